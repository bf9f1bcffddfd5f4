"""run_with_ra against the model's own forward pass and against TransformerLens alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import Shape, floor, of_both_passes, of_forward, weights_read
from benchmarks.models import HUGGING_FACE, gemma3, gpt2_small, random_tokens, shape_of, smollm2
from benchmarks.timing import interleaved, ratio_spread
from ra_lens import run_with_ra
from ra_lens.errors import BadInput
from ra_lens.model import available_kinds

FORWARD, OURS, NORMS = "forward pass, no_grad", "run_with_ra", "run_with_ra, store='norms'"
PLAIN = "TransformerLens hooks and backward()"
BOTH = "both passes, nothing collected"
TARGET = 5


def routes(model: Any, tokens: Tensor) -> dict[str, Callable[[], Any]]:
    """The routes to time, by name: of a model of TransformerLens, or of the one inside."""

    def forward() -> None:
        with torch.no_grad():
            model(tokens)

    if not hasattr(model, "hook_dict"):
        return {FORWARD: forward, BOTH: lambda: both_passes(model, tokens)}
    return {
        FORWARD: forward,
        OURS: lambda: run_with_ra(model, tokens, target=TARGET)[1],
        NORMS: lambda: run_with_ra(model, tokens, target=TARGET, store="norms")[1],
        PLAIN: lambda: transformer_lens_alone(model, tokens),
    }


def both_passes(model: Any, tokens: Tensor) -> Tensor:
    """The gradient at the embeddings of a Hugging Face model, logits at the last token only."""
    held: list[Tensor] = []

    def begin(_module: Any, _args: Any, out: Tensor) -> Tensor:
        held.append(out.detach().requires_grad_())
        return held[-1]

    handle = model.get_input_embeddings().register_forward_hook(begin)
    try:
        logits = model(tokens, logits_to_keep=1, use_cache=False).logits[:, -1]
        (-logits.log_softmax(-1)[:, TARGET].sum()).backward()
    finally:
        handle.remove()
    (leaf,) = held
    assert leaf.grad is not None
    return leaf.grad


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


GPT2, SMOLLM2, GEMMA3 = "GPT-2 small", "SmolLM2-135M", "Gemma 3 270M"
SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    GPT2: ((8, 64), (1, 512)),
    SMOLLM2: ((8, 64), (1, 512), (1, 12)),
    GEMMA3: ((8, 64), (1, 512)),
}
COLUMNS = [
    "shape",
    "model",
    "batch × tokens",
    "route",
    "s",
    "over the forward pass",
    "spread",
    "TransformerLens route over it",
    "counted floor",
    "over the counted floor",
    "weights read over a forward pass's",
]


def load(name: str, kind: str, *, quick: bool) -> Any:
    """Load a model of one of the shapes of `SIZES`; None where this class cannot hold it."""
    small: dict[str, Any] = {"n_layer": 2, "n_vocab": 1000} if quick else {}
    make = {GPT2: gpt2_small, SMOLLM2: smollm2, GEMMA3: gemma3}[name]
    try:
        return make(kind, **small)
    except BadInput:
        return None


def counted(shape: Shape, route: str, size: tuple[int, int], ratio: float) -> list[float | None]:
    """The last three columns; nothing where no floor was counted."""
    batch, n_tokens = size
    if route in (OURS, NORMS):
        least, read = floor(shape, batch=batch, n_tokens=n_tokens), weights_read(shape)
    elif route == BOTH:
        both = of_both_passes(shape, batch=batch, n_tokens=n_tokens)
        least, read = both / of_forward(shape, batch=batch, n_tokens=n_tokens), 2.0
    else:
        return [None, None, None]
    return [least, ratio / least, read]


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Time every route on all shapes, sizes and model classes."""
    rows: list[list[Any]] = []
    missing: list[str] = []
    for name, sizes in SIZES.items():
        shape: Shape | None = None
        for kind in (*available_kinds(), HUGGING_FACE):
            model = load(name, kind, quick=quick)
            if model is None:
                missing.append(f"{name}'s shape as a {kind}, which does not load it")
                continue
            if kind == HUGGING_FACE:
                model.requires_grad_(False)
            else:
                shape = shape_of(model)
            if shape is None:
                break
            for size in ((2, 8),) if quick else sizes:
                rows += _timed(name, kind, model, shape, size, rounds)
    return {
        "title": "run_with_ra over a forward pass",
        "how": how(rounds, missing),
        "columns": COLUMNS,
        "rows": rows,
    }


def how(rounds: int, missing: list[str]) -> str:
    """What the table says of itself."""
    without = f" Not measured: {'; '.join(missing)}." if missing else ""
    return (
        "Random weights in the shapes of known models, float32. Base: the same model on the same "
        "tokens under no_grad, all logits. Peer: TransformerLens's own forward and backward hooks "
        "on hook_pattern and `loss.backward()`, which is what `run_with_cache(incl_bwd=True)` "
        "does. Target: one token after each prompt. The counted floor: what a run has to multiply, "
        "over what a forward pass with all logits multiplies (`benchmarks/floor.py`). Hugging Face "
        "alone is the model inside, whose both passes go down to the embeddings and collect "
        "nothing: what they take over their floor is what layers do that is not multiplied. With "
        "few tokens a product takes as long as reading its weights; how many a run reads over a "
        "forward pass is in the last column. The spread is that of the ratio within a round. "
        f"Medians of {rounds} rounds, interleaved.{without}"
    )


def _timed(
    name: str, kind: str, model: Any, shape: Shape, size: tuple[int, int], rounds: int
) -> list[list[Any]]:
    tokens = random_tokens(*size, n_vocab=shape.d_vocab - 1)
    times = interleaved(routes(model, tokens), rounds=rounds)
    base, plain = times[FORWARD], times.get(PLAIN)
    rows: list[list[Any]] = []
    for route, t in times.items():
        ratio = t.median / base.median
        rows.append(
            [
                name,
                kind,
                f"{size[0]} × {size[1]}",
                route,
                t.median,
                ratio,
                ratio_spread(t.seconds, base.seconds),
                plain and plain.median / t.median,
                *counted(shape, route, size, ratio),
            ]
        )
    return rows
