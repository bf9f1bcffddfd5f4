"""What the scripts that write results pages share: tables as Markdown, sections, and figures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ra_lens.files import write_whole


def markdown(table: pd.DataFrame) -> str:
    """A table of texts as Markdown; its index is the first column."""
    head = ["", *map(str, table.columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in zip(table.index, table.to_numpy().tolist(), strict=True):
        cells = ["–" if pd.isna(cell) else str(cell) for cell in row]
        lines.append("| " + " | ".join([str(name), *cells]) + " |")
    return "\n".join(lines)


def share(value: float) -> str:
    """A share or another number with two digits, without a zero in front."""
    return re.sub(r"\b0\.", ".", f"{value:.2f}").replace("-", "−")


def interval(row: Any, mean: str = "mean") -> str:
    """A mean with its interval, which are columns `low` and `high`, or `mean_low` and so on."""
    if pd.isna(row[mean]):
        return "–"
    ends = f"{mean}_" if f"{mean}_low" in row else ""
    return f"{share(row[mean])} [{share(row[f'{ends}low'])}, {share(row[f'{ends}high'])}]"


def examples(n: Any) -> str:
    """Name a number of examples."""
    return f"{n} example" if n == 1 else f"{n} examples"


def draw(document: Path, figures: Mapping[str, Any], scale: float = 1.25) -> None:
    """Write figures beside a document, each as `name.png`."""
    folder = document.parent / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.write_image(folder / f"{name}.png", scale=scale)


def refresh(document: Path, sections: dict[str, str]) -> None:
    """Put new text between the marks of each section of the document."""
    text = document.read_text(encoding="utf-8")
    for name, new in sections.items():
        pattern = re.compile(f"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, new=new: f"{match[1]}{new}\n{match[2]}", text)
        if found != 1:
            raise SystemExit(f"{document} has no section {name!r}")
    write_whole(document, text)
