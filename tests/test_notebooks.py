"""Every notebook: its form, a run as a student (nothing solved) and a run with the solutions moved into their stubs.

The wrong answers that the checks must catch are in test_checks.py; grading hand-ins is grade.py's.
"""

import base64
import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def tagged(notebook, tag: str) -> dict:
    """The notebook's cells with this tag, by the name of their exercise."""
    return {c.metadata["exercise"]: c for c in notebook.cells if tag in c.metadata.get("tags", [])}


def solution(cell) -> str:
    """The code in a collapsed solution."""
    return re.search(r"```python\n(.*?)```", cell.source, re.DOTALL)[1]


def with_solutions(notebook):
    """A copy with every stub replaced by its solution."""
    notebook = copy.deepcopy(notebook)
    solutions = tagged(notebook, "solution")
    for name, cell in tagged(notebook, "exercise").items():
        cell.source = solution(solutions[name])
    return notebook


def execute(notebook, folder: Path) -> dict[str, str]:
    """Run a notebook in a folder; returns what the check of each exercise printed."""
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()
    checks = tagged(notebook, "check")
    return {name: "".join(out.get("text", "") for out in cell.outputs) for name, cell in checks.items()}


@each
def test_form(path):
    notebook, text = read(path), path.read_text()
    assert len(text) < 500_000, "outputs are too large"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "not one clean run"
    assert not any(out.output_type == "error" for cell in code for out in cell.outputs)
    assert "tqdm.auto" not in text and "/root/" not in text and "/tmp/" not in text
    stubs, checks, solutions = (tagged(notebook, tag) for tag in ("exercise", "check", "solution"))
    assert 2 <= len(stubs) <= 4 and stubs.keys() == checks.keys() == solutions.keys()
    for name, stub in stubs.items():
        assert "raise NotImplementedError" in stub.source
        assert "".join(out.text for out in checks[name].outputs) == f"{name}: not implemented yet\n"
        assert "<details>" in solutions[name].source and solution(solutions[name])
        assert re.search(r"checks\.(\w+)\(", checks[name].source)[1] == name


@each
def test_readme_lists_its_exercises(path):
    readme, notebook = (ROOT / "README.md").read_text(), read(path)
    (line,) = [line for line in readme.splitlines() if line.startswith(f"| `{path.stem}` |")]
    minutes = [int(x) for cell in notebook.cells for x in re.findall(r"### Exercise \d.*?(\d+) minutes", cell.source)]
    exercises = dict(zip(tagged(notebook, "exercise"), minutes, strict=True))
    assert line.split("|")[3].strip() == ", ".join(f"`{name}` {n}" for name, n in exercises.items())


def test_the_figure_of_the_method_is_the_notebooks():
    notebook = read(ROOT / "notebooks" / "04_autoregressive_objective.ipynb")
    (cell,) = [cell for cell in notebook.cells if "def method_figure" in cell.source and cell.cell_type == "code"]
    (picture,) = [out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})]
    assert base64.b64decode(picture) == (ROOT / "notebooks" / "method.png").read_bytes(), "export it again"


@pytest.mark.slow
@each
@pytest.mark.parametrize("who", ["student", "solved"])
def test_runs(path, who, tmp_path, monkeypatch):
    """As a student from the notebooks' folder, solved from the repository's root; in test mode, which cuts steps."""
    monkeypatch.setenv("ARMAMBA_TEST", "1")
    notebook = read(path) if who == "student" else with_solutions(read(path))
    printed = execute(notebook, path.parent if who == "student" else ROOT)
    verdict = "not implemented yet" if who == "student" else "passed"
    assert printed == {name: f"{name}: {verdict}\n" for name in printed}


@pytest.mark.parametrize("path", NOTEBOOKS[:1], ids=lambda path: path.stem)
def test_handing_out_leaves_no_solution(path, tmp_path):
    """The README's command for teachers."""
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "nbconvert",
        "--to",
        "notebook",
        str(path),
        "--output-dir",
        str(tmp_path),
    ]
    command += ["--TagRemovePreprocessor.enabled=True", "--TagRemovePreprocessor.remove_cell_tags=solution"]
    subprocess.run(command, check=True, capture_output=True)
    out = json.loads((tmp_path / path.name).read_text())
    assert not any("solution" in cell["metadata"].get("tags", []) for cell in out["cells"])
    assert any("exercise" in cell["metadata"].get("tags", []) for cell in out["cells"])
    assert not any("<details>" in "".join(cell["source"]) for cell in out["cells"])


@pytest.mark.slow
def test_grading(tmp_path):
    """The README's command for teachers, on good and bad notebooks, files of another name, and no notebook."""
    path = NOTEBOOKS[0]
    original, solved = read(path), with_solutions(read(path))
    wrong = copy.deepcopy(solved)
    first, *others = tagged(wrong, "exercise")
    stub = tagged(original, "exercise")[first].source
    tagged(wrong, "exercise")[first].source = stub.replace("raise NotImplementedError", "return None")
    for cell in wrong.cells:  # some editors drop what a cell is tagged with
        cell.metadata = {}
    talks, loops, ends = copy.deepcopy(solved), copy.deepcopy(solved), copy.deepcopy(solved)
    tagged(talks, "exercise")[first].source += "\nmine = my_patchify"
    talk = "\ndef my_patchify(*x):\n    import warnings\n    warnings.warn('slow')\n    print(x)\n    return mine(*x)"
    tagged(talks, "exercise")[first].source += talk
    tagged(loops, "exercise")[first].source = stub.replace("raise NotImplementedError", "while True: pass")
    tagged(ends, "exercise")[first].source += "\nimport os; os._exit(0)"
    solved.metadata.kernelspec["name"] = "an-environment-of-her-own"
    students = dict(ada=solved, bob=original, cy=wrong, dan=talks, eve=loops, fay=ends)
    for student, notebook in students.items():
        (tmp_path / student).mkdir()
        nbformat.write(notebook, tmp_path / student / f"{student}-{path.name}")
    (tmp_path / "jan.ipynb").write_text("{}")
    (tmp_path / f"._ada-{path.name}").write_text("of a Mac's archive, and no notebook")
    (tmp_path / f"kim-{path.name}").write_text("no notebook")
    command = [sys.executable, "-m", "pytest", "tests/grade.py", "--submissions", str(tmp_path)]
    command += ["--junitxml", str(tmp_path / "grades.xml")]
    subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ | dict(ARMAMBA_GRADE_SECONDS="40"))
    cases = ElementTree.parse(tmp_path / "grades.xml").iter("testcase")
    marks = {case.get("name"): [child.get("message") for child in case] for case in cases}
    for name in (first, *others):
        found = {who: marks[f"test_exercise[{who}/{who}-{path.stem}:{name}]"] for who in students}
        assert found["ada"] == found["dan"] == []
        assert "not implemented yet" in found["bob"][0] and "DeadKernelError" in found["fay"][0]
        assert bool(found["cy"]) == bool(found["eve"]) == (name == first)
        assert "longer than 40 s" in found["eve"][0] if name == first else True
        assert "NotJSONError" in marks[f"test_exercise[kim-{path.stem}:{name}]"][0]
    assert not any("._ada" in case for case in marks)
    assert "jan.ipynb has no notebook's name" in marks["test_exercise[jan:]"][0]
