"""Read the maps of prompts from a model, a cache or a tensor, as numpy arrays.

A model is run (one forward pass without gradients for the pattern and value norms; `run_with_ra`
for Reversed Attention and knockouts). An `RACache`, a TransformerLens `ActivationCache` or a tensor
of attention weights is read as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NotStored, UnsupportedModel, one_of
from ra_lens.inputs import Mask, TokenIds, read_given
from ra_lens.knockouts.read import sinks_in
from ra_lens.knockouts.sinks import find_sinks, most_attended, sinks_of
from ra_lens.memory import offering
from ra_lens.model import Layers, Lens, PrependBos, Site, as_lens
from ra_lens.model.values import writing_names, written_norms
from ra_lens.numbers import BatchSize, Whole, read_batch_size, whole_or_none, wholes
from ra_lens.padding import batches, watched
from ra_lens.paths.result import GRADIENT, REVERSED, Follow
from ra_lens.paths.weights import LayerMaps
from ra_lens.prompts import PromptInput, Prompts, read_prompts
from ra_lens.run import run_with_ra
from ra_lens.targets import as_objective

Source = nn.Module | RACache | Tensor | Any


@dataclass(frozen=True)
class PromptMaps:
    """One prompt's maps, which `trace_paths` and `trace_layers` follow.

    Attributes:
        tokens: What the model read.
        layers: Maps by layer.
        follow: What is followed in them.
        model_name: Where they are from.
        token_ids: Ids of the tokens, where known.
        bos: Positions of BOS tokens.
        usable: For a tensor of weights: where a path may go. None: everywhere.
        later: Layers whose tokens also attend to later ones, which `trace_layers` refuses.
        prepended: The token put in front of text; empty if none was; None where that is not known.
        sinks: Positions of attention sinks (`ra_lens.knockouts.sinks`), which paths leave out.
    """

    tokens: tuple[str, ...]
    layers: Mapping[int, LayerMaps]
    follow: Follow
    model_name: str
    token_ids: tuple[int, ...] | None = None
    bos: frozenset[int] = frozenset()
    usable: Bool[np.ndarray, "pos"] | None = None
    later: tuple[str, ...] = ()
    prepended: str | None = None
    sinks: tuple[int, ...] = ()


def read_maps(
    source: Source,
    prompts: PromptInput | None = None,
    *,
    follow: Follow = "pattern",
    layers: Layers = None,
    target: Any = None,
    metric: Any = None,
    example: Whole | None = None,
    attention_mask: Mask | None = None,
    prepend_bos: PrependBos = None,
    bos_token_id: Whole | None = None,
    batch_size: BatchSize | None = None,
) -> list[PromptMaps]:
    """Read the maps of several prompts, to trace each: `[trace_paths(maps) for maps in ...]`.

    Attention sinks are looked for in the patterns of all layers that the source has, together with
    the norms of what heads write for `value_norm` through all layers. In R or knockouts given as a
    tensor none are found.

    Memory: 8 bytes for each entry of each map read. Cost: as in `trace_paths`.

    Args:
        source: A model, an `RACache`, an `ActivationCache` or a tensor, as in `trace_paths`.
        prompts: For a model: texts, or token ids `[batch, pos]`. For an `ActivationCache` or a
            tensor: the ids, if tokens are to be named.
        follow: What is going to be followed, as in `trace_paths`; `value_norm` as in
            `trace_layers`.
        layers: Only these; negative counts from the last. Default: all.
        target: For Reversed Attention and knockouts of a model: one for all prompts, or one each.
        metric: The same, as a function of the logits.
        example: For a cache or a tensor: only this one.
        attention_mask: For token ids: 1 at real tokens. For a tensor: 0 where no path may go.
        prepend_bos: For text: what stands in front of it, as in `run_with_ra`.
        bos_token_id: What counts as BOS. Default: what was put in front of text, or the
            tokenizer's.
        batch_size: Prompts per forward pass. Default: all at once. `"auto"`: as many as fit what
            the model's device has free (`ra_lens.fitting`).

    Raises:
        BadInput: a prompt or option that this source does not take.
        NotStored: the cache does not hold the maps.
        UnsupportedModel: a model whose maps cannot be read.
    """
    one_of("follow", follow, get_args(Follow))
    layers = None if layers is None else wholes("layers", layers)
    example = whole_or_none("example", example)
    bos_token_id = whole_or_none("bos_token_id", bos_token_id)
    at_a_time = None if batch_size is None else read_batch_size(batch_size)
    if isinstance(source, RACache):
        refuse("an RACache, which knows its own", prompt=prompts)
        refuse("an RACache, whose run is over", target=target, metric=metric)
        refuse("an RACache, which knows its padding", attention_mask=attention_mask)
        if bos_token_id is not None:
            raise BadInput(
                "found bos_token_id= with an RACache, which knows tokens as text only. Give the "
                "model and the prompt instead."
            )
        return _from_cache(source, follow, layers, example)
    if isinstance(source, Tensor):
        refuse("a tensor, which has no loss", target=target, metric=metric)
        refuse("a tensor, which is one layer", layers=layers)
        maps = _from_tensor(source, follow, example)
        return _with_ids(maps, prompts, attention_mask, bos_token_id)
    if hasattr(source, "cache_dict") and hasattr(source, "model"):
        refuse("an ActivationCache, whose run is over", target=target, metric=metric)
        lens, maps = _from_activation_cache(source, follow, layers, example)
        if prompts is None:
            return maps
        read = read_prompts(lens, prompts, prepend_bos=prepend_bos)
        lengths = [len(one.tokens) for one in maps]
        if list(read.lengths) != lengths:
            raise BadInput(
                f"found prompts of {list(read.lengths)} tokens for maps of {lengths}. Give "
                "the prompt that the maps were made from, or its token ids."
            )
        return _named(lens, maps, read, bos_token_id)
    if not isinstance(source, nn.Module):
        raise BadInput(
            f"found a {type(source).__name__} to trace; give a TransformerLens model, an RACache, "
            "an ActivationCache, or attention weights as a tensor [head, query, key]."
        )
    if prompts is None:
        raise BadInput("found no prompt. Give the text (or token ids) to run the model on.")
    lens = as_lens(source)
    if follow not in GRADIENT:
        refuse(f"follow={follow!r}, which has no loss", target=target, metric=metric)
        lens.refuse_dropout()
    sites = lens.sites.choose(layers)
    _check_sites(sites, follow, lens.name)
    read = read_prompts(lens, prompts, attention_mask=attention_mask, prepend_bos=prepend_bos)
    if follow not in GRADIENT:
        maps = _from_forward(lens, sites, read, follow, at_a_time)
        return _named(lens, maps, read, bos_token_id)
    objective = as_objective(target, metric)
    answered = objective.bind(lens, read)[1]  # with the answers that were read
    options: dict[str, Any] = {"target": objective, "layers": layers, "batch_size": at_a_time}
    with offering("layers", "batch_size"):
        _, cache = run_with_ra(lens.module, read, **options, progress=False)
    maps = _from_cache(cache, follow, None, None)
    if len(sites) < len(lens.sites):
        sinks = _look_for_sinks(lens, answered, at_a_time)
        maps = [replace(one, sinks=own) for one, own in zip(maps, sinks, strict=True)]
    return _named(lens, maps, answered, bos_token_id)


def refuse(what: str, **given: object) -> None:
    """Refuse what was given with a source that does not take it."""
    for name, value in given.items():
        if value is not None:
            raise BadInput(f"found {name}= with {what}. Leave it out.")


def refuse_later_tokens(layers: Sequence[str], name: str) -> None:
    """Refuse to trace through layers whose tokens attend to later ones."""
    if layers:
        raise UnsupportedModel(
            f"{layers[0]} of {name} also attends to later tokens; trace_layers is for models "
            "that do not. trace_paths follows one layer of it, to earlier tokens."
        )


def _check_sites(sites: Mapping[int, Site], follow: Follow, name: str) -> None:
    for site in sites.values():
        if site.cross or site.query_side != "input":
            raise UnsupportedModel(
                f"paths run through tokens of one text, and {site.label} of {name} is part of a "
                "decoder beside an encoder. Of such models trace_paths follows a layer of the "
                "encoder, from the RACache that run_with_ra gives."
            )
    if follow == "value_norm":  # which only trace_layers follows
        refuse_later_tokens(_later(sites), name)


def _later(sites: Mapping[int, Site]) -> tuple[str, ...]:
    return tuple(site.label for site in sites.values() if not site.causal)


# ---- models -------------------------------------------------------------------------------------


def _from_forward(
    lens: Lens,
    sites: Mapping[int, Site],
    read: Prompts,
    follow: Follow,
    batch_size: int | Literal["auto"] | None,
) -> list[PromptMaps]:
    values = follow == "value_norm"
    others = [site for layer, site in _of_one_text(lens).items() if layer not in sites]
    names = {layer: {"pattern": site.pattern_name} for layer, site in sites.items()}
    for layer, site in sites.items() if values else ():
        names[layer] |= writing_names(lens, site) | {"x": lens.block_input_name(site)}
    keep = {name: Tensor.clone for of_layer in names.values() for name in of_layer.values()}
    keep |= {site.pattern_name: most_attended for site in others}
    found: dict[int, PromptMaps] = {}
    for which, part in batches(lens, read, batch_size):
        batch = part.lay_out(lens)
        with watched(lens, batch):
            shown, _ = lens.look(keep, batch.tokens, batch.attention_mask, batch.last)
        norms: dict[int, tuple[Tensor, Tensor]] = {}  # of what is written, and of the stream
        for layer, site in sites.items():
            if site.pattern_name not in shown:
                raise UnsupportedModel(
                    f"hook_pattern of layer {layer} of {lens.name} did not fire, so there is "
                    "nothing to trace. The model probably runs fused attention: load it with "
                    "attn_implementation='eager'."
                )
            if values:
                seen = {what: shown[name] for what, name in names[layer].items()}
                written = written_norms(lens, site, seen["pattern"], seen)
                norms[layer] = written, seen["x"].double().norm(dim=-1)
        for i, place in enumerate(which):
            span = batch.span(i)
            maps = {n: shown[site.pattern_name][i, :, span, span] for n, site in sites.items()}
            one = _unnamed(maps, follow, lens.name, sites)
            layers = dict(one.layers)
            for layer, (written, stream) in norms.items():
                own = _numpy(written[i, :, span]), _numpy(stream[i, span])
                layers[layer] = LayerMaps(layers[layer].maps, *own)
            most = [most_attended(m).cpu() for m in maps.values()]
            most += [_most_within(shown, site, i, span) for site in others]
            quiet = (
                None if others or not norms else [w[i, :, span].cpu() for w, _ in norms.values()]
            )
            sinks = sinks_of(torch.cat(most), None if quiet is None else torch.cat(quiet))
            found[place] = replace(one, layers=layers, sinks=sinks)
    return [found[place] for place in sorted(found)]


def _of_one_text(lens: Lens) -> dict[int, Site]:
    """The layers that attend from a text to itself."""
    every = lens.sites.items()
    return {n: site for n, site in every if not site.cross and site.query_side == "input"}


def _look_for_sinks(
    lens: Lens, read: Prompts, batch_size: int | Literal["auto"] | None
) -> list[tuple[int, ...]]:
    sites = _of_one_text(lens).values()
    keep = {site.pattern_name: most_attended for site in sites}
    found: dict[int, tuple[int, ...]] = {}
    for which, part in batches(lens, read, batch_size):
        batch = part.lay_out(lens)
        with watched(lens, batch):
            shown, _ = lens.look(keep, batch.tokens, batch.attention_mask, batch.last)
        for i, place in enumerate(which):
            most = [_most_within(shown, site, i, batch.span(i)) for site in sites]
            found[place] = sinks_of(torch.cat(most))
    return [found[place] for place in sorted(found)]


def _most_within(
    shown: Mapping[str, Tensor], site: Site, i: int, span: slice
) -> Int[Tensor, "some query"]:
    """What one prompt's tokens attend to most, counted without padding; nothing if not shown."""
    if site.pattern_name not in shown:
        return torch.zeros(0, span.stop - span.start, dtype=torch.long)
    return (shown[site.pattern_name][i, :, span] - span.start).cpu()


