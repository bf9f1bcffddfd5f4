"""What a cache foretells of knockouts: of sets of edges, of the strongest edges, of a whole layer.

`RACache.edges`, `knockout`, `top_edges` and `flow` say what is meant; here it is done, a layer at a
time, so that no more than a few maps of one layer are held beside the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.knockouts.edges import Edge, Edges, EdgeSet, Tokens, edge_set
from ra_lens.knockouts.predict import cut_of_set, knockout_of_set
from ra_lens.knockouts.sinks import most_attended, sinks_of
from ra_lens.text import label

if TYPE_CHECKING:
    from ra_lens.cache import RACache
    from ra_lens.head_names import Heads
    from ra_lens.model import Side
    from ra_lens.model.sites import MapKind


def set_of(ra: RACache, **choice: Any) -> EdgeSet:
    """Read a choice of heads and tokens; see `RACache.edges`."""
    sizes = {layer: _size(ra, layer) for layer in ra.layers}
    return edge_set(ra.sites, ra.info, sizes, ra.batch_size, **choice)


def effect_of(ra: RACache, edges: EdgeSet, *, renormalise: bool) -> Float[Tensor, "*batch"]:
    """What cutting a set does to the loss of each example; see `RACache.knockout`."""
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
            step = _wide(_batched(ra, "ra", layer)) / site.need_scale()
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
    own = [
        (_batched(ra, "pattern", layer), site)
        for layer, site in ra.sites.items()
        if not site.cross and site.query_side == "input" and ("pattern", layer) in ra
    ]
    found: list[tuple[int, ...]] = []
    for example in range(ra.batch_size if own else 0):
        rows = [_positions(ra, site.query_side, pattern.shape[-1]) for pattern, site in own]
        real = [row[example % len(row)] >= 0 for row in rows]
        most = [
            most_attended(pattern[example][:, marks.to(pattern.device)][..., marks]).cpu()
            for (pattern, _), marks in zip(own, real, strict=True)
        ]
        found.append(sinks_of(torch.cat(most)))
    return found or [()] * ra.batch_size


def rest_names(ra: RACache) -> list[str]:
    """The tokens where heads rest, in any of the examples, as labels; each once."""
    rows = ra.info.str_tokens
    names = [label(ra.info.prepended)] if ra.info.prepended else []
    if rows is not None:
        names += [
            label(row[at]) for row, at_all in zip(rows, rests(ra), strict=True) for at in at_all
        ]
    return list(dict.fromkeys(names))


def strongest(ra: RACache, k: int, *, by: MapKind, bos: bool) -> Edges:
    """The edges that matter most; see `RACache.top_edges`."""
    found: list[list[tuple[float, Edge]]] = [[] for _ in range(ra.batch_size)]
    resting = [()] * ra.batch_size if bos else rests(ra)
    for layer, site in ra.sites.items():
        values, pattern = _batched(ra, by, layer), _batched(ra, "pattern", layer)
        queries = _positions(ra, site.query_side, values.shape[-2])
        keys = _positions(ra, site.key_side, values.shape[-1])
        counts = keys >= 0
        if site.key_side == "input" and any(resting):
            keys_of = keys.expand(ra.batch_size, -1)
            rest = [
                torch.isin(row, torch.tensor(at)) for row, at in zip(keys_of, resting, strict=True)
            ]
            counts = counts & ~torch.stack(rest)
        size = values.abs().nan_to_num().masked_fill(~counts.to(values.device)[:, None, None], 0.0)
        top = rearrange(size, "batch head query key -> batch (head query key)").topk(
            min(k, size[0].numel())
        )
        for example, (sizes, places) in enumerate(
            zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ):
            for at in (place for one, place in zip(sizes, places, strict=True) if one > 0):
                head, cell = divmod(at, values.shape[-2] * values.shape[-1])
                row, column = divmod(cell, values.shape[-1])
                query = int(queries[example % len(queries), row])
                key = int(keys[example % len(keys), column])
                edge = Edge(
                    layer,
                    head,
                    query,
                    key,
                    float(values[example, head, row, column]),
                    float(pattern[example, head, row, column]),
                    _token(ra, site.query_side, example, query),
                    _token(ra, site.key_side, example, key),
                    example,
                )
                found[example].append((abs(edge.effect), edge))
    best = (sorted(of, key=lambda pair: -pair[0])[:k] for of in found)
    return Edges((edge for of in best for _, edge in of), by)


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
    rows: list[Tensor] = []
    for layer, site in ra.sites.items():
        values = _batched(ra, by, layer)
        where = _positions(ra, site.query_side, values.shape[-2])
        columns = _positions(ra, site.key_side, values.shape[-1])
        marks = chosen.marks(layer, site.n_heads, where, columns).to(values.device)
        rows.append((values * marks).sum(dim=(-3, -2)))
    flow = torch.stack([row.to(rows[0].device) for row in rows], dim=-2)
    return flow if ra.has_batch_dim else flow[0]


# ---- shared -------------------------------------------------------------------------------------


def _size(ra: RACache, layer: int) -> tuple[int, int]:
    n_queries, n_keys = ra["pattern", layer].shape[-2:]
    return n_queries, n_keys


def _batched(ra: RACache, kind: MapKind, layer: int) -> Float[Tensor, "batch head query key"]:
    value = ra[kind, layer]
    return value if ra.has_batch_dim else value[None]


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


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
