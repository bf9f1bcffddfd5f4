"""Numbers per head, in one table also where layers have different numbers of heads.

A table `[…, layer, head]` is as wide as the layer with the most heads. The places beyond the heads
of a layer hold NaN and are no heads: no order, figure or list has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ra_lens.sites import Site


def heads_of(sites: Mapping[int, Site]) -> tuple[int, ...]:
    """Give the number of heads of each layer."""
    return tuple(site.n_heads for site in sites.values())


def every_head(layers: Iterable[int], counts: Iterable[int]) -> list[tuple[int, int]]:
    """List every head as (layer, head), in the order of the model."""
    return [(layer, h) for layer, n in zip(layers, counts, strict=True) for h in range(n)]


def head_places(counts: Sequence[int]) -> Bool[Tensor, "layer head"]:
    """Mark the places of a table that are heads; they are those of `every_head`, in its order."""
    return torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)


def table(rows: Sequence[Float[Tensor, "*batch _heads"]]) -> Float[Tensor, "*batch layer head"]:
    """Lay one row for each layer out as a table."""
    width = max(row.shape[-1] for row in rows)
    nan = float("nan")
    wide = [torch.nn.functional.pad(row, (0, width - row.shape[-1]), value=nan) for row in rows]
    return torch.stack(wide, dim=-2)


def spell_counts(counts: Sequence[int]) -> str:
    """Spell how many heads layers have: `8`, or `2 to 6` where they differ."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
