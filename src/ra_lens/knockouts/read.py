"""What a cache foretells of knockouts: of sets of edges, of the strongest edges, of a whole layer.

`RACache.edges`, `knockout`, `top_edges` and `flow` say what is meant; here it is done, a layer at a
time, so that no more than a few maps of one layer are held beside the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.knockouts.edges import Edge, Edges, EdgeSet, Tokens, edge_set
from ra_lens.knockouts.predict import FORETOLD_FROM, cut_of_set, foretold, knockout_of_set, wide
from ra_lens.knockouts.sinks import most_attended, sinks_of
from ra_lens.text import label

if TYPE_CHECKING:
    from ra_lens.cache import RACache
    from ra_lens.head_names import Heads
    from ra_lens.model import Side
    from ra_lens.model.sites import MapKind

_CELLS = 2**24
"""Of a map that are worked on at once, but for at least one head."""


def set_of(ra: RACache, **choice: Any) -> EdgeSet:
    """Read a choice of heads and tokens; see `RACache.edges`."""
    sizes = {layer: _size(ra, layer) for layer in ra.layers}
    return edge_set(ra.sites, ra.info, sizes, ra.batch_size, **choice)


def effect_of(ra: RACache, edges: EdgeSet, *, renormalise: bool) -> Float[Tensor, "*batch"]:
    """What cutting a set does to the loss of each example; see `RACache.knockout`."""
    ra.info.need_exact("what a knockout does to the loss")
    n = len(edges.rows)
    if n not in (1, ra.batch_size):
        raise BadInput(
            f"found edges of {n} examples for a cache of {ra.batch_size}. Give as many, or one set "
            "for all."
        )
    total: Tensor | None = None
    for layer in ra.sites.choose(edges.layers):
        site, pattern = ra.sites[layer], _batched(ra, "pattern", layer)
        queries = _positions(ra, site.query_side, pattern.shape[-2])
        keys = _positions(ra, site.key_side, pattern.shape[-1])
        marks = edges.marks(layer, site.n_heads, queries, keys).to(pattern.device)
        marks = marks.expand(pattern.shape)
        if renormalise:
            step = wide(_batched(ra, "ra", layer)) / site.need_scale()
            rows = knockout_of_set(pattern, step, marks)
        else:
            rows = cut_of_set(pattern, _batched(ra, "pattern_grad", layer), marks)
        of_layer = rows.sum(dim=(-1, -2))
        total = of_layer if total is None else total + of_layer.to(total.device)
    if total is None:
        total = torch.zeros(ra.batch_size)
    return total if ra.has_batch_dim else total[0]


def rests(ra: RACache) -> list[tuple[int, ...]]:
    """Where heads rest in each example: the token put in front, and attention sinks.

    Sinks are known from the patterns that were kept; see `ra_lens.knockouts.sinks`.
    """
    front = (0,) if ra.info.prepended else ()
    return [tuple(sorted({*front, *sinks})) for sinks in sinks_in(ra)]


def sinks_in(ra: RACache) -> list[tuple[int, ...]]:
    """The attention sinks of each example, from the patterns that were kept of one text."""
    most = [
        most_attended(_batched(ra, "pattern", layer)).cpu()
        for layer, site in ra.sites.items()
        if not site.cross and site.query_side == "input" and ("pattern", layer) in ra
    ]
    if not most:
        return [()] * ra.batch_size
    every = torch.cat(most, dim=1)
    spans = [row.nonzero()[:, 0] for row in _positions(ra, "input", every.shape[-1]) >= 0]
    found: list[tuple[int, ...]] = []
    for example, of_example in enumerate(every):
        span = spans[example % len(spans)]
        found.append(sinks_of(of_example[:, span] - int(span[0])))
    return found


def strongest(ra: RACache, k: int, *, by: MapKind, bos: bool) -> Edges:
    """The edges that matter most; see `RACache.top_edges`."""
    found: list[list[tuple[float, Edge]]] = [[] for _ in range(ra.batch_size)]
    resting: list[tuple[int, ...]] = [()] * ra.batch_size if bos else rests(ra)
    for layer, site in ra.sites.items():
        pattern = _batched(ra, "pattern", layer)
        n_queries, n_keys = pattern.shape[-2:]
        queries = _positions(ra, site.query_side, n_queries)
        keys = _positions(ra, site.key_side, n_keys)
        counts = (keys >= 0).expand(ra.batch_size, -1)
        if site.key_side == "input" and any(resting):
            own = zip(keys.expand(ra.batch_size, -1), resting, strict=True)
            rest = [torch.isin(row, torch.tensor(at, dtype=row.dtype)) for row, at in own]
            counts = counts & ~torch.stack(rest)
        nowhere = ~counts.to(pattern.device)[:, None, None]
        for heads, values in _some_heads(ra, by, layer):
            size = values.abs().nan_to_num_().masked_fill_(nowhere, 0.0)
            flat = rearrange(size, "batch head query key -> batch (head query key)")
            top = flat.topk(min(k, flat.shape[1]))
            for example in range(len(flat)):
                largest = (top.values[example].tolist(), top.indices[example].tolist())
                for at in (place for one, place in zip(*largest, strict=True) if one > 0):
                    head, cell = divmod(at, n_queries * n_keys)
                    row, column = divmod(cell, n_keys)
                    query = int(queries[example % len(queries), row])
                    key = int(keys[example % len(keys), column])
                    edge = Edge(
                        layer,
                        heads[head],
                        query,
                        key,
                        float(values[example, head, row, column]),
                        float(pattern[example, heads[head], row, column]),
                        _token(ra, site.query_side, example, query),
                        _token(ra, site.key_side, example, key),
                        example,
                    )
                    found[example].append((abs(edge.effect), edge))
    best = (sorted(of, key=lambda pair: -pair[0])[:k] for of in found)
    names = [
        tuple(label(_token(ra, "input", example, at) or f"#{at}") for at in of_example)
        for example, of_example in enumerate(resting)
    ]
    return Edges((edge for of in best for _, edge in of), by, names)


def _some_heads(
    ra: RACache, by: MapKind, layer: int, rows: Int[Tensor, "row"] | None = None
) -> Iterator[tuple[range, Float[Tensor, "batch head query key"]]]:
    """A layer's map, some heads at a time: of a long prompt what is made on the way is large.

    Only some `rows` of it, or all.
    """
    parts = FORETOLD_FROM.get(by, (by,)) if (by, layer) in ra else (by,)
    made = [_batched(ra, part, layer) for part in parts]
    made = made if rows is None else [value[:, :, rows.to(value.device)] for value in made]
    n_heads, n_at_once = made[0].shape[1], max(1, _CELLS // max(1, made[0][:, :1].numel()))
    for first in range(0, n_heads, n_at_once):
        heads = range(first, min(first + n_at_once, n_heads))
        some = [value[:, heads.start : heads.stop] for value in made]
        if by == "knockout" or by == "cut":
            scale = ra.sites[layer].need_scale() if by == "knockout" else 1.0
            yield heads, foretold(by, some[0], some[1], scale)
        else:
            yield heads, some[0]


def flow_of(
    ra: RACache, *, queries: Tokens, by: MapKind, heads: Heads
) -> Float[Tensor, "*batch layer key"]:
    """A map summed over heads and over the rows of some queries; see `RACache.flow`."""
    if len({_size(ra, layer) for layer in ra.layers}) > 1:
        raise BadInput(
            "the layers of this cache attend to tokens of different texts, which do not go into "
            "one table. Take maps layer by layer: ra['knockout', 0]."
        )
    chosen = set_of(ra, heads=heads, layers=None, queries=queries, keys=None)
    found: list[Tensor] = []
    for layer, site in ra.sites.items():
        n_queries, n_keys = _size(ra, layer)
        queries_at = _positions(ra, site.query_side, n_queries)
        marks = chosen.marks(layer, site.n_heads, queries_at, _positions(ra, site.key_side, n_keys))
        rows = marks.any(dim=-1).any(dim=0).any(dim=0).nonzero()[:, 0]  # of a long prompt a few
        total = torch.zeros(())
        for these, values in _some_heads(ra, by, layer, rows):
            own = marks[:, these.start : these.stop][:, :, rows].to(values.device)
            total = total.to(values.device) + (values * own).sum(dim=(-3, -2))
        found.append(total)
    flow = torch.stack([row.to(found[0].device) for row in found], dim=-2)
    return flow if ra.has_batch_dim else flow[0]


# ---- shared -------------------------------------------------------------------------------------


def _size(ra: RACache, layer: int) -> tuple[int, int]:
    n_queries, n_keys = ra["pattern", layer].shape[-2:]
    return n_queries, n_keys


def _batched(ra: RACache, kind: MapKind, layer: int) -> Float[Tensor, "batch head query key"]:
    value = ra[kind, layer]
    return value if ra.has_batch_dim else value[None]


def _positions(ra: RACache, side: Side, width: int) -> Int[Tensor, "some pos"]:
    """Position of the token in each row or column of the maps of each example; −1 at padding."""
    rows: Sequence[Sequence[str]] | None = ra.info.tokens_of(side)
    columns = torch.arange(width)
    if rows is None:
        return columns[None]
    starts = [0] * len(rows) if side == "decoder" or ra.info.starts is None else ra.info.starts
    found = [
        torch.where((columns >= start) & (columns < start + len(row)), columns - start, -1)
        for row, start in zip(rows, starts, strict=True)
    ]
    return torch.stack(found)


def _token(ra: RACache, side: Side, example: int, position: int) -> str:
    rows = ra.info.tokens_of(side)
    return "" if rows is None or position < 0 else rows[example][position]
