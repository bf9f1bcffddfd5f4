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
        timeout=600,
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
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_widget(output)]
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output["metadata"].clear()
    return notebook


def _is_widget(output: Any) -> bool:
    """Whether it is a progress bar, whose state lives in the kernel only."""
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def write(notebook: Any, path: Path) -> None:
    """Write a notebook."""
    import nbformat

    nbformat.validate(notebook)
    nbformat.write(notebook, path)
