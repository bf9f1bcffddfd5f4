"""Where a map lies in a pattern of another length.

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

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ra_lens.errors import BadInput

Align = Literal["exact", "left", "right"]
ALIGNMENTS: tuple[Align, ...] = ("exact", "left", "right")


def read_mask(attention_mask: Tensor | None) -> Bool[Tensor, "example pos"] | None:
    """Read an attention mask given by the user: 1 at real tokens.

    Raises:
        BadInput: not `[batch, pos]`, other values than 0 and 1, or an example without a token.
    """
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

    Args:
        n_map: Tokens of the map.
        n_queries: Query rows of the pattern, the last columns' tokens.
        n_keys: Its key columns.
        align: As in the module's docstring.
        mask: True at real tokens. Columns beyond its width are real: they were generated. None:
            every column is a token.
        layer: Named in messages.

    Raises:
        BadInput: lengths that differ with `align="exact"`, or a mask wider than the pattern.
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
    """Lay maps into patterns of `n_queries` rows, zero where nothing of them goes.

    Args:
        maps: One per example, or one for all.
        index: From `map_indices`; per example, or one row for all.
        n_queries: Query rows of the pattern: those of the last columns.
        causal: Whether keys after the query get nothing.
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
