"""One head on one example: its two maps cut to the tokens that were read, and their largest cells.

Plain data, which figures, report and command line share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ra_lens.cache import HeadScore, RACache
from ra_lens.collect import MapKind
from ra_lens.errors import BadInput

Head = HeadScore | tuple[int, int]


@dataclass(frozen=True)
class Cell:
    """One entry of a head's maps: what `query` attends to at `key` and how descent would move it.

    Attributes:
        query: Position of the attending token.
        key: Position of the token attended to.
        ra: R there; negative where descent raises this attention.
        pattern: A there.
    """

    query: int
    key: int
    ra: float
    pattern: float

    @property
    def moves(self) -> str:
        """`more`, `less` or `same`: how descent moves this attention."""
        return "more" if self.ra < 0 else "less" if self.ra > 0 else "same"


@dataclass(frozen=True)
class HeadMaps:
    """The maps of one head on one example, without padding.

    Attributes:
        layer: The head's layer.
        head: Its index there.
        tokens: What the model read (`#0`, `#1`, … where the cache was not told).
        first: Position of the first row and column kept; not 0 where a long prompt was cut.
        pattern: A; NaN where a query cannot look.
        ra: R; NaN likewise.
    """

    layer: int
    head: int
    tokens: tuple[str, ...]
    first: int
    pattern: Float[np.ndarray, "query key"]
    ra: Float[np.ndarray, "query key"]

    @property
    def label(self) -> str:
        """`L5H3`, as TransformerLens labels heads."""
        return f"L{self.layer}H{self.head}"

    def strongest(self, k: int) -> list[Cell]:
        """Give the `k` cells with the largest |R| above 0, largest first."""
        size = np.nan_to_num(np.abs(self.ra)).ravel()
        order = np.argsort(-size, kind="stable")[:k]
        rows, columns = np.unravel_index(order[size[order] > 0], self.ra.shape)
        return [
            Cell(
                self.first + i,
                self.first + j,
                float(self.ra[i, j]),
                float(self.pattern[i, j]),
            )
            for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
        ]


def head_of_example(
    ra: RACache, head: Head, *, example: int = 0, max_tokens: int | None = None
) -> HeadMaps:
    """Cut the maps of one head on one example out of a cache.

    Args:
        ra: A cache that holds `ra` and `pattern`.
        head: The head: a `HeadScore` or `(layer, head)`.
        example: Which example.
        max_tokens: Keep at most so many of the last rows and columns. Default: all.

    Raises:
        BadInput: no such head or example.
        NotStored: the maps were not kept.
    """
    layer, index = read_head(ra, head)
    check_example(ra, example)
    both = [_values(ra, kind, layer, index, example) for kind in ("ra", "pattern")]
    start, tokens = 0, tuple(f"#{i}" for i in range(both[0].shape[-1]))
    if ra.info.str_tokens is not None:
        tokens = ra.info.str_tokens[example]
        start = 0 if ra.info.starts is None else ra.info.starts[example]
    first = 0 if max_tokens is None else max(0, len(tokens) - max_tokens)
    kept = slice(start + first, start + len(tokens))
    r, a = (values[kept, kept].copy() for values in both)
    above = np.triu_indices(len(r), k=1)
    if not r[above].any() and not a[above].any():  # causal: nothing there rather than a zero
        r[above] = a[above] = np.nan
    return HeadMaps(layer, index, tokens[first:], first, a, r)


def read_head(ra: RACache, head: Head) -> tuple[int, int]:
    """Give layer and index of a head.

    Raises:
        BadInput: it is not in the cache.
    """
    layer, index = (head.layer, head.head) if isinstance(head, HeadScore) else head
    if layer not in ra.layers or not 0 <= index < ra.n_heads:
        raise BadInput(
            f"found head (layer={layer}, head={index}); this cache has layers {ra.layers} with "
            f"heads 0 to {ra.n_heads - 1}. Give heads such as ra.top_heads(6) or [(layer, head)]."
        )
    return layer, index


def read_heads(ra: RACache, heads: Sequence[Head]) -> list[tuple[int, int]]:
    """Give layer and index of several heads.

    Raises:
        BadInput: none is given, or one is not in the cache.
    """
    if not heads:
        raise BadInput("found no heads to show. Give some, such as ra.top_heads(6).")
    return [read_head(ra, head) for head in heads]


def check_example(ra: RACache, example: int) -> None:
    """Raise if there is no such example.

    Raises:
        BadInput: the example is not in the cache.
    """
    if not 0 <= example < ra.batch_size:
        raise BadInput(
            f"found example={example}; this cache has examples 0 to {ra.batch_size - 1}."
        )


def _values(
    ra: RACache, kind: MapKind, layer: int, head: int, example: int
) -> Float[np.ndarray, "query key"]:
    maps = ra[kind, layer]
    one = maps[example, head] if ra.has_batch_dim else maps[head]
    one = one.detach().cpu()
    return np.asarray(one if one.dtype.itemsize > 2 else one.float())
