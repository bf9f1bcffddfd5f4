"""Where information enters: layers × key tokens, what blocking each token would do to the loss.

`RACache.flow` foretells it to first order, one edge at a time: of each layer it sums the map over
the heads, and over the queries asked for. Tokens that none of these queries look at are grey.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from typing_extensions import Unpack

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.figures.maps import LOSS_IF, loss_bar
from ra_lens.figures.style import (
    LOSS,
    Layout,
    distinct,
    finish,
    plotly_text,
    read_size,
    ticks,
)
from ra_lens.head_maps import kept_tokens, largest, read_example
from ra_lens.head_names import Heads
from ra_lens.knockouts.edges import Tokens
from ra_lens.numbers import Real, Whole, real_or_none, whole_or_none
from ra_lens.text import label

Effect = Literal["knockout", "cut"]


def flow_map(
    ra: RACache,
    *,
    queries: Tokens = -1,
    by: Effect = "knockout",
    heads: Heads = None,
    example: Whole = 0,
    limit: Real | None = None,
    max_tokens: Whole | None = 256,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw in which layers, and from which tokens, information enters the last token.

    Args:
        ra: A cache that holds `ra` and `pattern`; for `by="cut"` `pattern_grad`, not `ra`.
        queries: Tokens that look, as in `RACache.edges`. Default: the last one.
        by: `"knockout"`, the rest of a row takes what a blocked edge had, or `"cut"`, it does not.
        heads: Only these. Default: all.
        example: Which example.
        limit: Size of a value at the ends of the colour scale. Default: the largest in this figure.
        max_tokens: A longer prompt shows its last so many tokens. None: all of them.
        **layout: `title`, above the figure (default: none); `width` and `height` in pixels
            (default: as wide as its container, and by the number of layers); `template` of plotly,
            for this figure only.

    Returns:
        A figure with one heatmap; its `z` is `RACache.flow`, `[layer, key]`, in the unit of the
        loss: green where the loss would rise, so that the answer needs what is read there, brown
        where it would fall; NaN where none of the queries look.

    Raises:
        BadInput: no such example, heads or tokens, an unknown `by`, or an encoder-decoder, whose
            layers have keys of different texts.
        NotStored: the maps were not kept.
    """
    if by not in LOSS_IF:
        raise BadInput(
            f"found by={by!r}; give 'knockout' or 'cut', which are in the unit of the loss. "
            "ra.flow(by=…) sums the others."
        )
    most = real_or_none("limit", limit)
    example, max_tokens = read_example(ra, example), whole_or_none("max_tokens", max_tokens)
    one = ra.apply_slice_to_batch_dim(example) if ra.has_batch_dim else ra
    values, seen = (
        one.flow(queries=queries, by=kind, heads=heads).detach().cpu().float().numpy()
        for kind in (by, "pattern")
    )
    side = ra.sites[ra.layers[0]].key_side
    tokens, first, columns = kept_tokens(ra, side, example, values.shape[-1], max_tokens)
    values, seen = values[:, columns], seen[:, columns]
    shown = np.where(np.isfinite(values) & (seen != 0), values, np.nan)
    most = (largest(shown) or 1.0) if most is None else most
    rows = [ra.sites[layer].label for layer in ra.layers]
    keys = distinct(tokens, first=first)
    pixels = read_size(layout)[1] or 150 + max(14, min(26, 640 // len(rows))) * len(rows)
    figure = go.Figure(
        go.Heatmap(
            name=f"flow {by}",
            z=shown,
            x=keys,
            y=rows,
            zmin=-most,
            zmid=0,
            zmax=most,
            colorscale=LOSS,
            colorbar={
                "title": {
                    "text": loss_bar(by, ra.loss_unit),
                    "side": "top",
                    "font": {"size": 11},
                },
                "orientation": "h",
                "x": 0.5,
                "len": 1.0,
                "y": 1.01,
                "yanchor": "bottom",
                "thickness": 10,
                "outlinewidth": 0,
                "nticks": 5,
                "exponentformat": "e",
                "ypad": 0,
            },
            hoverongaps=False,
            hovertemplate=(
                f"<b>%{{y}}</b><br>to %{{x}}<br>{LOSS_IF[by]} = %{{z:+.3g}} {ra.loss_unit}"
                "<extra></extra>"
            ),
            xgap=1 if len(keys) <= 40 else 0,
            ygap=1,
        )
    )
    axis: dict[str, Any] = {
        "type": "category",
        "showgrid": False,
        "zeroline": False,
        "automargin": True,
        "tickfont": {"size": 11},
        "title_font": {"size": 11},
        "title_standoff": 4,
    }
    texts = [plotly_text(label(token, 14)) for token in tokens]
    numbers = [name.removeprefix("layer ") for name in rows]
    figure.update_xaxes(**axis, **ticks(keys, texts, 30), tickangle=-90, title_text="to (key)")
    figure.update_yaxes(
        **axis, **ticks(rows, numbers, int(pixels - 150) // 12), autorange="reversed",
        title_text="layer",
    )  # fmt: skip
    finish(figure, layout, height=pixels)
    return figure
