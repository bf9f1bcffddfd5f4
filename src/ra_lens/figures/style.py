"""What figures share: sizes and titles, panels, colours, and how results are named.

A method has one colour, one marker and one short name in every figure; its reversed order is
dashed. Colours are Okabe and Ito's, which colour-blind eyes tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import pandas as pd

from ra_lens.errors import BadInput
from ra_lens.heads.registry import ranking_methods
from ra_lens.numbers import Real, as_whole, real
from ra_lens.questions import METRICS
from ra_lens.tables import problem_of
from ra_lens.text import label


class Layout(TypedDict, total=False):
    """What every figure takes by keyword.

    Attributes:
        title: Above the figure.
        width: In pixels.
        height: In pixels.
        template: Plotly template, for this figure only. Default: `plotly_white`.
    """

    title: str | None
    width: Real | None
    height: Real | None
    template: str


def read_size(layout: Layout) -> tuple[float | None, float | None]:
    """Give width and height as numbers of Python's, where they are given."""
    unknown = sorted(set(layout) - set(Layout.__annotations__))
    if unknown:
        raise TypeError(
            f"got an unexpected keyword argument {unknown[0]!r}; what all figures take is "
            f"{', '.join(Layout.__annotations__)}."
        )
    return _pixels("width", layout.get("width")), _pixels("height", layout.get("height"))


def _pixels(name: str, value: Real | None) -> float | None:
    whole = as_whole(value)
    return real(name, value) if value is not None and whole is None else whole


def finish(
    figure: Any,
    layout: Layout,
    *,
    height: float | None = None,
    width: float | None = None,
    above: tuple[float, float] = (8, 56),
    subtitle: str | None = None,
    **more: Any,
) -> None:
    """Apply size, template and title, then what else is given.

    `height` and `width` serve where the layout has none; without a width the figure fills its
    container. `above` is the room above the axes, without a title and with one.
    """
    own_width, own_height = read_size(layout)
    pixels = own_height or height or figure.layout.height
    title = heading = layout.get("title")
    place: dict[str, Any] = {"x": 0.02, "xanchor": "left"}
    if subtitle is not None:
        small = subtitle and f'<span style="font-size:12px">{subtitle}</span>'
        heading = "<br>".join(filter(None, (title, small)))
        place |= {"y": 1 - 14 / pixels, "yanchor": "top"}
    figure.update_layout(
        template=layout.get("template", "plotly_white"),
        width=own_width or width,
        height=pixels,
        title=None if heading is None else {"text": heading, **place},
        plot_bgcolor=NOTHING_THERE,
        font={"size": 12},
        margin={"l": 12, "r": 12, "t": above[title is not None], "b": 8},
        dragmode=False,
    )
    figure.update_layout(**more)


