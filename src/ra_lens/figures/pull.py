"""Which query is pulled to which key: the strongest cells of a head's map, as lines.

The gradient of the loss with respect to a query is the sum of its row of R times the keys (R holds
the softmax scale). A step of descent therefore moves a query towards the keys where R < 0 and away
from those where R > 0, the more the larger |R|: red lines pull, blue lines push.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from typing_extensions import Unpack

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.figures.style import PULL, PUSH, Layout, finish, plotly_text
from ra_lens.head_maps import Cell, HeadMaps, head_of_example
from ra_lens.head_names import Head
from ra_lens.numbers import Whole, whole
from ra_lens.text import label

_LEFT, _RIGHT = 0.0, 1.0
_LABEL, _BESIDE = 16, 124  # characters, and pixels of them


def query_key_pull(
    ra: RACache,
    head: Head,
    *,
    k: Whole = 12,
    example: Whole = 0,
    max_tokens: Whole | None = 48,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw the strongest cells of a head as lines from queries to the keys they are moved to.

    Args:
        ra: A cache that holds `ra` and `pattern`.
        head: `"L2H3"`, `(layer, head)` or a `HeadScore`.
        k: So many of the cells with the largest |R|.
        example: Which example.
        max_tokens: A longer prompt shows its last so many tokens. None: all of them.
        **layout: `title`, above the figure (default: none); `width` and `height` in pixels
            (default: as wide as its container, and by the number of tokens); `template` of plotly,
            for this figure only.

    Returns:
        A figure with a line per cell, the strongest last, named `·Italy (8) → ·France (2)`; red
        where descent pulls the query to the key (R < 0), blue where it pushes it away; its width
        and opacity grow with |R|. Queries are on the left, keys on the right.

    Raises:
        BadInput: no such head or example, or `k` below 1.
        NotStored: the maps were not kept.
    """
    k = whole("k", k)
    if k < 1:
        raise BadInput(f"found k={k}; give the number of cells to draw, at least 1.")
    maps = head_of_example(ra, head, example=example, max_tokens=max_tokens)
    cells = maps.strongest(k)
    figure = go.Figure()
    for cell in reversed(cells):
        figure.add_trace(_line(maps, cell))
    used = {"query": {c.query for c in cells}, "key": {c.key for c in cells}}
    _tokens(figure, maps.tokens, maps.first, used["query"], _LEFT, "right")
    _tokens(figure, maps.key_tokens, maps.first_key, used["key"], _RIGHT, "left")
    rows = max(len(maps.tokens), len(maps.key_tokens))
    finish(
        figure,
        layout,
        height=90 + max(16, min(24, 900 // rows)) * rows,
        above=(40, 80),
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        hovermode="closest",
        # Labels take as many pixels in a narrow figure as in a wide one.
        margin={"l": _BESIDE, "r": _BESIDE, "b": 12},
    )
    figure.update_xaxes(visible=False, range=[_LEFT, _RIGHT], fixedrange=True)
    figure.update_yaxes(visible=False, range=[rows - 0.4, -1.4], fixedrange=True)
    heads = (("query", _LEFT, "right"), ("key", _RIGHT, "left"))
    for text, x, side in heads:
        figure.add_annotation(
            x=x, y=-1, text=f"<b>{text}</b>", showarrow=False, xanchor=side,
            xshift=-10 if side == "right" else 10,
        )  # fmt: skip
    figure.add_annotation(
        x=0.5,
        y=-1,
        text=(
            f"{maps.label}: descent <span style='color:rgb{PULL}'>pulls the query to the key"
            f"</span>, <span style='color:rgb{PUSH}'>pushes it away</span>"
        ),
        showarrow=False,
        yshift=20,
        font={"size": 12},
    )
    return figure


def _line(maps: HeadMaps, cell: Cell) -> go.Scatter:
    share = abs(cell.ra) / (maps.limit or 1.0)
    red, green, blue = PULL if cell.moves == "more" else PUSH
    from_, to = cell.query - maps.first, cell.key - maps.first_key
    query = f"{plotly_text(label(maps.query_token(cell)))} ({cell.query})"
    key = f"{plotly_text(label(maps.key_token(cell)))} ({cell.key})"
    word = "pulled to" if cell.moves == "more" else "pushed from"
    told = (
        (
            f"<b>{query}</b> {word} <b>{key}</b><br>−R = {-cell.ra:+.3g}<br>A = {cell.pattern:.3g}"
            "<extra></extra>"
        )
        .replace("=-", "=−")
        .replace(" -", " −")
    )
    # An S-shaped way, with points on it for the pointer to find.
    steps = [i / 24 for i in range(25)]
    smooth = [s * s * (3 - 2 * s) for s in steps]
    return go.Scatter(
        x=[_LEFT + s * (_RIGHT - _LEFT) for s in steps],
        y=[from_ + s * (to - from_) for s in smooth],
        mode="lines",
        line={
            "color": f"rgba({red},{green},{blue},{0.4 + 0.6 * share:.2f})",
            "width": 1 + 6 * share,
        },
        name=f"{query} → {key}",
        hovertemplate=told,
    )


def _tokens(
    figure: Any, tokens: tuple[str, ...], first: int, used: set[int], x: float, side: str
) -> None:
    for i, token in enumerate(tokens):
        on = first + i in used
        name = plotly_text(label(token, _LABEL))
        figure.add_annotation(
            x=x,
            y=i,
            text=f"<b>{name}</b>" if on else name,
            showarrow=False,
            xanchor=side,
            xshift=-10 if side == "right" else 10,
            font={"size": 12, "color": None if on else "#8b949e"},
        )
