"""What cutting attention does to the loss, to first order, from A and R.

Cutting the edges K of one row of one head (their scores become −∞) and leaving the rest to the
softmax turns A into A′:

    A′_j = 0 for j in K,   A′_j = A_j / (1 − a) else,   with a = Σ_K A_k

To first order the loss changes by Σ_j (A′_j − A_j) G_j, with G = ∂L/∂A. Written with R~ = R / scale
= A ⊙ (G − g), g = Σ_j A_j G_j, that is

    knockout   −Σ_K R~_k / (1 − a)    renormalised: as if the keys were not there
    cut        −Σ_K A_k G_k           not renormalised: the row keeps what it had for other keys

Proof: A′ − A is a / (1 − a) · A_j outside of K and −A_k inside, so that the change is
a / (1 − a) · (g − Σ_K A_k G_k) − Σ_K A_k G_k = −Σ_K A_k (G_k − g) / (1 − a).  ∎

Positive: the loss rises without these edges, so the answer needs them. The unit is that of the
loss, nats for −log p, whatever the head, the layer or the model. It is exact as long as the loss is
linear in A along the change: for a slight weakening of the edges always, for a whole cut about as
well as a first-order expansion reaches. Rows, heads and layers add up.

A row that holds nothing but what is cut, as that of the first token, cannot be renormalised. It
stays as it is, and its knockout is 0. Where nearly all of a row is cut, 1 − a and the sum of R~ are
taken from what is left, as their difference to the whole would be rounding.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ra_lens.model.sites import StoredKind

_ROUNDING = 8  # so many steps of the dtype may a row that sums to 1 be off


def knockout_map(
    pattern: Float[Tensor, "*batch query key"], step: Float[Tensor, "*batch query key"]
) -> Float[Tensor, "*batch query key"]:
    """What cutting each edge alone does to the loss, the row renormalised: −R~ / (1 − A).

    Args:
        pattern: A.
        step: R~, that is R / scale.

    Returns:
        In the unit of the loss, positive where it rises; float32 at least. 0 where the edge is all
        that its row has.
    """
    missing = lacking(pattern)
    pattern, step = wide(pattern), wide(step)
    found = torch.where(pattern >= 1, 0.0, -step / (1 - pattern))  # NaN stays NaN
    # Of a row at most one edge holds more than half; what the others hold tells the rest exactly.
    most, at = pattern.max(dim=-1, keepdim=True)
    others = torch.ones_like(pattern, dtype=torch.bool).scatter(-1, at, value=False)
    left = (pattern * others).sum(dim=-1, keepdim=True) + missing
    of_others = (step * others).sum(dim=-1, keepdim=True)
    own = torch.where(missing > 0, -step.gather(-1, at), of_others)
    exact = torch.where(left > 0, own / left, 0.0)
    return found.scatter(-1, at, torch.where(most > 0.5, exact, found.gather(-1, at)))


def cut_map(
    pattern: Float[Tensor, "*batch query key"], grad: Float[Tensor, "*batch query key"]
) -> Float[Tensor, "*batch query key"]:
    """What cutting each edge alone does to the loss, the row not renormalised: −A ⊙ G.

    Args:
        pattern: A.
        grad: G = ∂L/∂A.

    Returns:
        In the unit of the loss, positive where it rises; float32 at least.
    """
    return -wide(pattern) * wide(grad)


def foretold(
    kind: Literal["knockout", "cut"],
    pattern: Float[Tensor, "*batch query key"],
    other: Float[Tensor, "*batch query key"],
    scale: float,
) -> Float[Tensor, "*batch query key"]:
    """Either map of single edges, from A and what is stored beside it: R, or G for a plain cut."""
    if kind == "cut":
        return cut_map(pattern, other)
    return knockout_map(pattern, wide(other) / scale)


FORETOLD_FROM: dict[str, tuple[StoredKind, StoredKind]] = {
    "knockout": ("pattern", "ra"),
    "cut": ("pattern", "pattern_grad"),
}
"""What the maps of single edges are made from."""


def knockout_of_set(
    pattern: Float[Tensor, "*batch query key"],
    step: Float[Tensor, "*batch query key"],
    edges: Bool[Tensor, "*batch query key"],
) -> Float[Tensor, "*batch query"]:
    """What cutting the `edges` of each row together does to the loss, renormalised.

    As `knockout_map`: −Σ R~ / (1 − Σ A), both sums over the edges of the row.
    """
    missing = lacking(pattern)[..., 0]
    pattern, step = wide(pattern), wide(step)
    held, gone = (pattern * edges).sum(dim=-1), (step * edges).sum(dim=-1)
    left = (pattern * ~edges).sum(dim=-1) + missing
    mostly = (held > 0.5) & (missing == 0)  # rows of R~ sum to 0
    gone = torch.where(mostly, -(step * ~edges).sum(dim=-1), gone)
    left = torch.where(held > 0.5, left, 1 - held)
    return torch.where(left > 0, -gone / left, 0.0)


def cut_of_set(
    pattern: Float[Tensor, "*batch query key"],
    grad: Float[Tensor, "*batch query key"],
    edges: Bool[Tensor, "*batch query key"],
) -> Float[Tensor, "*batch query"]:
    """What cutting the `edges` of each row together does to the loss, not renormalised."""
    return (cut_map(pattern, grad) * edges).sum(dim=-1)


def wide(value: Tensor) -> Tensor:
    """Give a map in float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def lacking(pattern: Float[Tensor, "*batch query key"]) -> Float[Tensor, "*batch query 1"]:
    """What a row lacks to 1: the share of an attention sink, which no key has; rounding is none."""
    lacks = 1 - wide(pattern).sum(dim=-1, keepdim=True)
    return torch.where(lacks > _ROUNDING * torch.finfo(pattern.dtype).eps, lacks, 0.0)
