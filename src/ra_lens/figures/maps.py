"""What heads look at, where the gradient moves it, what cutting it would do: token × token maps.

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
    LOSS,
    Layout,
    distinct,
    finish,
    plotly_text,
    read_size,
    ticks,
)
from ra_lens.head_maps import HeadMaps, head_of_example, largest, read_heads
from ra_lens.head_names import Head, Heads
from ra_lens.numbers import Real, Whole, real_or_none, whole_or_none
from ra_lens.text import label

Sign = Literal["descent", "gradient"]
Panel = Literal["ra", "pattern", "knockout", "cut"]

_BAR = {
    "descent": "−R   red: descent wants more, blue: less",
    "gradient": "R   red: descent wants less, blue: more",
}
LOSS_IF: dict[Panel, str] = {"knockout": "loss if blocked", "cut": "loss if cut"}
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
        ra: A cache that holds `ra` and `pattern`; for `kind="cut"` `pattern_grad` too.
        head: `"L2H3"`, `(layer, head)` or a `HeadScore`.
        kind: `"ra"`; `"pattern"` for the forward attention; `"knockout"` or `"cut"` for what
            blocking each edge alone would do to the loss, in its unit (`RACache`): green where it
            rises, so that the answer needs the edge, brown where it falls.
        example: Which example.
        sign: Of R: `"descent"` shows −R, where gradient descent moves attention; `"gradient"`
            shows R.
        limit: Size of a value at the ends of the colour scale. Default: the largest in this map.
        max_tokens: A longer prompt shows its last so many tokens. None: all of them.
        **layout: `title`, above the figure (default: none); `width` and `height` in pixels
            (default: as wide as its container, and by the number of tokens); `template` of plotly,
            for this figure only.

    Returns:
        A figure with one heatmap; its `z` is the map, NaN where a query cannot look.

    Raises:
        BadInput: no such head or example, or an unknown `kind` or `sign`.
        NotStored: the maps were not kept, or for `kind="cut"` not the gradient of the pattern.
    """
    check(kind, sign)
    most = real_or_none("limit", limit)
    maps = head_of_example(ra, head, example=example, max_tokens=max_tokens)
    bar = {"orientation": "h", "x": 0.5, "len": 1.0, "y": 1.01, "yanchor": "bottom"}
    pixels = read_size(layout)[1] or _pixels(len(maps.tokens)) + 150
    values = of_kind(ra, maps, kind, sign)
    limit = (largest(values) or 1.0) if most is None else most
    figure = go.Figure()
    room = int(pixels - 150) // 12
    _draw(figure, maps, values, kind, sign, limit, bar, room=room, unit=ra.loss_unit)
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
        ra: A cache that holds `ra` and `pattern`; for the kind `"cut"` `pattern_grad` too.
        heads: The heads, such as `ra.top_heads(6)`, `["L2H3", "L0H1"]` or `(layer, head)` pairs;
            one or several.
        kinds: Which maps of each head, as in `head_map`; `["ra"]` makes small multiples of RA
            alone, `["pattern", "ra", "knockout"]` sets three beside each other.
        columns: How many maps stand beside each other. Default: the kinds of one head, or of one
            kind three.
        example: Which example.
        sign: Of R: `"descent"` shows −R, where gradient descent moves attention; `"gradient"`
            shows R.
        shared_scale: Colour all heads' maps of a kind on one scale, so that they compare; False:
            each its own. Attention has one scale in any case.
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
    panels: list[tuple[HeadMaps, Panel, Float[np.ndarray, "query key"]]] = [
        (maps, kind, of_kind(ra, maps, kind, sign)) for maps in shown for kind in kinds
    ]
    across = min(columns or (len(kinds) if len(kinds) > 1 else 3), len(panels))
    down = -(-len(panels) // across)
    what: dict[Panel, str] = {"ra": R_NAMES[sign], "pattern": "attention", **LOSS_IF}
    # One bar says it all where every map has the same scale.
    apart = not shared_scale or len(set(kinds)) > 1 or "pattern" in kinds
    each = _pixels(max(len(maps.tokens) for maps in shown)) if across < 3 else 280
    beside = min(0.1 if apart else 0.03, 0.3 / across)
    if apart and across == 2:
        beside = 0.16
    figure = make_subplots(
        rows=down,
        cols=across,
        horizontal_spacing=beside,
        vertical_spacing=0 if down == 1 else min(0.12, 110 / (down * (each + 110)), 0.9 / down),
        subplot_titles=[f"{maps.label} {what[kind]}" for maps, kind, _ in panels],
    )
    figure.update_annotations(font_size=13)
    for i, (maps, kind, values) in enumerate(panels):
        row, col = i // across + 1, i % across + 1
        axes: Any = figure.get_subplot(row, col)
        (_, right), (low, high) = axes.xaxis.domain, axes.yaxis.domain
        bar = {"len": high - low, "y": (low + high) / 2, "x": right + 0.01}
        if not apart:
            bar = {"len": 1.0, "y": 0.5, "x": 1.01} if i == 0 else None
        alike = [other for _, one, other in panels if one == kind] if shared_scale else [values]
        limit = max(map(largest, alike)) or 1.0
        _draw(
            figure,
            maps,
            values,
            kind,
            sign,
            limit,
            bar,
            unit=ra.loss_unit,
            room=each // 12,
            most=60 // across,
            row=row,
            col=col,
        )
        if col > 1 and maps.tokens == panels[i - 1][0].tokens:  # they stand on the left
            figure.update_yaxes(showticklabels=False, row=row, col=col)
    _title_axes(figure, row=down if len(panels) == down * across else down - 1 or 1, col=1)
    finish(figure, layout, height=down * (each + 110) + 20, above=(36, 76))
    return figure


def check(kind: str, sign: str) -> None:
    """Refuse what is no map and no sign."""
    if sign not in _BAR:
        raise BadInput(f"found sign={sign!r}; give 'descent' (shows −R) or 'gradient' (shows R).")
    if kind not in ("ra", "pattern", "knockout", "cut"):
        raise BadInput(f"found kind={kind!r}; give 'ra', 'pattern', 'knockout' or 'cut'.")


def of_kind(ra: RACache, maps: HeadMaps, kind: Panel, sign: Sign) -> Float[np.ndarray, "query key"]:
    """Give a head's map as it is shown: R with the sign asked for, others as they are.

    Raises:
        NotStored: the gradient of the pattern was not kept, which a cut is made from.
    """
    if kind == "ra":
        return -maps.ra if sign == "descent" else maps.ra
    if kind == "cut":
        # Where it is not there the cache raises, and says what it lacks.
        return ra["cut", maps.layer].numpy() if maps.cut is None else maps.cut
    return maps.pattern if kind == "pattern" else maps.knockout


def value_name(kind: Panel, sign: Sign) -> str:
    """Name a value where a cell is told."""
    names: dict[Panel, str] = {"ra": R_NAMES[sign], "pattern": "A", **LOSS_IF}
    return names[kind]


def loss_bar(kind: Panel, unit: str, *, line: str = "   ") -> str:
    """Title of a colour bar of changes of the loss; `line` stands between its two parts."""
    return f"{LOSS_IF[kind]} ({unit}){line}green: the answer needs it, brown: it is in the way"


def _pixels(n_tokens: int) -> int:
    return max(240, min(640, 14 * n_tokens))


def _draw(
    figure: go.Figure,
    maps: HeadMaps,
    shown: Float[np.ndarray, "query key"],
    kind: Panel,
    sign: Sign,
    limit: float,
    bar: dict[str, Any] | None,
    *,
    unit: str,
    room: int,
    most: int = 30,
    **where: Any,
) -> None:
    """Add a map with its labels, `room` of them at most, and `most` beside each other."""
    beside: Panel = "ra" if kind == "pattern" else "pattern"
    r = -maps.ra if sign == "descent" else maps.ra
    other = r if beside == "ra" else maps.pattern
    # Distinct by position, so that a token that occurs twice has two rows.
    rows = distinct(maps.tokens, first=maps.first)
    columns = distinct(maps.key_tokens, first=maps.first_key)
    of_loss = kind in ("knockout", "cut")
    value = f"%{{z:+.3g}} {unit}" if of_loss else "%{z:.3g}"
    told = [f"<b>{maps.label}</b>", "from %{y}", "to %{x}", f"{value_name(kind, sign)} = {value}"]
    more: Any = None
    if max(shown.shape) <= _TOLD:
        more = np.stack([other, maps.ranks_in_row()], axis=-1).astype(np.float32)
        told.append(f"{value_name(beside, sign)} = %{{customdata[0]:.3g}}")
        told.append("|R| has rank %{customdata[1]} in its row")
    scale: dict[str, Any] = {"zmin": 0, "zmax": 1, "colorscale": ATTENTION}
    if kind != "pattern":
        colours = LOSS if of_loss else DIVERGING
        scale = {"zmin": -limit, "zmid": 0, "zmax": limit, "colorscale": colours}
    gap = 1 if max(shown.shape) <= 40 else 0
    lies = (bar or {}).get("orientation") == "h"
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
                "text": _bar_title(kind, sign, unit, line="   " if lies else "<br>"),
                "side": "top" if lies else "right",
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


def _bar_title(kind: Panel, sign: Sign, unit: str, *, line: str) -> str:
    if kind == "ra":
        return _BAR[sign]
    if kind == "pattern":
        return "A   attention"
    return loss_bar(kind, unit, line=line)


def _title_axes(figure: go.Figure, **where: Any) -> None:
    small: dict[str, Any] = {"title_font": {"size": 11}, "title_standoff": 4, **where}
    figure.update_xaxes(title_text="to (key)", **small)
    figure.update_yaxes(title_text="from (query)", **small)
