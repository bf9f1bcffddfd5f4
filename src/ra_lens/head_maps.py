"""One head on one example: its two maps cut to the tokens that were read, and their largest cells.

Rows are queries, columns keys. Where no query looks ahead, cells above the diagonal are NaN: there
is nothing, rather than a 0. Any other NaN is one that the maps themselves hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.head_names import Head, Heads, layer_and_index, list_heads
from ra_lens.model import Side
from ra_lens.numbers import Whole, whole, whole_or_none


@dataclass(frozen=True)
class Cell:
    """One entry of a head's maps, at the positions `query` and `key`."""

    query: int
    key: int
    ra: float  # negative where descent raises this attention
    pattern: float

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

    @property
    def label(self) -> str:
        """`L5H3`, as TransformerLens labels heads."""
        return f"L{self.layer}H{self.head}"

    @property
    def limit(self) -> float:
        """The largest finite |R|; 0 where there is none."""
        return float(np.abs(self.ra[np.isfinite(self.ra)]).max(initial=0.0))

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
        r, pattern = self.ra[rows, columns].tolist(), self.pattern[rows, columns].tolist()
        queries, keys = (self.first + rows).tolist(), (self.first_key + columns).tolist()
        return [Cell(*entry) for entry in zip(queries, keys, r, pattern, strict=True)]


def head_of_example(
    ra: RACache, head: Head, *, example: Whole = 0, max_tokens: Whole | None = None
) -> HeadMaps:
    """Cut the maps of one head on one example out of a cache that holds `ra` and `pattern`.

    At most `max_tokens` of the last rows and columns are kept.
    """
    layer, index = read_head(ra, head)
    example, max_tokens = read_example(ra, example), whole_or_none("max_tokens", max_tokens)
    both = (ra["ra", layer], ra["pattern", layer])
    found = [maps[example, index] if ra.has_batch_dim else maps[index] for maps in both]
    n_queries, n_keys = found[0].shape
    site = ra.sites[layer]
    tokens, first, rows = _side(ra, site.query_side, example, n_queries, max_tokens)
    key_tokens, first_key, columns = _side(ra, site.key_side, example, n_keys, max_tokens)
    r, a = (_array(one[rows, columns]) for one in found)
    causal = r.shape[0] == r.shape[1] and first == first_key and _nothing_above(r, a)
    if causal:  # nothing there rather than a zero
        above = np.triu_indices(len(r), k=1)
        r[above] = a[above] = np.nan
    return HeadMaps(layer, index, tokens, first, key_tokens, first_key, causal, a, r)


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


def _side(
    ra: RACache, side: Side, example: int, length: int, max_tokens: int | None
) -> tuple[tuple[str, ...], int, slice]:
    """Tokens of the rows or columns, the position of the first kept, and where they are stored."""
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
