"""`HeadScores`: one number per head, larger = more important, and the order that follows from it.

Ties keep the model's order, first layer and first head first, so that an order is the same on every
machine. `reversed()` turns the whole order around, ties included: the paper's `[<-]` runs.

Where layers have different numbers of heads, `scores` is as wide as the layer with the most, and
NaN at heads that do not exist; these are in no order and no table.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.head_names import HeadScore
from ra_lens.model import spell_layers
from ra_lens.model.sites import every_head, head_places, spell_counts
from ra_lens.numbers import Whole, whole

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """Scores of all heads of a model by one method.

    Attributes:
        method: Name of the method, as `rank_heads` takes it.
        title: What the method is, in a few words.
        scores: Float64 on the CPU; larger = more important. Negated where `is_reversed`. NaN where
            a layer has no such head.
        layers: The layers that the rows of `scores` belong to.
        n_examples: Number of prompts that the scores were averaged over.
        model_name: As TransformerLens has it.
        seed: Of the method, where it draws anything.
        draw: Which of the orders of a random method.
        is_reversed: True for what `reversed` gives: the least important head first.
        heads: Heads of each layer; None: as many as `scores` has columns.
        each: The scores of each prompt, of which `scores` are the mean, where they were asked for
            (`rank_heads(each_prompt=True)`); else None. Negated and NaN as `scores`.
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
    heads: tuple[int, ...] | None = None
    each: Float[Tensor, "prompt layer head"] | None = None

    def __post_init__(self) -> None:
        """Move the scores to float64 on the CPU, and refuse those that rank nothing.

        Raises:
            BadInput: not one row per layer, not as wide as the layer with the most heads, or NaN.
        """
        if self.scores.ndim != 2 or self.scores.shape[0] != len(self.layers):
            raise BadInput(
                f"method {self.method!r} gave scores of shape {tuple(self.scores.shape)} for "
                f"{len(self.layers)} layers. Give [layer, head]."
            )
        if len(self._counts) != len(self.layers) or max(self._counts) != self.n_heads:
            raise BadInput(
                f"found heads={self.heads} for scores of shape {tuple(self.scores.shape)}. Give "
                "the number of heads of each layer; the largest is the width of the scores."
            )
        scores = self.scores.detach().to(device="cpu", dtype=torch.float64)
        scores = scores.masked_fill(~head_places(self._counts), float("nan"))
        unknown = scores[head_places(self._counts)].isnan().tolist()
        names = list(itertools.compress(self.labels, unknown))
        if names:
            raise BadInput(
                f"method {self.method!r} gave NaN for {len(names)} of {len(self)} heads "
                f"({', '.join(names[:4])}{', …' * (len(names) > 4)}). A score is a number, larger "
                "for a more important head; give a head that cannot be scored 0 or minus infinity."
            )
        object.__setattr__(self, "scores", scores)
        if self.each is not None:
            if self.each.shape[1:] != scores.shape:
                raise BadInput(
                    f"method {self.method!r} gave scores of each prompt of shape "
                    f"{tuple(self.each.shape)}; [prompt, layer, head] is needed, with "
                    f"{list(scores.shape)} for layer and head."
                )
            each = self.each.detach().to(device="cpu", dtype=torch.float64)
            each = each.masked_fill(~head_places(self._counts), float("nan"))
            object.__setattr__(self, "each", each)

    @property
    def n_heads(self) -> int:
        """Heads per layer; of the layer with the most, where they differ."""
        return self.scores.shape[1]

    def __len__(self) -> int:
        """Give the number of heads."""
        return sum(self._counts)

    @property
    def labels(self) -> list[str]:
        """`L0H0`, `L0H1`, … of every head, layer by layer, as TransformerLens labels heads."""
        return [f"L{layer}H{head}" for layer, head in every_head(self.layers, self._counts)]

    @property
    def direction(self) -> str:
        """`forward`, or `reversed` for the least important head first."""
        return "reversed" if self.is_reversed else "forward"

    def order(self) -> list[tuple[int, int]]:
        """Give every head as (layer, head), the most important first (last where reversed)."""
        return [(head.layer, head.head) for head in self._ranked()]

    def top(self, k: Whole = 10) -> list[HeadScore]:
        """Give the first `k` heads of the order with their scores; all of them if there are fewer.

        Raises:
            BadInput: `k` below 1.
        """
        k = whole("k", k)
        if k < 1:
            raise BadInput(f"found k={k}; ask for at least one head.")
        return self._ranked()[:k]

    def reversed(self) -> HeadScores:
        """Give the same heads in exactly the opposite order, ties included; scores are negated."""
        each = None if self.each is None else 0 - self.each
        return replace(self, scores=0 - self.scores, each=each, is_reversed=not self.is_reversed)

    def absolute(self) -> HeadScores:
        """Give the same heads by the size of their scores, without its sign, the largest first.

        A signed score puts heads that hurt last; so they come beside those that help as much.
        """
        return replace(self, scores=self.scores.abs(), each=None, is_reversed=False)

    def keep_mask(self, n: Whole) -> Bool[Tensor, "layer head"]:
        """Mark the first `n` heads of the order, for `ra_lens.patching.masking.mask_hooks`.

        Raises:
            BadInput: fewer than 0 heads, or more than there are.
        """
        n = whole("n", n)
        if not 0 <= n <= len(self):
            raise BadInput(f"found n={n}; {self.model_name} has {len(self)} heads to keep.")
        mask = torch.zeros(self.scores.shape, dtype=torch.bool)
        for layer, head in self.order()[:n]:
            mask[self.layers.index(layer), head] = True
        return mask

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate one row per head, in order: layer, head, label, score, rank (1 = first), …."""
        import pandas as pd

        rows = [
            {
                "model": self.model_name,
                "method": self.method,
                "title": self.title,
                "direction": self.direction,
                "seed": self.seed,
                "draw": self.draw,
                "n_examples": self.n_examples,
                "layer": head.layer,
                "head": head.head,
                "label": head.label,
                "score": head.score,
                "rank": rank,
            }
            for rank, head in enumerate(self._ranked(), start=1)
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        """Say what was ranked how, and which heads come first."""
        best = ", ".join(f"{head.label} {head.score:.3g}" for head in self.top(5))
        n = self.n_examples
        return (
            f"HeadScores of {self.model_name} by {self.method!r} ({self.title}): "
            f"layers {spell_layers(self.layers)}, {spell_counts(self._counts)} heads, "
            f"{n} prompt{'s' * (n != 1)}{', reversed' * self.is_reversed}\n"
            f"  first: {best}{', …' * (len(self) > 5)}"
        )

    @property
    def _counts(self) -> tuple[int, ...]:
        return self.heads or (self.n_heads,) * len(self.layers)

    def _ranked(self) -> list[HeadScore]:
        values = self.scores[head_places(self._counts)]
        # Reversed scores are sorted as they were before, so that ties turn around too.
        forward = 0 - values if self.is_reversed else values
        order = forward.argsort(descending=True, stable=True).tolist()
        order = order[::-1] if self.is_reversed else order
        every, scores = every_head(self.layers, self._counts), values.tolist()
        ranked = ((every[i], scores[i]) for i in order)
        return [HeadScore(layer, head, score) for (layer, head), score in ranked]
