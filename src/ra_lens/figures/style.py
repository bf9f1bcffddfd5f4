"""What figures share.

What all figures share: colours, the way sizes and templates are given, rows of small maps.

What figures of experiments share: names and colours of methods, names of metrics, checks.

A method has one colour, one marker and one short name in every figure; its reversed order is
dashed. Colours are Okabe and Ito's, which colour-blind eyes tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from ra_lens.errors import BadInput
from ra_lens.heads.ranking import ranking_methods
from ra_lens.numbers import Real, as_whole, real
from ra_lens.questions import METRICS
from ra_lens.tables import problem_of
from ra_lens.text import label


def plotly_text(text: str) -> str:
    """Escape text for plotly, which reads some HTML tags and, between dollars, TeX."""
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("$", "&#36;")):
        text = text.replace(character, entity)
    return text


def distinct(tokens: Sequence[str], *, first: int = 0) -> list[str]:
    """Names of the tokens by position, all different: `Paris (3)`, escaped for plotly."""
    return [f"{plotly_text(label(token))} ({i})" for i, token in enumerate(tokens, start=first)]


def thinned(n: int, room: int) -> list[int]:
    """Choose evenly spaced positions out of `n`, at most `room`, always with the last one."""
    step = -(-n // max(room, 1))
    return list(range(n - 1, -1, -step))[::-1]


# Both are read the same by colour-blind eyes: lightness alone tells zero from much, and the
# diverging scale opposes red and blue (ColorBrewer's RdBu, Purples).
SEQUENTIAL = "Viridis"
ATTENTION = "Purples"
DIVERGING = "RdBu_r"
NOTHING_THERE = "#c9ccd1"
"""Background of maps: shows through where a query cannot look."""

MARK = "#e4572e"


def read_size(width: Real | None, height: Real | None) -> tuple[float | None, float | None]:
    """Give the size of a figure as numbers of Python's.

    Raises:
        BadInput: one is no number.
    """
    return _pixels("width", width), _pixels("height", height)


def _pixels(name: str, value: Real | None) -> float | None:
    whole = as_whole(value)
    return real(name, value) if value is not None and whole is None else whole


def finish(
    figure: Any, *, title: str | None, width: float | None, height: float | None, template: str
) -> None:
    """Apply size, template and title; the figure fills its container where width is None."""
    figure.update_layout(
        template=template,
        width=width,
        height=height,
        title=None if title is None else {"text": title, "x": 0.02, "xanchor": "left"},
        plot_bgcolor=NOTHING_THERE,
        font={"size": 12},
        margin={"l": 12, "r": 12, "t": 8 if title is None else 56, "b": 8},
        dragmode=False,
    )


_OF_ANSWERS: dict[str, str] = {
    "top1": "accuracy (whole answer, greedily)",
    "top2": "accuracy (each token of the answer among the first 2)",
    "top3": "accuracy (each token of the answer among the first 3)",
    "logit_diff": "logit of the answer − best other logit, smallest of its tokens",
}


def metric_name(frame: pd.DataFrame, metric: str) -> str:
    """Name a metric as an experiment measured it: by the first token, or the whole answer."""
    whole = "accuracy" in frame and set(frame["accuracy"]) == {"answer"}
    return (_OF_ANSWERS if whole else METRICS)[metric]


@dataclass(frozen=True)
class MethodStyle:
    """How a method looks.

    Attributes:
        colour: Of its lines.
        symbol: Of its markers.
        name: What legends call it.
        forward: What its order is, in words; empty where the name says enough.
        backward: What its reversed order is, likewise.
    """

    colour: str
    symbol: str
    name: str = ""
    forward: str = ""
    backward: str = ""


_KNOWN = {
    "ra": MethodStyle("#d55e00", "circle"),
    "fa": MethodStyle("#0072b2", "square"),
    "cm1": MethodStyle("#009e73", "diamond"),
    "cm2": MethodStyle("#cc79a7", "triangle-up"),
    "index": MethodStyle(
        "#e69f00", "cross", forward="first layer first", backward="last layer first"
    ),
    "random": MethodStyle("#6b7280", "x"),
    "fa_of_mean": MethodStyle("#56b4e9", "square-open"),
    "cm1_last": MethodStyle("#004d3a", "diamond-open"),
}
_SPARE = ("#8c5e2a", "#5b3a8e", "#a3173f", "#7d8a00", "#22637a", "#b23fb5")
_SPARE_SYMBOLS = ("star", "hexagon", "pentagon", "bowtie", "hourglass", "star-square")


def method_styles(methods: Iterable[str]) -> dict[str, MethodStyle]:
    """Give each method its look, in the order in which legends list them.

    The built-in ones look the same everywhere. A user's own take spare colours in alphabetical
    order, so that a set of methods looks the same whatever the order of its rows.
    """
    found = set(methods)
    styles = {name: style for name, style in _KNOWN.items() if name in found}
    for i, name in enumerate(sorted(found - set(_KNOWN))):
        spare = _SPARE[i % len(_SPARE)], _SPARE_SYMBOLS[i % len(_SPARE_SYMBOLS)]
        styles[name] = MethodStyle(*spare)
    labels = {name: method.label for name, method in ranking_methods().items()}
    return {
        name: replace(style, name=plotly_text(labels.get(name) or name))
        for name, style in styles.items()
    }


def order_name(style: MethodStyle, direction: str) -> str:
    """Name a method's order: `RA`, `RA, reversed`, `Index (first layer first)`."""
    note = style.backward if direction == "reversed" else style.forward
    name = f"{style.name}, reversed" if direction == "reversed" else style.name
    return f"{name} ({note})" if note else name


