"""One head on one example: its maps cut to the tokens that were read, and their largest cells.

Beside A and R stands what cutting each edge alone would do to the loss, which is made from both:
`ra_lens.knockouts.predict`. Rows are queries, columns keys. Where no query looks ahead, cells above
the diagonal are NaN: there is nothing, rather than a 0. Any other NaN is one that the maps
themselves hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.head_names import Head, Heads, layer_and_index, list_heads
from ra_lens.knockouts.predict import cut_map, knockout_map
from ra_lens.model import Side
from ra_lens.model.sites import MapKind
from ra_lens.numbers import Whole, whole, whole_or_none


@dataclass(frozen=True)
class Cell:
    """One entry of a head's maps, at the positions `query` and `key`."""

    query: int
    key: int
    ra: float  # negative where descent raises this attention
    pattern: float
    knockout: float  # positive where the loss would rise without this edge

    @property
    def moves(self) -> str:
        """`more`, `less` or `same`: how descent moves this attention."""
        return "more" if self.ra < 0 else "less" if self.ra > 0 else "same"


@dataclass(frozen=True)
class HeadMaps:
    """The maps of one head on one example, without padding."""

    layer: int
    head: int
    tokens: tuple[str, ...]  # of the queries; `#0`, `#1`, … where the cache was not told
    first: int  # position of the first row kept; not 0 where a long prompt was cut
    key_tokens: tuple[str, ...]  # `tokens`, but for a decoder that attends to an encoder
    first_key: int  # position of the first column kept
    causal: bool  # whether no query has anything at a later key; such cells are NaN
    pattern: Float[np.ndarray, "query key"]
    ra: Float[np.ndarray, "query key"]
    knockout: Float[np.ndarray, "query key"]  # in the unit of the loss
    cut: Float[np.ndarray, "query key"] | None  # the same; None without the pattern's gradient

    @property
    def label(self) -> str:
        """`L5H3`, as TransformerLens labels heads."""
        return f"L{self.layer}H{self.head}"

    @property
    def limit(self) -> float:
        """The largest finite |R|; 0 where there is none."""
        return largest(self.ra)

    def reachable(self) -> Bool[np.ndarray, "query key"]:
        """Mark the cells that a query can look at."""
        everywhere = np.ones(self.ra.shape, dtype=bool)
        return np.tril(everywhere) if self.causal else everywhere

    def query_token(self, cell: Cell) -> str:
        """The token that attends."""
        return self.tokens[cell.query - self.first]

    def key_token(self, cell: Cell) -> str:
        """The token attended to."""
        return self.key_tokens[cell.key - self.first_key]

    def ranks_in_row(self) -> Int[np.ndarray, "query key"]:
        """Rank the cells of each row by |R|, 1 being the largest; 0 where a query cannot look."""
        size = np.where(np.isnan(self.ra), -1.0, np.abs(self.ra))
        ranks = (-size).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") + 1
        return np.where(size < 0, 0, ranks)

    def strongest(self, k: int) -> list[Cell]:
        """Give the `k` cells with the largest |R| above 0, largest first."""
        size = np.nan_to_num(np.abs(self.ra)).ravel()
        k = min(k, size.size)
        least = np.partition(size, size.size - k)[size.size - k]
        large = np.flatnonzero(size >= least)  # a long prompt has too many cells to sort them all
        order = large[np.argsort(-size[large], kind="stable")][:k]
        rows, columns = np.unravel_index(order[size[order] > 0], self.ra.shape)
        maps = (self.ra, self.pattern, self.knockout)
        values = (one[rows, columns].tolist() for one in maps)
        queries, keys = (self.first + rows).tolist(), (self.first_key + columns).tolist()
        return [Cell(*entry) for entry in zip(queries, keys, *values, strict=True)]


