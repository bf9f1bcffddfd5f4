"""The scale that was found: the loss of a patch, or the target's probability, against its scale.

Scales of both signs and five orders of magnitude are drawn at

    x(s) = asinh(s / 0.03)       near 0 in proportion to s, far from 0 to the logarithm of |s|

on an axis whose ticks are labelled with the scales themselves; every scale tried has a tick.
"""

from __future__ import annotations

from typing import Literal

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from ra_lens.errors import one_of
from ra_lens.figures.style import Layout, finish
from ra_lens.scales import PAPER_SCALE, BestScale, axis_position, axis_ticks
from ra_lens.text import scale_name

LINEAR = 0.03
"""Scales below it are spaced in proportion, scales above it by their logarithm."""

FIRST_TICKS = (0.0, -30.0, -1000.0, -100.0, -1.0, -0.1, 1.0, -10.0, -3000.0, 3.0)

_LINE, _BEST, _PAPER = "#d55e00", "#b2182b", "#4b5563"


def scale_curve(
    found: BestScale,
    *,
    metric: Literal["loss", "probability"] = "loss",
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw what a patch does against its scale, with the best scale and the paper's marked.

    Args:
        found: From `best_scale`, of one prompt or several.
        metric: The `"loss"`, or the target's `"probability"`: of several prompts the mean, with a
            thin line for each prompt behind it where there are at most 50.
        **layout: `title`, above the figure (default: only a line that says what was patched);
            `width` and `height` in pixels (default: as wide as its container, and 360); `template`
            of plotly, for this figure only.

    Returns:
        A figure whose last three traces are the curve, the paper's scale (if it was tried) and the
        best one; `customdata` are the scales, `x` is where they are drawn.

    Raises:
        BadInput: an unknown `metric`.
    """
    one_of("metric", metric, ("loss", "probability"))
    values = found.loss_per_prompt if metric == "loss" else found.probability
    n = len(values)
    figure = go.Figure()
    for i, row in enumerate(values.tolist() if 1 < n <= 50 else []):
        figure.add_trace(_curve(found, row, f"prompt {i}", thin=True))
    mean: Float[Tensor, "scale"] = values.mean(dim=0)
    label = {"loss": "loss", "probability": "p(target)"}[metric]
    figure.add_trace(_curve(found, mean.tolist(), label + " (mean)" * (n > 1)))
    paper = PAPER_SCALE.get(found.kind)
    marks = [(paper, f"the paper’s {scale_name(paper)}", _PAPER, "circle-open")] if paper else []
    marks.append((found.scale, f"best, {scale_name(found.scale)}", _BEST, "circle"))
    for scale, name, colour, symbol in marks:
        if scale in found.scales:
            figure.add_trace(
                go.Scatter(
                    x=[axis_position(scale, LINEAR)],
                    y=[float(mean[found.scales.index(scale)])],
                    customdata=[scale],
                    mode="markers",
                    name=name,
                    marker={"size": 13, "color": colour, "symbol": symbol, "line": {"width": 2}},
                    hovertemplate=f"<b>{name}</b><br>{label} %{{y:.4g}}<extra></extra>",
                )
            )
    unpatched = float(mean[found.scales.index(0.0)])
    figure.add_hline(y=unpatched, line={"color": _PAPER, "width": 1.2, "dash": "dot"})
    what = "RA" if found.kind == "ra" else f"The {found.kind}"
    finish(
        figure,
        layout,
        height=360,
        above=(66, 88),
        subtitle=f"{what} added to the {found.at} of {n} prompt{'s' * (n != 1)}"
        " · line across: unpatched",
        plot_bgcolor=None,
        margin={"l": 72, "r": 20, "b": 58},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    ticks = axis_ticks(found.scales, FIRST_TICKS, linear=LINEAR)
    figure.update_xaxes(
        title="scale of the map added (asinh axis; 0: unpatched)",
        tickmode="array",
        tickvals=[axis_position(scale, LINEAR) for scale in ticks],
        ticktext=[scale_name(scale) for scale in ticks],
        tickangle=0,
        ticks="outside",
        ticklen=6,
        minor={
            "tickvals": [axis_position(scale, LINEAR) for scale in found.scales],
            "ticks": "outside",
            "ticklen": 3,
        },
    )
    title = {"loss": "−log p(target), mean over its tokens", "probability": "p(target)"}[metric]
    figure.update_yaxes(title=title, rangemode="tozero")
    return figure


def _curve(found: BestScale, values: list[float], name: str, *, thin: bool = False) -> go.Scatter:
    return go.Scatter(
        x=[axis_position(scale, LINEAR) for scale in found.scales],
        y=values,
        customdata=list(found.scales),
        text=list(map(scale_name, found.scales)),
        mode="lines" if thin else "lines+markers",
        name=name,
        showlegend=not thin,
        line={"color": _LINE, "width": 0.8 if thin else 2},
        opacity=0.35 if thin else 1,
        marker={"size": 5},
        hovertemplate=f"<b>scale %{{text}}</b><br>{name} %{{y:.4g}}<extra></extra>",
    )
