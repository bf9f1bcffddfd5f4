"""Float16: the loss is scaled, so that its gradients stay in the range of these numbers.

float16 holds 6e-8 to 65504, the smallest of them with few bits. Where the model is sure of its
answer the gradients of −log p begin at 1e-4, and further down much of them is rounded away. As in
mixed-precision training the loss is multiplied by a power of two and the maps are divided by it,
which changes nothing else, as a backward pass is linear.

The factor makes the largest gradient at the logits about 64, so that one may grow a thousandfold
on its way down, and prompts of which the model is sure share a batch with others. Where a gradient
grows out of range all the same, the batch is run again with a smaller factor, hooks included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_AT_THE_LOGITS = (2.0**6, 2.0**-2, 2.0**-10)


class LossScale:
    """The factor of the losses of a run, batch by batch; 1 where nothing is done in float16."""

    def __init__(self, *, in_float16: bool) -> None:
        """Scale where a model computes `in_float16`."""
        self._in_float16 = in_float16
        self._allowed = list(_AT_THE_LOGITS)

    def of(self, total: Tensor, logits: Tensor) -> float:
        """Give the factor of a loss of `logits`, a power of two."""
        if not self._in_float16 or not total.requires_grad or not logits.requires_grad:
            return 1.0
        largest = _largest_gradient(total, logits)
        if not 0 < largest < math.inf:
            return 1.0
        exponent = math.floor(math.log2(self._allowed[0] / largest))
        return 2.0 ** min(exponent, 15 if total.dtype == torch.float16 else 100)

    def lower(self) -> bool:
        """Give smaller factors from now on; False if there are none."""
        if not self._in_float16 or len(self._allowed) == 1:
            return False
        del self._allowed[0]
        return True


def _largest_gradient(total: Tensor, logits: Tensor) -> float:
    """Largest |∂ total / ∂ logits|, whether or not float16 could hold it."""
    for factor in (2.0**15, 1.0, 2.0**-15):
        weight = torch.full_like(total, factor)
        (grad,) = torch.autograd.grad(total, logits, weight, retain_graph=True, allow_unused=True)
        largest = 0.0 if grad is None else float(grad.norm(p=math.inf))
        if math.isfinite(largest):
            break
    return largest / factor
