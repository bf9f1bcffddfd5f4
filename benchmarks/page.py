"""docs/performance.md from what was measured."""

from __future__ import annotations

import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ra_lens.files import write_whole


def write(tables: dict[str, dict[str, Any]], path: Path) -> None:
    """Put the tables between their marks on the page."""
    text = path.read_text(encoding="utf-8")
    parts = {"machine": f"Measured with {tables['machine']['how']}.\n"}
    for name, table in tables.items():
        if name != "machine":
            rows = "\n" + shown(table) if table["rows"] else ""
            parts[name] = f"## {table['title']}\n\n{table['how']}\n{rows}"
    for name, part in parts.items():
        between = re.compile(f"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.S)
        text = between.sub(lambda found, part=part: f"{found[1]}{part}{found[2]}", text)
    write_whole(path, text)


def write_json(tables: dict[str, dict[str, Any]], path: Path) -> None:
    """Keep what was measured."""
    write_whole(path, json.dumps(tables, indent=1, ensure_ascii=False) + "\n")


def described() -> str:
    """Versions and machine."""
    names = ("torch", "transformer-lens", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    threads = torch.get_num_threads()
    return (
        f"Python {platform.python_version()}, {versions}, {threads} threads, {platform.machine()}"
    )


def shown(table: dict[str, Any]) -> str:
    """A table as the page has it."""
    head = "| " + " | ".join(table["columns"]) + " |\n" + "|---" * len(table["columns"]) + "|\n"
    rows = ["| " + " | ".join(map(cell, row)) + " |\n" for row in table["rows"]]
    return head + "".join(rows)


def cell(value: object) -> str:
    """A value as it is shown."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.2f}"
