"""The patching sweep: accuracy against the factor by which a mean map is added to the pattern.

The scales of a sweep span both signs and three orders of magnitude, so they are drawn at

    x(s) = asinh(s / 0.5)        near 0 in proportion to s, far from 0 to the logarithm of |s|

on an axis whose ticks are labelled with the scales themselves; every scale measured has a tick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from typing_extensions import Unpack

from ra_lens.errors import BadInput
from ra_lens.figures.curves import panel_columns
from ra_lens.figures.style import (
    Layout,
    check_frame,
    check_metric,
    finish,
    limits,
    metric_name,
    panels,
    subtitle_of,
    tasks_averaged,
    value_text,
)
from ra_lens.questions import Metric
from ra_lens.scales import PAPER_SCALE, axis_position, axis_ticks
from ra_lens.tables import mean_over_questions
from ra_lens.text import scale_name, shots_name

_LINEAR = 0.5
"""Scales below it are spaced in proportion, scales above it by their logarithm."""

_CELL = ("task", "n_shots", "map", "scale")
MAPS = {
    "ra": ("RA map", "#d55e00", "circle"),
    "pattern": ("FA map", "#0072b2", "square"),
    "shuffled": ("RA map, rows shuffled", "#cc79a7", "x"),
    "grad": ("G, as large as RA", "#009e73", "diamond"),
    "centred_grad": ("G, rows centred, as large as RA", "#56b4e9", "triangle-up"),
    "a_grad": ("A ⊙ G, as large as RA", "#b8860b", "triangle-down"),
}
_LINES = "#4b5563"


def patching_sweep_curve(
    frame: pd.DataFrame,
    *,
    metric: Metric = "top1",
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw a metric against the scale of the added map, a line per kind of map.

    A panel per number of shots, each the mean over the tasks. Horizontal lines show what the model
    does unpatched with each number of shots; that of the panel's own number is solid. The scales
    that the paper reports (RA −30, FA +1) have larger markers.

    Args:
        frame: From `patching_sweep`, of one model.
        metric: Which column: `top1`, `top2`, `top3` (shares of questions) or `logit_diff`.
        **layout: `title`, above the figure (default: only a line that says what was averaged);
            `width` and `height` in pixels (default: as wide as its container, and by the number of
            panels); `template` of plotly, for this figure only.

    Returns:
        A figure with, per panel, a trace per number of shots for the unpatched model (named
        `unpatched, 5 shots`) and one per kind of map (`RA map`, `FA map`), whose `customdata` are
        the scales and whose `x` is where they are drawn.

    Raises:
        BadInput: not such a frame, several models in it, scales that were found, which make no
            curve, or an unknown `metric`.
    """
    check_metric(metric)
    frame = mean_over_questions(frame)
    if "train_loss" in frame:
        raise BadInput(
            "found a table of scales found on training questions, one for each task, which make no "
            "curve. Run patching_sweep with scales, or draw best_scale's with scale_curve."
        )
    check_frame(frame, what="patching_sweep()", columns=[*_CELL, metric], cell=_CELL)
    means: Any = frame.groupby(["n_shots", "map", "scale"], dropna=False)[metric].mean()
    mean: Any = means.reset_index().sort_values("scale")
    patched = mean[mean["map"] != "none"]
    unpatched = {
        int(row["n_shots"]): float(row[metric])
        for _, row in mean[mean["map"] == "none"].sort_values("n_shots").iterrows()
    }
    shots = [int(n) for n in sorted(mean["n_shots"].unique())]
    columns = min(panel_columns(len(shots)), 2)
    figure, places = panels(
        [shots_name(n) for n in shots],
        layout,
        columns=columns,
        each=330,
        around=140,
        gap=64,
        horizontal_spacing=0.11 if columns > 1 else 0,
        x_title="scale of the map added to the attention pattern (asinh axis; 0: unpatched)",
        y_title=metric_name(frame, metric),
    )
    scales = sorted({float(s) for s in patched["scale"]} | {0.0})
    ends = (position(scales[0]), position(scales[-1]))
    room = 0.03 * ((ends[1] - ends[0]) or 1.0)
    ends = (ends[0] - room, ends[1] + room)
    count = tasks_averaged(frame.groupby(["n_shots", "map"])["task"].nunique())
    said = "" if count is None else f"<br>{count}"
    low, high = limits(mean[metric], metric)
    for own, place in zip(shots, places, strict=True):
        _add_unpatched(figure, unpatched, own, ends, (low, high), metric, said, place)
        for kind in MAPS:
            curve = patched[(patched["map"] == kind) & (patched["n_shots"] == own)]
            if not curve.empty:
                figure.add_trace(_line(curve, kind, metric, said, first=own == shots[0]), **place)
    finish(
        figure,
        layout,
        above=(100, 122),
        subtitle=f"{subtitle_of(frame, count)} · lines across: unpatched",
        plot_bgcolor=None,
        margin={"l": 72, "r": 74, "b": 58},
    )
    axes = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    figure.update_layout(
        legend={"orientation": "h", "x": 0, "y": 1 + 24 / max(axes, 1), "yanchor": "bottom"}
    )
    ticks = tick_scales(scales)
    figure.update_xaxes(
        range=list(ends),
        tickmode="array",
        tickvals=[position(s) for s in ticks],
        ticktext=[scale_name(s) for s in ticks],
        tickangle=0,
        ticks="outside",
        ticklen=6,
        minor={"tickvals": [position(s) for s in scales], "ticks": "outside", "ticklen": 3},
        zeroline=True,
        showticklabels=True,
    )
    figure.update_yaxes(range=[low, high])
    return figure


