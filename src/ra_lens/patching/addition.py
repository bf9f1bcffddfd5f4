"""What one layer's pattern gets: the scaled map, less what was not chosen, placed on it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.patching.place import Align, map_indices, place
from ra_lens.sites import Site


class Placer:
    """Alignment of the maps of one call, kept for all layers of a forward pass."""

    def __init__(self, align: Align, mask: Bool[Tensor, "example pos"] | None) -> None:
        """Align as in `ra_lens.patching.place`."""
        self.align: Align = align
        self.mask = mask
        self._last: tuple[tuple[int, int, int], Tensor] | None = None

    def indices(
        self, n_map: int, n_queries: int, n_keys: int, layer: int
    ) -> Int[Tensor, "example key"]:
        """`map_indices` for these lengths."""
        lengths = (n_map, n_queries, n_keys)
        if self._last is None or self._last[0] != lengths:
            index = map_indices(
                n_map, n_queries, n_keys, align=self.align, mask=self.mask, layer=layer
            )
            self._last = lengths, index
        return self._last[1]


class Placed(NamedTuple):
    """What to add to a pattern, and the rows and heads that it is meant for."""

    addition: Float[Tensor, "some head query key"]
    reached: Bool[Tensor, "example head query 1"]


class Addition:
    """`scale · map` of one layer, for patterns of any length that the alignment allows."""

    def __init__(
        self,
        value: Float[Tensor, "*batch head query key"],
        scale: float,
        *,
        site: Site,
        heads: Bool[Tensor, "head"],
        rows: Bool[Tensor, "query"],
        placer: Placer,
    ) -> None:
        """Scale the map and drop the heads and query rows that were not chosen."""
        wide = torch.promote_types(value.dtype, torch.float32)
        scaled = scale * value.detach().to(wide)
        chosen = (heads[:, None] & rows).to(value.device)[..., None]
        zero = torch.zeros((), dtype=wide, device=value.device)
        maps = torch.where(chosen, scaled, zero)
        maps = maps.tril() if site.causal and not site.cross else maps
        self._maps = maps.reshape(-1, *value.shape[-3:])
        self._heads = heads
        # Rows of zeros, as the first of every RA map, are rows to leave alone.
        self._rows = (self._maps != 0).any(dim=-1).any(dim=1).any(dim=0).cpu()
        self._site = site
        self.placer = placer
        self.n_tokens = int(value.shape[-1])

    def on(
        self, n_examples: int, n_heads: int, n_queries: int, n_keys: int, device: torch.device
    ) -> Placed | None:
        """What a pattern of this shape gets; None where nothing of the map goes.

        Raises:
            BadInput: a length, number of heads or number of examples that does not fit.
        """
        if self._site.cross:
            return self._on_cross_attention(n_examples, n_heads, n_queries, n_keys, device)
        index = self.placer.indices(self.n_tokens, n_queries, n_keys, self._site.layer)
        self._check(n_examples, n_heads, index.shape[0])
        rows = index[:, -n_queries:]
        reached = (rows >= 0) & self._rows[rows.clamp(min=0)]
        if not bool(reached.any()):
            return None
        self._maps = self._maps.to(device)
        same = n_queries == n_keys == self.n_tokens and bool((index == torch.arange(n_keys)).all())
        addition = (
            self._maps
            if same
            else place(self._maps, index.to(device), n_queries, causal=self._site.causal)
        )
        meant = reached[:, None, :, None] & self._heads[:, None, None]
        return Placed(addition, meant.to(device))

    def _on_cross_attention(
        self, n_examples: int, n_heads: int, n_queries: int, n_keys: int, device: torch.device
    ) -> Placed | None:
        shape = tuple(self._maps.shape[-2:])
        if shape != (n_queries, n_keys):
            raise BadInput(
                f"found {n_queries} tokens of the decoder and {n_keys} of the encoder at "
                f"{self._site.label} (layer {self._site.layer}), but the map to add is for "
                f"{shape[0]} and {shape[1]}. Maps of cross-attention go on prompts of the lengths "
                "that they were made on."
            )
        self._check(n_examples, n_heads, 1)
        if not bool(self._rows.any()):
            return None
        self._maps = self._maps.to(device)
        meant = self._rows[None, None, :, None] & self._heads[:, None, None]
        return Placed(self._maps, meant.to(device))

    def _check(self, n_examples: int, n_heads: int, n_masked: int) -> None:
        if n_heads != self._maps.shape[1]:
            raise BadInput(
                f"found a pattern of {n_heads} heads at {self._site.label}, but the map to add "
                f"has {self._maps.shape[1]}. Use maps of the same model."
            )
        for what, n in (("maps", self._maps.shape[0]), ("rows of attention_mask", n_masked)):
            if n not in (1, n_examples):
                raise BadInput(
                    f"found {n_examples} examples at {self._site.label}, but {n} {what}. Run "
                    "as many examples as the patch was made for, or give one for all."
                )
