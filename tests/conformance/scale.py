"""The softmax scale of a model, measured from what its attention softmaxes were given."""

from __future__ import annotations

import torch
from torch import Tensor

from oracle import Seen


def measured_scale(seen: Seen, *, softcap: float | None = None) -> float | None:
    """Factor c in S = c·(q·k) + bias, from two examples; None where it cannot be told.

    A bias that depends only on positions drops out of the difference of two examples, one that is
    constant along a row drops out with the row's mean. What remains must be a multiple of the
    products; if it is not, no factor is given.
    """
    if seen.product is None:
        return None
    scores = seen.scores.detach()
    scores = scores.reshape(seen.product.shape[0], -1, *scores.shape[-2:])
    scores = scores[..., : seen.product.shape[-1]].double()
    if softcap is not None:
        inside = (scores / softcap).clamp(-1 + 1e-12, 1 - 1e-12)
        allowed = scores > -1.01 * softcap
        scores = torch.where(allowed, softcap * torch.atanh(inside), scores)
    else:
        allowed = scores > -1e4
    both = allowed.all(dim=0, keepdim=True)
    s = _centred(scores[:1] - scores[1:2], both)
    p = _centred((seen.product[:1] - seen.product[1:2]).double(), both)
    factor = float((s * p).sum() / (p * p).sum())
    left = float((s - factor * p).norm() / s.norm())
    return factor if left < 1e-3 else None


def _centred(x: Tensor, where: Tensor) -> Tensor:
    x = torch.where(where, x, 0.0)
    mean = x.sum(-1, keepdim=True) / where.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(where, x - mean, 0.0)
