"""The notebooks of docs/notebooks, executed anew, with what their cells show.

python docs/notebooks.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent / "notebooks").glob("*.ipynb"))


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """A notebook after all its cells have run in a folder, in a process of their own.

    What they show names files as seen from the folder; what libraries warn of is left out.

    Raises:
        CellExecutionError: one of them failed.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, resources=resources, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # warnings of libraries, which name places of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    shown = nbformat.writes(notebook).replace(f"{folder}/", "").replace(str(folder), ".")
    return nbformat.reads(shown, as_version=4)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(path)
