"""The notebooks under docs/notebooks: every cell runs on the quick start, and what is committed is small and clean.

The code runs without Jupyter, so that this needs no further package; where nbclient and a kernel are installed, it runs as
Jupyter does too. Both start where the cell tagged `parameters` (papermill's convention) is replaced by folders of the test and
one epoch a task.
"""

import contextlib
import io
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import pytest

import utils.config
from tests.helpers import LONG, ROOT

SHORT = """
import utils.config
whole = utils.config.load_config
utils.config.load_config = lambda *paths, **changes: whole(*paths, init_epoch=1, epochs=1, **changes)
"""  # instead of the quick start's ten epochs a task; the long form of the tests has those
BOOKS = [ROOT / "docs/notebooks/first_steps.ipynb", ROOT / "docs/notebooks/explore_a_run.ipynb"]  # in this order
KIB = 1024


def cells_of(path: Path, run: Path) -> list[dict[str, Any]]:
    """The cells, with the cell of parameters naming the folder `run`."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    (parameters,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert source(parameters).startswith('RUN = Path("runs/quickstart")')
    parameters["source"] = f"RUN = Path({str(run)!r})" + ("" if LONG else SHORT)
    return cells


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory) -> Path:
    """Where the first notebook makes the run that every later execution finds there."""
    return tmp_path_factory.mktemp("notebooks") / "quickstart"


def executed(path: Path, run: Path, monkeypatch) -> str:
    """Runs the code of a notebook in one namespace, from its own folder; returns what it printed."""
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(utils.config, "load_config", utils.config.load_config)  # comes back from what SHORT makes of it
    matplotlib.use("Agg")
    names, printed = {"__name__": "__main__"}, io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.filterwarnings("ignore", message=".*non-interactive")
        for number, cell in enumerate(cells_of(path, run)):
            if cell["cell_type"] == "code":
                exec(compile(source(cell), f"{path.name}, cell {number}", "exec"), names)
    names["plt"].close("all")
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_on_the_quick_start(path, quick_start, monkeypatch):
    if path != BOOKS[0] and not (quick_start / "results.json").exists():
        executed(BOOKS[0], quick_start, monkeypatch)
    printed = executed(path, quick_start, monkeypatch)
    result = json.loads((quick_start / "results.json").read_text())
    assert result["finished"] and len(result["tasks"]) == 5
    if path == BOOKS[0]:
        accuracy = f"{result['metrics']['last_accuracy']:.2f} %"
        assert f"{accuracy}; the record says {accuracy}" in printed
    else:
        assert "gives exactly the accuracy that the run recorded" in printed
        assert f"task 4: {'kept  ' if result['tasks'][4]['kept'] else 'pruned'}" in printed


@pytest.mark.slow
@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_they_run_in_jupyter(path, quick_start, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel to run notebooks as Jupyter does")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel to run notebooks as Jupyter does")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel to run notebooks as Jupyter does")
    if not (quick_start / "results.json").exists():
        executed(BOOKS[0], quick_start, monkeypatch)
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    for cell, changed in zip(book.cells, cells_of(path, quick_start), strict=True):
        cell["source"] = source(changed)
    place = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=place).execute()
    assert any("image/png" in output.get("data", {}) for cell in book.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_small_complete_and_names_no_machine(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 300 * KIB
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"] == []
    assert not re.search(r"/(home|root|tmp|usr|Users)/", text)


def test_links_in_the_text_lead_somewhere():
    for path in BOOKS:
        text = "\n".join(source(cell) for cell in cells_of(path, Path("x")) if cell["cell_type"] == "markdown")
        links = re.findall(r"\]\(([^)#]+)", text)
        assert links and [link for link in links if not os.path.exists(path.parent / link)] == []
