"""Rankings and perturbation tests in a terminal and as JSON.

Tables fit 80 columns: a cell of the perturbation test is `.39/.05`, an order and its reverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.text import Text

from ra_lens.cli.tables import (
    METRIC_COLUMNS,
    answer_columns,
    groups,
    mean_of,
    new_console,
    new_table,
    print_facts,
    print_files,
    records,
)
from ra_lens.figures.style import method_styles, metric_name
from ra_lens.tables import table_rows
from ra_lens.text import short, shots_name

# ---- rankings -----------------------------------------------------------------------------------


def print_ranking(frame: pd.DataFrame, *, top: int, out: Path | None) -> None:
    """Print the top heads of each task, number of shots and method."""
    console = new_console()
    for (task, n), part in groups(frame, ["task", "n_shots"]):
        table = new_table(f"{task}, {shots_name(int(n))}: top heads", "method", "heads")
        for method, style in method_styles(part["method"]).items():
            heads = _top(part[part["method"] == method], top)
            table.add_row(style.name, Text("  ".join(heads["label"])))
        console.print(table)
        console.print("")
    print_files(console, out, None)


def print_ranking_json(frame: pd.DataFrame, *, top: int, out: Path | None) -> None:
    """Print the top heads as JSON."""
    rankings = [
        {
            "task": task,
            "kind": part["kind"].iloc[0],
            "n_shots": int(n),
            "method": method,
            "heads": records(_top(part, top)[["rank", "layer", "head", "label", "score"]]),
        }
        for (task, n, method), part in groups(frame, ["task", "n_shots", "method"])
    ]
    print_facts(frame, {"rankings": rankings}, out, None)


def _top(part: Any, top: int) -> Any:
    return part.sort_values("rank").head(top)


# ---- perturbation test --------------------------------------------------------------------------


def print_areas(
    frame: pd.DataFrame,
    areas: pd.DataFrame,
    *,
    metric: str,
    out: Path | None,
    figure: Path | None,
) -> None:
    """Print the areas under the curves: rows are tasks, or numbers of shots of a single task."""
    console = new_console()
    title = f"Area under the perturbation curve: {metric_name(frame, metric)}"
    console.print(Text(title, style="bold"))
    rows, shots = table_rows(areas), sorted({int(n) for n in areas["n_shots"]})
    styles = method_styles(areas["method"])
    names = [style.name for style in styles.values()]
    if len(rows) == 1:
        tables = [
            (next(iter(rows)), {shots_name(n): (n, next(iter(rows.values()))) for n in shots})
        ]
    else:
        tables = [(shots_name(n), {row: (n, tasks) for row, tasks in rows.items()}) for n in shots]
    for title, lines in tables:
        table = new_table(title, "", *names, "all heads")
        for row, (n, tasks) in lines.items():
            if not tasks:
                table.add_section()
                continue
            cells = [_both(areas, method, n, tasks) for method in styles]
            best = _best(areas, list(styles), n, tasks)
            full = mean_of(frame[frame["share"] == 1.0], metric, n, tasks)
            table.add_row(
                Text(row),
                *[Text(cell, style="bold" if i in best else "") for i, cell in enumerate(cells)],
                short(full),
            )
        console.print(table)
        console.print("")
    draws = int(areas["draws"].max())
    random = f" Random: mean of {draws} orders." if draws > 1 else ""
    notes = f"Order / its reverse; bold: largest of the row.{random} all heads: no head masked."
    console.print(Text(notes, style="dim"))
    print_files(console, out, figure)


def print_areas_json(
    frame: pd.DataFrame,
    areas: pd.DataFrame,
    *,
    metric: str,
    rule: str,
    out: Path | None,
    figure: Path | None,
) -> None:
    """Print the areas and their means over the tasks as JSON."""
    cell = ["n_shots", "method", "direction"]
    means = areas.groupby(cell, sort=False).agg(auc=("auc", "mean"), tasks=("task", "nunique"))
    whole: Any = frame[frame["share"] == 1.0]
    columns = ["task", "kind", "n_shots", *METRIC_COLUMNS, *answer_columns(frame)]
    full = whole.drop_duplicates(["task", "n_shots"])[columns]
    facts = {
        "metric": metric,
        "auc_rule": rule,
        "auc": records(areas.drop(columns="model")),
        "means": records(means.reset_index()),
        "all_heads": records(full),
    }
    print_facts(frame, facts, out, figure)


def _both(areas: Any, method: str, n: int, tasks: Sequence[str]) -> str:
    of: Any = areas[areas["method"] == method]
    values = [
        mean_of(of[of["direction"] == direction], "auc", n, tasks)
        for direction in ("none", "forward", "reversed")
    ]
    return "/".join(short(value) for value in values if not math.isnan(value))


def _best(areas: Any, methods: Sequence[str], n: int, tasks: Sequence[str]) -> set[int]:
    largest = [
        max(
            (
                mean_of(of, "auc", n, tasks)
                for _, of in areas[areas["method"] == method].groupby("direction")
            ),
            default=math.nan,
        )
        for method in methods
    ]
    known = [value for value in largest if not math.isnan(value)]
    if not known or max(known) <= min(known) + 1e-9:
        return set()
    return {i for i, value in enumerate(largest) if value >= max(known) - 1e-9}
