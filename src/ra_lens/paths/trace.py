"""`trace_paths` and `trace_layers`: from one token back to where it came from.

An example's maps become weights, the search gives paths, and the paths are put into words.

Cost, beside the search: one forward pass without gradients; for Reversed Attention one forward and
one backward pass (`run_with_ra`); nothing for a cache or a tensor.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.head_names import Head, layer_and_index
from ra_lens.inputs import Mask, TokenIds, read_given
from ra_lens.model import Layers
from ra_lens.numbers import Real, Whole, as_whole, real, real_or_none, whole, whole_or_none, wholes
from ra_lens.paths.read import Example, Request, Source, read_source
from ra_lens.paths.result import GRADIENT, Follow, Step, TracedPath, TraceResult
from ra_lens.paths.search import (
    Edge,
    Found,
    Layered,
    Map,
    beam_paths,
    exact_paths,
    layered_paths,
    normalised,
    read_norm,
)
from ra_lens.paths.weights import Aggregated, LayerWeights, across_layers, aggregate
from ra_lens.prompts import PromptInput, Prompts

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


def trace_paths(
    source: Source,
    prompt: PromptInput | None = None,
    *,
    target_pos: Whole = -1,
    layer: Whole = -1,
    follow: Follow = "pattern",
    search: Search = "exact",
    top_beam: Whole = 5,
    top_k: Whole | None = None,
    min_attn: Real = 0.0,
    agg_heads: AggHeads = "mean",
    length_norm: str = "none",
    stop_at_bos: bool = True,
    bos_token_id: Whole | None = None,
    attention_mask: Mask | None = None,
    target: Any = None,
    metric: Any = None,
    example: Whole = 0,
    prepend_bos: bool | None = None,
) -> TraceResult:
    """Trace paths through one layer's map, from a token back to an earlier one, and so on.

    Every step goes from a query to a strictly earlier key. A path ends at position 0, at a BOS
    token it arrives at, or where no step is left. Its score is the sum of log weights.

    Args:
        source: A TransformerLens model; an `RACache`; an `ActivationCache`; or attention weights
            (R, where that is followed) as a tensor `[query, key]`, `[head, query, key]` or
            `[batch, head, query, key]`.
        prompt: For a model: text, or token ids, as `run_with_ra` takes them. For an
            `ActivationCache` or a tensor: the ids, if tokens are to be named. An `RACache` knows.
        target_pos: Where to begin; negative counts from the end of the prompt.
        layer: The layer; negative counts from the last.
        follow: `pattern`: forward attention. Or Reversed Attention: `more` goes where descent
            wants more attention (−R, its positive part), `less` where it wants less, `abs` both.
        search: `exact`: the best paths there are. `beam`: those that beam search finds.
        top_beam: How many paths (and the width of the beam).
        top_k: From each token only so many of its heaviest steps. Default: all; 5 for `beam`.
        min_attn: Steps of less weight are not taken. For R, weights are shares of the largest row.
        agg_heads: Heads put together by `mean` or `max`, or one: its index, or `"L2H3"`.
        length_norm: Divides a score by the number of steps to a power: `none`, `avg_logprob`
            (1), `sqrt` (½), `pow:α`.
        stop_at_bos: End at a BOS token also past position 0.
        bos_token_id: What counts as BOS. Default: the tokenizer's.
        attention_mask: For token ids with padding, as in `run_with_ra`: positions then count real
            tokens. For a tensor of weights: 0 where no path may go.
        target: For R of a model: what the loss asks for, as in `run_with_ra`.
        metric: The same, as a function of the logits.
        example: For a cache or tensor of several: which one.
        prepend_bos: For text: overrides the model's default.

    Raises:
        BadInput: an option out of range or that does not go with the source.
        NotStored: the cache does not hold the maps.
        UnsupportedModel: the model's maps cannot be read.
    """
    top_beam, top_k = check_options(follow, top_beam, search=search, top_k=top_k, layered=False)
    target_pos, min_attn = whole("target_pos", target_pos), real("min_attn", min_attn)
    agg = read_agg(agg_heads)
    of_weights = isinstance(source, Tensor)  # one layer, whose mask is no padding
    prompt = _given(source, prompt)
    if of_weights and attention_mask is None and isinstance(prompt, TokenIds):
        attention_mask = prompt.mask
    request = Request(
        follow=follow,
        layers=_layer_of(source, layer),
        target=target,
        metric=metric,
        attention_mask=None if of_weights else attention_mask,
        prepend_bos=prepend_bos,
        bos_token_id=whole_or_none("bos_token_id", bos_token_id),
        example=whole("example", example),
    )
    return one_layer(
        _only(source, prompt, request, "trace_many"),
        target_pos=target_pos,
        follow=follow,
        search=search,
        top_beam=top_beam,
        top_k=top_k,
        min_attn=min_attn,
        agg_heads=agg,
        length_norm=length_norm,
        stop_at_bos=stop_at_bos,
        attention_mask=attention_mask if of_weights else None,
    )


def trace_many(
    source: Source,
    prompts: PromptInput | None = None,
    *,
    target_pos: Whole = -1,
    layer: Whole = -1,
    follow: Follow = "pattern",
    search: Search = "exact",
    top_beam: Whole = 5,
    top_k: Whole | None = None,
    min_attn: Real = 0.0,
    agg_heads: AggHeads = "mean",
    length_norm: str = "none",
    stop_at_bos: bool = True,
    bos_token_id: Whole | None = None,
    attention_mask: Mask | None = None,
    target: Any = None,
    metric: Any = None,
    prepend_bos: bool | None = None,
    batch_size: Whole | None = None,
) -> list[TraceResult]:
    """Trace paths for every prompt of a batch, or every example of a cache; see `trace_paths`.

    Args:
        source: A model, an `RACache`, an `ActivationCache` or a tensor.
        prompts: Texts, or token ids `[batch, pos]`.
        target_pos: See `trace_paths`; counted in each prompt.
        layer: See `trace_paths`.
        follow: See `trace_paths`.
        search: See `trace_paths`.
        top_beam: See `trace_paths`.
        top_k: See `trace_paths`.
        min_attn: See `trace_paths`.
        agg_heads: See `trace_paths`.
        length_norm: See `trace_paths`.
        stop_at_bos: See `trace_paths`.
        bos_token_id: See `trace_paths`.
        attention_mask: For token ids: 1 at real tokens.
        target: One for all prompts, or one each.
        metric: See `trace_paths`.
        prepend_bos: See `trace_paths`.
        batch_size: Prompts per forward pass. Default: all at once.

    Raises:
        BadInput: as `trace_paths`.
    """
    top_beam, top_k = check_options(follow, top_beam, search=search, top_k=top_k, layered=False)
    target_pos, min_attn = whole("target_pos", target_pos), real("min_attn", min_attn)
    agg = read_agg(agg_heads)
    prompts = _given(source, prompts)
    if isinstance(source, Tensor):
        own = prompts.mask if isinstance(prompts, TokenIds) else None
        if attention_mask is not None or (own is not None and not bool(own.all())):
            raise BadInput("found attention_mask= with a tensor; use trace_paths for each example.")
    request = Request(
        follow=follow,
        layers=_layer_of(source, layer),
        target=target,
        metric=metric,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
        bos_token_id=whole_or_none("bos_token_id", bos_token_id),
        batch_size=whole_or_none("batch_size", batch_size, least=1),
    )
    return [
        one_layer(
            example,
            target_pos=target_pos,
            follow=follow,
            search=search,
            top_beam=top_beam,
            top_k=top_k,
            min_attn=min_attn,
            agg_heads=agg,
            length_norm=length_norm,
            stop_at_bos=stop_at_bos,
        )
        for example in read_source(source, prompts, request)
    ]


def trace_layers(
    source: Source,
    prompt: PromptInput | None = None,
    *,
    target_pos: Whole = -1,
    layers: Layers = None,
    follow: Follow = "value_norm",
    top_beam: Whole = 5,
    residual: Real | None = None,
    must_move: bool = True,
    attention_mask: Mask | None = None,
    target: Any = None,
    metric: Any = None,
    example: Whole = 0,
    prepend_bos: bool | None = None,
) -> TraceResult:
    """Trace paths through all layers: which head moved what from where, layer by layer.

    A path has one step per layer, through a head (from a query to a key that is not later) or
    along the residual connection, which keeps the position. The best paths are exact.

    Args:
        source: A TransformerLens model; or, for any `follow` but `value_norm`, an `RACache`, an
            `ActivationCache`.
        prompt: For a model: text, or token ids.
        target_pos: Where to begin, after the last layer; negative counts from the end.
        layers: Only these; what the others do stays in place. Default: all.
        follow: `value_norm`: attention × norm of the value as it is written into the stream
            (‖A v W_O‖). `pattern`: attention alone. `more`, `less`, `abs`: Reversed Attention.
        top_beam: How many paths.
        residual: Share of the residual connection at each token, instead of what `follow` gives it.
        must_move: Leave out the paths that never leave the target.
        attention_mask: For token ids: 1 at real tokens.
        target: For Reversed Attention of a model: what the loss asks for.
        metric: The same, as a function of the logits.
        example: For a cache of several: which one.
        prepend_bos: For text: overrides the model's default.

    Returns:
        A trace whose `heads()` go into `patch_hooks(heads=...)`.

    Raises:
        BadInput: an option out of range or that does not go with the source.
        NotStored: the cache does not hold the maps.
        UnsupportedModel: norms of values that this model does not show.
    """
    top_beam, _ = check_options(follow, top_beam, layered=True)
    layers = None if layers is None else wholes("layers", layers)
    target_pos, residual = whole("target_pos", target_pos), real_or_none("residual", residual)
    request = Request(
        follow=follow,
        layers=layers,
        through_layers=True,
        target=target,
        metric=metric,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
        example=whole("example", example),
    )
    return across(
        _only(source, prompt, request, "trace_layers_many"),
        target_pos=target_pos,
        follow=follow,
        top_beam=top_beam,
        residual=residual,
        must_move=must_move,
    )


def trace_layers_many(
    source: Source,
    prompts: PromptInput | None = None,
    *,
    target_pos: Whole = -1,
    layers: Layers = None,
    follow: Follow = "value_norm",
    top_beam: Whole = 5,
    residual: Real | None = None,
    must_move: bool = True,
    attention_mask: Mask | None = None,
    target: Any = None,
    metric: Any = None,
    prepend_bos: bool | None = None,
    batch_size: Whole | None = None,
) -> list[TraceResult]:
    """Trace paths through all layers for every prompt of a batch; see `trace_layers`.

    Args:
        source: A model, or a cache.
        prompts: Texts, or token ids `[batch, pos]`.
        target_pos: Counted in each prompt.
        layers: See `trace_layers`.
        follow: See `trace_layers`.
        top_beam: See `trace_layers`.
        residual: See `trace_layers`.
        must_move: See `trace_layers`.
        attention_mask: For token ids: 1 at real tokens.
        target: One for all prompts, or one each.
        metric: See `trace_layers`.
        prepend_bos: See `trace_layers`.
        batch_size: Prompts per forward pass. Default: all at once.

    Raises:
        BadInput: as `trace_layers`.
    """
    top_beam, _ = check_options(follow, top_beam, layered=True)
    layers = None if layers is None else wholes("layers", layers)
    target_pos, residual = whole("target_pos", target_pos), real_or_none("residual", residual)
    request = Request(
        follow=follow,
        layers=layers,
        through_layers=True,
        target=target,
        metric=metric,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
        batch_size=whole_or_none("batch_size", batch_size, least=1),
    )
    return [
        across(
            example,
            target_pos=target_pos,
            follow=follow,
            top_beam=top_beam,
            residual=residual,
            must_move=must_move,
        )
        for example in read_source(source, prompts, request)
    ]


def _layer_of(source: Source, layer: Whole) -> int | None:
    layer = whole("layer", layer)
    if not isinstance(source, Tensor):
        return layer
    if layer != -1:
        raise BadInput(f"found layer={layer} with a tensor, which is one layer. Leave it out.")
    return None


def _given(source: Source, prompt: PromptInput | None) -> Any:
    """The prompt read once, as an iterator can only be."""
    if prompt is None or isinstance(source, RACache) or isinstance(prompt, Prompts):
        return prompt
    return read_given("prompt", prompt)


def _only(source: Source, prompt: PromptInput | None, request: Request, many: str) -> Example:
    given = _given(source, prompt)
    one = f"this traces one. For several: {many}."
    if isinstance(source, nn.Module):
        request = replace(request, example=None)
        if given is not None and len(given) != 1:
            raise BadInput(f"found {len(given)} prompts; {one}")
    found = read_source(source, given, request)
    if len(found) != 1:
        raise BadInput(f"found {len(found)} examples; {one}")
    return found[0]
