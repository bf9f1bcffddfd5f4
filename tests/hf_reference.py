"""The oracle: Hugging Face's eager model in float64, its softmax inputs open to the tests.

Nothing here comes from ra_lens or TransformerLens. During a forward pass `torch.softmax` of the
attention is replaced by one that keeps its input S (so that autograd gives dL/dS) and can add a
perturbation to it (so that finite differences do), or to its output A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]


@contextmanager
def _float64_throughout() -> Iterator[None]:
    """Casts to float32, as in Llama's norms and GPT-J's attention, give float64 instead."""
    originals: dict[str, Any] = {name: getattr(Tensor, name) for name in ("to", "float")}

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wider = {torch.float32: torch.float64}
        args = tuple(wider.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: wider.get(a, a) if k == "dtype" else a for k, a in kwargs.items()}
        return originals["to"](self, *args, **kwargs)

    try:
        Tensor.to, Tensor.float = to, Tensor.double
        yield
    finally:
        Tensor.to, Tensor.float = originals["to"], originals["float"]


class Reference:
    def __init__(self, folder: Path) -> None:
        self.model: Any = (
            transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), attn_implementation="eager"
            )
            .double()
            .eval()
        )

    @contextmanager
    def _open_softmax(
        self, deltas: dict[int, Tensor], pattern_deltas: dict[int, Tensor]
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        original = nn.functional.softmax
        scores: list[Tensor] = []
        patterns: list[Tensor] = []

        def softmax(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            x = x.double()
            if len(scores) in deltas:
                x = x + deltas[len(scores)]
            if x.requires_grad:
                x.retain_grad()
            scores.append(x)
            patterns.append(original(x, dim=-1))
            added = pattern_deltas.get(len(patterns) - 1)
            return patterns[-1] if added is None else patterns[-1] + added

        nn.functional.softmax = softmax
        try:
            with _float64_throughout():
                yield scores, patterns
        finally:
            nn.functional.softmax = original

    def logits(
        self,
        ids: Tensor,
        deltas: dict[int, Tensor] | None = None,
        pattern_deltas: dict[int, Tensor] | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """Logits, with `deltas` (by layer) added to the softmax inputs and `pattern_deltas` to
        the softmax outputs; `inputs` are further arguments of the model."""
        with torch.no_grad(), self._open_softmax(deltas or {}, pattern_deltas or {}):
            return self.model(ids, **inputs).logits

    def score_gradients(
        self, ids: Tensor, loss: Loss, pattern_deltas: dict[int, Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """dL/dS and A per layer, each [batch, head, query, key], by autograd."""
        with (
            torch.enable_grad(),
            self._open_softmax({}, pattern_deltas or {}) as (scores, patterns),
        ):
            total = loss(self.model(ids).logits)
            gradients = torch.autograd.grad(total, scores)
        return list(gradients), [p.detach() for p in patterns]

    def ra(self, ids: Tensor, loss: Loss, scales: Sequence[float]) -> list[Tensor]:
        """R per layer: dL/d(q·k) = scale · dL/dS."""
        gradients, _ = self.score_gradients(ids, loss)
        return [g * c for g, c in zip(gradients, scales, strict=True)]

    def finite_differences(
        self, ids: Tensor, loss: Loss, layer: int, directions: Tensor, step: float = 1e-4
    ) -> Tensor:
        """Central differences of the loss of one example ([1, pos]) along score perturbations.

        `directions` is [n, head, query, key]; `loss` gives one value per example.
        """
        many = ids.expand(directions.shape[0], -1)
        up = loss(self.logits(many, {layer: step * directions}))
        down = loss(self.logits(many, {layer: -step * directions}))
        return (up - down) / (2 * step)


def nll(*tokens: int) -> Loss:
    """−log p of one token per example at the last position, summed."""

    def loss(logits: Tensor) -> Tensor:
        return -sum(logits[i, -1].log_softmax(-1)[t] for i, t in enumerate(tokens))

    return loss
