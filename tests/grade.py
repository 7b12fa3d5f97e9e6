"""Grade notebooks that students hand in: one test for each file and exercise, in a JUnit file for the course's records.

    pytest tests/grade.py --submissions FOLDER --junitxml grades.xml

FOLDER, or a folder for each student below it, holds notebooks whose names contain the original's, such as
ada-02_selective_scan.ipynb; others fail. Each is run from top to bottom, cells that fail included, a cell for at most
two minutes, and then meets this repository's checks, whatever became of its own. Handed-in code runs with your rights,
and could outwit a check: use a container, and look at surprising marks.
"""

import functools
import os

import nbclient
import nbformat
import pytest
from test_notebooks import NOTEBOOKS, ROOT, read, tagged

SECONDS = int(os.environ.get("ARMAMBA_GRADE_SECONDS", 120))  # that a cell may take


def original(path):
    """The notebook that a handed-in one is made from, or None."""
    return next((notebook for notebook in NOTEBOOKS if notebook.stem in path.stem), None)


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--submissions")
    if folder is None or not folder.is_dir():
        raise pytest.UsageError(f"give --submissions FOLDER, with the notebooks to grade; not {folder}")
    paths = sorted(path for path in folder.rglob("[!.]*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    if not any(map(original, paths)):
        raise pytest.UsageError(f"{folder} holds no notebook named like those in notebooks/")
    cases = [
        (path, name) for path in paths for name in (tagged(read(original(path)), "check") if original(path) else [""])
    ]
    ids = [f"{path.relative_to(folder).with_suffix('')}:{name}" for path, name in cases]
    metafunc.parametrize("path, name", cases, ids=ids, scope="session")


def run(path) -> dict[str, str]:
    """Of each exercise, "" if it passed, or else what its check printed or raised."""
    checks = tagged(read(original(path)), "check")
    try:
        notebook = read(path)
        notebook.metadata.pop("kernelspec", None)  # the student's environment may have had another name
        find = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport checks\n"
        notebook.cells += [nbformat.v4.new_code_cell(find + cell.source) for cell in checks.values()]
        options = dict(timeout=SECONDS, interrupt_on_timeout=True, allow_errors=True)
        resources = {"metadata": {"path": str(ROOT / "notebooks")}}
        nbclient.NotebookClient(notebook, resources=resources, **options).execute()
    except Exception as error:  # no notebook at all, or one that has ended its kernel
        return dict.fromkeys(checks, f"{type(error).__name__}: {error}".splitlines()[0])
    found = {}
    for name, cell in zip(checks, notebook.cells[-len(checks) :]):
        errors = [f"{out.ename}: {out.evalue}" for out in cell.outputs if out.output_type == "error"]
        errors = [e.replace("KeyboardInterrupt: ", f"it takes longer than {SECONDS} s") for e in errors]
        printed = "".join(out.text for out in cell.outputs if out.get("name") == "stdout").split("\n")[-2:-1]
        found[name] = "" if not errors and printed == [f"{name}: passed"] else "".join(errors or printed) or "no answer"
    return found


@pytest.fixture(scope="session")
def marks():
    """path -> run(path), each notebook run once."""
    os.environ["ARMAMBA_TEST"] = "1"  # the notebooks' own runs are cut short
    return functools.cache(run)


def test_exercise(marks, path, name):
    if not name:
        pytest.fail(f"{path.name} has no notebook's name in its own, such as {NOTEBOOKS[0].stem}", pytrace=False)
    if wrong := marks(path)[name]:
        pytest.fail(wrong, pytrace=False)
