"""From an example's maps to a `TraceResult`: weights, search, and the paths put into words."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool

from ra_lens.errors import BadInput
from ra_lens.head_names import Head, layer_and_index
from ra_lens.inputs import Mask
from ra_lens.numbers import Whole, as_whole, whole, whole_or_none
from ra_lens.paths.layered import Edge, Layered, layered_paths
from ra_lens.paths.one_layer import Found, Map, beam_paths, exact_paths, normalised, read_norm
from ra_lens.paths.result import Follow, Step, TracedPath, TraceResult
from ra_lens.paths.source import Example
from ra_lens.paths.weights import (
    GRADIENT,
    Aggregated,
    LayerWeights,
    across_layers,
    aggregate,
)

Search = Literal["exact", "beam"]
AggHeads = Literal["mean", "max"] | Whole | Head
_FOLLOW = ("pattern", "more", "less", "abs")


def check_options(
    follow: str,
    top_beam: Whole,
    *,
    search: str = "exact",
    top_k: Whole | None = None,
    layered: bool,
) -> tuple[int, int | None]:
    """Give `top_beam` and `top_k` as numbers of Python's.

    Raises:
        BadInput: an option is out of range.
    """
    top_beam, top_k = whole("top_beam", top_beam), whole_or_none("top_k", top_k)
    choices = ("value_norm", *_FOLLOW) if layered else _FOLLOW
    if follow not in choices:
        raise BadInput(f"found follow={follow!r}; give one of {', '.join(map(repr, choices))}.")
    if top_beam < 1:
        raise BadInput(f"found top_beam={top_beam}; ask for at least one path.")
    if search not in ("exact", "beam"):
        raise BadInput(f"found search={search!r}; give 'exact' or 'beam'.")
    if top_k is not None and top_k < 1:
        raise BadInput(f"found top_k={top_k}; follow at least one step, or None for all.")
    return top_beam, top_k


def read_agg(agg_heads: AggHeads) -> str | int | tuple[int, int]:
    """Read how heads are put together: `mean`, `max`, the index of one, or its layer and index.

    Raises:
        BadInput: none of them.
    """
    index = as_whole(agg_heads)
    if index is not None:
        return index
    if isinstance(agg_heads, str) and agg_heads in ("mean", "max"):
        return agg_heads
    try:
        return layer_and_index(agg_heads)
    except BadInput:
        raise BadInput(
            f"found agg_heads={agg_heads!r}; give 'mean', 'max' or the index of a head, or the "
            "head as it is printed, such as 'L2H3'."
        ) from None


def one_layer(
    example: Example,
    *,
    target_pos: int,
    follow: Follow,
    search: Search,
    top_beam: int,
    top_k: int | None,
    min_attn: float,
    agg_heads: str | int | tuple[int, int],
    length_norm: str,
    stop_at_bos: bool,
    attention_mask: Mask | None = None,
) -> TraceResult:
    """Trace through the one layer that an example holds; see `trace_paths`."""
    power = read_norm(length_norm)
    start = _start(example, target_pos)
    ((layer, maps),) = example.layers.items()
    agg_heads = _of_layer(agg_heads, layer)
    edges = aggregate(maps.maps, follow, agg_heads)
    kept = (5 if top_k is None else top_k) if search == "beam" else top_k
    ends = np.zeros(len(example.tokens), dtype=bool)
    if stop_at_bos:
        ends[list(example.bos)] = True
    usable = None if attention_mask is None else _usable(attention_mask, example)
    graph = Map.make(edges.weights, ends=ends, usable=usable, min_attn=min_attn, top_k=kept)
    if follow in GRADIENT and graph.is_end(start, start):
        raise BadInput(
            f"found nothing to follow from position {start} in layer {layer}: follow={follow!r} is "
            f"0 there (or below min_attn={min_attn:g}). The loss reaches the rows of R at or "
            "before the position it reads; take another target_pos or layer."
        )
    if search == "exact":
        found = exact_paths(graph, start, top_beam, power)
    else:
        found = beam_paths(graph, start, top_beam, power)
    head = agg_heads if isinstance(agg_heads, int) else None
    head = None if head is None else head % len(maps.maps)
    beams = [_path(example, layer, head, edges, power, one) for one in found]
    beams.sort(key=lambda beam: -beam.score_norm)
    return TraceResult(
        seq_len=len(example.tokens),
        target_pos=start,
        layer=layer,
        layers=(layer,),
        top_beam=top_beam,
        top_k=kept,
        tokens=example.tokens,
        beams=tuple(beams),
        follow=follow,
        search=search,
        length_norm=length_norm,
        agg_heads=agg_heads if head is None else head,
        model_name=example.model_name,
    )


def across(
    example: Example,
    *,
    target_pos: int,
    follow: Follow,
    top_beam: int,
    residual: float | None,
    must_move: bool,
) -> TraceResult:
    """Trace through all layers of an example; see `trace_layers`."""
    start = _start(example, target_pos)
    layers = sorted(example.layers)
    weights = across_layers([example.layers[layer] for layer in layers], follow, residual)
    with np.errstate(divide="ignore"):
        graph = Layered([np.log(w.heads) for w in weights], [np.log(w.residual) for w in weights])
    found = layered_paths(graph, start, top_beam, must_move=must_move)
    if not found:
        raise BadInput(
            f"found no path that leaves position {start}: follow={follow!r} has no step from there "
            "to an earlier token. Take another target_pos, or must_move=False."
        )
    return TraceResult(
        seq_len=len(example.tokens),
        target_pos=start,
        layer=None,
        layers=tuple(layers),
        top_beam=top_beam,
        top_k=None,
        tokens=example.tokens,
        beams=tuple(_through(example, layers, weights, start, *one) for one in found),
        follow=follow,
        agg_heads="none",
        model_name=example.model_name,
    )


def _of_layer(agg_heads: str | int | tuple[int, int], layer: int) -> str | int:
    if not isinstance(agg_heads, tuple):
        return agg_heads
    if agg_heads[0] != layer:
        raise BadInput(
            f"found agg_heads='L{agg_heads[0]}H{agg_heads[1]}', but the layer traced is {layer}. "
            "Give layer= of the head, or a head of that layer."
        )
    return agg_heads[1]


def _start(example: Example, target_pos: int) -> int:
    n = len(example.tokens)
    if not -n <= target_pos < n:
        raise BadInput(
            f"found target_pos={target_pos}; this prompt has positions 0 to {n - 1} (negative: "
            "from the end)."
        )
    return target_pos % n


def _usable(attention_mask: Mask, example: Example) -> Bool[np.ndarray, "pos"]:
    mask = torch.as_tensor(attention_mask).detach().cpu().reshape(-1).bool().numpy()
    if len(mask) != len(example.tokens):
        raise BadInput(
            f"found an attention_mask of {len(mask)} positions for {len(example.tokens)} tokens."
        )
    return mask


def _path(
    example: Example,
    layer: int,
    head: int | None,
    edges: Aggregated,
    power: float,
    found: Found,
) -> TracedPath:
    positions, score = found
    steps = tuple(
        Step(q, k, layer, head, float(edges.weights[q, k]), float(edges.values[q, k]))
        for q, k in pairwise(positions)
    )
    return _named(example, positions, steps, score, normalised(score, len(steps), power))


def _through(
    example: Example,
    layers: list[int],
    weights: list[LayerWeights],
    start: int,
    edges: list[Edge],
    score: float,
) -> TracedPath:
    steps: list[Step] = []
    for row, head, query, key in edges:
        of = weights[row]
        if head is None:
            share = float(of.residual[query])
            steps.append(Step(query, key, layers[row], None, share, share, "residual"))
        else:
            place = (head, query, key)
            weight, value = float(of.heads[place]), float(of.values[place])
            steps.append(Step(query, key, layers[row], head, weight, value, "head"))
    return _named(example, [start, *(step.key for step in steps)], tuple(steps), score, score)


def _named(
    example: Example, positions: list[int], steps: tuple[Step, ...], score: float, norm: float
) -> TracedPath:
    ids = example.token_ids
    return TracedPath(
        positions=tuple(positions),
        tokens=tuple(example.tokens[p] for p in positions),
        token_ids=None if ids is None else tuple(ids[p] for p in positions),
        steps=steps,
        score_raw=score,
        score_norm=norm,
    )