def read_frame(
    frame: pd.DataFrame, *, what: str, columns: Sequence[str], cell: Sequence[str]
) -> pd.DataFrame:
    """Check that a frame is of an experiment, of one model, with one row per cell; give it back.

    Args:
        frame: What a figure was given.
        what: The function that makes such frames, for messages.
        columns: Which columns it must have.
        cell: The columns that tell its rows apart.

    Raises:
        BadInput: it lacks a column, has no rows, text for a number or nothing where there should
            be something, several models or kinds of accuracy, or two rows for a cell.
    """
    problem = "without rows" if frame.empty and set(columns) <= set(frame.columns) else None
    problem = problem or problem_of(frame, columns)
    if problem is not None:
        raise BadInput(f"found a table {problem}; give the result of {what}.")
    models = list(dict.fromkeys(frame["model"].astype(str))) if "model" in frame else []
    if len(models) > 1:
        raise BadInput(
            f"found results of {len(models)} models ({', '.join(models)}); a figure shows one. "
            f"Give frame[frame.model == {models[0]!r}]."
        )
    kinds = sorted(frame["accuracy"].dropna().unique()) if "accuracy" in frame else []
    if len(kinds) > 1:
        raise BadInput(
            f"found accuracies of two kinds ({' and '.join(kinds)}); a figure shows one. "
            f"Give frame[frame.accuracy == {kinds[0]!r}]."
        )
    twice: Any = frame[frame.duplicated(list(cell), keep=False)]
    if not twice.empty:
        first = twice.iloc[0]
        same = (twice[list(cell)] == first[list(cell)]) | (
            twice[list(cell)].isna() & first[list(cell)].isna()
        )
        these = twice[same.all(axis=1)]
        differ = [c for c in frame if c not in cell and these[c].nunique(dropna=False) > 1]
        where = ", ".join(f"{name}={first[name]}" for name in cell)
        raise BadInput(
            f"found several rows for {where}; they differ in {', '.join(differ) or 'nothing'}. "
            "Give the results of one run."
        )
    return frame


def subtitle_of(frame: pd.DataFrame, averaged: str | None) -> str:
    """Say which model and how many questions a figure is of, and what it averages over."""
    parts: list[str] = [] if averaged is None else [averaged]
    tasks = list(dict.fromkeys(frame["task"].astype(str)))
    if len(tasks) == 1:
        parts.append(f"task {plotly_text(tasks[0])}")
    if "model" in frame:
        parts.append(plotly_text(str(frame["model"].iloc[0])))
    if "n_test" in frame:
        low, high = int(frame["n_test"].min()), int(frame["n_test"].max())
        each = " per task" if len(tasks) > 1 else ""
        parts.append(f"{low if low == high else f'{low} to {high}'} questions{each}")
    return " · ".join(parts)


def tasks_averaged(counts: Iterable[int]) -> str | None:
    """Say over how many tasks was averaged: None for a single one."""
    found = sorted(set(counts))
    if found[-1] <= 1:
        return None
    several = str(found[-1]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
    return f"mean over {several} tasks"


def with_subtitle(title: str | None, subtitle: str) -> str:
    """Put a smaller line under a title, or alone where there is none."""
    if not subtitle:
        return title or ""
    small = f'<span style="font-size:12px">{subtitle}</span>'
    return small if title is None else f"{title}<br>{small}"
