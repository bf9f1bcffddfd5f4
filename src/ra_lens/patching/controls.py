"""Maps to compare a patch with: as large as Reversed Attention, but without what it says.

A patch that helps may help because of what its map says, or because attention was moved at all. Two
maps that are as large as RA, head by head, tell these apart:

* `shuffled`: the entries of each row of RA, put in another order among the keys that the row can
  attend to. Rows keep their sum of 0 and their size, and lose which token they point to.
* `grad`: the gradient at the pattern itself, G, times ‖R‖/‖G‖ of its head: the gradient step that
  does not go through the softmax, so that its rows move no attention but make or take it.
"""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ra_lens.patching.mean import MeanMaps

Control = Literal["shuffled", "grad"]


def control_maps(
    mean: MeanMaps, control: Control, *, seed: int = 0
) -> dict[int, Float[Tensor, "head query key"]]:
    """Give the maps of a control, by layer, for `patch_hooks`; `seed` is that of the shuffle.

    Raises:
        NotStored: RA, the pattern or its gradient were not averaged.
    """
    maps: dict[int, Tensor] = {}
    for layer in mean.sites:
        ra, reached = mean["ra", layer], mean["pattern", layer] > 0
        if control == "shuffled":
            maps[layer] = _shuffled(ra, reached, zlib.crc32(f"{seed} {layer}".encode()))
        else:
            grad = mean["pattern_grad", layer].where(reached, 0.0)
            sizes = ra.norm(dim=(-2, -1), keepdim=True), grad.norm(dim=(-2, -1), keepdim=True)
            maps[layer] = grad * (sizes[0] / sizes[1].where(sizes[1] > 0, 1.0))
    return maps


def _shuffled(
    ra: Float[Tensor, "head query key"], reached: Bool[Tensor, "head query key"], seed: int
) -> Float[Tensor, "head query key"]:
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(ra.shape, generator=generator).to(ra.device)
    # The keys that a row can attend to, in order and in another order; the others follow in both.
    there = (~reached).to(torch.uint8).argsort(dim=-1, stable=True)
    drawn = (chance + ~reached).argsort(dim=-1)
    return torch.zeros_like(ra).scatter(-1, there, ra.where(reached, 0.0).gather(-1, drawn))
