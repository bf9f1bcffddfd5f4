"""Edges cut without what is tested: as scores of minus infinity, or in a pattern by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from ra_lens.knockouts import Edge

Cells = Sequence[tuple[int, int, int, int]]  # layer, head, query, key


def as_edges(cells: Cells) -> list[Edge]:
    return [Edge(*cell) for cell in cells]


def boxed(
    layers: Iterable[int], heads: Iterable[int], queries: Iterable[int], keys: Iterable[int]
) -> Cells:
    """Every combination."""
    heads, queries, keys = list(heads), list(queries), list(keys)
    return [(i, h, q, k) for i in layers for h in heads for q in queries for k in keys]


def marks(cells: Cells, layer: int, n_heads: int, n: int, n_keys: int | None = None):
    """Where a layer is cut, `[head, query, key]`."""
    found = torch.zeros(n_heads, n, n if n_keys is None else n_keys, dtype=torch.bool)
    for of_layer, head, query, key in cells:
        if of_layer == layer and query < found.shape[1] and key < found.shape[2]:
            found[head, query, key] = True
    return found


def minus_infinity(rows: Sequence[Cells], n_layers: int, n_heads: int, n: int):
    """By layer, what added to the scores of each example cuts its edges."""
    zero = torch.zeros(len(rows), n_heads, n, n, dtype=torch.float64)
    return {
        i: zero.masked_fill(torch.stack([marks(row, i, n_heads, n) for row in rows]), -torch.inf)
        for i in range(n_layers)
    }


def without(pattern: torch.Tensor, cut: torch.Tensor, *, renormalise: bool) -> torch.Tensor:
    """A pattern with the edges cut, row by row a softmax of what is left."""
    after = torch.where(cut, torch.zeros_like(pattern), pattern)
    if not renormalise:
        return after
    # log A is the scores but for a constant of the row.
    log = pattern.clamp(min=torch.finfo(pattern.dtype).tiny).log()
    left = torch.where(cut, -torch.inf, log).softmax(dim=-1)
    left = left * pattern.sum(dim=-1, keepdim=True)
    return torch.where(after.sum(dim=-1, keepdim=True) > 0, left, pattern)


def cutting(
    rows: Sequence[Cells], *, renormalise: bool = True
) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """The edit of patterns, by site, that cuts the edges of each example."""

    def edit(site: int, pattern: torch.Tensor) -> torch.Tensor:
        shape = pattern.shape[1:]
        each = [marks(row, site, *shape) for row in rows]
        return without(pattern, torch.stack(each), renormalise=renormalise)

    return edit
