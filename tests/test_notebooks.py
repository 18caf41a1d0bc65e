"""The notebooks of docs/ run, and what they print holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPO / "docs" / "notebooks").glob("*.ipynb"))


def read_cells(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return cells


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def texts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Name of a notebook, and what it printed."""
    pytest.importorskip("nbclient", reason="nbclient is not installed; `pip install '.[dev]'` installs it")
    from tools.run_notebooks import list_texts, run_notebook

    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPO))
        patch.setenv("OMP_NUM_THREADS", "1")
        # Nothing is written to the home of the person who runs the tests.
        for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        notebook = run_notebook(request.param, folder)
    return request.param.stem, "".join(list_texts(notebook))


@pytest.mark.slow
def test_a_notebook_runs_and_its_trees_are_good(texts: tuple[str, str]) -> None:
    name, text = texts
    scores = [float(value) for value in re.findall(r"'f1': ([\d.]+)", text)]
    if name == "trace_and_look":
        assert len(scores) == 1
        assert "True" in text
    else:
        assert len(scores) == 2
        assert text.count("exit code 0") == 2
    assert min(scores) > 0.7


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs(path: Path) -> None:
    code = [cell for cell in read_cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code), "run `python -m tools.run_notebooks` and commit the notebooks"
    assert path.stat().st_size < 250_000
    # No path of the machine on which it ran.
    assert not re.search(r"/(home|root|tmp|work)/", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    text = "".join("".join(cell["source"]) for cell in read_cells(path) if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (path.parent / target).exists(), target
