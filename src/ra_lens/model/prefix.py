"""Prompts that go on from tokens which have run before: their keys and values are kept.

In a causal model nothing that comes later changes what is computed at earlier tokens. So tokens
that many prompts begin with run once, with the hooks that are to be there, and each layer's keys
and values are kept, one row for each set of hooks. The rest of a prompt then runs with the kept
ones in front of its own, through the model's own key/value cache: HookedTransformer's, or Hugging
Face's inside a TransformerBridge. Which row a prompt goes on from is chosen layer by layer, when
the layer runs, so that a batch takes no more memory than its own tokens do.

The rest of prompts is padded on the right, without a mask: what stands there comes after all that
is read. Positions go on from the last token of the prefix.

Not every model has such a cache: state space and hybrid layers keep something else, windows drop
keys, layers may share theirs. What is not one pair of keys and values of every token for each
attention layer is refused. Whoever uses this should compare with a prompt that runs in full.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ra_lens.errors import UnsupportedModel
from ra_lens.model.lens import FwdHooks, Lens


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the first tokens of prompts, by layer; a row for each set of hooks.

    Attributes:
        n_tokens: How many tokens there are.
        n_rows: Sets of hooks that they were run with.
    """

    n_tokens: int
    n_rows: int
    _cache: Any
    _base: Prefix | None = None  # of one row, for the layers that were skipped

    def options(self, rows: Int[Tensor, "batch"], n_new: int) -> Mapping[str, Any]:
        """Options of a forward pass that goes on from these rows with `n_new` tokens each."""
        n = len(rows)
        if hasattr(self._cache, "entries"):  # HookedTransformer
            cache = copy.copy(self._cache)
            cache.frozen = True
            cache.entries = [_Entry(*self._of_layer(i, rows)) for i in range(len(cache.entries))]
            mask = cache.previous_attention_mask[:1]
            cache.previous_attention_mask = mask.expand(n, self.n_tokens)
            return {"past_kv_cache": cache, "attention_mask": mask.new_ones(n, n_new)}
        cache = copy.copy(self._cache)
        cache.layers = [_layer(*self._of_layer(i, rows)) for i in range(len(cache.layers))]
        return {"past_key_values": cache, "use_cache": True}

    def _of_layer(self, i: int, rows: Tensor) -> tuple[Any, Tensor]:
        """What one layer has kept, and the row of it for each example."""
        kept = _layers(self._cache)[i]
        if self._base is not None and _keys(kept) is None:
            return _layers(self._base._cache)[i], torch.zeros_like(rows)
        return kept, rows


def read_prefix(
    lens: Lens,
    tokens: Int[Tensor, "row pos"],
    fwd_hooks: FwdHooks = (),
    *,
    base: Prefix | None = None,
) -> Prefix:
    """Run tokens that prompts begin with, and keep their keys and values.

    `base`, of one row, was read without hooks; blocks that are skipped (`SkippedBlocks`) have its
    keys and values.

    Raises:
        UnsupportedModel: there is a layer whose keys and values are not kept as they are.
    """
    n_rows, n_tokens = tokens.shape
    cache = _new_cache(lens, n_rows)
    if lens.kind == "HookedTransformer":
        ones = torch.ones(tokens.shape, dtype=torch.long, device=tokens.device)
        options = {"past_kv_cache": cache, "attention_mask": ones}
    else:
        options = {"past_key_values": cache, "use_cache": True}
    last = torch.full((n_rows, 1), n_tokens - 1)
    with torch.no_grad():
        lens.logits_at(tokens, tokens.new_ones(tokens.shape).bool(), last, fwd_hooks, past=options)
    found = Prefix(n_tokens, n_rows, cache, base)
    _need_all(lens, found)
    return found


