"""Perturbation curves: what a model still gets right while its heads are unmasked in some order.

One line per method and direction: solid for its order, most important head first, dashed for the
reverse. Random orders are a line, the mean of the draws, in a band from the smallest draw to the
largest. Where a panel holds several tasks, each draw is first averaged over the tasks.
"""

from __future__ import annotations

from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
from typing_extensions import Unpack

from ra_lens.errors import BadInput
from ra_lens.figures.style import (
    Layout,
    MethodStyle,
    check_frame,
    check_metric,
    finish,
    limits,
    method_styles,
    metric_name,
    number_text,
    order_name,
    panels,
    plotly_text,
    subtitle_of,
    tasks_averaged,
    value_text,
)
from ra_lens.questions import Metric
from ra_lens.tables import mean_over_questions
from ra_lens.text import shots_name

Facet = Literal["n_shots", "task"]

_CELL = ("task", "n_shots", "method", "direction", "draw", "share")


def perturbation_curves(
    frame: pd.DataFrame,
    *,
    metric: Metric = "top1",
    facet: Facet = "n_shots",
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw a metric against the share of heads unmasked, a line per method and direction.

    Args:
        frame: From `perturbation_test`, of one model.
        metric: Which column: `top1`, `top2`, `top3` (shares of questions), `logit_diff`, or
            `answer_diff` where it was measured.
        facet: `"n_shots"`, a panel per number of shots, each the mean over the tasks; or `"task"`,
            a panel per task, each the mean over the numbers of shots. A line under the title says
            over what was averaged.
        **layout: `title`, above the figure (default: that line only); `width` and `height` in
            pixels (default: as wide as its container, and by the number of panels); `template` of
            plotly, for this figure only.

    Returns:
        A figure with a trace per panel, method and direction, named as in the legend, and before
        it, where there are several draws, a trace for their band.

    Raises:
        BadInput: not such a frame, several models in it, or an unknown `metric` or `facet`.
    """
    check_metric(metric)
    if facet not in ("n_shots", "task"):
        raise BadInput(f"found facet={facet!r}; give 'n_shots' or 'task'.")
    frame = mean_over_questions(frame)
    check_frame(frame, what="perturbation_test()", columns=[*_CELL, metric], cell=_CELL)
    values = sorted(frame["n_shots"].unique()) if facet == "n_shots" else frame["task"].unique()
    names = [shots_name(int(v)) if facet == "n_shots" else plotly_text(str(v)) for v in values]
    columns = panel_columns(len(names))
    figure, places = panels(
        names,
        layout,
        columns=columns,
        each={1: 400, 2: 320}.get(-(-len(names) // columns), 240),
        around=110,
        gap=62,
        horizontal_spacing=0.05 if columns > 1 else 0,
        x_title="share of heads unmasked",
        y_title=metric_name(frame, metric),
    )
    styles = method_styles(frame["method"])
    counts: list[int] = []
    listed: set[object] = set()
    for value, place in zip(values, places, strict=True):
        panel: Any = frame[frame[facet] == value]
        for trace, count in _panel(panel, metric, styles, "task" if facet == "n_shots" else None):
            counts.append(count)
            trace.showlegend = trace.fill is None and trace.name not in listed
            if trace.showlegend:
                listed.add(trace.name)
            figure.add_trace(trace, **place)
    averaged = tasks_averaged(counts) if facet == "n_shots" else _shots_averaged(frame)
    finish(
        figure,
        layout,
        above=(66, 88),
        subtitle=subtitle_of(frame, averaged),
        plot_bgcolor=None,
        margin={"l": 72, "b": 58},
        legend={
            "title": {"text": "heads unmasked<br>in the order of"},
            "font": {"size": 12},
            "y": 1,
            "tracegroupgap": 2,
        },
    )
    figure.update_xaxes(
        range=[-0.02, 1.02],
        tickformat=".0%",
        tickvals=[0, 0.2, 0.4, 0.6, 0.8, 1] if columns < 3 else [0, 0.5, 1],
        tickangle=0,
        showticklabels=True,
    )
    low, high = limits((y for trace in figure.data for y in trace.y), metric)
    figure.update_yaxes(range=[low, high])
    return figure


def panel_columns(n: int) -> int:
    """Choose how many panels stand beside each other: four as two by two."""
    return {1: 1, 2: 2, 4: 2}.get(n, 3)


def _panel(
    panel: Any, metric: str, styles: dict[str, MethodStyle], over: str | None
) -> list[tuple[go.Scatter, int]]:
    """Draw the traces of one panel, bands below all lines, with how many tasks each averages."""
    bands: list[tuple[go.Scatter, int]] = []
    lines: list[tuple[go.Scatter, int]] = []
    for method, style in styles.items():
        of_method = panel[panel["method"] == method]
        for direction in sorted(of_method["direction"].unique()):  # forward, none, reversed
            of_order = of_method[of_method["direction"] == direction]
            # One curve per draw, then their mean: a draw is one order.
            draws = of_order.groupby(["draw", "share"])[metric].mean().unstack("share")
            count = of_order["task"].nunique()
            said = f"<br>mean over {count} tasks" if over == "task" and count > 1 else ""
            if len(draws) > 1:
                bands.append((_band(draws, style, direction), count))
            lines.append((_line(draws, style, direction, metric, said), count))
    return [*bands, *lines]


def _line(
    draws: pd.DataFrame, style: MethodStyle, direction: str, metric: str, said: str
) -> go.Scatter:
    name = _name(style, direction, len(draws))
    back = direction == "reversed"
    extremes = ""
    if len(draws) > 1:
        low, high = (number_text(metric, f"customdata[{i}]") for i in (0, 1))
        extremes = f"<br>mean of {len(draws)} draws, from {low} to {high}"
    return go.Scatter(
        x=draws.columns.to_numpy(float),
        y=draws.mean(axis=0).to_numpy(float),
        customdata=pd.concat([draws.min(axis=0), draws.max(axis=0)], axis=1).to_numpy(float),
        mode="lines+markers",
        name=name,
        legendgroup=name,
        line={"color": style.colour, "dash": "5px,4px" if back else "solid", "width": 2},
        marker={
            "symbol": style.symbol,
            "size": 6,
            "color": "white" if back else style.colour,
            "line": {"color": style.colour, "width": 1.3},
        },
        hovertemplate=(
            f"<b>{order_name(style, direction)}</b><br>%{{x:.0%}} of heads unmasked<br>"
            f"{value_text(metric)}{extremes}{said}<extra></extra>"
        ),
    )


def _band(draws: pd.DataFrame, style: MethodStyle, direction: str) -> go.Scatter:
    x = draws.columns.to_numpy(float)
    red, green, blue = (int(style.colour[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=[*x, *x[::-1]],
        y=[*draws.max(axis=0), *draws.min(axis=0)[::-1]],
        mode="lines",
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.22)",
        line={"width": 0},
        hoverinfo="skip",
        name=f"{order_name(style, direction)}, band",
        legendgroup=_name(style, direction, len(draws)),
    )


def _name(style: MethodStyle, direction: str, n_draws: int) -> str:
    name, _, note = order_name(style, direction).partition(" (")
    if n_draws > 1:
        note = f"mean and range of {n_draws})"
    return f'{name}<br><span style="font-size:11px">({note}</span>' if note else name


def _shots_averaged(frame: pd.DataFrame) -> str | None:
    shots = [str(int(n)) for n in sorted(frame["n_shots"].unique())]
    if len(shots) == 1:
        return shots_name(int(shots[0]))
    return f"mean over {', '.join(shots[:-1])} and {shots[-1]} shots"
