"""What recompute=True costs in time, over the same run without it."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.engine import NORMS, TARGET
from benchmarks.models import gpt2_small, random_tokens
from benchmarks.timing import interleaved, ratio_spread
from ra_lens import run_with_ra
from ra_lens.model import available_kinds

RECOMPUTE = f"{NORMS}, recompute=True"


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Time both on three shapes and all model classes."""
    shapes = ((2, 8),) if quick else ((8, 64), (1, 512), (1, 1024))
    rows: list[list[Any]] = []
    for kind in available_kinds():
        model = gpt2_small(kind, n_layer=2 if quick else 12)
        for shape in shapes:
            tokens = random_tokens(*shape)
            run = partial(run_with_ra, model, tokens, target=TARGET, store="norms")
            times = interleaved(
                {NORMS: run, RECOMPUTE: partial(run, recompute=True)}, rounds=rounds
            )
            once, twice = times[NORMS], times[RECOMPUTE]
            rows.append(
                [
                    kind,
                    f"{shape[0]} × {shape[1]}",
                    once.median,
                    twice.median,
                    twice.median / once.median,
                    ratio_spread(twice.seconds, once.seconds),
                ]
            )
    return {
        "title": "The time of recomputing",
        "how": (
            "GPT-2 small's shape, random weights, float32, one target after each prompt. "
            "recompute=True runs every block but the last again in the backward pass; for what it "
            "saves see the memory. The spread is that of the ratio within a round. "
            f"Medians of {rounds} rounds, interleaved."
        ),
        "columns": ["model", "batch × tokens", f"{NORMS}, s", f"{RECOMPUTE}, s", "ratio", "spread"],
        "rows": rows,
    }