@torch.no_grad()
def logits_after(
    lens: Lens,
    prefix: Prefix,
    rows: Int[Tensor, "batch"],
    tokens: Int[Tensor, "batch pos"],
    columns: Int[Tensor, "batch read"],
    fwd_hooks: FwdHooks = (),
) -> Float[Tensor, "batch read d_vocab"]:
    """Run what comes after the prefix, each example from its row, and give logits at columns."""
    options = prefix.options(rows, tokens.shape[1])
    real = torch.ones_like(tokens, dtype=torch.bool)
    return lens.logits_at(tokens, real, columns, fwd_hooks, past=options)


def _new_cache(lens: Lens, n_rows: int) -> Any:
    if lens.kind == "HookedTransformer":
        import transformer_lens

        # Renamed in TransformerLens 3.
        names = ("TransformerLensKeyValueCache", "HookedTransformerKeyValueCache")
        found: Any = next(c for name in names if (c := getattr(transformer_lens, name, None)))
        model: Any = lens.module
        return found.init_cache(model.cfg, model.cfg.device, n_rows)
    return hugging_face_cache(lens)


def hugging_face_cache(lens: Lens) -> Any:
    """Give an empty cache of keys and values for the Hugging Face model inside a bridge."""
    from transformers import DynamicCache

    model: Any = lens.module
    return DynamicCache(config=model.original_model.config)


def _layers(cache: Any) -> list[Any]:
    return cache.entries if hasattr(cache, "entries") else cache.layers


def _keys(kept: Any) -> Tensor | None:
    """Keys that a layer has kept; None where it has not run."""
    keys = kept.past_keys if hasattr(kept, "past_keys") else kept.keys
    return keys if isinstance(keys, Tensor) and keys.numel() else None


def _need_all(lens: Lens, prefix: Prefix) -> None:
    cache, base = prefix._cache, prefix._base  # pyright: ignore[reportPrivateUsage]
    layers = _layers(cache)
    n_dim, at = (4, 1) if hasattr(cache, "entries") else (4, 2)
    wrong = len(layers) != len(lens.sites) or any(site.repeated for site in lens.sites.values())
    for kept in layers:
        keys = _keys(kept)
        plain = hasattr(kept, "past_keys") or type(kept).__name__ in _PLAIN
        if not plain or (keys is None and base is None):
            wrong = True
        elif keys is not None:
            wrong |= keys.ndim != n_dim or keys.shape[at] != prefix.n_tokens
            wrong |= keys.shape[0] != prefix.n_rows
    if wrong:
        raise UnsupportedModel(
            f"{lens.name} does not keep the keys and values of {prefix.n_tokens} tokens in each of "
            "its attention layers, so that prompts cannot go on from them. Run them in full."
        )


# Layers of Hugging Face's cache that keep keys and values as they are, and nothing else.
_PLAIN = ("DynamicLayer", "DynamicSlidingWindowLayer")


class _Entry:
    """HookedTransformer's cache of one layer, from which each example takes the row it goes on."""

    def __init__(self, kept: Any, rows: Tensor) -> None:
        self._kept, self._rows = kept, rows
        # For its shape, which positions are told by.
        self.past_keys = _wide(kept.past_keys, len(rows))
        self.past_values = _wide(kept.past_values, len(rows))

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        kept, rows = self._kept, self._rows
        return (
            torch.cat([_chosen(kept.past_keys, rows), keys], dim=1),
            torch.cat([_chosen(kept.past_values, rows), values], dim=1),
        )


def _layer(kept: Any, rows: Tensor) -> Any:
    """Hugging Face's cache of one layer, from which each example takes the row it goes on."""
    layer = copy.copy(kept)
    layer.keys, layer.values = _wide(kept.keys, len(rows)), _wide(kept.values, len(rows))

    def update(keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return (
            torch.cat([_chosen(kept.keys, rows), keys], dim=-2),
            torch.cat([_chosen(kept.values, rows), values], dim=-2),
        )

    own: Callable[..., Any] = update
    layer.update = own
    return layer


def _wide(kept: Tensor, n: int) -> Tensor:
    """A view of the shape that the chosen rows have."""
    return kept[:1].expand(n, *kept.shape[1:])


def _chosen(kept: Tensor, rows: Tensor) -> Tensor:
    return kept[rows.to(kept.device)]
