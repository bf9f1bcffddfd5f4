"""run_with_ra against the model's own forward pass and against TransformerLens alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import gpt2_small, random_tokens
from benchmarks.timing import interleaved, ratio_spread
from ra_lens import run_with_ra
from ra_lens.model import available_kinds

FORWARD, OURS, NORMS = "forward pass, no_grad", "run_with_ra", "run_with_ra, store='norms'"
PLAIN = "TransformerLens hooks and backward()"
TARGET = 5


def routes(model: Any, tokens: Tensor) -> dict[str, Callable[[], Any]]:
    """The routes to time, by name; all but the first give every map or its norms."""

    def forward() -> None:
        with torch.no_grad():
            model(tokens)

    return {
        FORWARD: forward,
        OURS: lambda: run_with_ra(model, tokens, target=TARGET)[1],
        NORMS: lambda: run_with_ra(model, tokens, target=TARGET, store="norms")[1],
        PLAIN: lambda: transformer_lens_alone(model, tokens),
    }


def transformer_lens_alone(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Patterns and their gradients, as `run_with_cache(incl_bwd=True)` gets them."""
    kept: dict[str, Tensor] = {}

    def save(x: Tensor, hook: Any) -> None:
        kept[hook.name] = x.detach()

    def save_grad(x: Tensor, hook: Any) -> None:
        kept[f"{hook.name}_grad"] = x.detach()

    def wanted(name: str) -> bool:
        return name.endswith("hook_pattern")

    with model.hooks(fwd_hooks=[(wanted, save)], bwd_hooks=[(wanted, save_grad)]):
        (-model(tokens)[:, -1].log_softmax(-1)[:, TARGET].sum()).backward()
    model.zero_grad()
    return kept


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Time every route on both shapes and model classes."""
    shapes = ((2, 8),) if quick else ((8, 64), (1, 512))
    rows: list[list[Any]] = []
    for kind in available_kinds():
        model = gpt2_small(kind, n_layer=2 if quick else 12)
        for shape in shapes:
            tokens = random_tokens(*shape)
            times = interleaved(routes(model, tokens), rounds=rounds)
            base, plain = times[FORWARD], times[PLAIN].median
            for name, t in times.items():
                rows.append(
                    [
                        kind,
                        f"{shape[0]} × {shape[1]}",
                        name,
                        t.median,
                        t.median / base.median,
                        ratio_spread(t.seconds, base.seconds),
                        plain / t.median,
                    ]
                )
    return {
        "title": "run_with_ra over a forward pass",
        "how": (
            "GPT-2 small's shape, random weights, float32. Base: the same model on the same tokens "
            "under no_grad, all logits. Peer: TransformerLens's own forward and backward hooks on "
            "hook_pattern and `loss.backward()`, which is what `run_with_cache(incl_bwd=True)` "
            "does. Target: one token after each prompt. The spread is that of the ratio within a "
            f"round. Medians of {rounds} rounds, interleaved."
        ),
        "columns": [
            "model",
            "batch × tokens",
            "route",
            "s",
            "over the forward pass",
            "spread",
            "TransformerLens route over it",
        ],
        "rows": rows,
    }
