"""Which heads matter: one cell per head, coloured by its score; several scores side by side.

Norms and other scores that are never negative go from 0 up (viridis). Scores with both signs, such
as effects of ablation, have 0 in the middle of a diverging scale: red for important heads. Heads
without a score (NaN, infinite) are grey, and so are the places at the end of a row where its layer
has fewer heads than another; these have no rank, and hovering tells nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from typing_extensions import Unpack

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.figures.style import (
    DIVERGING,
    SEQUENTIAL,
    Layout,
    finish,
    frame_cells,
    plotly_text,
    ticks,
)
from ra_lens.heads import HeadScores
from ra_lens.model.sites import MapKind, read_kind
from ra_lens.numbers import Whole, whole

Scores = RACache | HeadScores
Order = Literal["index", "score"]

_NAMES = {
    "ra": "‖R‖",
    "pattern": "‖A‖",
    "pattern_grad": "‖∂L/∂A‖",
    "knockout": "‖knockout‖",
    "cut": "‖cut‖",
}
_TITLES = {
    "ra": "Reversed Attention ‖R‖",
    "pattern": "forward attention ‖A‖",
    "pattern_grad": "gradient ‖∂L/∂A‖",
    "knockout": "knockout ‖R~/(1 − A)‖",
    "cut": "cut ‖A ⊙ ∂L/∂A‖",
}


@dataclass(frozen=True)
class _Panel:
    """One grid. The most important head has rank 1; where there is no head, the rank is 0."""

    name: str  # of its colour bar
    title: str
    layers: tuple[int, ...]
    values: Float[np.ndarray, "layer head"]
    ranks: Int[np.ndarray, "layer head"]


def head_grid(
    scores: Scores | Sequence[Scores],
    *,
    kind: MapKind | Sequence[MapKind] = "ra",
    order: Order = "index",
    shared_scale: bool = False,
    top: Whole = 10,
    titles: Sequence[str] | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw layers × heads, coloured by a score; several scores side by side.

    Args:
        scores: A cache, whose norms are averaged over the examples (norms are enough:
            `store="norms"`); a `HeadScores` of `rank_heads`; or several of either.
        kind: Of a cache, whose norm: `ra`, `pattern`, `pattern_grad`, `knockout` or `cut`, or
            several of them. The last two are made from maps, which the cache must have kept; their
            unit is that of the loss.
        order: `"index"`: a column per head. `"score"`: in each layer the heads from most to least
            important, so that columns are places, not heads; hover tells which head it is.
        shared_scale: Colour all grids on one scale, so that they compare; False: each its own.
        top: So many of the most important are framed and numbered, in each grid.
        titles: Above each grid. Default, where there are several: what they show.
        **layout: `title`, above the figure (default: none); `width` and `height` in pixels
            (default: as wide as its container, and by the number of layers); `template` of plotly,
            for this figure only.

    Returns:
        A figure with a heatmap per grid, `z` being the scores, `[layer, head]` or, in order of
        score, `[layer, place]`; `customdata[..., 0]` the ranks and `customdata[..., 1]` the heads.

    Raises:
        BadInput: nothing to show, an unknown `order`, or other than one of `titles` per grid.
        NotStored: the cache has no such norms.
    """
    if order not in ("index", "score"):
        raise BadInput(f"found order={order!r}; give 'index' or 'score'.")
    top = whole("top", top)
    given: list[Scores] = [scores] if isinstance(scores, RACache | HeadScores) else list(scores)
    asked: list[MapKind] = [kind] if isinstance(kind, str) else list(kind)
    kinds: list[MapKind] = [read_kind(one) for one in asked]
    panels = [panel for one in given for panel in _panels(one, kinds)]
    if not panels:
        raise BadInput("found nothing to show. Give a cache, or scores from rank_heads().")
    if titles is not None and len(titles) != len(panels):
        raise BadInput(f"found {len(titles)} titles for {len(panels)} grids. Give one for each.")
    n = len(panels)
    names = [panel.title for panel in panels] if titles is None and n > 1 else list(titles or ())
    gap = 0.12 / (n - 1) ** 0.5 if n > 1 else 0.0
    figure = make_subplots(
        rows=1,
        cols=n,
        horizontal_spacing=gap,
        subplot_titles=[plotly_text(name) for name in names] or None,
    )
    figure.update_annotations(font_size=13)
    for column, panel in enumerate(panels, start=1):
        axes: Any = figure.get_subplot(1, column)
        bar: dict[str, Any] | None = None
        if not shared_scale:
            bar = {"x": axes.xaxis.domain[1] + 0.01 / n, "xanchor": "left"}
        elif column == n:
            alike = len({one.name for one in panels}) == 1
            bar = {} if alike else {"title": {"text": "score", "side": "top"}}
        among = panels if shared_scale else [panel]
        known = np.concatenate([one.values[np.isfinite(one.values)] for one in among])
        limits = (float(known.min(initial=0.0)), float(known.max(initial=0.0)))
        _add(figure, panel, column, limits, order=order, top=top, bar=bar, shown=n)
    rows = max(len(panel.layers) for panel in panels)
    finish(
        figure,
        layout,
        height=110 + max(18, min(34, 900 // rows)) * rows + 24 * bool(names),
        above=(32, 80) if names else (8, 56),
    )
    return figure


def _panels(scores: Scores, kinds: Sequence[MapKind]) -> list[_Panel]:
    if isinstance(scores, HeadScores):
        # As the method gave them: reversing an order negates the scores it is told by.
        name = scores.method + " reversed" * scores.is_reversed
        title = scores.title + ", reversed" * scores.is_reversed
        return [_panel(scores, name, title, scores.scores.double().numpy(), scores.order())]
    panels: list[_Panel] = []
    for kind in kinds:
        norms = scores.norms(kind)
        mean = (norms.mean(dim=0) if scores.has_batch_dim else norms).detach().cpu().float().numpy()
        order = [(head.layer, head.head) for head in scores.top_heads(mean.size, kind)]
        unit = f", {scores.loss_unit}" * (kind in ("knockout", "cut"))
        panels.append(_panel(scores, _NAMES[kind], _TITLES[kind] + unit, mean, order))
    return panels


def _panel(
    scores: Scores,
    name: str,
    title: str,
    values: Float[np.ndarray, "layer head"],
    order: Sequence[tuple[int, int]],
) -> _Panel:
    layers = list(scores.layers)
    ranks = np.zeros(values.shape, dtype=np.int64)
    for rank, (layer, head) in enumerate(order, start=1):
        ranks[layers.index(layer), head] = rank
    return _Panel(name, title, tuple(layers), values, ranks)


def _add(
    figure: Any,
    panel: _Panel,
    column: int,
    limits: tuple[float, float],
    *,
    order: Order,
    top: int,
    bar: dict[str, Any] | None,
    shown: int,
) -> None:
    n_heads = panel.values.shape[1]
    heads = np.tile(np.arange(n_heads), (len(panel.layers), 1))
    if order == "score":
        last = np.where(panel.ranks == 0, panel.ranks.size + 1, panel.ranks)
        heads = last.argsort(axis=1, kind="stable")
    values = np.take_along_axis(panel.values, heads, axis=1)
    ranks = np.take_along_axis(panel.ranks, heads, axis=1)
    marked = (ranks > 0) & (ranks <= top)
    low, high = limits
    signed = low < 0
    most = max(abs(low), abs(high)) or 1.0
    rows = [f"L{layer}" for layer in panel.layers]
    columns = [f"H{j}" if order == "index" else str(j + 1) for j in range(n_heads)]
    where: dict[str, Any] = {"row": 1, "col": column}
    figure.add_trace(
        go.Heatmap(
            z=np.where(np.isfinite(values), values, np.nan),
            x=columns,
            y=rows,
            zmin=-most if signed else 0,
            zmid=0 if signed else None,
            zmax=most,
            colorscale=DIVERGING if signed else SEQUENTIAL,
            showscale=bar is not None,
            colorbar={
                "title": {"text": plotly_text(panel.name), "side": "top"},
                "thickness": 12,
                "outlinewidth": 0,
                "exponentformat": "e",
                "nticks": 6,
                **(bar or {}),
            },
            name=plotly_text(panel.title),
            customdata=np.stack([ranks, heads], axis=-1),
            text=np.where(marked, ranks.astype(str), "").tolist(),
            texttemplate="%{text}",
            hovertemplate=(
                "<b>%{y}H%{customdata[1]}</b><br>"
                f"{plotly_text(panel.name)} = %{{z:.4g}}<br>"
                f"rank %{{customdata[0]}} of {int((ranks > 0).sum())}<extra></extra>"
            ),
            hoverongaps=False,
            xgap=1,
            ygap=1,
        ),
        **where,
    )
    frame_cells(figure, marked, "top head", 2, where)
    figure.update_xaxes(
        type="category",
        title_text="head" if order == "index" else "heads of the layer by score",
        showgrid=False,
        tickangle=0,
        **ticks(columns, [name.removeprefix("H") for name in columns], 24 // shown),
        **where,
    )
    figure.update_yaxes(
        type="category",
        title_text="layer" if column == 1 else None,
        showgrid=False,
        autorange="reversed",
        **ticks(rows, [str(layer) for layer in panel.layers], 32),
        **where,
    )
