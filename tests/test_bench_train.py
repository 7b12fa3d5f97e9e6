"""bench_train.py and bench_loader.py: FLOP by hand, arithmetic, and that they run the code that they say they do."""

import json
import math
from collections import Counter
from pathlib import Path

import bench_scan  # first, for the reason that bench_train gives
import bench_train
import pytest
import torch
from bench_loader import cores

import armamba
import finetune
import train

DATA = Path(__file__).parent / "data"
DOCUMENTED = {"base": 76, "large": 233, "huge": 506}  # GFLOP per image of pretraining: 6 per multiply-add forward


@pytest.mark.parametrize("variant", DOCUMENTED)
def test_flops_of_pretraining_are_the_documented_ones(variant):
    assert bench_train.flops(variant, "pretrain") / 1e9 == pytest.approx(DOCUMENTED[variant], rel=0.03)


def test_flops_by_hand():
    """Every multiply-add of micro is two FLOP, three times, but for pixels, which need no gradient."""
    d, depth, n, r, hidden, pixels, dec = 64, 4, 16, 4, 170, 16 * 16 * 3, 64

    def block(tokens, directions):
        mixer = d * 2 * d + d * d + directions * (d * (r + 2 * n) + r * d + 4 * d * n)  # 4: the scan's
        return tokens * (mixer + 3 * d * hidden)

    decoder = 128 * (4 * dec * dec + 2 * dec * 4 * dec + 2 * 128 * dec)  # q, k, v, out; MLP; attention
    rest = depth * block(128, 1) + 128 * (2 * d) * (2 * dec) + 2 * decoder + 128 * dec * pixels
    assert bench_train.flops("micro", "pretrain") == 2 * (2 * 144 * pixels * d + 3 * rest)
    rest = depth * block(197, 4) + d * 1000
    assert bench_train.flops("micro", "finetune") == 2 * (2 * 196 * pixels * d + 3 * rest)


@pytest.fixture
def calls(monkeypatch):
    """Records each scan call's (backend, groups)."""
    found, scan = [], armamba.selective_scan

    def record(u, delta, A, B, C, D=None, backend="auto", **flags):
        found.append((backend, B.shape[1]))
        return scan(u, delta, A, B, C, D, backend="torch", **flags)  # the fastest

    monkeypatch.setattr(armamba, "selective_scan", record)
    return found


def run(tmp_path, *flags):
    path = tmp_path / "result.json"
    bench_train.main(["--quick", "--device", "cpu", "--threads", "1", "--json", str(path), *flags])
    return json.loads(path.read_text())


def test_quick_run_uses_what_it_says(tmp_path, calls):
    """Both stages, from end to end; every row's numbers; and which scans a row's steps call."""
    report = run(tmp_path, "--backends", "torch", "ref", "--grad-checkpoint", "--split")
    rows, depth = report["steps"], 4
    ways = {stage: [(x["scan"], x["change"]) for x in rows if x["stage"] == stage] for stage in bench_train.SCRIPTS}
    changes = ["", "grad_checkpoint", "split"]
    assert ways["pretrain"] == [(scan, change) for scan in ("torch", "ref") for change in changes[:2]]
    assert ways["finetune"] == [(scan, change) for scan in ("torch", "ref") for change in changes]
    for row in rows:
        numbers = [x for x in row.values() if isinstance(x, float)]
        assert len(numbers) == 9 and all(math.isfinite(x) and x > 0 for x in numbers)
        assert row["min"] <= row["ms"] <= row["max"]
        assert row["images_per_s"] == pytest.approx(1000 * row["batch"] / row["ms"])
        flops = bench_train.flops("micro", row["stage"])
        assert row["tflop_per_s"] == pytest.approx(row["images_per_s"] * flops / 1e12)
    assert [row["x_first"] for row in rows if (row["scan"], row["change"]) == ("torch", "")] == [1, 1]

    # a row takes 4 steps (warm-up, memory, 2 timed), in which recomputed blocks scan twice
    both, split = depth * 4 * (1 + 2), depth * 4 * 4
    found = Counter(x for x in calls if x[0] != "auto")  # auto: from counting FLOP
    for scan in ("torch", "ref"):
        assert (found[scan, 1], found[scan, 4]) == (both + split, both)  # pretraining and split rows; finetuning


def test_profile_of_the_first_row_that_fits(tmp_path, monkeypatch):
    scan = armamba.selective_scan

    def greedy(*x, backend="auto", **flags):
        if backend == "ref":
            raise torch.OutOfMemoryError
        return scan(*x, backend=backend, **flags)

    monkeypatch.setattr(armamba, "selective_scan", greedy)
    report = run(tmp_path, "--stage", "pretrain", "--profile", "--backends", "ref", "torch")
    assert report["steps"][0]["loss"] == "OutOfMemoryError" and "ms" not in report["steps"][0]
    assert report["steps"][1]["x_first"] == 1
    *rows, rest = report["profile of pretrain"]
    shares = [row["share"] for row in rows]
    assert (
        len(rows) == 15 and shares == sorted(shares, reverse=True) and sum(shares) + rest["share"] == pytest.approx(1)
    )
    assert {row["operator"]: row["calls"] for row in rows}["armamba::fast_scan_backward"] == 4  # blocks, one step


