"""What heads look at, and where the gradient moves it: token × token maps.

Rows are queries, columns keys. Cells that a query cannot look at are grey, never the colour of 0; a
number that is not one (NaN, infinite) where there should be one is grey with a ×. A cell costs
about 18 bytes in HTML; above 512 tokens the other map and the rank are left out of what hovering
tells, which makes it about 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from typing_extensions import Unpack

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.figures.style import (
    ATTENTION,
    DIVERGING,
    Layout,
    distinct,
    finish,
    plotly_text,
    read_size,
    ticks,
)
from ra_lens.head_maps import HeadMaps, head_of_example, read_heads
from ra_lens.head_names import Head, Heads
from ra_lens.numbers import Real, Whole, real_or_none, whole_or_none
from ra_lens.text import label

Sign = Literal["descent", "gradient"]
Panel = Literal["ra", "pattern"]

_BAR = {
    "descent": "−R   red: descent wants more, blue: less",
    "gradient": "R   red: descent wants less, blue: more",
}
R_NAMES = {"descent": "−R", "gradient": "R"}
_TOLD = 512
"""Above so many tokens hovering tells one map only."""


def head_map(
    ra: RACache,
    head: Head,
    *,
    kind: Panel = "ra",
    example: Whole = 0,
    sign: Sign = "descent",
    limit: Real | None = None,
    max_tokens: Whole | None = 256,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw one map of one head.

    Args:
        ra: A cache that holds `ra` and `pattern`.
        head: `"L2H3"`, `(layer, head)` or a `HeadScore`.
        kind: `"ra"`, or `"pattern"` for the forward attention.
        example: Which example.
        sign: `"descent"` shows −R, where gradient descent moves attention; `"gradient"` shows R.
        limit: |R| at the ends of the colour scale. Default: the largest in this map.
        max_tokens: A longer prompt shows its last so many tokens. None: all of them.
        **layout: `title`, above the figure (default: none); `width` and `height` in pixels
            (default: as wide as its container, and by the number of tokens); `template` of plotly,
            for this figure only.

    Returns:
        A figure with one heatmap; its `z` is the map, NaN where a query cannot look.

    Raises:
        BadInput: no such head or example, or an unknown `kind` or `sign`.
        NotStored: the maps were not kept.
    """
    check(kind, sign)
    most = real_or_none("limit", limit)
    maps = head_of_example(ra, head, example=example, max_tokens=max_tokens)
    bar = {"orientation": "h", "x": 0.5, "len": 1.0, "y": 1.01, "yanchor": "bottom"}
    pixels = read_size(layout)[1] or _pixels(len(maps.tokens)) + 150
    limit = _limit([maps]) if most is None else most
    figure = go.Figure()
    _draw(figure, maps, kind, sign, limit, bar, room=int(pixels - 150) // 12)
    _title_axes(figure)
    finish(figure, layout, height=pixels)
    return figure


def head_maps(
    ra: RACache,
    heads: Heads,
    *,
    kinds: Sequence[Panel] = ("pattern", "ra"),
    columns: Whole | None = None,
    example: Whole = 0,
    sign: Sign = "descent",
    shared_scale: bool = True,
    max_tokens: Whole | None = 256,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw maps of several heads: forward attention beside Reversed Attention, or small multiples.

    Args:
        ra: A cache that holds `ra` and `pattern`.
        heads: The heads, such as `ra.top_heads(6)`, `["L2H3", "L0H1"]` or `(layer, head)` pairs;
            one or several.
        kinds: Which maps of each head; `["ra"]` makes small multiples of RA alone.
        columns: How many maps stand beside each other. Default: the kinds of one head, or of one
            kind three.
        example: Which example.
        sign: `"descent"` shows −R, where gradient descent moves attention; `"gradient"` shows R.
        shared_scale: Colour all heads' RA on one scale, so that they compare; False: each its own.
        max_tokens: A longer prompt shows its last so many tokens. None: all of them.
        **layout: `title`, above the figure (default: none); `width` and `height` in pixels
            (default: as wide as its container, and by the numbers of heads and tokens); `template`
            of plotly, for this figure only.

    Returns:
        A figure with a heatmap per head and kind, named `L5H3 pattern` and `L5H3 ra`.

    Raises:
        BadInput: no heads or kinds, no such head or example, or an unknown kind or `sign`.
        NotStored: the maps were not kept.
    """
    columns = whole_or_none("columns", columns)
    if not kinds or (columns is not None and columns < 1):
        raise BadInput(
            f"found kinds={list(kinds)}, columns={columns}; give at least one kind and one column."
        )
    for one in kinds:
        check(one, sign)
    shown = [
        head_of_example(ra, head, example=example, max_tokens=max_tokens)
        for head in read_heads(ra, heads)
    ]
    panels: list[tuple[HeadMaps, Panel]] = [(maps, kind) for maps in shown for kind in kinds]
    across = min(columns or (len(kinds) if len(kinds) > 1 else 3), len(panels))
    down = -(-len(panels) // across)
    what: dict[Panel, str] = {"pattern": "attention", "ra": R_NAMES[sign]}
    # One bar says it all where every map of a kind has the same scale.
    apart = not shared_scale or "pattern" in kinds
    each = _pixels(max(len(maps.tokens) for maps in shown)) if across < 3 else 280
    beside = min(0.1 if apart else 0.03, 0.3 / across)
    if apart and across == 2:
        beside = 0.16
    figure = make_subplots(
        rows=down,
        cols=across,
        horizontal_spacing=beside,
        vertical_spacing=0 if down == 1 else min(0.12, 110 / (down * (each + 110)), 0.9 / down),
        subplot_titles=[f"{maps.label} {what[kind]}" for maps, kind in panels],
    )
    figure.update_annotations(font_size=13)
    for i, (maps, kind) in enumerate(panels):
        row, col = i // across + 1, i % across + 1
        axes: Any = figure.get_subplot(row, col)
        (_, right), (low, high) = axes.xaxis.domain, axes.yaxis.domain
        bar = {"len": high - low, "y": (low + high) / 2, "x": right + 0.01}
        if not apart:
            bar = {"len": 1.0, "y": 0.5, "x": 1.01} if i == 0 else None
        limit = _limit(shown if shared_scale else [maps])
        room, most = each // 12, 60 // across
        _draw(figure, maps, kind, sign, limit, bar, room=room, most=most, row=row, col=col)
        if col > 1 and maps.tokens == panels[i - 1][0].tokens:  # they stand on the left
            figure.update_yaxes(showticklabels=False, row=row, col=col)
    _title_axes(figure, row=down if len(panels) == down * across else down - 1 or 1, col=1)
    finish(figure, layout, height=down * (each + 110) + 20, above=(36, 76))
    return figure


def check(kind: str, sign: str) -> None:
    """Refuse what is no map and no sign."""
    if sign not in _BAR:
        raise BadInput(f"found sign={sign!r}; give 'descent' (shows −R) or 'gradient' (shows R).")
    if kind not in ("ra", "pattern"):
        raise BadInput(f"found kind={kind!r}; give 'ra' or 'pattern'.")


def signed(maps: HeadMaps, sign: Sign) -> Float[np.ndarray, "query key"]:
    """Give R as it is shown."""
    return -maps.ra if sign == "descent" else maps.ra


def _limit(shown: Sequence[HeadMaps]) -> float:
    return max(maps.limit for maps in shown) or 1.0


def _pixels(n_tokens: int) -> int:
    return max(240, min(640, 14 * n_tokens))


def _draw(
    figure: go.Figure,
    maps: HeadMaps,
    kind: Panel,
    sign: Sign,
    limit: float,
    bar: dict[str, Any] | None,
    *,
    room: int,
    most: int = 30,
    **where: Any,
) -> None:
    """Add a map with its labels, `room` of them at most, and `most` beside each other."""
    r = signed(maps, sign)
    shown, other = (r, maps.pattern) if kind == "ra" else (maps.pattern, r)
    # Distinct by position, so that a token that occurs twice has two rows.
    rows = distinct(maps.tokens, first=maps.first)
    columns = distinct(maps.key_tokens, first=maps.first_key)
    names = (R_NAMES[sign], "A") if kind == "ra" else ("A", R_NAMES[sign])
    told = [f"<b>{maps.label}</b>", "from %{y}", "to %{x}", f"{names[0]} = %{{z:.3g}}"]
    more: Any = None
    if max(shown.shape) <= _TOLD:
        more = np.stack([other, maps.ranks_in_row()], axis=-1).astype(np.float32)
        told.append(f"{names[1]} = %{{customdata[0]:.3g}}")
        told.append("|R| has rank %{customdata[1]} in its row")
    scale: dict[str, Any] = {"zmin": 0, "zmax": 1, "colorscale": ATTENTION}
    if kind == "ra":
        scale = {"zmin": -limit, "zmid": 0, "zmax": limit, "colorscale": DIVERGING}
    gap = 1 if max(shown.shape) <= 40 else 0
    finite = np.isfinite(shown)
    heatmap = go.Heatmap(
        name=f"{maps.label} {kind}",
        z=np.where(finite, shown, np.nan).astype(shown.dtype),
        customdata=more,
        x=columns,
        y=rows,
        **scale,
        showscale=bar is not None,
        colorbar={
            "title": {
                "text": _BAR[sign] if kind == "ra" else "A   attention",
                "side": "top" if (bar or {}).get("orientation") == "h" else "right",
                "font": {"size": 11},
            },
            "thickness": 10,
            "outlinewidth": 0,
            "nticks": 5,
            "exponentformat": "e",
            "ypad": 0,
            **(bar or {}),
        },
        hoverongaps=False,
        hovertemplate=f"{'<br>'.join(told)}<extra></extra>",
        xgap=gap,
        ygap=gap,
    )
    figure.add_trace(heatmap, **where)
    broken = np.argwhere(~finite & maps.reachable()).tolist()
    if broken:  # crosses where a number should be and is none
        crosses = go.Scatter(
            x=[columns[j] for _, j in broken],
            y=[rows[i] for i, _ in broken],
            mode="markers",
            marker={"symbol": "x", "size": 7, "color": "#1f2937"},
            name=f"{maps.label} {kind}, not a number",
            showlegend=False,
            hovertemplate="from %{y}<br>to %{x}<br>not a number<extra></extra>",
        )
        figure.add_trace(crosses, **where)
    axis: dict[str, Any] = {
        "type": "category",
        "showgrid": False,
        "zeroline": False,
        "automargin": True,
        "tickfont": {"size": 11},
        "constrain": "domain",
        **where,
    }
    queries, keys = (
        [plotly_text(label(token, 14)) for token in side] for side in (maps.tokens, maps.key_tokens)
    )
    # Widths are not known here; so many fit beside each other in half a page.
    figure.update_xaxes(**axis, **ticks(columns, keys, min(room, most)), tickangle=-90)
    figure.update_yaxes(**axis, **ticks(rows, queries, room), autorange="reversed")


def _title_axes(figure: go.Figure, **where: Any) -> None:
    small: dict[str, Any] = {"title_font": {"size": 11}, "title_standoff": 4, **where}
    figure.update_xaxes(title_text="to (key)", **small)
    figure.update_yaxes(title_text="from (query)", **small)
