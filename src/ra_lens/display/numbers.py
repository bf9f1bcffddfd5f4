"""Numbers and rows as tables show them: few characters, means below the tasks."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float

from ra_lens.display.tokens import plotly_text, shorten


def table_rows(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Give the rows of the table: name to the tasks averaged; an empty list is a gap.

    Tasks stand alone, those learnt in context first; means follow where there are several tasks,
    of each kind first where there are both kinds and several tasks of it.
    """
    kinds: dict[str, list[str]] = {}
    for kind in ("icl", "natural"):
        kinds[kind] = list(dict.fromkeys(frame[frame["kind"] == kind]["task"].astype(str)))
    tasks = [task for of_kind in kinds.values() for task in of_kind]
    tasks += [t for t in dict.fromkeys(frame["task"].astype(str)) if t not in tasks]
    rows = {plotly_text(shorten(task, 30)): [task] for task in tasks}
    if len(tasks) > 1:
        rows[" "] = []
        for kind, of_kind in kinds.items():
            if 1 < len(of_kind) < len(tasks):
                rows[f"mean of {len(of_kind)} {kind}"] = of_kind
        rows[f"<b>mean of {len(tasks)} tasks</b>"] = tasks
    return rows


def best_of_rows(values: Float[np.ndarray, "row column"]) -> np.ndarray:
    """Mark the largest value of each row, ties included; none where all are the same."""
    known = np.where(np.isnan(values), -np.inf, values)
    largest = known.max(axis=1, keepdims=True)
    smallest = np.where(np.isnan(values), np.inf, values).min(axis=1, keepdims=True)
    return (known >= largest - 1e-9) & (largest > smallest + 1e-9)


def short(value: float) -> str:
    """Write an area in few characters: `.39`, `1.0`, `−.05`, and nothing where there is none."""
    if np.isnan(value):
        return ""
    text = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}"
    return text.replace("0.", ".", 1).replace("-", "−") if abs(value) < 0.995 else text


def scale_name(scale: float) -> str:
    """Write a scale: `−30`, `+1`, `0`."""
    return "0" if scale == 0 else f"{scale:+g}".replace("-", "−")
