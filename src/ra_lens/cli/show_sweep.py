"""Patching sweeps in a terminal and as JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from rich.text import Text

from ra_lens.cli.tables import (
    METRIC_COLUMNS,
    answer_columns,
    mean_of,
    new_console,
    new_table,
    number,
    print_facts,
    print_files,
    records,
)
from ra_lens.figures.style import metric_name
from ra_lens.tables import table_rows
from ra_lens.text import scale_name, shots_name

_MAPS = {"ra": "RA", "pattern": "FA"}
_PAPER_SCALE = {"ra": -30.0, "pattern": 1.0}


def print_sweep(frame: pd.DataFrame, *, metric: str, out: Path | None, figure: Path | None) -> None:
    """Print accuracy unpatched and patched, at the paper's scales and at the best ones."""
    console = new_console()
    rows, shots = table_rows(frame), sorted({int(n) for n in frame["n_shots"]})
    columns = _columns(frame)
    console.print(Text(f"Attention patching: {metric_name(frame, metric)}", style="bold"))
    unpatched: Any = frame[frame["map"] == "none"]
    beside = f"unpatched {'/'.join(map(str, shots))}"
    for n in shots:
        table = new_table(f"{shots_name(n)}, patched", "", beside, *columns)
        for row, tasks in rows.items():
            if not tasks:
                table.add_section()
                continue
            part: Any = frame[(frame["n_shots"] == n) & frame["task"].isin(tasks)]
            plainly = [number(mean_of(unpatched, metric, m, tasks), metric) for m in shots]
            cells = [_cell(part, metric, kind, scale) for kind, scale in columns.values()]
            table.add_row(Text(row), "/".join(plainly), *cells)
        console.print(table)
        console.print("")
    console.print(Text(f"{beside}: without a map, with so many shots.", style="dim"))
    if any(scale is None for _, scale in columns.values()):
        note = "best: the scale that is best on these same test questions."
        console.print(Text(note, style="dim"))
    print_files(console, out, figure)


def print_sweep_json(
    frame: pd.DataFrame, *, metric: str, out: Path | None, figure: Path | None
) -> None:
    """Print every cell of a sweep as JSON, and the means over the tasks."""
    cell = ["n_shots", "map", "scale"]
    means = frame.groupby(cell, sort=False, dropna=False).agg(
        **{metric: (metric, "mean")}, tasks=("task", "nunique")
    )
    columns = ["task", "kind", *cell, *METRIC_COLUMNS, "n_test", "n_tokens", *answer_columns(frame)]
    facts = {
        "metric": metric,
        "cells": records(frame[columns]),
        "means": records(means.reset_index()),
    }
    print_facts(frame, facts, out, figure)


def _columns(frame: Any) -> dict[str, tuple[str, float | None]]:
    """Name the columns: all scales where they are few, else the paper's and the best."""
    columns: dict[str, tuple[str, float | None]] = {}
    for kind, name in _MAPS.items():
        scales = sorted({float(s) for s in frame[frame["map"] == kind]["scale"]})
        if not scales:
            continue
        few = len(scales) <= 3
        shown = scales if few else [s for s in scales if s == _PAPER_SCALE[kind]]
        columns |= {f"{name} {scale_name(s)}": (kind, s) for s in shown}
        if not few:
            columns[f"{name} best"] = (kind, None)
    return columns


def _cell(part: Any, metric: str, kind: str, scale: float | None) -> str:
    means = part[part["map"] == kind].groupby("scale")[metric].mean()
    if scale is not None:
        return number(means.get(scale, math.nan), metric)
    if means.empty:
        return ""
    # Of several best scales, the one nearest to none.
    best = min(means[means >= means.max() - 1e-9].index, key=abs)
    return f"{number(means[best], metric)} at {scale_name(best)}"
