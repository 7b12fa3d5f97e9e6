"""Grade notebooks that students hand in: one test for each file and exercise, in a JUnit file for the course's records.

    pytest tests/grade.py --submissions FOLDER --junitxml grades.xml

FOLDER holds notebooks whose names contain the original's, such as ada-02_selective_scan.ipynb. Each is run from top to
bottom, cells that fail included, and then meets this repository's checks, whatever became of its own. Handed-in code
runs with your rights, and could outwit a check: use a container, and look at surprising marks.
"""

import os

import nbclient
import nbformat
import pytest
from test_notebooks import NOTEBOOKS, ROOT, read, tagged


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--submissions")
    if folder is None:
        raise pytest.UsageError("give --submissions FOLDER, with the notebooks to grade")
    cases = [
        (path, name)
        for path in sorted(folder.glob("*.ipynb"))
        for original in NOTEBOOKS
        if original.stem in path.stem
        for name in tagged(read(original), "check")
    ]
    if not cases:
        raise pytest.UsageError(f"{folder} holds no notebook named like those in notebooks/")
    metafunc.parametrize("path, name", cases, ids=[f"{path.stem}:{name}" for path, name in cases], scope="session")


@pytest.fixture(scope="session")
def marks():
    """(path, exercise) -> what its check printed, or the last line of its error; each notebook is run once."""
    known = {}

    def get(path, name):
        if (path, name) not in known:
            notebook = read(path)
            original = next(original for original in NOTEBOOKS if original.stem in path.stem)
            checks = tagged(read(original), "check")
            find = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport checks\n"
            notebook.cells += [nbformat.v4.new_code_cell(find + cell.source) for cell in checks.values()]
            os.environ["ARMAMBA_TEST"] = "1"  # the notebooks' own runs are cut short
            resources = {"metadata": {"path": str(ROOT / "notebooks")}}
            nbclient.NotebookClient(notebook, timeout=600, allow_errors=True, resources=resources).execute()
            for exercise, cell in zip(checks, notebook.cells[-len(checks) :]):
                texts = [out.get("text") or f"{out.get('ename')}: {out.get('evalue')}" for out in cell.outputs]
                known[path, exercise] = "".join(texts).strip()
        return known[path, name]

    return get


def test_exercise(marks, path, name):
    mark = marks(path, name)
    if mark != f"{name}: passed":
        pytest.fail(mark, pytrace=False)
