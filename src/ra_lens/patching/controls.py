"""Maps to compare a patch with: as large as Reversed Attention, but without what it says.

A patch that helps may help because of what its map says, or because attention was moved at all.
Maps that are as large as RA, head by head, tell these apart:

* `shuffled`: the entries of each row of RA, put in another order among the keys that the row can
  attend to. Rows keep their sum of 0 and their size, and lose which token they point to.
* `grad`: the gradient at the pattern itself, G, times ‖R‖/‖G‖ of its head: the gradient step that
  does not go through the softmax, so that its rows move no attention but make or take it.
* `centred_grad`: G less the mean of its row over the keys that the row can attend to, as large as
  R: rows sum to 0 as those of RA do, but nothing says how much a key has to give.
* `a_grad`: A ⊙ G, the mean of the prompts' own products, as large as R: RA without the term that
  makes its rows sum to 0.
"""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ra_lens.patching.mean import MeanMaps

Control = Literal["shuffled", "grad", "centred_grad", "a_grad"]


def control_maps(
    mean: MeanMaps, control: Control, *, seed: int = 0
) -> dict[int, Float[Tensor, "head query key"]]:
    """Give the maps of a control, by layer, for `patch_hooks`; `seed` is that of the shuffle.

    Raises:
        NotStored: RA, the pattern or its gradient were not averaged; or, for `a_grad`, `cut`, which
            is −A ⊙ G: `ra.mean("ra", "cut")` of a cache of whole maps averages it.
    """
    maps: dict[int, Tensor] = {}
    for layer in mean.sites:
        ra = mean["ra", layer]
        if control == "a_grad":
            maps[layer] = _as_large(-mean["cut", layer], ra)
            continue
        reached = mean["pattern", layer] > 0
        if control == "shuffled":
            maps[layer] = _shuffled(ra, reached, zlib.crc32(f"{seed} {layer}".encode()))
            continue
        grad = mean["pattern_grad", layer].where(reached, 0.0)
        if control == "centred_grad":
            keys = reached.sum(dim=-1, keepdim=True).clamp(min=1)
            grad = (grad - grad.sum(dim=-1, keepdim=True) / keys).where(reached, 0.0)
        maps[layer] = _as_large(grad, ra)
    return maps


def _as_large(
    maps: Float[Tensor, "head query key"], ra: Float[Tensor, "head query key"]
) -> Float[Tensor, "head query key"]:
    """Scale the map of each head to the norm that its RA has; one of zeros stays."""
    wanted, own = (value.norm(dim=(-2, -1), keepdim=True) for value in (ra, maps))
    return maps * (wanted / own.where(own > 0, 1.0))


def _shuffled(
    ra: Float[Tensor, "head query key"], reached: Bool[Tensor, "head query key"], seed: int
) -> Float[Tensor, "head query key"]:
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(ra.shape, generator=generator).to(ra.device)
    # The keys that a row can attend to, in order and in another order; the others follow in both.
    there = (~reached).to(torch.uint8).argsort(dim=-1, stable=True)
    drawn = (chance + ~reached).argsort(dim=-1)
    return torch.zeros_like(ra).scatter(-1, there, ra.where(reached, 0.0).gather(-1, drawn))
