"""`HeadScores`: one number per head, larger = more important, and the order that follows from it.

Ties keep the model's order, first layer and first head first, so that an order is the same on every
machine. `reversed()` turns the whole order around, ties included: the paper's `[<-]` runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ra_lens.cache_info import HeadScore
from ra_lens.errors import BadInput
from ra_lens.numbers import Whole, whole
from ra_lens.sites import spell_layers

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """Scores of all heads of a model by one method.

    Attributes:
        method: Name of the method, as `rank_heads` takes it.
        title: What the method is, in a few words.
        scores: Float64 on the CPU; larger = more important. Negated where `is_reversed`.
        layers: The layers that the rows of `scores` belong to.
        n_examples: Number of prompts that the scores were averaged over.
        model_name: As TransformerLens has it.
        seed: Of the method, where it draws anything.
        draw: Which of the orders of a random method.
        is_reversed: True for what `reversed` gives: the least important head first.
    """

    method: str
    title: str
    scores: Float[Tensor, "layer head"]
    layers: tuple[int, ...]
    n_examples: int
    model_name: str
    seed: int = 0
    draw: int = 0
    is_reversed: bool = False

    def __post_init__(self) -> None:
        """Move the scores to float64 on the CPU, and refuse those that rank nothing.

        Raises:
            BadInput: not one row per layer, or NaN.
        """
        if self.scores.ndim != 2 or self.scores.shape[0] != len(self.layers):
            raise BadInput(
                f"method {self.method!r} gave scores of shape {tuple(self.scores.shape)} for "
                f"{len(self.layers)} layers. Give [layer, head]."
            )
        scores = self.scores.detach().to(device="cpu", dtype=torch.float64)
        unknown = scores.isnan().nonzero().tolist()
        if unknown:
            names = [f"L{self.layers[i]}H{head}" for i, head in unknown]
            raise BadInput(
                f"method {self.method!r} gave NaN for {len(names)} of {scores.numel()} heads "
                f"({', '.join(names[:4])}{', …' * (len(names) > 4)}). A score is a number, larger "
                "for a more important head; give a head that cannot be scored 0 or minus infinity."
            )
        object.__setattr__(self, "scores", scores)

    @property
    def n_heads(self) -> int:
        """Heads per layer."""
        return self.scores.shape[1]

    def __len__(self) -> int:
        """Give the number of heads."""
        return self.scores.numel()

    @property
    def labels(self) -> list[str]:
        """`L0H0`, `L0H1`, … in the order of `scores.flatten()`, as TransformerLens labels heads."""
        return [f"L{layer}H{head}" for layer in self.layers for head in range(self.n_heads)]

    @property
    def direction(self) -> str:
        """`forward`, or `reversed` for the least important head first."""
        return "reversed" if self.is_reversed else "forward"

    def order(self) -> list[tuple[int, int]]:
        """Give every head as (layer, head), the most important first (last where reversed)."""
        cells = (divmod(i, self.n_heads) for i in self._flat_order())
        return [(self.layers[row], head) for row, head in cells]

    def top(self, k: Whole = 10) -> list[HeadScore]:
        """Give the first `k` heads of the order with their scores; all of them if there are fewer.

        Raises:
            BadInput: `k` below 1.
        """
        k = whole("k", k)
        if k < 1:
            raise BadInput(f"found k={k}; ask for at least one head.")
        values = self.scores.flatten().tolist()
        chosen = zip(self.order(), self._flat_order(), strict=True)
        return [HeadScore(layer, head, values[i]) for (layer, head), i in list(chosen)[:k]]

    def reversed(self) -> HeadScores:
        """Give the same heads in exactly the opposite order, ties included; scores are negated."""
        return replace(self, scores=0 - self.scores, is_reversed=not self.is_reversed)

    def keep_mask(self, n: Whole) -> Bool[Tensor, "layer head"]:
        """Mark the first `n` heads of the order, for `ra_lens.masking.mask_hooks`.

        Raises:
            BadInput: fewer than 0 heads, or more than there are.
        """
        n = whole("n", n)
        if not 0 <= n <= len(self):
            raise BadInput(f"found n={n}; {self.model_name} has {len(self)} heads to keep.")
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[self._flat_order()[:n]] = True
        return mask.reshape(self.scores.shape)

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate one row per head, in order: layer, head, label, score, rank (1 = first), …."""
        import pandas as pd

        values, labels = self.scores.flatten().tolist(), self.labels
        rows = [
            {
                "model": self.model_name,
                "method": self.method,
                "title": self.title,
                "direction": self.direction,
                "seed": self.seed,
                "draw": self.draw,
                "n_examples": self.n_examples,
                "layer": layer,
                "head": head,
                "label": labels[i],
                "score": values[i],
                "rank": rank,
            }
            for rank, ((layer, head), i) in enumerate(
                zip(self.order(), self._flat_order(), strict=True), start=1
            )
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        """Say what was ranked how, and which heads come first."""
        best = ", ".join(f"{head.label} {head.score:.3g}" for head in self.top(5))
        n = self.n_examples
        return (
            f"HeadScores of {self.model_name} by {self.method!r} ({self.title}): "
            f"layers {spell_layers(self.layers)}, {self.n_heads} heads, "
            f"{n} prompt{'s' * (n != 1)}{', reversed' * self.is_reversed}\n"
            f"  first: {best}{', …' * (len(self) > 5)}"
        )

    def _flat_order(self) -> list[int]:
        # Reversed scores are sorted as they were before, so that ties turn around too.
        forward = 0 - self.scores if self.is_reversed else self.scores
        order = forward.flatten().argsort(descending=True, stable=True)
        return order.flip(0).tolist() if self.is_reversed else order.tolist()