def panels(
    names: Sequence[str],
    layout: Layout,
    *,
    columns: int,
    each: int,
    around: int,
    gap: int,
    **options: Any,
) -> tuple[Any, list[dict[str, int]]]:
    """Make a figure of panels that share their y axis; give it and the place of each panel.

    Where the layout has no height, a row of panels has `each` pixels, and there are `around` above
    and below all rows; `gap` lie between two rows. The other options are those of plotly's
    `make_subplots`.
    """
    from plotly.subplots import make_subplots

    rows = -(-len(names) // columns)
    pixels = read_size(layout)[1] or rows * each + around
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_yaxes="all",  # type: ignore[arg-type]
        vertical_spacing=0 if rows == 1 else min(0.5 / rows, gap / max(pixels - around, 1)),
        subplot_titles=names,
        **options,
    )
    figure.update_layout(height=pixels)
    figure.update_annotations(font_size=13)
    return figure, [{"row": i // columns + 1, "col": i % columns + 1} for i in range(len(names))]


def frame_cells(
    figure: Any, marked: np.ndarray, name: str, width: float, where: dict[str, int]
) -> None:
    """Draw a frame around the cells of a heatmap that are marked."""
    for i, j in np.argwhere(marked).tolist():
        figure.add_shape(
            type="rect",
            x0=j - 0.47,
            x1=j + 0.47,
            y0=i - 0.46,
            y1=i + 0.46,
            line={"color": MARK, "width": width},
            name=name,
            **where,
        )


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


def ticks(names: Sequence[str], texts: Sequence[str], room: int) -> dict[str, Any]:
    """Give an axis of categories the labels that there is room for."""
    shown = thinned(len(names), room)
    return {
        "tickmode": "array",
        "tickvals": [names[i] for i in shown],
        "ticktext": [texts[i] for i in shown],
    }


# All are read the same by colour-blind eyes: lightness alone tells zero from much, and the
# diverging scales oppose red and blue, green and brown (ColorBrewer's RdBu, BrBG, Purples).
SEQUENTIAL = "Viridis"
ATTENTION = "Purples"
DIVERGING = "RdBu_r"
LOSS = "BrBG"
"""Of what blocking an edge does to the loss: no colours of R, which is another quantity."""
NOTHING_THERE = "#c9ccd1"
"""Background of maps: shows through where a query cannot look."""

MARK = "#e4572e"
PULL, PUSH = (208, 58, 60), (52, 126, 198)
"""Where descent draws a query and a key together, and where it drives them apart: to be seen on
white and on black."""


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
    "w_norm": MethodStyle("#332288", "hexagon-open"),
    "michel": MethodStyle("#882255", "triangle-down"),
    "atp": MethodStyle("#aa4499", "triangle-right"),
    "knockout": MethodStyle("#117733", "hexagram"),
    "grad_sam": MethodStyle("#6f6f1e", "triangle-left"),
    "ag": MethodStyle("#661100", "octagon"),
    "grad_norm": MethodStyle("#2a7f74", "diamond-tall"),
    "nap": MethodStyle("#7b2fbe", "star-triangle-up"),
    "nap_ig": MethodStyle("#b5460f", "star-triangle-down"),
    "zero": MethodStyle("#111827", "circle-open"),
    "mean": MethodStyle("#4d7c0f", "circle-x"),
    "resample": MethodStyle("#0f4c81", "star-diamond"),
    "relp": MethodStyle("#4477aa", "square-x"),
    "gim": MethodStyle("#994f00", "diamond-x"),
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
    name = f"{style.name}, {direction}" if direction in ("reversed", "absolute") else style.name
    return f"{name} ({note})" if note else name


_OF_ANSWERS: dict[str, str] = {
    "top1": "accuracy (whole answer, greedily)",
    "top2": "accuracy (each token of the answer among the first 2)",
    "top3": "accuracy (each token of the answer among the first 3)",
    "logit_diff": "logit of the answer − best other logit, smallest of its tokens",
    "answer_diff": "logit of the answer's first token − logit of the wrong answer's",
}
_IN_LOGITS = ("logit_diff", "answer_diff")


def metric_name(frame: pd.DataFrame, metric: str) -> str:
    """Name a metric as an experiment measured it: by the first token, or the whole answer."""
    whole = "accuracy" in frame and set(frame["accuracy"]) == {"answer"}
    return (_OF_ANSWERS if whole else METRICS)[metric]


def value_text(metric: str) -> str:
    """Tell the value of a point, as plotly fills it in: `accuracy %{y:.1%}`."""
    name = "logit difference" if metric in _IN_LOGITS else "accuracy"
    return f"{name} {number_text(metric, 'y')}"


def number_text(metric: str, place: str) -> str:
    """Tell a number of a point, as plotly fills it in from `place`."""
    return f"%{{{place}{':.3g' if metric in _IN_LOGITS else ':.1%'}}}"


def limits(values: Iterable[float], metric: str) -> tuple[float, float]:
    """Give the ends of the axis of a metric, a little beyond its values."""
    if metric not in _IN_LOGITS:
        return -0.02, 1.02
    known = [float(value) for value in values if value == value]
    low, high = min(known, default=0.0), max(known, default=0.0)
    room = 0.04 * ((high - low) or 1.0)
    return low - room, high + room


def check_metric(metric: str) -> None:
    """Refuse a metric that experiments do not measure."""
    if metric not in METRICS:
        raise BadInput(f"found metric={metric!r}; give one of {', '.join(map(repr, METRICS))}.")


def check_frame(
    frame: pd.DataFrame, *, what: str, columns: Sequence[str], cell: Sequence[str]
) -> None:
    """Refuse what is not a result of `what`, of one model, with one row for each `cell`."""
    problem = problem_of(frame, columns, rows=True)
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
        _, these = next(iter(twice.groupby(list(cell), dropna=False, sort=False)))
        differ = [c for c in frame if c not in cell and these[c].nunique(dropna=False) > 1]
        where = ", ".join(f"{name}={twice.iloc[0][name]}" for name in cell)
        raise BadInput(
            f"found several rows for {where}; they differ in {', '.join(differ) or 'nothing'}. "
            "Give the results of one run."
        )


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