def test_the_steps_are_the_recipes():
    args, model, _, optimizer, ema = bench_train.prepared("finetune", "base", "--device", "cpu", "--depth", 2)
    assert (args.layer_decay, args.drop_path, args.mixup, args.cutmix, args.clip_grad) == (0.65, 0.1, 0.8, 1.0, 0.0)
    assert model.training and ema is not None and min(x["lr_scale"] for x in optimizer.param_groups) == 0.65**3
    args, model, _, optimizer, ema = bench_train.prepared("pretrain", "base", "--device", "cpu", "--depth", 4)
    assert (args.clip_grad, args.batch_size, args.image_size) == (3.0, 2048, (192, 192)) and ema is None
    assert isinstance(model, armamba.ARM) and optimizer.defaults["fused"] and optimizer.defaults["betas"] == (0.9, 0.95)


def test_loader(monkeypatch, tmp_path):
    """From JPEGs to batches; the augmentations are the stage's own."""
    assert [cores(4000, rate) for rate in (250, 249, 4000, 5000)] == [16, 17, 1, 1]
    used = []
    for module, name in ((train, "random_crop"), (finetune, "augmentation")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, f=function, name=name: used.append(name) or f(*x))
    rows = run(tmp_path, "--loader", "--workers", "1", "--rate", "100", "4000")["loader"]
    order = [(row["stage"], row["workers"]) for row in rows]
    assert order == [("pretrain", 0), ("pretrain", 1), ("finetune", 0), ("finetune", 1)]
    assert used == 2 * ["random_crop"] + 2 * ["augmentation", "random_crop"]
    for row in rows:
        assert 0 < row["min"] <= row["images_per_s"] <= row["max"] < math.inf and 80 < row["kilobytes"] < 140
    for row in rows[::2]:
        assert row["cores_for_4000"] == math.ceil(4000 / row["images_per_s"]) >= row["cores_for_100"] >= 1


def test_the_readmes_gpu_tables_are_those_of_the_results(tmp_path):
    readme = Path(bench_train.__file__).parents[1].joinpath("README.md").read_text()
    rows = run(tmp_path, "--cost", "300", *map(str, sorted(DATA.glob("h200/*.json"))))["cost"]
    lines = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    assert len(rows) == 6 and all(f"| {' | '.join(line)} |\n" in readme for line in lines)
    steps = [row for path in DATA.glob("h200/*.json") for row in json.loads(path.read_text())["steps"]]
    start, end = (
        "| {variant} | {stage} | {batch} | {scan} | {change} |",
        " {images_per_s:.0f} | {memory_gib:.1f} | {tflop_per_s:.0f} |",
    )
    assert len(steps) == 16 and all((start + end + "\n").format(**row) in readme for row in steps)
    scans = json.loads((DATA / "h200_scan.json").read_text())["scans"]
    scans.sort(key=lambda row: list(bench_scan.SHAPES).index(row["shape"]))
    assert bench_scan.summary(scans) in readme


def test_cost(tmp_path):
    """Estimated where nothing was measured on a GPU."""
    report = {
        "environment": {"gpu": "one"},
        "steps": [{"variant": "base", "stage": "pretrain", "loss": "OutOfMemoryError"}],
    }
    for rate in (2000.0, 4000.0, 3000.0):
        report["steps"].append({"variant": "base", "stage": "pretrain", "images_per_s": rate, "ms": 1.0})
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(report))
    base, huge = (run(tmp_path, "--cost", "200", str(path), "--stage", "pretrain")["cost"][i] for i in (0, 2))
    assert base["images/s, 1 GPU"] == "4000 (measured)" and base["hours, 8 GPUs"].endswith("(estimated)")
    assert base["hours, 1 GPU"] == f"{1600 * 1_281_167 / 4000 / 3600:.0f} (estimated)"
    hours = 800 * 1_281_167 * bench_train.flops("huge", "pretrain") / 200e12 / 3600
    assert (
        huge["hours, 1 GPU"] == f"{hours:.0f} (estimated)" and huge["hours, 8 GPUs"] == f"{hours / 8:.1f} (estimated)"
    )
    path.write_text(json.dumps(report | {"environment": {"gpu": None}}))
    with pytest.raises(ValueError, match="CPU"):
        run(tmp_path, "--cost", str(path))