def position(scale: float) -> float:
    """Give where on the axis a scale is drawn."""
    return axis_position(scale, _LINEAR)


def tick_scales(scales: Sequence[float]) -> list[float]:
    """Choose which of the scales are labelled: as many as stay apart, round ones first."""
    round_ones = (0.0, min(scales), max(scales), -30.0, 1.0, -10.0, -1.0, -4.0, -60.0, 3.0)
    return axis_ticks(scales, round_ones, linear=_LINEAR)


def _line(curve: Any, kind: str, metric: str, said: str, *, first: bool) -> go.Scatter:
    name, colour, symbol = MAPS[kind]
    scales = [float(s) for s in curve["scale"]]
    paper = [s == PAPER_SCALE.get(kind) for s in scales]
    return go.Scatter(
        x=[position(s) for s in scales],
        y=curve[metric].to_numpy(float),
        customdata=scales,
        text=[scale_name(s) + " (the paper's)" * p for s, p in zip(scales, paper, strict=True)],
        mode="lines+markers",
        name=name,
        legendgroup=name,
        showlegend=first,
        line={"color": colour, "width": 2},
        marker={
            "symbol": symbol,
            "color": colour,
            "size": [11 if p else 5.5 for p in paper],
            "line": {"width": 0},
            "opacity": 1,
        },
        hovertemplate=(
            f"<b>{name}</b>, scale %{{text}}<br>{value_text(metric)}{said}<extra></extra>"
        ),
    )


def _add_unpatched(
    figure: Any,
    unpatched: Mapping[int, float],
    own: int,
    ends: tuple[float, float],
    limits: tuple[float, float],
    metric: str,
    said: str,
    place: dict[str, int],
) -> None:
    """Add a horizontal line per number of shots, labelled at the right edge of the panel."""
    labels = spread(list(unpatched.values()), 0.058 * (limits[1] - limits[0]), limits)
    for (n, value), y in zip(unpatched.items(), labels, strict=True):
        mine = n == own
        name = f"unpatched, {shots_name(n)}"
        figure.add_trace(
            go.Scatter(
                x=list(ends),
                y=[value, value],
                mode="lines",
                name=name,
                legendgroup=name,
                showlegend=False,
                line={
                    "color": _LINES,
                    "width": 2 if mine else 1.2,
                    "dash": "solid" if mine else "dot",
                },
                hovertemplate=f"<b>{name}</b><br>{value_text(metric)}{said}<extra></extra>",
            ),
            **place,
        )
        figure.add_annotation(
            x=ends[1],
            y=y,
            text=f"<b>{shots_name(n)}</b>" if mine else shots_name(n),
            showarrow=False,
            xanchor="left",
            xshift=3,
            font={"size": 11, "color": _LINES},
            **place,
        )


def spread(values: Sequence[float], gap: float, limits: tuple[float, float]) -> list[float]:
    """Move labels apart vertically, by as little as their order and the edges allow."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = [min(max(values[i], limits[0]), limits[1]) for i in order]
    for _ in range(200):
        moved = False
        for i in range(len(placed) - 1):
            short = gap - (placed[i + 1] - placed[i])
            if short > 1e-9:
                placed[i] -= short / 2
                placed[i + 1] += short / 2
                moved = True
        if placed and placed[0] < limits[0]:
            placed[0] = limits[0]
        if placed and placed[-1] > limits[1]:
            placed[-1] = limits[1]
        if not moved:
            break
    back = dict(zip(order, placed, strict=True))
    return [back[i] for i in range(len(values))]
