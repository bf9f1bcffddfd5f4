"""What vectors=True costs in time, over the same run without it."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.engine import TARGET
from benchmarks.models import gpt2_small, random_tokens
from benchmarks.timing import interleaved, ratio_spread
from ra_lens import run_with_ra
from ra_lens.model import available_kinds

WITHOUT, WITH = "run_with_ra", "run_with_ra, vectors=True"


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Time both on two shapes and all model classes."""
    shapes = ((2, 8),) if quick else ((8, 64), (1, 512))
    rows: list[list[Any]] = []
    for kind in available_kinds():
        model = gpt2_small(kind, n_layer=2 if quick else 12)
        for shape in shapes:
            run = partial(run_with_ra, model, random_tokens(*shape), target=TARGET)
            times = interleaved({WITHOUT: run, WITH: partial(run, vectors=True)}, rounds=rounds)
            without, having = times[WITHOUT], times[WITH]
            rows.append(
                [
                    kind,
                    f"{shape[0]} × {shape[1]}",
                    without.median,
                    having.median,
                    having.median / without.median,
                    ratio_spread(having.seconds, without.seconds),
                ]
            )
    return {
        "title": "The time of vectors",
        "how": (
            "GPT-2 small's shape, random weights, float32, one target after each prompt. "
            "vectors=True keeps fifteen kinds of vectors of every token and layer, and runs the "
            "backward pass down to the input of the first block. The spread is that of the ratio "
            f"within a round. Medians of {rounds} rounds, interleaved."
        ),
        "columns": ["model", "batch × tokens", f"{WITHOUT}, s", f"{WITH}, s", "ratio", "spread"],
        "rows": rows,
    }
