"""Which heads matter: one cell per head, coloured by the norm of its map."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from ra_lens.cache import RACache
from ra_lens.collect import MapKind
from ra_lens.figures.style import MARK, SEQUENTIAL, finish
from ra_lens.figures.tokens import thinned

_NAMES = {"ra": "‖R‖", "pattern": "‖A‖", "pattern_grad": "‖∂L/∂A‖"}


def head_grid(
    ra: RACache,
    *,
    kind: MapKind = "ra",
    top: int = 10,
    title: str | None = None,
    width: int | None = None,
    height: int | None = None,
    template: str = "plotly_white",
) -> go.Figure:
    """Draw layers × heads, coloured by the Frobenius norm of a map, averaged over the examples.

    Args:
        ra: A cache; norms are enough (`store="norms"`).
        kind: Whose norm: `ra`, `pattern` or `pattern_grad`.
        top: So many of the largest are framed and numbered.
        title: Above the figure. Default: none.
        width: In pixels. Default: as wide as its container.
        height: In pixels. Default: by the number of layers.
        template: Plotly template, for this figure only.

    Returns:
        A figure whose one heatmap holds the norms, `[layer, head]`.
    """
    norms = ra.norms(kind)
    values = (norms.mean(dim=0) if ra.has_batch_dim else norms).detach().cpu().float().numpy()
    ranked = ra.top_heads(values.size, kind)
    rows = {layer: i for i, layer in enumerate(ra.layers)}
    ranks = [[0] * ra.n_heads for _ in rows]
    marks = [[""] * ra.n_heads for _ in rows]
    frames: list[dict[str, Any]] = []
    for rank, score in enumerate(ranked, start=1):
        i, j = rows[score.layer], score.head
        ranks[i][j] = rank
        if rank <= top:
            marks[i][j] = str(rank)
            frames.append(_frame(i, j))
    name = _NAMES[kind]
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[f"H{head}" for head in range(ra.n_heads)],
            y=[f"L{layer}" for layer in rows],
            zmin=0,
            zmax=float(values.max()) or 1.0,
            colorscale=SEQUENTIAL,
            colorbar={
                "title": {"text": name, "side": "top"},
                "thickness": 12,
                "outlinewidth": 0,
                "exponentformat": "e",
            },
            customdata=ranks,
            text=marks,
            texttemplate="%{text}",
            hovertemplate=(
                "<b>%{y}%{x}</b><br>"
                f"{name} = %{{z:.4g}}<br>rank %{{customdata}} of {values.size}<extra></extra>"
            ),
            xgap=1,
            ygap=1,
        )
    )
    figure.update_layout(shapes=frames)
    columns, lines = thinned(ra.n_heads, 24), thinned(len(rows), 32)
    names = [f"L{layer}" for layer in rows]
    figure.update_xaxes(
        type="category", title_text="head", showgrid=False, tickmode="array",
        tickvals=[f"H{j}" for j in columns], ticktext=[str(j) for j in columns], tickangle=0,
    )  # fmt: skip
    figure.update_yaxes(
        type="category", title_text="layer", showgrid=False, autorange="reversed",
        tickmode="array", tickvals=[names[i] for i in lines],
        ticktext=[names[i].removeprefix("L") for i in lines],
    )  # fmt: skip
    finish(
        figure,
        title=title,
        width=width,
        height=height or 110 + max(18, min(34, 900 // len(rows))) * len(rows),
        template=template,
    )
    return figure


def _frame(row: int, column: int) -> dict[str, Any]:
    return {
        "type": "rect",
        "x0": column - 0.47,
        "x1": column + 0.47,
        "y0": row - 0.46,
        "y1": row + 0.46,
        "line": {"color": MARK, "width": 2},
        "name": "top head",
    }
