"""What the tables and JSON of all experiments share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ra_lens.text import short

METRIC_COLUMNS = ["top1", "top2", "top3", "logit_diff"]
_VARY = {"experiment", "task", "kind", "n_shots", "method", "direction", "draw", "share", "score",
         "heads_kept", "map", "scale", "layer", "head", "label", "rank", "prompts_hash", "n_test",
         "n_tokens", "n_first_tokens", *METRIC_COLUMNS}  # fmt: skip


def answer_columns(frame: Any) -> list[str]:
    """The column that tells how many answers begin alike; files of earlier versions lack it."""
    return ["n_first_tokens"] if "n_first_tokens" in frame else []


def groups(frame: Any, by: list[str]) -> list[tuple[Any, Any]]:
    """Divide a frame by some columns, in the order of its rows."""
    return list(frame.groupby(by, sort=False))


def mean_of(frame: Any, column: str, n: int, tasks: Sequence[str]) -> float:
    """Give the mean over tasks with n shots; NaN where there are none."""
    part = frame[(frame["n_shots"] == n) & frame["task"].isin(list(tasks))]
    return float(part.groupby("task")[column].mean().mean()) if len(part) else math.nan


def number(value: float, metric: str) -> str:
    """Write a value in few characters; nothing for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.2f}" if metric == "logit_diff" else short(value)


def records(frame: Any) -> list[dict[str, Any]]:
    """Give the rows of a frame as JSON has them: NaN is null."""
    return [
        {str(name): _json_value(value) for name, value in row.items()}
        for row in frame.to_dict("records")
    ]


def _json_value(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_facts(
    frame: Any, facts: Mapping[str, Any], out: Path | None, figure: Path | None
) -> None:
    """Print an experiment as one JSON object: how it was made, and what it gave."""
    settings = {
        str(name): _json_value(frame[name].iloc[0])
        for name in frame
        if name not in _VARY and frame[name].nunique(dropna=False) == 1
    }
    echo(
        {
            "experiment": frame["experiment"].iloc[0],
            **settings,
            "tasks": list(dict.fromkeys(frame["task"].astype(str))),
            "shots": sorted({int(n) for n in frame["n_shots"]}),
            **facts,
            "out": None if out is None else str(out),
            "figure": None if figure is None else str(figure),
        }
    )


def echo(facts: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    typer.echo(json.dumps(facts, indent=2, allow_nan=False))


def new_console() -> Console:
    """Give a console that takes text as it is."""
    return Console(highlight=False, markup=False)


def print_files(console: Console, out: Path | None, figure: Path | None) -> None:
    """Say which files were written."""
    for name, path in (("Results", out), ("Figure", figure)):
        if path is not None:
            console.print(f"{name}: {path}", soft_wrap=True)


def new_table(title: str, *columns: str) -> Table:
    """Make a table; numbers stand to the right."""
    table = Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
    )
    words = ("", "method", "heads", "task", "order", "as")
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right")
    return table
