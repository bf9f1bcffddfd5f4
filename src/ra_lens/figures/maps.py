"""What heads look at, and where the gradient moves it: token × token maps.

Rows are queries, columns keys. Cells that a query cannot look at are grey, never the colour of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.figures.example import Head, HeadMaps, head_of_example, read_head, read_heads
from ra_lens.figures.style import ATTENTION, DIVERGING, finish
from ra_lens.figures.tokens import distinct, plotly_text, shorten, thinned, visible

Sign = Literal["descent", "gradient"]
Panel = Literal["ra", "pattern"]

_BAR = {
    "descent": "−R   red: descent wants more, blue: less",
    "gradient": "R   red: descent wants less, blue: more",
}
_NAME = {"descent": "−R", "gradient": "R"}


def head_map(
    ra: RACache,
    head: Head,
    *,
    kind: Panel = "ra",
    example: int = 0,
    sign: Sign = "descent",
    limit: float | None = None,
    max_tokens: int | None = 256,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    template: str = "plotly_white",
) -> go.Figure:
    """Draw one map of one head.

    Args:
        ra: A cache that holds `ra` and `pattern`.
        head: A `HeadScore` or `(layer, head)`.
        kind: `"ra"`, or `"pattern"` for the forward attention.
        example: Which example.
        sign: `"descent"` shows −R, where gradient descent moves attention; `"gradient"` shows R.
        limit: |R| at the ends of the colour scale. Default: the largest in this map.
        max_tokens: A longer prompt shows its last so many tokens. None: all of them.
        title: Above the figure. Default: none.
        width: In pixels. Default: as wide as its container.
        height: In pixels. Default: by the number of tokens.
        template: Plotly template, for this figure only.

    Returns:
        A figure with one heatmap; its `z` is the map, NaN where a query cannot look.

    Raises:
        BadInput: no such head or example, or an unknown `kind` or `sign`.
        NotStored: the maps were not kept.
    """
    _check(kind, sign)
    maps = head_of_example(ra, head, example=example, max_tokens=max_tokens)
    bar = {"orientation": "h", "x": 0.5, "len": 1.0, "y": 1.01, "yanchor": "bottom"}
    figure = go.Figure(_heatmap(maps, kind, sign, _limit([maps]) if limit is None else limit, bar))
    pixels = height or _pixels(len(maps.tokens)) + 150
    _label_axes(figure, maps, room=(pixels - 150) // 12)
    _title_axes(figure)
    finish(figure, title=title, width=width, height=pixels, template=template)
    return figure


def head_maps(
    ra: RACache,
    heads: Sequence[Head],
    *,
    example: int = 0,
    sign: Sign = "descent",
    shared_scale: bool = True,
    max_tokens: int | None = 256,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    template: str = "plotly_white",
) -> go.Figure:
    """Draw forward attention and Reversed Attention side by side, one row per head.

    Args:
        ra: A cache that holds `ra` and `pattern`.
        heads: The heads, such as `ra.top_heads(6)`, or `(layer, head)` pairs.
        example: Which example.
        sign: `"descent"` shows −R, where gradient descent moves attention; `"gradient"` shows R.
        shared_scale: Colour all heads' RA on one scale, so that they compare; False: each its own.
        max_tokens: A longer prompt shows its last so many tokens. None: all of them.
        title: Above the figure. Default: none.
        width: In pixels. Default: as wide as its container.
        height: In pixels. Default: by the numbers of heads and tokens.
        template: Plotly template, for this figure only.

    Returns:
        A figure with two heatmaps per head, A then ±R, named `L5H3 pattern` and `L5H3 ra`.

    Raises:
        BadInput: no heads, no such head or example, or an unknown `sign`.
        NotStored: the maps were not kept.
    """
    _check("ra", sign)
    shown = [
        head_of_example(ra, head, example=example, max_tokens=max_tokens)
        for head in read_heads(ra, heads)
    ]
    n = len(shown)
    each = _pixels(len(shown[0].tokens))
    figure = make_subplots(
        rows=n,
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.16,
        vertical_spacing=min(0.12, 110 / (n * (each + 110))),
        subplot_titles=[
            f"{maps.label} {what}" for maps in shown for what in ("attention", _NAME[sign])
        ],
    )
    for row, maps in enumerate(shown, start=1):
        axis: Any = figure.layout[f"yaxis{2 * row - 1 if row > 1 else ''}"]
        low, high = axis.domain
        bar = {"len": high - low, "y": (low + high) / 2}
        limit = _limit(shown if shared_scale else [maps])
        for col, kind in enumerate(("pattern", "ra"), start=1):
            beside = {**bar, "x": 0.43 if kind == "pattern" else 1.01}
            figure.add_trace(_heatmap(maps, kind, sign, limit, beside), row=row, col=col)
            _label_axes(figure, maps, room=each // 12, row=row, col=col)
    _title_axes(figure, row=n, col=1)
    finish(
        figure,
        title=title,
        width=width,
        height=height or n * (each + 110) + 20,
        template=template,
    )
    figure.update_layout(margin_t=36 if title is None else 76)
    return figure


def largest(
    ra: RACache, heads: Sequence[Head], *, example: int = 0, max_tokens: int | None = 256
) -> float:
    """Give the largest |R| in the maps of several heads, as `limit` for a scale they share."""
    return _limit(
        [
            head_of_example(ra, read_head(ra, head), example=example, max_tokens=max_tokens)
            for head in heads
        ]
    )


def _check(kind: str, sign: str) -> None:
    if sign not in _BAR:
        raise BadInput(f"found sign={sign!r}; give 'descent' (shows −R) or 'gradient' (shows R).")
    if kind not in ("ra", "pattern"):
        raise BadInput(f"found kind={kind!r}; give 'ra' or 'pattern'.")


def _limit(shown: Sequence[HeadMaps]) -> float:
    return max(float(np.nan_to_num(np.abs(maps.ra)).max()) for maps in shown) or 1.0


def _pixels(n_tokens: int) -> int:
    return max(240, min(640, 14 * n_tokens))


def _heatmap(
    maps: HeadMaps, kind: Panel, sign: Sign, limit: float, bar: dict[str, Any]
) -> go.Heatmap:
    signed = -maps.ra if sign == "descent" else maps.ra
    names = _names(maps)
    r, a = ("z", "customdata") if kind == "ra" else ("customdata", "z")
    scale: dict[str, Any] = (
        {"zmin": -limit, "zmid": 0, "zmax": limit, "colorscale": DIVERGING}
        if kind == "ra"
        else {"zmin": 0, "zmax": 1, "colorscale": ATTENTION}
    )
    gap = 1 if len(names) <= 40 else 0
    return go.Heatmap(
        name=f"{maps.label} {kind}",
        z=signed if kind == "ra" else maps.pattern,
        customdata=maps.pattern if kind == "ra" else signed,
        x=names,
        y=names,
        **scale,
        colorbar={
            "title": {
                "text": _BAR[sign] if kind == "ra" else "A   attention",
                "side": "top" if bar.get("orientation") == "h" else "right",
                "font": {"size": 11},
            },
            "thickness": 10,
            "outlinewidth": 0,
            "nticks": 5,
            "exponentformat": "e",
            "ypad": 0,
            **bar,
        },
        hoverongaps=False,
        hovertemplate=(
            f"<b>{maps.label}</b><br>from %{{y}}<br>to %{{x}}<br>"
            f"{_NAME[sign]} = %{{{r}:.3g}}<br>A = %{{{a}:.3g}}<extra></extra>"
        ),
        xgap=gap,
        ygap=gap,
    )


def _names(maps: HeadMaps) -> list[str]:
    # Distinct by position, so that a token that occurs twice has two rows.
    before = [""] * maps.first
    return distinct([*before, *maps.tokens])[maps.first :]


def _label_axes(figure: go.Figure, maps: HeadMaps, *, room: int, **where: Any) -> None:
    names = _names(maps)
    common: dict[str, Any] = {
        "type": "category",
        "tickmode": "array",
        "showgrid": False,
        "zeroline": False,
        "automargin": True,
        "tickfont": {"size": 11},
        "constrain": "domain",
        **where,
    }

    def labels(room: int) -> dict[str, Any]:
        ticks = thinned(len(names), room)
        texts = [plotly_text(shorten(visible(maps.tokens[i]), 14)) for i in ticks]
        return {"tickvals": [names[i] for i in ticks], "ticktext": texts}

    # Widths are not known here; so many fit beside each other in half a page.
    figure.update_xaxes(**common, **labels(min(room, 30)), tickangle=-90)
    figure.update_yaxes(**common, **labels(room), autorange="reversed")


def _title_axes(figure: go.Figure, **where: Any) -> None:
    small: dict[str, Any] = {"title_font": {"size": 11}, "title_standoff": 4, **where}
    figure.update_xaxes(title_text="to (key)", **small)
    figure.update_yaxes(title_text="from (query)", **small)
