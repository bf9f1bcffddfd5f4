"""Heads that are known to do something: published lists, and how well scores find such heads.

    known = known_heads("ioi")
    known["name mover"]  # ('L9H9', 'L10H0', 'L9H6')
    localisation_scores(rank_heads(model, prompts, method="michel"), known.heads).auroc

The lists are of GPT-2 small, as their authors printed them. That a score agrees with one says where
it looks, not that the circuit is all there is: overlap with a published circuit is no substitute
for taking heads away (Hanna et al., "Have Faith in Faithfulness", 2024). So look at
`ra_lens.perturbation_test` and exact effects as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

from ra_lens.errors import BadInput
from ra_lens.head_names import Heads, layer_and_index, list_heads, spell_head
from ra_lens.heads.scores import HeadScores


@dataclass(frozen=True)
class KnownHeads(Mapping[str, tuple[str, ...]]):
    """A published list of heads: a mapping from a class of heads to their labels.

    Attributes:
        name: What `known_heads` calls it.
        model: The model whose heads they are, as TransformerLens names it.
        source: Who published it.
        classes: Labels such as `L9H9` by class, in the order published.
    """

    name: str
    model: str
    source: str
    classes: Mapping[str, tuple[str, ...]]

    @property
    def heads(self) -> tuple[str, ...]:
        """The labels of all classes, each once."""
        return tuple(dict.fromkeys(head for heads in self.classes.values() for head in heads))

    def __getitem__(self, name: str) -> tuple[str, ...]:
        """Give the labels of a class."""
        return self.classes[name]

    def __iter__(self) -> Iterator[str]:
        """Go through the names of the classes."""
        return iter(self.classes)

    def __len__(self) -> int:
        """Give the number of classes."""
        return len(self.classes)


@cache
def _lists() -> dict[str, KnownHeads]:
    file = resources.files("ra_lens.heads") / "known_heads.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: KnownHeads(
            name,
            one["model"],
            one["source"],
            {kind: tuple(heads) for kind, heads in one["classes"].items()},
        )
        for name, one in found.items()
    }


def known_heads(name: str) -> KnownHeads:
    """Give a published list of heads of GPT-2 small.

    * `"ioi"`: the 26 heads of indirect object identification, in seven classes (Wang et al. 2022).
    * `"greater_than"`: the attention heads of greater-than (Hanna et al. 2023).
    * `"induction"`: the induction heads among those of `"ioi"`.

    Raises:
        BadInput: there is no such list.
    """
    lists = _lists()
    if name not in lists:
        raise BadInput(
            f"there is no published list of heads {name!r}. There are "
            f"{', '.join(map(repr, lists))}; heads of your own are labels such as 'L9H9'."
        )
    return lists[name]


@dataclass(frozen=True)
class Localisation:
    """How well scores find some heads among all.

    Attributes:
        auroc: Chance that a true head scores higher than another head, a tie counting half: the
            area under the receiver operating characteristic by mid-ranks. 1: all true heads come
            first; .5: as if drawn at random.
        auroc_pessimistic: The same with every tie against the true head.
        average_precision: Precision at each score that a true head has, times the share of true
            heads that have it, summed; heads that tie come together.
        to_verify: How many heads have to be looked at, the largest score first, before the last
            true head is found; of a tie all.
        n_true: Number of true heads.
        n_heads: Number of heads.
    """

    auroc: float
    auroc_pessimistic: float
    average_precision: float
    to_verify: int
    n_true: int
    n_heads: int


def localisation_scores(scores: HeadScores, heads: Heads) -> Localisation:
    """Say how well scores find some heads: those with a large score should be these.

    A signed score puts heads that hurt last, and a circuit may have such (negative name movers):
    look at `scores.absolute()` as well.

    Args:
        scores: Of all heads by some method; larger = more important.
        heads: The true heads: labels like `"L3H5"`, (layer, head) pairs or `HeadScore`s.

    Raises:
        BadInput: a head that the model does not have, none, all, or one twice.
    """
    every = scores.order()
    places = {pair: i for i, pair in enumerate(every)}
    given = list_heads(heads)
    chosen = [_find(head, scores, places) for head in given]
    refuse_true_heads(chosen, len(every), scores.model_name)
    rows = {layer: i for i, layer in enumerate(scores.layers)}
    values = torch.stack([scores.scores[rows[layer], head] for layer, head in every])
    true = torch.zeros(len(every), dtype=torch.bool)
    true[[places[pair] for pair in chosen]] = True
    positive, negative = values[true][:, None], values[~true][None, :]
    above, tied = (positive > negative).double().mean(), (positive == negative).double().mean()
    # At the score of each true head: all heads, and true heads, that have at least that.
    at_least = (values[None, :] >= positive).sum(dim=1)
    true_at_least = (positive <= positive.T).sum(dim=1)
    return Localisation(
        auroc=float(above + tied / 2),
        auroc_pessimistic=float(above),
        average_precision=float((true_at_least / at_least.double()).mean()),
        to_verify=int(at_least.max()),
        n_true=len(chosen),
        n_heads=len(every),
    )


def refuse_true_heads(chosen: Sequence[object], n_heads: int, model_name: str) -> None:
    """Raise BadInput unless these are some of a model's heads, each once, and not all."""
    if not 0 < len(set(chosen)) == len(chosen) < n_heads:
        raise BadInput(
            f"found {len(chosen)} true heads, {len(set(chosen))} different ones, of "
            f"{n_heads} of {model_name}; give each once, at least one, and not all."
        )


def _find(
    head: object, scores: HeadScores, places: Mapping[tuple[int, int], int]
) -> tuple[int, int]:
    pair = layer_and_index(head)
    if pair not in places:
        raise BadInput(
            f"found {spell_head(head)} among the true heads, but {scores.model_name} has no such "
            "head among those scored. A published list is of the model that it names."
        )
    return pair
