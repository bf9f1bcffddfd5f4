"""Executing notebooks in a fresh kernel, and writing them without traces of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import METADATA


def execute(path: Path) -> Any:
    """Run a notebook from its folder, in a kernel of its own, and give it with new outputs.

    Raises:
        CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    return cleaned(notebook)


def cleaned(notebook: Any) -> Any:
    """Leave nothing in the metadata that another machine would write in another way."""
    notebook.metadata.clear()
    notebook.metadata.update(METADATA)
    for i, cell in enumerate(notebook.cells):
        cell.metadata.clear()
        cell["id"] = f"cell-{i}"
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output["metadata"].clear()
    return notebook


def write(notebook: Any, path: Path) -> None:
    """Write a notebook."""
    import nbformat

    nbformat.validate(notebook)
    nbformat.write(notebook, path)