# ---- what is already there ----------------------------------------------------------------------


def _from_cache(
    cache: RACache, follow: Follow, layers: list[int] | None, example: int | None
) -> list[PromptMaps]:
    if follow == "value_norm":
        raise NotStored(
            "an RACache holds maps, not values. Give the model and the prompt instead, or take "
            "follow='pattern' or 'more'."
        )
    sites = cache.sites.choose(layers)
    _check_sites(sites, follow, cache.info.model_name)
    maps = {
        layer: _batched(_followed(cache, layer, follow), cache.has_batch_dim) for layer in sites
    }
    sinks = sinks_in(cache)
    known, starts = cache.info.str_tokens, cache.info.starts
    found: list[PromptMaps] = []
    for i in _examples(cache.batch_size, example):
        own, span = {layer: m[i] for layer, m in maps.items()}, slice(None)
        if known is not None:
            start = starts[i] if starts else 0
            span = slice(start, start + len(known[i]))
            own = {layer: m[:, span, span] for layer, m in own.items()}
        one = _unnamed(own, follow, cache.info.model_name, sites)
        one = replace(one, sinks=sinks[i])
        if known is not None:
            bos = _places(known[i], known[i][0]) if cache.info.prepended else frozenset[int]()
            front = cache.info.prepended
            one = replace(one, tokens=tuple(known[i]), bos=bos, prepended=front)
        found.append(one)
    return found


