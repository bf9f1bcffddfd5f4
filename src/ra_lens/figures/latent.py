"""Queries and keys of a head in two dimensions, and where a step of descent moves them.

The paper's figure 3b. The plane is that of `ra_lens.latent`: the first two principal components of
the head's queries and keys together. Lines join the pairs with the largest |R|: red where descent
raises their product q·k, so that the query attends more to the key, blue where it lowers it.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from typing_extensions import Unpack

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.figures.style import PULL, PUSH, Layout, finish, plotly_text, read_size
from ra_lens.head_maps import Cell
from ra_lens.head_names import Head
from ra_lens.latent import Drawing, LatentSpace, latent_space_of, lay_out
from ra_lens.latent.layout import FONT, Dot
from ra_lens.latent.said import said_of_arrows, said_of_plane, said_of_sharing
from ra_lens.numbers import Real, Whole, real_or_none
from ra_lens.text import label

QUERY, KEY = "#d97706", "#7b6cc4"
"""Of the markers: to be seen on white and on black, and no colours of R."""
_LEFT, _RIGHT, _BELOW, _ABOVE = 46, 12, 44, 66


def latent_space(
    ra: RACache,
    head: Head,
    *,
    k: Whole = 8,
    step: Real | None = None,
    example: Whole = 0,
    max_tokens: Whole | None = 48,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw a head's queries and keys in the plane in which they differ most, and their steps.

    Args:
        ra: A cache of `run_with_ra(..., vectors=True)`. Without gradients (`vectors=["query",
            "key"]`) there are no arrows.
        head: `"L2H3"`, `(layer, head)` or a `HeadScore`.
        k: So many of the query–key pairs with the largest |R| are joined. 0: none.
        step: Size of the step of descent: arrows are −step·δ_q and −step·δ_k, in the units of the
            plane. None: queries and keys each have their own, by which the longest arrow is a sixth
            of the width; the figure says which.
        example: Which example.
        max_tokens: A longer prompt shows its last so many tokens, and the plane is theirs. None:
            all of them.
        **layout: `title`, above the figure (default: none); `width` in pixels, by which labels are
            placed (default: 760); `height` (default: by what is shown); `template` of plotly, for
            this figure only.

    Returns:
        A figure with a line per pair, the strongest last, named `·of (8) → ·tomato (4)`, then the
        traces `queries` and `keys`, whose `customdata` is (position, length, length of δ). Arrows
        are annotations named `step`. Both axes have one scale, and say which share of the variance
        they show. Labels that find no room are left out; pointing at a marker tells its token.

    Raises:
        BadInput: no such head or example, `k` below 0, a step that is not positive, or vectors that
            are not finite.
        NotStored: the queries and keys were not kept, or the maps.
    """
    step = real_or_none("step", step)
    if step is not None and step <= 0:
        raise BadInput(f"found step={step}; give a positive number, or None.")
    space = latent_space_of(ra, head, k=k, example=example, max_tokens=max_tokens)
    wide = read_size(layout)[0] or 760
    drawing = lay_out(space, width=max(200.0, float(wide - _LEFT - _RIGHT)), step=step)
    figure = go.Figure()
    for cell in reversed(space.pairs):
        figure.add_trace(_line(space, drawing, cell))
    figure.add_trace(_zero(space))
    for dots, colour, symbol in (
        (drawing.queries, QUERY, "circle"),
        (drawing.keys, KEY, "square"),
    ):
        figure.add_trace(_markers(space, dots, colour, symbol))
        for dot in dots:
            _annotate(figure, drawing, dot, colour)
    above = _ABOVE + 22 * (layout.get("title") is not None)
    finish(
        figure,
        layout,
        width=wide,
        height=drawing.height + _BELOW + above,
        subtitle=_subtitle(space, drawing, step),
        showlegend=False,
        hovermode="closest",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": _LEFT, "r": _RIGHT, "b": _BELOW, "t": above, "autoexpand": False},
    )
    (left, top), (right, bottom) = (
        drawing.in_plane(corner) for corner in ((0.0, 0.0), (drawing.width, drawing.height))
    )
    axis: dict[str, Any] = {
        "zeroline": False,
        "title_font": {"size": 11},
        "tickfont": {"size": 10},
        "title_standoff": 4,
        "nticks": 6,
    }
    first, second = said_of_plane(space)
    figure.update_xaxes(**axis, range=[left, right], title_text=first)
    figure.update_yaxes(**axis, range=[bottom, top], title_text=second, scaleanchor="x")
    return figure


