"""Run the notebooks of docs/notebooks and write them with what they print and draw.

    python -m tools.run_notebooks            # needs the extra `dev`

Each runs in an empty temporary folder. Cells that fail stop the program.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from hpc_neuro.core import files

NOTEBOOKS = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
"""Folder of the notebooks."""
_CELL_SECONDS = 280
"""[s] A cell that takes longer is stopped."""


def main() -> int:
    """Run all notebooks and write them."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = run_notebook(path, Path(folder))
        files.write_text(path, nbformat.writes(notebook) + "\n")
        sys.stdout.write(f"{path}, {path.stat().st_size / 1000:.0f} kB\n")
    return 0


def run_notebook(path: Path, folder: Path) -> Any:
    """The notebook with the outputs of its cells, run in `folder`. Raises CellExecutionError for a cell that fails."""
    notebook = nbformat.read(path, as_version=4)

    client = NotebookClient(
        notebook,
        timeout=_CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    client.execute()

    # Progress and warnings of libraries differ from run to run and from machine to machine.
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]

    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def list_texts(notebook: Any) -> Iterator[str]:
    """What the cells of a notebook printed."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            yield from (output.text for output in cell.outputs if output.output_type == "stream")


if __name__ == "__main__":
    sys.exit(main())