def _followed(cache: RACache, layer: int, follow: Follow) -> Float[Tensor, "*batch head query key"]:
    return cache["ra" if follow in REVERSED else follow, layer]


def _from_activation_cache(
    cache: Any, follow: Follow, layers: list[int] | None, example: int | None
) -> tuple[Lens, list[PromptMaps]]:
    lens = as_lens(cache.model)
    if follow == "value_norm":
        raise BadInput("found follow='value_norm' with an ActivationCache; give the model.")
    if follow in GRADIENT:
        converted = RACache.from_activation_cache(cache, cache.model)
        return lens, _from_cache(converted, follow, layers, example)
    sites = lens.sites.choose(layers)
    _check_sites(sites, follow, lens.name)
    has_batch = bool(getattr(cache, "has_batch_dim", True))
    held = {
        layer: _batched(cache.cache_dict[site.pattern_name], has_batch)
        for layer, site in _of_one_text(lens).items()
        if site.pattern_name in cache.cache_dict
    }
    for layer, site in sites.items():
        if layer not in held:
            raise NotStored(f"{site.pattern_name} is not in this ActivationCache; keep it there.")
    found: list[PromptMaps] = []
    for i in _examples(len(held[next(iter(sites))]), example):
        one = _unnamed({layer: held[layer][i] for layer in sites}, follow, lens.name, sites)
        found.append(replace(one, sinks=_sinks([m[i] for m in held.values()])))
    return lens, found


