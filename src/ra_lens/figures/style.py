"""What all figures share: colours, the way sizes and templates are given, rows of small maps."""

from __future__ import annotations

from typing import Any

from ra_lens.numbers import Real, as_whole, real

# Both are read the same by colour-blind eyes: lightness alone tells zero from much, and the
# diverging scale opposes red and blue (ColorBrewer's RdBu, Purples).
SEQUENTIAL = "Viridis"
ATTENTION = "Purples"
DIVERGING = "RdBu_r"
NOTHING_THERE = "#c9ccd1"
"""Background of maps: shows through where a query cannot look."""

MARK = "#e4572e"


def read_size(width: Real | None, height: Real | None) -> tuple[float | None, float | None]:
    """Give the size of a figure as numbers of Python's.

    Raises:
        BadInput: one is no number.
    """
    return _pixels("width", width), _pixels("height", height)


def _pixels(name: str, value: Real | None) -> float | None:
    whole = as_whole(value)
    return real(name, value) if value is not None and whole is None else whole


def finish(
    figure: Any, *, title: str | None, width: float | None, height: float | None, template: str
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
