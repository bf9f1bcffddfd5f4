"""What the scripts that write results pages share: tables as Markdown, and a page's sections."""

from __future__ import annotations

import re
from pathlib import Path

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


def refresh(document: Path, sections: dict[str, str]) -> None:
    """Put new text between the marks of each section of the document."""
    text = document.read_text(encoding="utf-8")
    for name, new in sections.items():
        pattern = re.compile(f"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, new=new: f"{match[1]}{new}\n{match[2]}", text)
        if found != 1:
            raise SystemExit(f"{document} has no section {name!r}")
    write_whole(document, text)
