"""`trace_paths` and `trace_layers`: from one token back to where it came from.

A prompt's maps become weights, the search gives paths, and the paths become a `TraceResult`.

Cost, beside the search: one forward pass without gradients; for Reversed Attention and knockouts
one forward and one backward pass (`run_with_ra`), and of some layers one more forward pass, to look
for attention sinks in all; nothing for a cache, a tensor or maps that have been read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor, nn

from ra_lens.errors import BadInput, one_of
from ra_lens.head_names import Head, layer_and_index
from ra_lens.inputs import Mask, read_given
from ra_lens.memory import offering
from ra_lens.model import Layers, PrependBos
from ra_lens.numbers import Real, Whole, as_whole, real, real_or_none, whole, whole_or_none
from ra_lens.paths.read import PromptMaps, Source, read_maps, refuse, refuse_later_tokens
from ra_lens.paths.result import GRADIENT, Follow, Step, TracedPath, TraceResult, spell_sinks
from ra_lens.paths.search import Map, beam_paths, exact_paths, layered_paths, normalised, read_norm
from ra_lens.paths.weights import across_layers, aggregate
from ra_lens.prompts import PromptInput, Prompts

Search = Literal["exact", "beam"]
AggHeads = Literal["mean", "max"] | Whole | Head


def trace_paths(
    source: Source | PromptMaps,
    prompt: PromptInput | None = None,
    *,
    target_pos: Whole = -1,
    layer: Whole = -1,
    follow: Follow | None = None,
    search: Search = "exact",
    top_beam: Whole = 5,
    top_k: Whole | None = None,
    min_attn: Real = 0.0,
    agg_heads: AggHeads = "mean",
    length_norm: str = "none",
    stop_at_bos: bool = True,
    sinks: bool = False,
    bos_token_id: Whole | None = None,
    attention_mask: Mask | None = None,
    target: Any = None,
    metric: Any = None,
    example: Whole = 0,
    prepend_bos: PrependBos = None,
) -> TraceResult:
    """Trace paths through one layer's map, from a token back to an earlier one, and so on.

    Every step goes from a query to a strictly earlier key. A path ends at position 0, at a BOS
    token it arrives at, or where no step is left. Its score is the sum of log weights. No path goes
    to an attention sink unless `sinks=True`.

    Args:
        source: A TransformerLens model; an `RACache`; an `ActivationCache`; attention weights
            (R or knockouts, where those are followed) as a tensor `[query, key]`,
            `[head, query, key]` or `[batch, head, query, key]`; or one of
            `ra_lens.paths.read_maps`.
        prompt: For a model: text, or token ids, as `run_with_ra` takes them. For an
            `ActivationCache` or a tensor: the ids, if tokens are to be named. An `RACache` knows.
        target_pos: Where to begin; negative counts from the end of the prompt.
        layer: The layer; negative counts from the last (of those that were read).
        follow: `pattern`: forward attention. Or Reversed Attention: `more` goes where descent
            wants more attention (−R, its positive part), `less` where it wants less, `abs` both.
            `knockout`: along edges that the loss would miss, by how much cutting each would raise
            it, to first order (−R~ / (1 − A), its positive part). Default: `pattern`, or what maps
            were read for.
        search: `exact`: the best paths there are. `beam`: those that beam search finds.
        top_beam: How many paths (and the width of the beam).
        top_k: From each token only so many of its heaviest steps. Default: all; 5 for `beam`.
        min_attn: Steps of less weight are not taken. Weights of R and knockouts are shares of the
            largest row.
        agg_heads: Heads put together by `mean` or `max`, or one: its index, or `"L2H3"`.
        length_norm: Divides a score by the number of steps to a power: `none`, `avg_logprob`
            (1), `sqrt` (½), `pow:α`.
        stop_at_bos: End at a BOS token also past position 0.
        sinks: Also go to attention sinks, tokens that most heads look at where they have nothing to
            say: `ra_lens.knockouts.sinks` says how they are found.
        bos_token_id: What counts as BOS. Default: what was put in front of text, or the
            tokenizer's.
        attention_mask: For token ids with padding, as in `run_with_ra`: positions then count real
            tokens. For a tensor of weights: 0 where no path may go.
        target: For R and knockouts of a model: what the loss asks for, as in `run_with_ra`.
        metric: The same, as a function of the logits.
        example: For a cache or tensor of several: which one.
        prepend_bos: For text: what stands in front of it, as in `run_with_ra`.

    Raises:
        BadInput: an option out of range or that does not go with the source.
        NotStored: the cache does not hold the maps.
        UnsupportedModel: the model's maps cannot be read.
    """
    target_pos, layer = whole("target_pos", target_pos), whole("layer", layer)
    top_beam, top_k = _at_least_one_path(top_beam), whole_or_none("top_k", top_k)
    min_attn, power, agg = real("min_attn", min_attn), read_norm(length_norm), read_agg(agg_heads)
    one_of("search", search, get_args(Search))
    if top_k is not None and top_k < 1:
        raise BadInput(f"found top_k={top_k}; follow at least one step, or None for all.")
    if isinstance(source, Tensor) and layer != -1:
        raise BadInput(f"found layer={layer} with a tensor, which is one layer. Leave it out.")
    maps = _maps_of(
        source,
        prompt,
        ("pattern", *GRADIENT),
        example,
        follow=follow,
        layers=None if isinstance(source, Tensor | PromptMaps) else layer,
        target=target,
        metric=metric,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
        bos_token_id=bos_token_id,
    )
    follow, layer = maps.follow, _layer(maps, layer if isinstance(source, PromptMaps) else -1)
    start, agg = _start(maps, target_pos), _of_layer(agg, layer)
    left_out = () if sinks else maps.sinks
    weights, values = aggregate(maps.layers[layer].maps, follow, agg, left_out)
    top_k = 5 if search == "beam" and top_k is None else top_k
    bos = maps.bos if stop_at_bos else ()
    graph = Map.make(weights, start, bos=bos, usable=maps.usable, min_attn=min_attn, top_k=top_k)
    if follow in GRADIENT and graph.ends[start]:
        raise BadInput(
            f"found nothing to follow from position {start} in layer {layer}: follow={follow!r} is "
            f"0 there (or below min_attn={min_attn:g}). The loss reaches the rows of R at or "
            "before the position it reads; take another target_pos or layer."
            f"{_sinks_hint(maps, left_out)}"
        )
    best = exact_paths if search == "exact" else beam_paths
    head = agg % len(maps.layers[layer].maps) if isinstance(agg, int) else None
    beams: list[TracedPath] = []
    for positions, score in best(graph, top_beam, power):
        steps = [
            Step(q, k, layer, head, float(weights[q, k]), float(values[q, k]))
            for q, k in pairwise(positions)
        ]
        beams.append(_path(maps, start, steps, score, normalised(score, len(steps), power)))
    beams.sort(key=lambda beam: -beam.score_norm)
    return TraceResult(
        seq_len=len(maps.tokens),
        target_pos=start,
        layer=layer,
        layers=(layer,),
        top_beam=top_beam,
        top_k=top_k,
        tokens=maps.tokens,
        beams=tuple(beams),
        follow=follow,
        search=search,
        length_norm=length_norm,
        agg_heads=agg if head is None else head,
        model_name=maps.model_name,
        prepended=maps.prepended,
        sinks=left_out,
    )


def trace_layers(
    source: Source | PromptMaps,
    prompt: PromptInput | None = None,
    *,
    target_pos: Whole = -1,
    layers: Layers = None,
    follow: Follow | None = None,
    top_beam: Whole = 5,
    residual: Real | None = None,
    must_move: bool = True,
    sinks: bool = False,
    attention_mask: Mask | None = None,
    target: Any = None,
    metric: Any = None,
    example: Whole = 0,
    prepend_bos: PrependBos = None,
) -> TraceResult:
    """Trace paths through all layers: which head moved what from where, layer by layer.

    A path has one step per layer, through a head (from a query to a key that is not later) or
    along the residual connection, which keeps the position. The best paths are exact. No path goes
    to an attention sink unless `sinks=True`; what is left of a token's weight is shared as if
    nothing had come from there.

    Args:
        source: A TransformerLens model; for any `follow` but `value_norm`, an `RACache` or an
            `ActivationCache`; or one of `ra_lens.paths.read_maps`.
        prompt: For a model: text, or token ids.
        target_pos: Where to begin, after the last layer; negative counts from the end.
        layers: Only these; what the others do stays in place. Default: all.
        follow: `value_norm`: attention × norm of the value as it is written into the stream
            (‖A v W_O‖). `pattern`: attention alone. `more`, `less`, `abs`: Reversed Attention.
            `knockout`: edges that the loss would miss, as in `trace_paths`. Default: `value_norm`,
            or what maps were read for.
        top_beam: How many paths.
        residual: Share of the residual connection at each token, instead of what `follow` gives it.
        must_move: Leave out the paths that never leave the target.
        sinks: Also go to attention sinks, as in `trace_paths`.
        attention_mask: For token ids: 1 at real tokens.
        target: For Reversed Attention and knockouts of a model: what the loss asks for.
        metric: The same, as a function of the logits.
        example: For a cache of several: which one.
        prepend_bos: For text: what stands in front of it, as in `run_with_ra`.

    Returns:
        A trace whose `heads()` go into `patch_hooks(heads=...)`.

    Raises:
        BadInput: an option out of range or that does not go with the source.
        NotStored: the cache does not hold the maps.
        UnsupportedModel: norms of values that this model does not show.
    """
    target_pos, top_beam = whole("target_pos", target_pos), _at_least_one_path(top_beam)
    residual = real_or_none("residual", residual)
    maps = _maps_of(
        source,
        prompt,
        ("value_norm", "pattern", *GRADIENT),
        example,
        follow=follow,
        layers=layers,
        target=target,
        metric=metric,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
    )
    refuse_later_tokens(maps.later, maps.model_name)
    if maps.usable is not None:
        raise BadInput("found attention_mask= with a tensor; use trace_paths for each example.")
    follow, start, through = maps.follow, _start(maps, target_pos), sorted(maps.layers)
    left_out = () if sinks else maps.sinks
    weights = across_layers([maps.layers[layer] for layer in through], follow, residual, left_out)
    with np.errstate(divide="ignore"):
        heads, stays = [np.log(w.heads) for w in weights], [np.log(w.residual) for w in weights]
    beams: list[TracedPath] = []
    for edges, score in layered_paths(heads, stays, start, top_beam, must_move=must_move):
        steps: list[Step] = []
        for row, head, query, key in edges:
            of = weights[row]
            if head is None:
                share = float(of.residual[query])
                steps.append(Step(query, key, through[row], None, share, share, "residual"))
            else:
                weight, value = (float(x[head, query, key]) for x in (of.heads, of.values))
                steps.append(Step(query, key, through[row], head, weight, value, "head"))
        beams.append(_path(maps, start, steps, score, score))
    if not beams:
        raise BadInput(
            f"found no path that leaves position {start}: follow={follow!r} has no step from there "
            "to an earlier token. Take another target_pos, or must_move=False."
            f"{_sinks_hint(maps, left_out)}"
        )
    return TraceResult(
        seq_len=len(maps.tokens),
        target_pos=start,
        layer=None,
        layers=tuple(through),
        top_beam=top_beam,
        top_k=None,
        tokens=maps.tokens,
        beams=tuple(beams),
        follow=follow,
        agg_heads="none",
        model_name=maps.model_name,
        prepended=maps.prepended,
        sinks=left_out,
    )


# ---- what was asked for -------------------------------------------------------------------------


def read_agg(agg_heads: AggHeads) -> str | int | tuple[int, int]:
    """Read how heads are put together: `mean`, `max`, the index of one, or its layer and index."""
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


def _at_least_one_path(top_beam: Whole) -> int:
    top_beam = whole("top_beam", top_beam)
    if top_beam < 1:
        raise BadInput(f"found top_beam={top_beam}; ask for at least one path.")
    return top_beam


def _maps_of(
    source: Source | PromptMaps,
    prompt: PromptInput | None,
    choices: tuple[Follow, ...],
    example: Whole,
    *,
    follow: Any,  # not yet known to be a choice
    **how: Any,
) -> PromptMaps:
    """Read the maps of the one prompt that is traced, to follow the first choice by default."""
    if isinstance(source, PromptMaps):
        refuse("maps that have been read", prompt=prompt, follow=follow, **how)
        one_of("follow", source.follow, choices)
        return source
    follow = follow or choices[0]
    one_of("follow", follow, choices)
    if not isinstance(source, nn.Module):
        return read_maps(source, prompt, follow=follow, example=example, **how)[0]
    if prompt is not None and not isinstance(prompt, Prompts):
        prompt = read_given("prompt", prompt)
    if prompt is not None and len(prompt) != 1:
        raise BadInput(
            f"found {len(prompt)} prompts; this traces one. For several: "
            "[trace_paths(maps) for maps in read_maps(model, prompts)]."
        )
    with offering("layers"):
        return read_maps(source, prompt, follow=follow, **how)[0]


def _layer(maps: PromptMaps, layer: int) -> int:
    held = sorted(maps.layers)
    chosen = held[layer] if -len(held) <= layer < 0 else layer
    if chosen not in held:
        raise BadInput(f"found layer={layer}; these maps have layers {held}.")
    return chosen


def _of_layer(agg_heads: str | int | tuple[int, int], layer: int) -> str | int:
    if not isinstance(agg_heads, tuple):
        return agg_heads
    if agg_heads[0] != layer:
        raise BadInput(
            f"found agg_heads='L{agg_heads[0]}H{agg_heads[1]}', but the layer traced is {layer}. "
            "Give layer= of the head, or a head of that layer."
        )
    return agg_heads[1]


def _start(maps: PromptMaps, target_pos: int) -> int:
    n = len(maps.tokens)
    if not -n <= target_pos < n:
        raise BadInput(
            f"found target_pos={target_pos}; this prompt has positions 0 to {n - 1} (negative: "
            "from the end)."
        )
    return target_pos % n


def _sinks_hint(maps: PromptMaps, left_out: Sequence[int]) -> str:
    if not left_out:
        return ""
    return f" Left out: {spell_sinks(maps.tokens, left_out)}; sinks=True goes there."


def _path(
    maps: PromptMaps, start: int, steps: Sequence[Step], score: float, norm: float
) -> TracedPath:
    positions, ids = (start, *(step.key for step in steps)), maps.token_ids
    return TracedPath(
        positions=positions,
        tokens=tuple(maps.tokens[p] for p in positions),
        token_ids=None if ids is None else tuple(ids[p] for p in positions),
        steps=tuple(steps),
        score_raw=score,
        score_norm=norm,
    )
