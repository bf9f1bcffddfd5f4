"""What a call costs beside the model's own work, on a toy where that is next to nothing."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.models import gpt2_small
from benchmarks.timing import difference_spread, interleaved
from ra_lens import run_with_ra
from ra_lens.model import available_kinds

CALLS = 20
"""In a round. Single calls are too short to compare: the slowest is whatever interrupts it."""


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Time run_with_ra and a bare forward and backward pass on a model of two layers."""
    rows: list[list[Any]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    try:
        for kind in available_kinds():
            rows.append([kind, *_overhead(kind, rounds, 2 if quick else CALLS)])
    finally:
        torch.set_num_threads(threads)
    return {
        "title": "Overhead per call",
        "how": (
            "2 layers of 4 heads, width 32, 100 words, one prompt of 8 token ids, one thread. "
            "Peer: the model's own forward pass with all logits, and the backward pass from the "
            "same loss to the embedding, parameters frozen, nothing kept. The difference is what a "
            "call of run_with_ra adds: reading the model and the input, checks, hooks, maps, "
            "norms. The spread is that of the difference within a round, which compares the "
            f"medians of {2 if quick else CALLS} calls of each. Medians of {rounds} rounds, "
            "interleaved."
        ),
        "columns": [
            "model",
            "run_with_ra, ms",
            "bare forward and backward, ms",
            "difference, ms",
            "spread, ms",
        ],
        "rows": rows,
    }


def _overhead(kind: str, rounds: int, calls: int) -> list[float | str | None]:
    model = gpt2_small(kind, n_layer=2, n_head=4, width=32, n_vocab=100)
    tokens = torch.arange(8).reshape(1, 8) + 20
    for parameter in nn.Module.parameters(model):
        parameter.requires_grad_(False)

    def leaf(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x.detach().requires_grad_()

    def bare() -> None:
        with model.hooks(fwd_hooks=[("hook_embed", leaf)]):
            (-model(tokens)[:, -1].log_softmax(-1)[:, 5].sum()).backward()

    def ours() -> None:
        run_with_ra(model, tokens, target=5)

    mine: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        times = interleaved({"ours": ours, "bare": bare}, rounds=calls)
        mine.append(1e3 * times["ours"].median)
        theirs.append(1e3 * times["bare"].median)
    added = median(mine) - median(theirs)
    return [median(mine), median(theirs), added, difference_spread(mine, theirs)]
