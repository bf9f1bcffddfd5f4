"""Measure and write it down: `python -m benchmarks`, or with the names of some tables."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import page

DOCS = Path(__file__).parents[1] / "docs"
NAMES = (
    "engine",
    "overhead",
    "peers",
    "memory",
    "recompute",
    "long_prompts",
    "vectors",
    "mediation",
    "perturbation",
    "knockouts",
    "demonstrations",
    "growth",
    "startup",
    "gpu",
)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Which; default: all.")] = None,
    rounds: Annotated[int, typer.Option(help="Measurements of each route.")] = 7,
    quick: Annotated[bool, typer.Option(help="Tiny shapes, to see that it runs.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads; default: torch's own.")] = None,
    folder: Annotated[Path, typer.Option(help="Of performance.json and performance.md.")] = DOCS,
) -> None:
    """Print each table, keep it beside the others in performance.json, and renew the page."""
    unknown = sorted(set(names or ()) - set(NAMES))
    if unknown:
        raise typer.BadParameter(f"found {unknown[0]!r}; there are {', '.join(NAMES)}.")
    if threads is not None:
        torch.set_num_threads(threads)
    out, shown_on = folder / "performance.json", folder / "performance.md"
    kept = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    kept["machine"] = {"how": page.described()}
    for name in names or NAMES:
        kept[name] = importlib.import_module(f"benchmarks.{name}").measure(
            rounds=rounds, quick=quick
        )
        shown = Table(*kept[name]["columns"], title=kept[name]["title"])
        for row in kept[name]["rows"]:
            shown.add_row(*map(page.cell, row))
        Console().print(shown)
        page.write_json(kept, out)
        if shown_on.exists():
            page.write(kept, shown_on)


if __name__ == "__main__":
    typer.run(main)