def _from_tensor(weights: Tensor, follow: Follow, example: int | None) -> list[PromptMaps]:
    """Read a tensor of attention weights, R or knockouts, of one head, a layer, or a batch."""
    if follow == "value_norm":
        raise BadInput("found follow='value_norm' with a tensor; give the model.")
    maps = _batched(weights, weights.ndim > 2)
    maps = _batched(maps, maps.ndim > 3)
    if maps.ndim != 4 or maps.shape[-1] != maps.shape[-2] or maps.numel() == 0:
        raise BadInput(
            f"found a tensor of shape {tuple(weights.shape)}; attention weights are [query, key], "
            "[head, query, key] or [batch, head, query, key], with as many queries as keys."
        )
    found: list[PromptMaps] = []
    for i in _examples(len(maps), example):
        one = _unnamed({0: maps[i]}, follow, "tensor", {})
        found.append(replace(one, sinks=find_sinks(maps[i]) if follow == "pattern" else ()))
    return found


def _with_ids(
    maps: list[PromptMaps], prompts: Any, mask: Mask | None, bos_token_id: int | None
) -> list[PromptMaps]:
    """Give the maps of a tensor the ids of their tokens, and the mask, which may come with them."""
    shape = (len(maps), len(maps[0].tokens))
    if prompts is None and bos_token_id is not None:
        raise BadInput("found bos_token_id= without token ids. Give them as prompt.")
    if prompts is not None:
        given = read_given("prompt", prompts)
        if not isinstance(given, TokenIds):
            raise BadInput(
                "found text with a tensor of weights. Give token ids: model.to_tokens(text)"
            )
        if given.ragged or given.ids.shape != shape:
            raise BadInput(
                f"found token ids of shape {tuple(given.ids.shape)} for {shape[0]} maps of "
                f"{shape[1]} positions."
            )
        mask = given.mask if mask is None else mask
        maps = [
            replace(
                one,
                tokens=tuple(f"#{token}" for token in ids),
                token_ids=tuple(ids),
                bos=_places(ids, bos_token_id),
            )
            for one, ids in zip(maps, given.ids.tolist(), strict=True)
        ]
    if mask is None:
        return maps
    rows = torch.as_tensor(mask).detach().cpu().bool()
    rows = rows.reshape(1, -1) if len(maps) == 1 else rows
    if rows.shape != shape:
        raise BadInput(
            f"found an attention_mask of {rows.shape[-1]} positions for {shape[1]} tokens."
        )
    return [replace(one, usable=row.numpy()) for one, row in zip(maps, rows, strict=True)]


