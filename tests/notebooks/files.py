"""Notebook files: where they are, and what in them is text that another run must print again."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}

_NUMBER = re.compile(r"[-−+]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?")


def read(path: Path) -> dict[str, Any]:
    """Read a notebook as it lies in the file."""
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Give the cells that run."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def joined(text: str | list[str]) -> str:
    """Join what the format stores as a text or as its lines."""
    return text if isinstance(text, str) else "".join(text)


def texts(cell: dict[str, Any]) -> list[str]:
    """Give what a cell printed and returned as text; images and figures are not compared."""
    found = ""
    others: list[str] = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            found += joined(output["text"])
        elif "text/markdown" in output.get("data", {}):
            others.append(joined(output["data"]["text/markdown"]))
        elif "text/plain" in output.get("data", {}):
            others.append(joined(output["data"]["text/plain"]))
    return [text for text in (found, *others) if text]


def n_figures(cell: dict[str, Any]) -> int:
    """Count the plotly figures a cell shows."""
    return sum(
        "application/vnd.plotly.v1+json" in output.get("data", {}) for output in cell["outputs"]
    )


def same_text(one: str, other: str, *, relative: float = 0.02, absolute: float = 0.011) -> bool:
    """Whether two texts differ at most in their numbers, and those by little.

    The absolute part is for numbers as printed, where the last of two decimals may be rounded
    the other way.
    """
    if _words(one) != _words(other):
        return False
    numbers = zip(_numbers(one), _numbers(other), strict=True)
    return all(math.isclose(a, b, rel_tol=relative, abs_tol=absolute) for a, b in numbers)


def _words(text: str) -> list[str]:
    return re.sub(r"[-─]{3,}", "-", _NUMBER.sub("#", text)).split()


def _numbers(text: str) -> list[float]:
    return [float(n.replace("−", "-").replace(",", "")) for n in _NUMBER.findall(text)]
