"""What a norm does to a direction: centre it or not, and multiply each entry by a gain.

A norm gives N(x) = g ⊙ (x − mean(x)) / size(x) + b; an RMSNorm does not subtract the mean. The size
is that of the whole residual stream at a token, which a direction alone (what one head adds, a
gradient) does not have. What remains is linear:

    direction d  ↦  g ⊙ (d − mean(d))

It is what N adds for a small d, up to the positive factor 1 / size(x) and to the part of d that
lies along x itself, which the size takes out again. b is the same for every x, and belongs to no d.

The gain is read by showing the norm vectors of ±1, so that it does not matter where a class keeps
it, or whether it stores 1 + g; what is read must then give what the norm gives for another vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.errors import UnsupportedModel
from ra_lens.model.lens import Lens
from ra_lens.model.placement import device_of


@dataclass(frozen=True, eq=False)
class Gain:
    """The linear part of a norm.

    Attributes:
        gain: g, in float32 at least.
        centred: Whether the norm subtracts the mean.
    """

    gain: Float[Tensor, "d_model"]
    centred: bool

    def __call__(
        self, directions: Float[Tensor, "*some d_model"]
    ) -> Float[Tensor, "*some d_model"]:
        """Apply it to directions."""
        if self.centred:
            directions = directions - directions.mean(dim=-1, keepdim=True)
        return directions * self.gain.to(directions.device)

    def back(self, directions: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some d_model"]:
        """Apply its transpose: from a direction read behind the norm to one read in front of it."""
        directions = directions * self.gain.to(directions.device)
        return directions - directions.mean(dim=-1, keepdim=True) if self.centred else directions


def no_norm(like: Float[Tensor, "*some d_model"]) -> Gain:
    """The gain of no norm at all."""
    return Gain(torch.ones_like(like.reshape(-1, like.shape[-1])[0]), centred=False)


def gain_in(
    lens: Lens, norm: nn.Module, like: Float[Tensor, "batch pos d_model"], where: str
) -> Gain:
    """Read the linear part of a norm of a model, on which nothing is left; see `read_gain`."""
    with lens.without_hooks(), lens.tensors_put_back():
        own = like.to(device=device_of(norm) or like.device, dtype=lens.dtype)
        return read_gain(norm, own, f"the norm {where} of {lens.name}")


@torch.no_grad()
def read_gain(norm: nn.Module, like: Float[Tensor, "batch pos d_model"], name: str) -> Gain:
    """Read the linear part of a norm.

    Args:
        norm: The module.
        like: What it takes: dtype, device and width.
        name: What messages call it.

    Raises:
        UnsupportedModel: it is not of the form above.
    """
    width, wide = like.shape[-1], torch.promote_types(like.dtype, torch.float32)

    def given(x: Tensor) -> Tensor:
        return norm(x.to(like).reshape(1, 1, width)).to(wide).reshape(width)

    signs = torch.ones(width, dtype=wide, device=like.device)
    signs[1::2] = -1
    if width % 2:
        signs[-1] = -2 if width > 1 else 1  # so that they sum to 0
        signs[-3:-1] = 1
    shift = given(torch.zeros_like(signs))
    size = signs.square().mean().sqrt()
    at_signs = given(signs) - shift
    scales = not _same(given(2 * signs) - shift, 2 * at_signs)  # no norm does not
    gain = at_signs * (size if scales else 1.0) / signs
    centred = _same(given(signs + 1) - shift, at_signs)
    found = Gain(gain, centred)
    generator = torch.Generator().manual_seed(0)
    other = (3 * torch.randn(width, generator=generator, dtype=wide) + 1).to(like.device)
    direction = found(other)
    if scales:
        about = other - other.mean() if centred else other
        direction = direction / about.square().mean().sqrt()
    if not _same(given(other) - shift, direction):
        raise UnsupportedModel(
            f"{name} ({type(norm).__name__}) is no LayerNorm and no RMSNorm: it does not give "
            "gain · x / size + bias, so what it does to a direction of the residual stream is not "
            "known."
        )
    return found


def _same(found: Tensor, wanted: Tensor) -> bool:
    # Models in half precision round each on its own way.
    return float((found - wanted).norm()) <= 0.02 * float(wanted.norm()) + 1e-6
