"""`trace_paths` and `trace_layers`: from one token back to where it came from.

Cost, beside the search: one forward pass without gradients; for Reversed Attention one forward and
one backward pass (`run_with_ra`); nothing for a cache or a tensor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.inputs import Mask, TokenIds, read_given
from ra_lens.numbers import Real, Whole, real, real_or_none, whole, whole_or_none, wholes
from ra_lens.paths.build import AggHeads, Search, across, check_options, one_layer, read_agg
from ra_lens.paths.result import Follow, TraceResult
from ra_lens.paths.source import Example, Request, Source, read_source
from ra_lens.prompts import PromptInput, Prompts
from ra_lens.sites import Layers


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
