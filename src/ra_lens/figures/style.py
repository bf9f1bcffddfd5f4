"""What all figures share: colours, the way sizes and templates are given, rows of small maps."""

from __future__ import annotations

from typing import Any

# Both are read the same by colour-blind eyes: lightness alone tells zero from much, and the
# diverging scale opposes red and blue (ColorBrewer's RdBu, Purples).
SEQUENTIAL = "Viridis"
ATTENTION = "Purples"
DIVERGING = "RdBu_r"
NOTHING_THERE = "#c9ccd1"
"""Background of maps: shows through where a query cannot look."""

MARK = "#e4572e"


def finish(
    figure: Any, *, title: str | None, width: int | None, height: int | None, template: str
) -> None:
    """Apply size, template and title; the figure fills its container where width is None."""
    figure.update_layout(
        template=template,
        width=width,
        height=height,
        title=None if title is None else {"text": title, "x": 0.02, "xanchor": "left"},
        plot_bgcolor=NOTHING_THERE,
        font={"size": 12},
        margin={"l": 12, "r": 12, "t": 8 if title is None else 56, "b": 8},
        dragmode=False,
    )
