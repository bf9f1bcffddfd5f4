"""What is done to the pattern A with what is placed on it, D = scale · map.

    add           A' = A + D, the paper's; not renormalised
    renormalise   A' = max(A + D, 0) · rowsum(A) / rowsum(max(A + D, 0))
    scores        A' = A · e^D · rowsum(A) / rowsum(A · e^D), which is softmax(S + D)

The last two keep the sum of every row as it was: 1, or 0 at padding, or less than 1 with attention
sinks (which then keep their share). A row in which the addition leaves nothing above 0 becomes 0.
Only rows that the map reaches are changed at all.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Where = Literal["pattern", "scores"]


def added(
    pattern: Float[Tensor, "batch head query key"], addition: Float[Tensor, "some head query key"]
) -> Float[Tensor, "batch head query key"]:
    """A + D."""
    return pattern + addition.to(pattern.dtype)


def renormalised(
    pattern: Float[Tensor, "batch head query key"],
    addition: Float[Tensor, "some head query key"],
    reached: Bool[Tensor, "example head query 1"],
) -> Float[Tensor, "batch head query key"]:
    """A + D without its negative entries, in rows of the sum they had."""
    wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    positive = (wide + addition.to(wide.dtype)).clamp(min=0)
    return torch.where(reached, _with_sum_of(wide, positive).to(pattern.dtype), pattern)


def stepped(
    pattern: Float[Tensor, "batch head query key"],
    addition: Float[Tensor, "some head query key"],
    reached: Bool[Tensor, "example head query 1"],
) -> Float[Tensor, "batch head query key"]:
    """The pattern of scores to which D was added, from the pattern alone."""
    wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    # Relative to the largest exponent that any attention goes to: e^D cannot overflow, and the
    # row cannot vanish.
    exponent = addition.to(wide.dtype).expand_as(wide).masked_fill(wide <= 0, -torch.inf)
    highest = exponent.amax(dim=-1, keepdim=True)
    weights = (exponent - highest.clamp(min=torch.finfo(wide.dtype).min)).exp()
    return torch.where(reached, _with_sum_of(wide, wide * weights).to(pattern.dtype), pattern)


def _with_sum_of(before: Tensor, after: Tensor) -> Tensor:
    total = after.sum(dim=-1, keepdim=True)
    return after * (before.sum(dim=-1, keepdim=True) / torch.where(total > 0, total, 1.0))
