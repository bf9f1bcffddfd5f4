"""How time and peak memory grow with tokens, batch, layers and heads."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.memory import apart
from ra_lens.model import available_kinds

# One thing grows at a time, from the shape of GPT-2 small on 1 × 256 tokens.
GROWING: dict[str, list[int]] = {
    "tokens": [64, 128, 256, 512, 1024, 2048],
    "batch": [1, 2, 4, 8],
    "layers": [6, 12, 24],
    "heads": [12, 24, 48],
}


def measure(*, rounds: int = 2, quick: bool = False) -> dict[str, Any]:
    """Measure run_with_ra along each axis, with the exponent of each step."""
    growing = {"tokens": [8, 16], "layers": [1, 2]} if quick else GROWING
    kind = available_kinds()[0]
    rows: list[list[Any]] = []
    for axis, values in growing.items():
        points: list[tuple[int, float, float]] = []
        for value in values:
            runs = [_run(kind, axis, value, quick=quick) for _ in range(min(rounds, 2))]
            seconds, peak = min(r["seconds"] for r in runs), min(r["peak"] for r in runs)
            points.append((value, seconds, peak))
        for i, (value, seconds, peak) in enumerate(points):
            before = points[i - 1] if i else None
            rows.append(
                [
                    axis,
                    value,
                    seconds,
                    _exponent(before[0], value, before[1], seconds) if before else None,
                    peak / 1e6,
                    _exponent(before[0], value, before[2], peak) if before else None,
                ]
            )
    return {
        "title": "Growth",
        "how": (
            f"run_with_ra with all maps, {kind}, GPT-2 small's shape; 1 × 256 tokens, 12 layers, "
            "12 heads where they do not grow (more heads are thinner ones: the width stays). Each "
            "run in a process of its own, the better of two. An exponent b says that from the "
            "row before it the value grew as axis^b."
        ),
        "columns": ["axis", "value", "s", "exponent", "peak, MB", "exponent of the peak"],
        "rows": rows,
    }


def _run(kind: str, axis: str, value: int, *, quick: bool) -> dict[str, float]:
    shape: dict[str, Any] = {"n_layer": 2} if quick else {}
    tokens = 16 if quick else 256
    if axis == "tokens":
        tokens = value
        shape["n_ctx"] = max(1024, value)
    else:
        shape[{"batch": "batch", "layers": "n_layer", "heads": "n_head"}[axis]] = value
    return apart(kind, tokens, "maps", **shape)


def _exponent(x0: float, x1: float, y0: float, y1: float) -> float | None:
    return math.log(y1 / y0) / math.log(x1 / x0) if min(y0, y1) > 0 else None
