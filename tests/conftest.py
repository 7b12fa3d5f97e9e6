"""What all tests share. Runs before any test module: what it sets must be set before torch or armamba is imported."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `import armamba` works from any folder
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin on a shared machine
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # runs Triton's kernels on the CPU


def pytest_addoption(parser):
    parser.addoption("--submissions", type=Path, help="for grade.py: the folder of notebooks to grade")


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers, alone or with others."""
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """The folder of large reference files, which are not part of the repository; without it the test is skipped."""
    named = os.environ.get("ARMAMBA_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    if not folder.is_dir():
        assert not named, f"ARMAMBA_SHARED names {named}, which is not a folder"
        pytest.skip("no reference files: set ARMAMBA_SHARED to their folder")
    return folder


def have(found: bool, reason: str) -> None:
    """Skip, or with ARMAMBA_REQUIRE_KERNEL=1 fail, where something for GPUs is not there."""
    if not found:
        (pytest.fail if os.environ.get("ARMAMBA_REQUIRE_KERNEL") == "1" else pytest.skip)(reason)


@pytest.fixture
def cuda(monkeypatch) -> str:
    """A GPU, with products in full fp32."""
    have(torch.cuda.is_available(), "no CUDA GPU")
    for part in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(part, "allow_tf32", False)
    return "cuda"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """For what must hold on the CPU and on a GPU."""
    return request.param if request.param == "cpu" else request.getfixturevalue("cuda")
