"""Traced paths as a figure: tokens from left to right, a line per path."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from typing_extensions import Unpack

from ra_lens.errors import BadInput
from ra_lens.figures.style import Layout, finish, plotly_text
from ra_lens.numbers import Whole, whole
from ra_lens.paths.result import TracedPath, TraceResult, nodes_of, step_text
from ra_lens.text import label

# Okabe and Ito's, without the two lightest; told apart by colour-blind eyes.
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_APART = 0.07


def path_diagram(
    trace: TraceResult,
    *,
    n_paths: Whole = 5,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw the best paths of a trace; `trace.save_html` makes a page that can be explored.

    Across layers, rows are layers, the embedding at the bottom: a line that rises straight is a
    token that keeps what it has, a slanted one a head (named beside it) that moves something.
    Through one layer, rows are steps, the token traced from at the top.

    Args:
        trace: From `trace_paths` or `ra_lens.paths.trace_layers`.
        n_paths: How many of its paths, the best first.
        **layout: `title`, above the figure (default: none); `width` and `height` in pixels
            (default: as wide as its container, and by the number of rows); `template` of plotly,
            for this figure only.

    Returns:
        A figure with a line per path, the best last and so on top, named by its rank and score.

    Raises:
        BadInput: `n_paths` below 1, or a trace without paths.
    """
    n_paths = whole("n_paths", n_paths)
    if n_paths < 1:
        raise BadInput(f"found n_paths={n_paths}; give the number of paths to draw, at least 1.")
    beams = trace.beams[:n_paths]
    if not beams:
        raise BadInput("found a trace without paths; there is nothing to draw.")
    figure = go.Figure()
    for rank in reversed(range(len(beams))):
        figure.add_trace(_line(trace, beams[rank], rank, _shift(rank, len(beams))))
    for rank in reversed(range(len(beams))) if trace.is_layered else ():
        _name_heads(figure, trace, beams[rank], rank, len(beams))
    top = max(max(_rows(trace, beam)) for beam in beams)
    finish(
        figure,
        layout,
        height=150 + 70 * top,
        above=(40, 84),
        plot_bgcolor=None,
        hovermode="closest",
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "traceorder": "reversed"},
    )
    names = [plotly_text(label(token, 14)) for token in trace.tokens]
    figure.update_xaxes(
        tickmode="array",
        tickvals=list(range(trace.seq_len)),
        ticktext=names,
        tickangle=-90,
        range=[-0.5, trace.seq_len - 0.5],
        zeroline=False,
        automargin=True,
    )
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(range(top + 1)),
        ticktext=_row_names(trace, top),
        range=[-0.3, top + 0.3],
        zeroline=False,
        automargin=True,
    )
    return figure


def _rows(trace: TraceResult, beam: TracedPath) -> list[int]:
    """Row of each node of a path, the target's first."""
    if trace.is_layered:
        order = [*trace.layers, trace.layers[-1] + 1]
        return [order.index(layer) for layer, _ in nodes_of(trace, beam)]
    longest = max(len(other.steps) for other in trace.beams)
    return [longest - i for i in range(len(beam.positions))]


def _row_names(trace: TraceResult, top: int) -> list[str]:
    if not trace.is_layered:
        return [f"{top - row} step{'s' * (top - row != 1)} back" for row in range(top)] + ["target"]
    return [f"before layer {layer}" for layer in trace.layers] + ["after the last"]


def _shift(rank: int, n: int) -> float:
    return _APART * (rank - (n - 1) / 2)


def _line(trace: TraceResult, beam: TracedPath, rank: int, shift: float) -> go.Scatter:
    told = [step_text(trace, step) for step in beam.steps]
    told = [*told, told[-1] if told else "nothing moved"]
    return go.Scatter(
        x=[position + shift for position in beam.positions],
        y=_rows(trace, beam),
        mode="lines+markers",
        line={"color": _COLOURS[rank % len(_COLOURS)], "width": 4 if rank == 0 else 2.5},
        marker={"size": 8 if rank == 0 else 6},
        name=f"{rank + 1}: {beam.score_norm:.3g}".replace("-", "−"),
        text=[plotly_text(one) for one in told],
        hovertemplate="%{text}<extra></extra>",
    )


def _name_heads(figure: Any, trace: TraceResult, beam: TracedPath, rank: int, n: int) -> None:
    # Each path names its heads at another height, so that lines beside each other keep theirs.
    along = (rank + 1) / (n + 1)
    for step, row in zip(beam.steps, _rows(trace, beam)[1:], strict=True):
        if step.moves:
            figure.add_annotation(
                x=step.key + (step.query - step.key) * along + _shift(rank, n),
                y=row + along,
                text=f"L{step.layer}H{step.head}",
                showarrow=False,
                font={"size": 11, "color": _COLOURS[rank % len(_COLOURS)]},
                bgcolor="rgba(255,255,255,0.85)",
            )
