"""The notebooks run, and show what they showed when they were stored."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

import peft_graft.graft  # noqa: F401 - copies of this process need not import it
import processes

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_notebook_runs_and_shows_what_it_showed(name: str, tmp_path: Path) -> None:
    notebook = nbformat.read(DOCS / "notebooks" / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    process = processes.start(run, notebook, tmp_path / "work", out=tmp_path / "out", err=tmp_path / "err")
    process.join()
    said = (tmp_path / "out").read_text() + (tmp_path / "err").read_text()
    assert process.exitcode == 0, said
    assert any(level in said for level in ("useful", "strong", "exact"))


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in IPython, as kernels do, and in a copy of this process: kernels take longer to import things."""
    folder.mkdir()
    os.chdir(folder)
    os.environ["IPYTHONDIR"] = str(folder)
    shell = InteractiveShell()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            place = sys.stdout.tell()
            found = shell.run_cell(cell.source)
            found.raise_error()
            kinds = [output.output_type for output in cell.outputs]
            values = [set(output.data) for output in cell.outputs if "data" in output]
            assert values == ([] if found.result is None else [set(shell.display_formatter.format(found.result)[0])])
            assert bool(kinds) == (sys.stdout.tell() > place), f"run python docs/notebooks.py: {cell.source}"
