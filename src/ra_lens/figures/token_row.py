"""The prompt as text, each token shaded by one row of a head's map."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import get_colorscale, sample_colorscale
from rich.cells import cell_len
from typing_extensions import Unpack

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.figures.maps import LOSS_IF, Panel, Sign, check, loss_bar, of_kind, value_name
from ra_lens.figures.style import ATTENTION, DIVERGING, LOSS, Layout, finish, plotly_text, read_size
from ra_lens.head_maps import HeadMaps, head_of_example, largest
from ra_lens.head_names import Head
from ra_lens.numbers import Real, Whole, real_or_none, whole
from ra_lens.text import label, visible

_CHARACTER, _LINE, _MARGIN = 7.9, 26, 14
"""Pixels of a character of 13 px monospace type, of a line, and around the text."""

_OUT = "#8b949e"


def token_row(
    ra: RACache,
    head: Head,
    *,
    query: Whole = -1,
    kind: Panel = "ra",
    example: Whole = 0,
    sign: Sign = "descent",
    limit: Real | None = None,
    max_tokens: Whole | None = 512,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw the prompt as text, each token shaded by what one query's row has for it.

    Args:
        ra: A cache that holds `ra` and `pattern`; for `kind="cut"` `pattern_grad` too.
        head: `"L2H3"`, `(layer, head)` or a `HeadScore`.
        query: Position of the token whose row it is; negative counts from the end.
        kind: `"ra"`; `"pattern"` for the forward attention; `"knockout"` or `"cut"` for what
            blocking each edge alone would do to the loss: green where it rises, so that the answer
            needs the edge, brown where it falls.
        example: Which example.
        sign: Of R: `"descent"` shows −R, where gradient descent moves attention; `"gradient"`
            shows R.
        limit: Size of a value at the ends of the colour scale. Default: the largest in this row.
        max_tokens: A longer prompt shows its last so many tokens. None: all of them.
        **layout: `title`, above the figure (default: head, query and what is shown); `width` in
            pixels, by which lines are broken (default: 760); `height` (default: by the number of
            lines); `template` of plotly, for this figure only.

    Returns:
        A figure with one trace, a marker per token that can be attended to, whose `customdata` is
        (position, value shown, A). The query is framed; what it cannot attend to is grey.

    Raises:
        BadInput: no such head, example or query, or an unknown `kind` or `sign`.
        NotStored: the maps were not kept, or for `kind="cut"` not the gradient of the pattern.
    """
    check(kind, sign)
    given = real_or_none("limit", limit)
    maps = head_of_example(ra, head, example=example, max_tokens=max_tokens)
    row = _row_of(maps, whole("query", query))
    values = of_kind(ra, maps, kind, sign)[row]
    most = (largest(values) if given is None else given) or 1.0
    low, scale = -most, DIVERGING if kind == "ra" else LOSS
    if kind == "pattern":
        low, scale, most = 0.0, ATTENTION, 1.0
    wide = read_size(layout)[0] or 760
    name = value_name(kind, sign)
    unit, legend = "", ""
    if kind in LOSS_IF:
        unit, legend = f" {ra.loss_unit}", loss_bar(kind, ra.loss_unit)
    boxes = _set(maps, wide - 2 * _MARGIN)
    lines = 1 + max(line for line, _, _ in boxes)
    figure = go.Figure(_hover(maps, row, values, boxes, name, unit, legend, (low, most), scale))
    shades = _shades(values, low, most, scale)
    own = maps.key_tokens == maps.tokens and maps.first == maps.first_key
    reachable = maps.reachable()[row]
    for j, (line, left, length) in enumerate(boxes):
        there = bool(reachable[j])
        figure.add_shape(
            type="rect", x0=left, x1=left + length, y0=line - 0.38, y1=line + 0.38,
            fillcolor=shades[j] if there else "rgba(0,0,0,0)", layer="below",
            line={"color": "#1f2937", "width": 2 if own and j == row else 0},
            name="query" if own and j == row else "token",
        )  # fmt: skip
        figure.add_annotation(
            x=left + length / 2, y=line, showarrow=False,
            text=plotly_text(label(maps.key_tokens[j])),
            font={
                "family": "Menlo, Consolas, DejaVu Sans Mono, monospace", "size": 13,
                "color": _ink(shades[j]) if there else _OUT,
            },
        )  # fmt: skip
    asks = plotly_text(label(maps.tokens[row]))
    if layout.get("title") is None:
        layout["title"] = f"{maps.label}: {name} in the row of <b>{asks}</b> ({maps.first + row})"
    finish(
        figure,
        layout,
        width=wide,
        height=56 + _LINE * lines + 64,
        above=(44, 44),
        plot_bgcolor="rgba(0,0,0,0)",
        title_font_size=14,
        margin={"l": _MARGIN, "r": _MARGIN},
        hovermode="closest",
    )
    figure.update_xaxes(visible=False, range=[0, wide - 2 * _MARGIN], fixedrange=True)
    figure.update_yaxes(visible=False, range=[lines - 0.4, -0.6], fixedrange=True)
    return figure