def largest(values: Float[np.ndarray, "*shape"]) -> float:
    """Give the largest finite size of an entry; 0 where there is none."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def head_of_example(
    ra: RACache, head: Head, *, example: Whole = 0, max_tokens: Whole | None = None
) -> HeadMaps:
    """Cut the maps of one head on one example out of a cache that holds `ra` and `pattern`.

    At most `max_tokens` of the last rows and columns are kept. `knockout` and `cut` are those of
    `RACache`, the same numbers.
    """
    layer, index = read_head(ra, head)
    example, max_tokens = read_example(ra, example), whole_or_none("max_tokens", max_tokens)
    site = ra.sites[layer]

    def of_head(kind: MapKind) -> Float[Tensor, "query key"]:
        maps = ra[kind, layer]
        return maps[example, index] if ra.has_batch_dim else maps[index]

    n_queries, n_keys = ra["ra", layer].shape[-2:]
    tokens, first, rows = kept_tokens(ra, site.query_side, example, n_queries, max_tokens)
    key_tokens, first_key, columns = kept_tokens(ra, site.key_side, example, n_keys, max_tokens)
    r, a = of_head("ra")[rows], of_head("pattern")[rows]
    # Of these rows alone: `ra["knockout", layer]` would make those of all heads and examples.
    step = r.to(torch.promote_types(r.dtype, torch.float32)) / site.need_scale()
    found = [r, a, knockout_map(a, step)]
    if ("pattern_grad", layer) in ra:
        found.append(cut_map(a, of_head("pattern_grad")[rows]))
    maps = [_array(one[:, columns]) for one in found]
    height, width = maps[0].shape
    causal = height == width and first == first_key and _nothing_above(*maps[:2])
    if causal:  # nothing there rather than a zero
        above = np.triu_indices(height, k=1)
        for one in maps:
            one[above] = np.nan
    cut = maps[3] if len(maps) > 3 else None
    shown = (maps[1], maps[0], maps[2])
    return HeadMaps(layer, index, tokens, first, key_tokens, first_key, causal, *shown, cut)


def read_head(ra: RACache, head: object) -> tuple[int, int]:
    """Give layer and index of a head of a cache."""
    layer, index = layer_and_index(head)
    n_heads = ra.sites[layer].n_heads if layer in ra.layers else ra.n_heads
    if layer not in ra.layers or not 0 <= index < n_heads:
        raise BadInput(
            f"found head (layer={layer}, head={index}); this cache has layers {ra.layers} with "
            f"heads 0 to {n_heads - 1}. Give heads such as ra.top_heads(6), 'L2H3' or (2, 3)."
        )
    return layer, index


def read_heads(ra: RACache, heads: Heads) -> list[tuple[int, int]]:
    """Give layer and index of several heads of a cache, at least one, or of one alone."""
    given = [] if heads is None else list_heads(heads)
    if not given:
        raise BadInput("found no heads to show. Give some, such as ra.top_heads(6).")
    return [read_head(ra, head) for head in given]


def read_example(ra: RACache, example: Whole) -> int:
    """Give the index of an example of a cache."""
    index = whole("example", example)
    if not 0 <= index < ra.batch_size:
        raise BadInput(f"found example={index}; this cache has examples 0 to {ra.batch_size - 1}.")
    return index


def kept_tokens(
    ra: RACache, side: Side, example: int, length: int, max_tokens: int | None
) -> tuple[tuple[str, ...], int, slice]:
    """Give tokens of rows or columns, the position of the first kept, and where they are stored."""
    rows = ra.info.tokens_of(side)
    start, tokens = 0, tuple(f"#{i}" for i in range(length))
    if rows is not None:
        tokens = tuple(rows[example])
        start = 0 if side == "decoder" or ra.info.starts is None else ra.info.starts[example]
    first = 0 if max_tokens is None else max(0, len(tokens) - max_tokens)
    return tokens[first:], first, slice(start + first, start + len(tokens))


def _array(values: Float[Tensor, "query key"]) -> Float[np.ndarray, "query key"]:
    values = values.detach().cpu()
    return np.asarray(values if values.dtype.itemsize > 2 else values.float()).copy()


def _nothing_above(*maps: Float[np.ndarray, "query key"]) -> bool:
    return not any(np.triu(one, k=1).any() for one in maps)
