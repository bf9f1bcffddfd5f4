"""From a direction of the residual stream to the tokens of the vocabulary.

The logits are N(x) W_U + b_U, with N the model's final norm. Of a direction d, which is added to
the stream or is a gradient at it, the scores are

    s(d) = (g ⊙ (d − mean(d))) W_U,  less the mean of s(d) over the vocabulary

with g the gain of N, and mean(d) only where N subtracts it. It is linear in d: the tokens at the
negative end of d are those at the positive end of −d. The size that N divides by is left out, as a
direction has none; it is positive, so that no order of tokens depends on it. So are b_U and the
bias of N, which would be the same for every d, and the mean, which no softmax sees. Where the model
caps its logits, or multiplies them by a positive number, the order is the same as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.errors import UnsupportedModel
from ra_lens.model.gains import Gain, gain_in, no_norm
from ra_lens.model.lens import Lens
from ra_lens.model.short_run import Seen, fits, same, short_run


@dataclass(frozen=True, eq=False)
class Unembedding:
    """The final norm's gain, and W_U.

    Attributes:
        norm: What the final norm does to a direction.
        weights: W_U, in float32 at least.
    """

    norm: Gain
    weights: Float[Tensor, "d_model d_vocab"]

    def scores(self, directions: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some d_vocab"]:
        """Scores of every token, with mean 0 for each direction."""
        found = self.norm(directions.to(self.weights)) @ self.weights
        return found.sub_(found.mean(dim=-1, keepdim=True))


def unembedding(lens: Lens) -> Unembedding:
    """Read final norm and W_U, and check in a short run that the logits are made with them.

    Raises:
        UnsupportedModel: the logits are made in another way.
    """
    if lens.reads != "left to right":
        raise UnsupportedModel(
            f"{lens.name} reads {lens.reads}; which tokens a vector is nearest to is known of "
            "language models that read from left to right, with one residual stream."
        )
    head = getattr(lens.module, "unembed", None)
    norm = getattr(lens.module, "ln_final", None)
    weights = getattr(head, "W_U", None)
    shape = (lens.d_model, lens.d_vocab)
    if not isinstance(head, nn.Module) or not isinstance(weights, Tensor):
        raise _unsupported(lens, "it has no unembed.W_U")
    if tuple(weights.shape) != shape or not weights.is_floating_point():
        raise _unsupported(lens, f"unembed.W_U is {tuple(weights.shape)}, not {shape}")
    weights = weights.detach()
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    blocks = [site.block for site in lens.sites.values()]
    last = getattr(lens.module, "blocks", None)
    ends = [lens.module.get_submodule(blocks[-1])] if last is None else [list(last)[-1]]
    asked = [*ends, head, *([norm] if isinstance(norm, nn.Module) else [])]
    seen, logits = short_run(lens, asked)
    at_head, at_end = seen.get(head), seen.get(ends[0])
    stream = None if at_end is None else at_end.gave
    if at_head is None or at_head.taken is None or at_head.gave is None or stream is None:
        raise _unsupported(lens, "its unembedding does not run by itself")
    found = at_head.taken[:, 1:] - at_head.taken[:, :1]  # so that a bias drops out
    given = at_head.gave[:, 1:] - at_head.gave[:, :1]
    if not fits(found.to(weights.device) @ weights, given):
        raise _unsupported(lens, "its unembedding is not x W_U + b_U")
    if not _same_order(at_head.gave, logits):
        raise _unsupported(lens, "something else comes between W_U and its logits")
    gain = _final_gain(lens, norm, seen, at_head.taken, stream)
    return Unembedding(gain, weights)


def _final_gain(
    lens: Lens, norm: Any, seen: dict[nn.Module, Seen], taken: Tensor, stream: Tensor
) -> Gain:
    if same(taken, stream):
        return no_norm(stream)
    at_norm = seen.get(norm) if isinstance(norm, nn.Module) else None
    if at_norm is None or at_norm.taken is None or at_norm.gave is None:
        raise _unsupported(lens, "it has no ln_final")
    if not same(at_norm.taken, stream) or not same(taken, at_norm.gave):
        raise _unsupported(
            lens, "something beside the final norm stands between its last block and W_U"
        )
    return gain_in(lens, norm, at_norm.taken, "before the unembedding")


def _same_order(scores: Tensor, logits: Tensor) -> bool:
    """Whether logits rise with scores."""
    if scores.shape != logits.shape:
        return False
    order = scores.argsort(dim=-1).to(logits.device)
    steps = logits.gather(-1, order).diff(dim=-1)
    spread = logits.amax(dim=-1, keepdim=True) - logits.amin(dim=-1, keepdim=True)
    return bool((steps >= -1e-3 * spread).all())


def _unsupported(lens: Lens, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"which tokens of {lens.name} a vector is nearest to is not known: {why}. It is read "
        "where the logits are the last block's output, a final norm and W_U."
    )
