"""What is traced, read into one form: maps per layer as numpy arrays, tokens, where BOS stands.

A model is run (one forward pass without gradients for the pattern and value norms; `run_with_ra`
for Reversed Attention). An `RACache`, a TransformerLens `ActivationCache` or a tensor of attention
weights is read as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NotStored, UnsupportedModel
from ra_lens.inputs import Mask, TokenIds, read_given
from ra_lens.model import Layers, Lens, Site, as_lens
from ra_lens.model.values import writing_names, written_norms
from ra_lens.numbers import wholes
from ra_lens.padding import batches, watched
from ra_lens.paths.result import GRADIENT, Follow
from ra_lens.paths.weights import LayerMaps
from ra_lens.prompts import Prompts, read_prompts
from ra_lens.run import run_with_ra
from ra_lens.targets import as_objective, bind

Source = nn.Module | RACache | Tensor | Any


@dataclass(frozen=True)
class Example:
    """One prompt's maps.

    Attributes:
        tokens: What the model read.
        token_ids: Their ids, where known.
        bos: Positions of BOS tokens.
        layers: Maps by layer.
        model_name: Where they are from.
    """

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...] | None
    bos: frozenset[int]
    layers: dict[int, LayerMaps]
    model_name: str


@dataclass(frozen=True)
class Request:
    """What to read from a source, as `trace_paths` takes it."""

    follow: Follow = "pattern"
    layers: Layers = None
    target: Any = None
    metric: Any = None
    attention_mask: Mask | None = None
    prepend_bos: bool | None = None
    bos_token_id: int | None = None
    batch_size: int | None = None
    example: int | None = None
    through_layers: bool = False


def read_source(source: Source, prompts: Any, request: Request) -> list[Example]:
    """Read all examples of a source (or the one of `request.example`).

    Raises:
        BadInput: a prompt or option that this source does not take.
        NotStored: the cache does not hold the maps.
        UnsupportedModel: a model whose maps cannot be read.
    """
    if isinstance(source, RACache):
        _no(prompts, "prompt", "an RACache, which knows its own")
        _no(request.target, "target", "an RACache, whose run is over")
        _no(request.metric, "metric", "an RACache, whose run is over")
        _no(request.attention_mask, "attention_mask", "an RACache, which knows its padding")
        return _from_cache(source, request)
    if isinstance(source, Tensor):
        return _from_tensor(source, prompts, request)
    if hasattr(source, "cache_dict") and hasattr(source, "model"):
        return _from_activation_cache(source, prompts, request)
    if not isinstance(source, nn.Module):
        raise BadInput(
            f"found a {type(source).__name__} to trace; give a TransformerLens model, an RACache, "
            "an ActivationCache, or attention weights as a tensor [head, query, key]."
        )
    if prompts is None:
        raise BadInput("found no prompt. Give the text (or token ids) to run the model on.")
    lens = as_lens(source)
    if request.follow in GRADIENT:
        return _from_gradient(lens, prompts, request)
    _no(request.target, "target", f"follow={request.follow!r}, which has no loss")
    _no(request.metric, "metric", f"follow={request.follow!r}, which has no loss")
    return _from_forward(lens, prompts, request)


def _no(value: object, name: str, what: str) -> None:
    if value is not None:
        raise BadInput(f"found {name}= with {what}. Leave it out.")


# ---- models -------------------------------------------------------------------------------------


def _read(lens: Lens, prompts: Any, request: Request) -> Prompts:
    mask, bos = request.attention_mask, request.prepend_bos
    return read_prompts(lens, prompts, attention_mask=mask, prepend_bos=bos)


def _from_gradient(lens: Lens, prompts: Any, request: Request) -> list[Example]:
    _check_sites(lens.choose_layers(request.layers), request, lens.name)
    read = _read(lens, prompts, request)
    objective = as_objective(request.target, request.metric)
    _, bound = bind(objective, lens, read, None)
    _, cache = run_with_ra(
        lens.module,
        read,
        target=objective,
        layers=request.layers,
        batch_size=request.batch_size,
        progress=False,
    )
    examples = _from_cache(cache, replace(request, bos_token_id=None))
    return [
        replace(example, token_ids=ids, bos=_bos(lens, ids, request))
        for example, ids in zip(examples, bound.ids, strict=True)
    ]


@torch.no_grad()
def _from_forward(lens: Lens, prompts: Any, request: Request) -> list[Example]:
    lens.refuse_dropout()
    sites = lens.choose_layers(request.layers)
    _check_sites(sites, request, lens.name)
    values = request.follow == "value_norm"
    found: dict[int, Example] = {}
    for which, part in batches(lens, _read(lens, prompts, request), request.batch_size):
        batch = part.lay_out(lens)
        seen: dict[int, dict[str, Tensor]] = {layer: {} for layer in sites}
        hooks = [hook for site in sites.values() for hook in _hooks(lens, site, seen, values)]
        last = batch.columns([[n - 1] for n in batch.lengths])
        reading = lens.reading(None if lens.logits_are_hooked else last)
        with lens.hooks(hooks), reading, watched(lens, batch):
            lens.forward(batch.tokens, batch.attention_mask)
        _check_seen(lens, seen)
        norms = {
            layer: written_norms(lens, site, seen[layer]["pattern"], seen[layer])
            for layer, site in sites.items()
            if values
        }
        for i, (place, ids) in enumerate(zip(which, part.ids, strict=True)):
            span = batch.span(i)
            layers = {
                layer: LayerMaps(
                    _numpy(things["pattern"][i, :, span, span]),
                    _numpy(norms[layer][i, :, span]) if values else None,
                    _numpy(things["x"][i, span].double().norm(dim=-1)) if values else None,
                )
                for layer, things in seen.items()
            }
            tokens, bos = lens.decode_each(ids), _bos(lens, ids, request)
            found[place] = Example(tokens, ids, bos, layers, lens.name)
    return [found[place] for place in sorted(found)]


def _hooks(
    lens: Lens, site: Site, seen: dict[int, dict[str, Tensor]], values: bool
) -> list[tuple[str, Callable[..., None]]]:
    names = {"pattern": site.pattern_name}
    if values:
        names |= writing_names(lens, site) | {"x": lens.block_input_name(site)}

    def look(what: str) -> Callable[..., None]:
        def hook_function(x: Tensor, hook: Any) -> None:  # noqa: ARG001  passed by name
            seen[site.layer][what] = x.detach().clone()

        return hook_function

    return [(name, look(what)) for what, name in names.items()]


def _check_seen(lens: Lens, seen: dict[int, dict[str, Tensor]]) -> None:
    for layer, things in seen.items():
        if "pattern" not in things:
            raise UnsupportedModel(
                f"hook_pattern of layer {layer} of {lens.name} did not fire, so there is nothing "
                "to trace. The model probably runs fused attention: load it with "
                "attn_implementation='eager'."
            )


def _check_sites(sites: dict[int, Site], request: Request, name: str) -> None:
    for site in sites.values():
        if site.cross or site.query_side != "input":
            raise UnsupportedModel(
                f"paths run through tokens of one text, and {site.label} of {name} is part of a "
                "decoder beside an encoder. Of such models trace_paths follows a layer of the "
                "encoder, from the RACache that run_with_ra gives."
            )
        if request.through_layers and not site.causal:
            raise UnsupportedModel(
                f"{site.label} of {name} also attends to later tokens; trace_layers is for models "
                "that do not. trace_paths follows one layer of it, to earlier tokens."
            )


def _bos(lens: Lens, ids: Sequence[int], request: Request) -> frozenset[int]:
    own = getattr(lens.tokenizer, "bos_token_id", None)
    wanted = own if request.bos_token_id is None else request.bos_token_id
    return frozenset(i for i, token in enumerate(ids) if token == wanted)


# ---- what is already there ----------------------------------------------------------------------


def _from_cache(cache: RACache, request: Request) -> list[Example]:
    if request.follow == "value_norm":
        raise NotStored(
            "an RACache holds maps, not values. Give the model and the prompt instead, or take "
            "follow='pattern' or 'more'."
        )
    if request.bos_token_id is not None:
        raise BadInput(
            "found bos_token_id= with an RACache, which knows tokens as text only. Give the model "
            "and the prompt instead."
        )
    kind = "ra" if request.follow in GRADIENT else "pattern"
    n_layers = cache.info.n_layers or cache.layers[-1] + 1
    layers = _choose(cache.layers, request.layers, n_layers)
    _check_sites({layer: cache.sites[layer] for layer in layers}, request, cache.info.model_name)
    maps = {layer: cache[kind, layer] for layer in layers}
    found: list[Example] = []
    for i in _examples(cache.batch_size, request.example):
        known = cache.info.str_tokens
        width = next(iter(maps.values())).shape[-1]
        tokens = tuple(f"#{j}" for j in range(width)) if known is None else tuple(known[i])
        start = cache.info.starts[i] if known and cache.info.starts else 0
        span = slice(start, start + len(tokens))
        own = {
            layer: LayerMaps(_numpy((m[i] if cache.has_batch_dim else m)[:, span, span]))
            for layer, m in maps.items()
        }
        bos = frozenset(
            j for j, text in enumerate(tokens) if cache.info.bos_prepended and text == tokens[0]
        )
        found.append(Example(tokens, None, bos, own, cache.info.model_name))
    return found


def _from_activation_cache(cache: Any, prompts: Any, request: Request) -> list[Example]:
    lens = as_lens(cache.model)
    if request.follow != "pattern":
        if request.follow == "value_norm":
            raise BadInput("found follow='value_norm' with an ActivationCache; give the model.")
        converted = RACache.from_activation_cache(cache, cache.model)
        return _named(
            lens, _from_cache(converted, replace(request, bos_token_id=None)), prompts, request
        )
    sites = lens.choose_layers(request.layers)
    maps: dict[int, Tensor] = {}
    for layer, site in sites.items():
        if site.pattern_name not in cache.cache_dict:
            raise NotStored(f"{site.pattern_name} is not in this ActivationCache; keep it there.")
        maps[layer] = cache.cache_dict[site.pattern_name]
    has_batch = bool(getattr(cache, "has_batch_dim", True))
    batched = {layer: m if has_batch else m.unsqueeze(0) for layer, m in maps.items()}
    n = next(iter(batched.values())).shape[0]
    examples = [
        _plain({layer: m[i] for layer, m in batched.items()}, lens.name)
        for i in _examples(n, request.example)
    ]
    return _named(lens, examples, prompts, request)


def _named(lens: Lens, examples: list[Example], prompts: Any, request: Request) -> list[Example]:
    """Give examples the tokens of their prompts."""
    if prompts is None:
        return examples
    rows = _read(lens, prompts, replace(request, attention_mask=None)).ids
    lengths = [len(example.tokens) for example in examples]
    if len(rows) != len(examples) or any(len(r) != n for r, n in zip(rows, lengths, strict=True)):
        raise BadInput(
            f"found prompts of {[len(row) for row in rows]} tokens for maps of {lengths}. Give "
            "the prompt that the maps were made from, or its token ids."
        )
    return [
        replace(
            example,
            tokens=lens.decode_each(ids),
            token_ids=ids,
            bos=_bos(lens, ids, request),
        )
        for example, ids in zip(examples, rows, strict=True)
    ]


def _from_tensor(weights: Tensor, prompts: Any, request: Request) -> list[Example]:
    """Read attention weights, or R: `[query, key]`, `[head, query, key]`, or batches of those."""
    if request.follow == "value_norm":
        raise BadInput("found follow='value_norm' with a tensor; give the model.")
    _no(request.target, "target", "a tensor, which has no loss")
    _no(request.metric, "metric", "a tensor, which has no loss")
    _no(request.layers, "layer", "a tensor, which is one layer")
    maps = weights.unsqueeze(0) if weights.ndim == 2 else weights
    maps = maps.unsqueeze(0) if maps.ndim == 3 else maps
    if maps.ndim != 4 or maps.shape[-1] != maps.shape[-2] or maps.numel() == 0:
        raise BadInput(
            f"found a tensor of shape {tuple(weights.shape)}; attention weights are [query, key], "
            "[head, query, key] or [batch, head, query, key], with as many queries as keys."
        )
    examples = [_plain({0: maps[i]}, "tensor") for i in _examples(len(maps), request.example)]
    if prompts is None:
        if request.bos_token_id is not None:
            raise BadInput("found bos_token_id= without token ids. Give them as prompt.")
        return examples
    given = read_given("prompt", prompts)
    if not isinstance(given, TokenIds):
        raise BadInput("found text with a tensor of weights. Give token ids: model.to_tokens(text)")
    rows = given.ids.tolist()
    if given.ragged or given.ids.shape != (len(examples), maps.shape[-1]):
        raise BadInput(
            f"found token ids of shape {tuple(given.ids.shape)} for {len(examples)} maps of "
            f"{maps.shape[-1]} positions."
        )
    return [
        replace(
            example,
            token_ids=tuple(ids),
            tokens=tuple(f"#{token}" for token in ids),
            bos=frozenset(i for i, token in enumerate(ids) if token == request.bos_token_id),
        )
        for example, ids in zip(examples, rows, strict=True)
    ]


def _plain(maps: dict[int, Tensor], name: str) -> Example:
    width = next(iter(maps.values())).shape[-1]
    tokens = tuple(f"#{i}" for i in range(width))
    layers = {layer: LayerMaps(_numpy(m)) for layer, m in maps.items()}
    return Example(tokens, None, frozenset(), layers, name)


def _examples(n: int, example: int | None) -> list[int]:
    if example is None:
        return list(range(n))
    if not -n <= example < n:
        raise BadInput(f"found example={example}; there are examples 0 to {n - 1}.")
    return [example % n]


def _choose(present: Sequence[int], layers: Layers, n_layers: int) -> list[int]:
    if layers is None:
        return list(present)
    wanted = wholes("layers", layers)
    chosen = [i + n_layers if i < 0 else i for i in wanted]
    if any(i not in present for i in chosen):
        raise BadInput(f"found layers={wanted}; this cache has layers {list(present)}.")
    return sorted(set(chosen))


def _numpy(x: Tensor) -> Float[np.ndarray, "*any"]:
    return x.detach().cpu().double().numpy()