def _sinks(patterns: Sequence[Tensor]) -> tuple[int, ...]:
    return sinks_of(torch.cat([most_attended(m).cpu() for m in patterns])) if patterns else ()


# ---- shared -------------------------------------------------------------------------------------


def _unnamed(
    maps: Mapping[int, Tensor], follow: Follow, name: str, sites: Mapping[int, Site]
) -> PromptMaps:
    """Maps of a prompt whose tokens are not known: `#0`, `#1`, …."""
    tokens = tuple(f"#{i}" for i in range(next(iter(maps.values())).shape[-1]))
    layers = {layer: LayerMaps(_numpy(m)) for layer, m in maps.items()}
    return PromptMaps(tokens, layers, follow, name, later=_later(sites))


def _named(
    lens: Lens, maps: list[PromptMaps], prompts: Prompts, bos_token_id: int | None
) -> list[PromptMaps]:
    """Give maps the tokens of their prompts; what was put in front of text counts as BOS."""
    bos = bos_token_id
    if bos is None:
        bos = (
            prompts.ids[0][0]
            if prompts.prepended
            else getattr(lens.tokenizer, "bos_token_id", None)
        )
    return [
        replace(
            one,
            tokens=lens.decode_each(ids),
            token_ids=ids,
            bos=_places(ids, bos),
            prepended=prompts.prepended,
        )
        for one, ids in zip(maps, prompts.ids, strict=True)
    ]


def _places(ids: Sequence[object], wanted: object) -> frozenset[int]:
    return frozenset(i for i, token in enumerate(ids) if token == wanted)


def _examples(n: int, example: int | None) -> list[int]:
    if example is None:
        return list(range(n))
    if not -n <= example < n:
        raise BadInput(f"found example={example}; there are examples 0 to {n - 1}.")
    return [example % n]


def _batched(maps: Tensor, has_batch_dim: bool) -> Tensor:
    return maps if has_batch_dim else maps.unsqueeze(0)


def _numpy(x: Tensor) -> Float[np.ndarray, "*any"]:
    return x.detach().cpu().double().numpy()
