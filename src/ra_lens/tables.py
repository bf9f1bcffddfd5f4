"""Tables of results that people hand over: are the columns there, and do they hold what belongs?

A table may have been through other hands: a column dropped, `n/a` typed for a number, a cell left
empty. What is wrong is told in words that go on from "a table ...".

Numbers and rows as tables show them: few characters, means below the tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ra_lens.text import shorten

_NUMBERS = frozenset(
    {"n_shots", "draw", "share", "top1", "top2", "top3", "logit_diff", "scale", "auc", "layer",
     "head", "score", "rank"}
)  # fmt: skip
# Measures of a model that may have given none here and there; everything else has a value in
# every row, and what has none would silently be left out of a mean.
_MAY_BE_UNKNOWN = frozenset({"logit_diff", "score", "auc"})


def problem_of(frame: pd.DataFrame, columns: Sequence[str]) -> str | None:
    """Say why columns of a table cannot be used: missing, text for numbers, empty; None if not.

    Rows are counted from 1, below the names of the columns. The `scale` of the unpatched model
    (`map` is `none`) is empty, as it should be.
    """
    missing = [name for name in columns if name not in frame]
    if missing:
        return f"without {', '.join(map(repr, missing))}"
    return next(filter(None, (_problem_in(frame, name) for name in columns)), None)


def _problem_in(frame: pd.DataFrame, name: str) -> str | None:
    values: Any = frame[name]
    of_it = np.ones(len(frame), dtype=bool)
    if name == "scale" and "map" in frame:
        of_it = (frame["map"] != "none").to_numpy(dtype=bool)
    if not of_it.any():
        return None
    if name in _NUMBERS and not pd.api.types.is_numeric_dtype(values):
        rows = np.flatnonzero(of_it & values.notna().to_numpy()).tolist()
        # A column with one word in it is read as text throughout: name the word.
        words = [row for row in rows if not _is_number(values.iloc[row])]
        texts = [row for row in rows if isinstance(values.iloc[row], str)]
        for row in [*words, *texts][:1]:
            return f"with the text {values.iloc[row]!r} for {name} in row {row + 1}, not a number"
    unknown = of_it & values.isna().to_numpy()
    if bool((unknown == of_it).all()):
        return f"in which {name!r} is empty"
    if name not in _MAY_BE_UNKNOWN and unknown.any():
        return f"without a value for {name} in row {int(unknown.argmax()) + 1}"
    return None


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


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
    rows = {shorten(task, 30): [task] for task in tasks}
    if len(tasks) > 1:
        rows[" "] = []
        for kind, of_kind in kinds.items():
            if 1 < len(of_kind) < len(tasks):
                rows[f"mean of {len(of_kind)} {kind}"] = of_kind
        rows[f"mean of {len(tasks)} tasks"] = tasks
    return rows


def best_of_rows(values: Float[np.ndarray, "row column"]) -> np.ndarray:
    """Mark the largest value of each row, ties included; none where all are the same."""
    known = np.where(np.isnan(values), -np.inf, values)
    largest = known.max(axis=1, keepdims=True)
    smallest = np.where(np.isnan(values), np.inf, values).min(axis=1, keepdims=True)
    return (known >= largest - 1e-9) & (largest > smallest + 1e-9)