def _subtitle(space: LatentSpace, drawing: Drawing, step: float | None) -> str:
    lines = [
        f"<b>{space.maps.label}</b>: <span style='color:{QUERY}'>●</span> queries, "
        f"<span style='color:{KEY}'>■</span> keys"
    ]
    if space.pairs:
        lines[0] += (
            f"; largest |R|: descent <span style='color:rgb{PULL}'>raises q·k</span>, "
            f"<span style='color:rgb{PUSH}'>lowers it</span>"
        )
    lines.append(said_of_arrows(space, drawing, step))
    shared = said_of_sharing(space)
    if shared and drawing.times[1]:
        lines.append(shared)
    return "<br>".join(lines)


def _line(space: LatentSpace, drawing: Drawing, cell: Cell) -> go.Scatter:
    share = abs(cell.ra) / (space.maps.limit or 1.0)
    red, green, blue = PULL if cell.ra < 0 else PUSH
    query, key = (
        drawing.in_plane(dots[at].at)
        for dots, at in (
            (drawing.queries, cell.query - space.queries.first),
            (drawing.keys, cell.key - space.keys.first),
        )
    )
    told = (
        f"<b>%{{fullData.name}}</b><br>−R = {-cell.ra:+.3g}<br>A = {cell.pattern:.3g}"
        "<extra></extra>"
    ).replace("= -", "= −")
    steps = [i / 12 for i in range(13)]  # for the pointer to find
    return go.Scatter(
        x=[query[0] + s * (key[0] - query[0]) for s in steps],
        y=[query[1] + s * (key[1] - query[1]) for s in steps],
        mode="lines",
        line={
            "color": f"rgba({red},{green},{blue},{0.35 + 0.5 * share:.2f})",
            "width": 0.8 + 3.2 * share,
        },
        name=_pair_name(space, cell),
        hovertemplate=told,
    )


def _pair_name(space: LatentSpace, cell: Cell) -> str:
    from_, to = space.maps.query_token(cell), space.maps.key_token(cell)
    query, key = (plotly_text(label(token)) for token in (from_, to))
    return f"{query} ({cell.query}) → {key} ({cell.key})"


def _zero(space: LatentSpace) -> go.Scatter:
    return go.Scatter(
        x=[float(space.origin[0])],
        y=[float(space.origin[1])],
        mode="markers",
        marker={"symbol": "cross-thin", "size": 9, "line": {"width": 1.5, "color": "#8b949e"}},
        name="zero",
        hovertemplate="the vector 0<extra></extra>",
    )


def _markers(space: LatentSpace, dots: tuple[Dot, ...], colour: str, symbol: str) -> go.Scatter:
    is_query = symbol == "circle"
    side, word = (space.queries, "query") if is_query else (space.keys, "key")
    lengths = side.steps if side.steps is not None else [float("nan")] * len(side.tokens)
    told = f"<b>%{{text}}</b> (%{{customdata[0]}}), {word}<br>length %{{customdata[1]:.3g}}"
    if side.steps is not None:
        told += "<br>length of δ %{customdata[2]:.3g}"
    return go.Scatter(
        x=side.at[:, 0].tolist(),
        y=side.at[:, 1].tolist(),
        mode="markers",
        marker={"symbol": symbol, "size": 8, "color": colour},
        text=[plotly_text(label(token)) for token in side.tokens],
        customdata=[
            [side.first + dot.index, float(side.lengths[dot.index]), float(lengths[dot.index])]
            for dot in dots
        ],
        name="queries" if is_query else "keys",
        hovertemplate=f"{told}<extra></extra>",
    )


def _annotate(figure: go.Figure, drawing: Drawing, dot: Dot, colour: str) -> None:
    x, y = drawing.in_plane(dot.at)
    if dot.arrow is not None:
        to_x, to_y = drawing.in_plane(dot.arrow)
        figure.add_annotation(
            x=to_x, y=to_y, ax=x, ay=y, axref="x", ayref="y", showarrow=True, text="",
            arrowhead=2, arrowsize=1, arrowwidth=1.8, arrowcolor=colour, name="step",
        )  # fmt: skip
    if dot.label is None:
        return
    across, down = (dot.label.middle[i] - dot.at[i] for i in (0, 1))
    figure.add_annotation(
        x=x, y=y, text=plotly_text(dot.label.text), font={"size": FONT}, name=dot.side,
        showarrow=dot.label.far, arrowhead=0, arrowwidth=0.6, arrowcolor="#8b949e", standoff=5,
        borderpad=0,
        **({"ax": across, "ay": down} if dot.label.far else {"xshift": across, "yshift": -down}),
    )  # fmt: skip
