"""Where a map lies in a pattern of another length, and what one layer's pattern gets of it.

A map of N tokens is a square; a pattern is [query, key] = [Q, K], Q < K where a key/value cache
holds earlier tokens, and query row q is then the token in column K − Q + q. Each column gets an
index into the map, or none (−1), and entry (q, k) of the pattern gets map entry (index of q's
column, index of k's column). With n tokens in an example, column of its token i (counted within
the example, so that padding does not count):

    "exact"   index i; n must be N
    "left"    index i: the beginnings lie on each other
    "right"   index i + N − n: the ends lie on each other

Indices outside the map are none, so a map longer than the example is cropped at its end ("left")
or at its beginning ("right"). Keys after the query never get anything where attention is causal.
Maps of cross-attention have as many rows as the decoder read tokens and as many columns as the
encoder did; they go on patterns of the same shape only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.model import Site
from ra_lens.numbers import Wholes, places

Rows = Wholes | slice | None


def choose_rows(rows: Rows, n: int) -> Bool[Tensor, "query"]:
    """Query rows of a map of `n` tokens: ints (negative from its end), a slice, or `n` bools."""
    chosen = range(n) if rows is None else places("rows", rows, n, "query rows of the maps")
    of_map = torch.zeros(n, dtype=torch.bool)
    of_map[list(chosen)] = True
    return of_map


Align = Literal["exact", "left", "right"]
ALIGNMENTS: tuple[Align, ...] = ("exact", "left", "right")


def read_mask(attention_mask: Tensor | None) -> Bool[Tensor, "example pos"] | None:
    """Read an attention mask given by the user: 1 at real tokens, at least one in each row."""
    if attention_mask is None:
        return None
    mask = attention_mask.detach().cpu()
    if mask.ndim != 2:
        raise BadInput(
            f"found an attention_mask of shape {tuple(mask.shape)}; [batch, pos] is needed, "
            "1 at real tokens."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise BadInput(
            "found an attention_mask with other values than 0 and 1. Give 1 at real tokens and 0 "
            "at padding, not the mask that is added to the scores."
        )
    real = mask == 1
    empty = [i for i, n in enumerate(real.sum(dim=1).tolist()) if n == 0]
    if empty:
        raise BadInput(f"row {empty[0]} of attention_mask has no real token.")
    return real


def map_indices(
    n_map: int,
    n_queries: int,
    n_keys: int,
    *,
    align: Align,
    mask: Bool[Tensor, "example pos"] | None = None,
    layer: int = 0,
) -> Int[Tensor, "example key"]:
    """Which row and column of a map of `n_map` tokens each column of a pattern gets; −1: none.

    Columns beyond the width of `mask` are real: they were generated. Messages name `layer`.
    """
    if mask is None:
        real = torch.ones(1, n_keys, dtype=torch.bool)
    elif mask.shape[1] > n_keys:
        raise BadInput(
            f"found {n_keys} tokens at layer {layer}, but the attention_mask has "
            f"{mask.shape[1]} columns. Give the mask of the prompts that are run."
        )
    else:
        generated = torch.ones(mask.shape[0], n_keys - mask.shape[1], dtype=torch.bool)
        real = torch.cat([mask, generated], dim=1)
    lengths = real.sum(dim=1)
    if align == "exact" and bool((lengths != n_map).any()):
        raise _other_length(lengths.tolist(), n_map, layer=layer, cached=n_queries < n_keys)
    index = real.cumsum(dim=1) - 1
    if align == "right":
        index = index + (n_map - lengths).unsqueeze(1)
    return torch.where(real & (index >= 0) & (index < n_map), index, -1)


def place(
    maps: Float[Tensor, "some head pos pos"],
    index: Int[Tensor, "example key"],
    n_queries: int,
    *,
    causal: bool = True,
) -> Float[Tensor, "batch head query key"]:
    """Lay maps by `map_indices` into patterns of `n_queries` rows, 0 where nothing of them goes.

    Maps, and rows of `index`, are one per example or one for all.
    """
    rows, columns = index[:, -n_queries:, None], index[:, None, :]
    keep = (rows >= 0) & (columns >= 0)
    if causal:
        # Map columns after the map row are pattern keys after the query, whatever the alignment.
        keep = keep & (columns <= rows)
    example = torch.arange(maps.shape[0], device=maps.device)[:, None, None, None]
    head = torch.arange(maps.shape[1], device=maps.device)[None, :, None, None]
    entries = maps[example, head, rows.clamp(min=0)[:, None], columns.clamp(min=0)[:, None]]
    return torch.where(
        keep[:, None], entries, torch.zeros((), dtype=maps.dtype, device=maps.device)
    )


def _other_length(lengths: list[int], n_map: int, *, layer: int, cached: bool) -> BadInput:
    wrong = next(i for i, n in enumerate(lengths) if n != n_map)
    which = f"in example {wrong} " if len(lengths) > 1 else ""
    advice = (
        "With a key/value cache the sequence grows token by token: align='left' adds to the "
        "prompt and leaves generated tokens as they are."
        if cached
        else "Use prompts of the length that the maps were made on, or say where the map goes: "
        "align='left' lays it on the beginning, align='right' on the end."
    )
    return BadInput(
        f"found {lengths[wrong]} tokens {which}at layer {layer}, but the map to add has {n_map}, "
        f"and align='exact' needs both equal. {advice}"
    )


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
    """`scale · map` of one layer, for patterns of any length that the alignment allows.

    The scale is one for all examples, or one for each.
    """

    def __init__(
        self,
        value: Float[Tensor, "*batch head query key"],
        scale: float | Float[Tensor, "example"],
        *,
        site: Site,
        heads: Bool[Tensor, "head"],
        rows: Bool[Tensor, "query"],
        placer: Placer,
    ) -> None:
        """Scale the map and drop the heads and query rows that were not chosen."""
        wide = value.detach().to(torch.promote_types(value.dtype, torch.float32))
        # Scales of examples come in where the map is added: a copy of it for each of them would
        # otherwise be kept for all layers at once.
        self._each = scale if isinstance(scale, Tensor) else None
        scaled = wide if isinstance(scale, Tensor) else scale * wide
        maps = scaled.where((heads[:, None] & rows).to(value.device)[..., None], 0.0)
        maps = maps.tril() if site.causal and not site.cross else maps
        self._maps = maps.reshape(-1, *value.shape[-3:])
        self._heads = heads
        # Rows of zeros, as the first of every RA map, are rows to leave alone.
        self._rows = (self._maps != 0).any(dim=-1).any(dim=1).any(dim=0).cpu()
        self._site = site
        self._placer = placer
        self._n_tokens = int(value.shape[-1])

    def ends_before(self, first: int) -> bool:
        """Whether queries at position `first` or later get nothing, wherever they are."""
        placer = self._placer
        return placer.align == "left" and placer.mask is None and first >= self._n_tokens

    def on(self, shape: Sequence[int], device: torch.device) -> Placed | None:
        """What a pattern of this shape gets; None where nothing of the map goes."""
        n_examples, n_heads, n_queries, n_keys = shape
        if self._site.cross:
            index, reached = None, self._rows[None]
            self._check_cross(n_queries, n_keys)
        else:
            index = self._placer.indices(self._n_tokens, n_queries, n_keys, self._site.layer)
            rows = index[:, -n_queries:]
            reached = (rows >= 0) & self._rows[rows.clamp(min=0)]
        self._check(n_examples, n_heads, len(reached))
        if self._each is not None:
            reached = reached & (self._each != 0)[:, None]
        if not bool(reached.any()):
            return None
        self._maps = addition = self._maps.to(device)
        as_it_is = n_queries == n_keys == self._n_tokens
        if index is not None and not (as_it_is and bool((index == torch.arange(n_keys)).all())):
            addition = place(addition, index.to(device), n_queries, causal=self._site.causal)
        if self._each is not None:
            addition = addition * self._each.to(addition)[:, None, None, None]
        meant = reached[:, None, :, None] & self._heads[:, None, None]
        return Placed(addition, meant.to(device))

    def _check_cross(self, n_queries: int, n_keys: int) -> None:
        shape = tuple(self._maps.shape[-2:])
        if shape != (n_queries, n_keys):
            raise BadInput(
                f"found {n_queries} tokens of the decoder and {n_keys} of the encoder at "
                f"{self._site.label} (layer {self._site.layer}), but the map to add is for "
                f"{shape[0]} and {shape[1]}. Maps of cross-attention go on prompts of the lengths "
                "that they were made on."
            )

    def _check(self, n_examples: int, n_heads: int, n_masked: int) -> None:
        if n_heads != self._maps.shape[1]:
            raise BadInput(
                f"found a pattern of {n_heads} heads at {self._site.label}, but the map to add "
                f"has {self._maps.shape[1]}. Use maps of the same model."
            )
        n_scales = 1 if self._each is None else len(self._each)
        found = (self._maps.shape[0], n_masked, n_scales)
        for what, n in zip(("maps", "rows of attention_mask", "scales"), found, strict=True):
            if n not in (1, n_examples):
                raise BadInput(
                    f"found {n_examples} examples at {self._site.label}, but {n} {what}. Run "
                    "as many examples as the patch was made for, or give one for all."
                )
