"""The patching sweep: accuracy against the factor by which a mean map is added to the pattern.

The scales of a sweep span both signs and three orders of magnitude, so they are drawn at

    x(s) = asinh(s / 0.5)        near 0 in proportion to s, far from 0 to the logarithm of |s|

on an axis whose ticks are labelled with the scales themselves; every scale measured has a tick.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ra_lens.errors import BadInput
from ra_lens.figures.curves import panel_columns
from ra_lens.figures.style import (
    finish,
    metric_name,
    read_frame,
    read_size,
    subtitle_of,
    tasks_averaged,
    with_subtitle,
)
from ra_lens.numbers import Real
from ra_lens.questions import METRICS, Metric
from ra_lens.text import scale_name, shots_name

_LINEAR = 0.5
"""Scales below it are spaced in proportion, scales above it by their logarithm."""

_CELL = ("task", "n_shots", "map", "scale")
_MAPS = {
    "ra": ("RA map", "#d55e00", "circle"),
    "pattern": ("FA map", "#0072b2", "square"),
}
_PAPER = {"ra": -30.0, "pattern": 1.0}
_LINES = "#4b5563"


def patching_sweep_curve(
    frame: pd.DataFrame,
    *,
    metric: Metric = "top1",
    title: str | None = None,
    width: Real | None = None,
    height: Real | None = None,
    template: str = "plotly_white",
) -> go.Figure:
    """Draw a metric against the scale of the added map, a line per kind of map.

    A panel per number of shots, each the mean over the tasks. Horizontal lines show what the model
    does unpatched with each number of shots; that of the panel's own number is solid. The scales
    that the paper reports (RA −30, FA +1) have larger markers.

    Args:
        frame: From `patching_sweep`, of one model.
        metric: Which column: `top1`, `top2`, `top3` (shares of questions) or `logit_diff`.
        title: Above the figure. Default: only a line that says what was averaged.
        width: In pixels. Default: as wide as its container.
        height: In pixels. Default: by the number of panels.
        template: Plotly template, for this figure only.

    Returns:
        A figure with, per panel, a trace per number of shots for the unpatched model (named
        `unpatched, 5 shots`) and one per kind of map (`RA map`, `FA map`), whose `customdata` are
        the scales and whose `x` is where they are drawn.

    Raises:
        BadInput: not such a frame, several models in it, or an unknown `metric`.
    """
    width, height = read_size(width, height)
    if metric not in METRICS:
        raise BadInput(f"found metric={metric!r}; give one of {', '.join(map(repr, METRICS))}.")
    read_frame(frame, what="patching_sweep()", columns=[*_CELL, metric], cell=_CELL)
    means: Any = frame.groupby(["n_shots", "map", "scale"], dropna=False)[metric].mean()
    mean: Any = means.reset_index().sort_values("scale")
    patched = mean[mean["map"] != "none"]
    unpatched = {
        int(row["n_shots"]): float(row[metric])
        for _, row in mean[mean["map"] == "none"].sort_values("n_shots").iterrows()
    }
    shots = [int(n) for n in sorted(mean["n_shots"].unique())]
    columns = min(panel_columns(len(shots)), 2)
    rows = -(-len(shots) // columns)
    pixels = height or rows * 330 + 140
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_yaxes="all",  # type: ignore[arg-type]
        horizontal_spacing=0.11 if columns > 1 else 0,
        vertical_spacing=0 if rows == 1 else min(0.5, 64 / max(pixels - 140, 1)),
        subplot_titles=[shots_name(n) for n in shots],
        x_title="scale of the map added to the attention pattern (asinh axis; 0: unpatched)",
        y_title=metric_name(frame, metric),
    )
    figure.update_annotations(font_size=13)
    scales = sorted({float(s) for s in patched["scale"]} | {0.0})
    ends = (position(scales[0]), position(scales[-1]))
    room = 0.03 * ((ends[1] - ends[0]) or 1.0)
    ends = (ends[0] - room, ends[1] + room)
    count = tasks_averaged(frame.groupby(["n_shots", "map"])["task"].nunique())
    said = "" if count is None else f"<br>{count}"
    low, high = _limits(mean[metric], metric)
    for i, own in enumerate(shots):
        where: dict[str, Any] = {"row": i // columns + 1, "col": i % columns + 1}
        _add_unpatched(figure, unpatched, own, ends, (low, high), metric, said, where)
        for kind in dict.fromkeys([k for k in _MAPS if k in set(patched["map"])]):
            curve = patched[(patched["map"] == kind) & (patched["n_shots"] == own)]
            if not curve.empty:
                figure.add_trace(_line(curve, kind, metric, said, first=i == 0), **where)
    finish(
        figure,
        title=with_subtitle(title, f"{subtitle_of(frame, count)} · lines across: unpatched"),
        width=width,
        height=pixels,
        template=template,
    )
    top, bottom = 100 if title is None else 122, 58
    figure.update_layout(
        plot_bgcolor=None,
        margin={"l": 72, "r": 74, "t": top, "b": bottom},
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1 + 24 / max(pixels - top - bottom, 1),
            "yanchor": "bottom",
        },
        title_y=1 - 14 / pixels,
        title_yanchor="top",
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
    return math.asinh(scale / _LINEAR)


def tick_scales(scales: Sequence[float]) -> list[float]:
    """Choose which of the scales are labelled: as many as stay apart, round ones first."""
    span = (position(max(scales)) - position(min(scales))) or 1.0
    wanted = [0.0, min(scales), max(scales), -30.0, 1.0, -10.0, -1.0, -4.0, -60.0, 3.0]
    kept: list[float] = []
    for scale in [s for s in wanted if s in scales] + sorted(scales, key=abs, reverse=True):
        if all(abs(position(scale) - position(other)) >= 0.085 * span for other in kept):
            kept.append(scale)
    return sorted(kept)


def _line(curve: Any, kind: str, metric: str, said: str, *, first: bool) -> go.Scatter:
    name, colour, symbol = _MAPS[kind]
    scales = [float(s) for s in curve["scale"]]
    paper = [s == _PAPER[kind] for s in scales]
    return go.Scatter(
        x=[position(s) for s in scales],
        y=curve[metric].to_numpy(float),
        customdata=scales,
        text=[scale_name(s) + " (the paper's)" * (s == _PAPER[kind]) for s in scales],
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
        hovertemplate=(f"<b>{name}</b>, scale %{{text}}<br>{_value(metric)}{said}<extra></extra>"),
    )


def _add_unpatched(
    figure: Any,
    unpatched: Mapping[int, float],
    own: int,
    ends: tuple[float, float],
    limits: tuple[float, float],
    metric: str,
    said: str,
    where: dict[str, Any],
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
                hovertemplate=f"<b>{name}</b><br>{_value(metric)}{said}<extra></extra>",
            ),
            **where,
        )
        figure.add_annotation(
            x=ends[1],
            y=y,
            text=f"<b>{shots_name(n)}</b>" if mine else shots_name(n),
            showarrow=False,
            xanchor="left",
            xshift=3,
            font={"size": 11, "color": _LINES},
            **where,
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


def _value(metric: str) -> str:
    return "logit difference %{y:.3g}" if metric == "logit_diff" else "accuracy %{y:.1%}"


def _limits(values: Any, metric: str) -> tuple[float, float]:
    if metric != "logit_diff":
        return -0.02, 1.02
    low, high = float(values.min()), float(values.max())
    room = 0.04 * ((high - low) or 1.0)
    return low - room, high + room
