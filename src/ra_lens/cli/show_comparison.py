"""Results beside published numbers, in a terminal and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from rich.text import Text

from ra_lens.cli.tables import echo, groups, new_console, new_table, number, print_files, records
from ra_lens.experiments.paper import count_cells
from ra_lens.text import scale_name


def print_comparison(compared: pd.DataFrame, *, every: bool, out: Path | None) -> None:
    """Print published numbers and ours, table by table."""
    console = new_console()
    shown: Any = compared if every else compared[compared["found"] == "both"]
    for (place, model), part in groups(shown, ["table", "model"]):
        name = f"Table {place}, {model}" if place else f"Not published, {model}"
        table = new_table(name, "task", "shots", "order", "paper", "ours", "difference", "as")
        for row in part.to_dict("records"):
            table.add_row(
                Text(row["task"]),
                str(row["n_shots"]),
                Text(_order(row)),
                number(row["paper"], "auc"),
                number(row["ours"], "auc"),
                "" if math.isnan(row["difference"]) else f"{row['difference']:+.2f}",
                Text(row["our_cell"]),
            )
        console.print(table)
        console.print("")
    counts = count_cells(compared)
    both: Any = compared[compared["found"] == "both"]
    average = float(both["difference"].abs().mean())
    differing = "" if math.isnan(average) else f", differing by {average:.3f} on average"
    text = (
        f"{counts['both']} published numbers with a result{differing}; {counts['paper']} of these "
        f"models without a result; {counts['ours']} results without a published number"
    )
    console.print(Text(text + ("." if every else " (--all lists them)."), style="dim"))
    print_files(console, out, None)


def print_comparison_json(compared: pd.DataFrame, *, out: Path | None) -> None:
    """Print every cell as JSON."""
    echo(
        {
            "ra_lens": version("ra-lens"),
            "counts": count_cells(compared),
            "cells": records(compared),
            "out": None if out is None else str(out),
        }
    )


def _order(row: Mapping[str, Any]) -> str:
    scale = "" if math.isnan(row["scale"]) else f" {scale_name(row['scale'])}"
    return f"{row['method']}{' reversed' if row['direction'] == 'reversed' else ''}{scale}"