def _row_of(maps: HeadMaps, query: int) -> int:
    n = maps.first + len(maps.tokens)
    row = (query + n if query < 0 else query) - maps.first
    if not 0 <= row < len(maps.tokens):
        raise BadInput(
            f"found query={query}; the tokens shown are {maps.first} to {n - 1}. Give one of them, "
            "or a larger max_tokens."
        )
    return row


def _set(maps: HeadMaps, wide: float) -> list[tuple[int, float, float]]:
    """Place the tokens in lines: line, left edge, width. A line ends after a newline as well."""
    boxes: list[tuple[int, float, float]] = []
    line, left = 0, 0.0
    for token in maps.key_tokens:
        text = visible(token)
        length = min(cell_len(text) * _CHARACTER + 6, float(wide))
        if left and left + length > wide:
            line, left = line + 1, 0.0
        boxes.append((line, left, length))
        left += length + 2
        if text.endswith("⏎"):
            line, left = line + 1, 0.0
    return boxes


def _shades(values: Any, low: float, high: float, scale: str) -> list[str]:
    shares = np.clip((np.nan_to_num(values) - low) / (high - low), 0, 1)
    sampled: Any = sample_colorscale(get_colorscale(scale), shares.tolist(), colortype="rgb")
    return list(sampled)


def _ink(colour: str) -> str:
    red, green, blue = (float(c) for c in colour.removeprefix("rgb(").rstrip(")").split(","))
    return "#14171b" if 0.3 * red + 0.59 * green + 0.11 * blue > 140 else "#ffffff"


def _hover(
    maps: HeadMaps,
    row: int,
    values: Any,
    boxes: list[tuple[int, float, float]],
    name: str,
    unit: str,
    legend: str,
    limits: tuple[float, float],
    scale: str,
) -> go.Scatter:
    shown = [j for j in range(len(boxes)) if np.isfinite(values[j])]
    return go.Scatter(
        x=[boxes[j][1] + boxes[j][2] / 2 for j in shown],
        y=[boxes[j][0] for j in shown],
        mode="markers",
        marker={
            "size": 18,
            "opacity": 0,
            "color": [float(values[j]) for j in shown],
            "cmin": limits[0],
            "cmax": limits[1],
            "colorscale": scale,
            "showscale": True,
            "colorbar": {
                "orientation": "h", "thickness": 8, "len": 0.5, "x": 0, "xanchor": "left",
                "y": 0, "yanchor": "top", "nticks": 5, "exponentformat": "e", "outlinewidth": 0,
                "tickfont": {"size": 10},
                "title": {"text": legend, "side": "bottom", "font": {"size": 11}},
            },
        },
        text=[plotly_text(label(maps.key_tokens[j])) for j in shown],
        customdata=[
            [maps.first_key + j, float(values[j]), float(maps.pattern[row, j])] for j in shown
        ],
        hovertemplate=(
            "<b>%{text}</b> (%{customdata[0]})<br>"
            f"{name} = %{{customdata[1]:.3g}}{unit}<br>A = %{{customdata[2]:.3g}}<extra></extra>"
        ),
        showlegend=False,
    )  # fmt: skip
