"""Finding the attention layers of a model among its hook points."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from ra_lens.errors import UnsupportedModel
from ra_lens.sites import facts
from ra_lens.sites.site import Site

_PATTERN_NAME = re.compile(r"^((?:(\w+)_)?blocks)\.(\d+)\.(\w+)\.hook_pattern$")
# Stacks in the order in which they run. HRM-Text runs its two in a loop; in the last round the low
# one comes before the high one.
_STACKS = ("encoder_blocks", "decoder_blocks", "L_blocks", "H_blocks")
_REPEATED = ("L_blocks", "H_blocks")


def find_sites(model: Any, hook_names: Collection[str]) -> dict[int, Site]:
    """Find the attention layers of `model` among its `hook_names`, in the order they run in.

    Raises:
        UnsupportedModel: no hook point of a pattern, or a stack of blocks that is not known.
    """
    found = [m for m in map(_PATTERN_NAME.match, hook_names) if m]
    plain = {int(m[3]): m[0] for m in found if m[1] == "blocks" and m[4] == "attn"}
    if plain:
        return {layer: _site(model, layer, plain[layer], hook_names) for layer in sorted(plain)}
    if not found:
        raise UnsupportedModel(_nothing_found(model, hook_names))
    unknown = sorted({m[1] for m in found} - set(_STACKS))
    if unknown:
        raise UnsupportedModel(
            f"{_describe(model)} has its attention in {' and '.join(unknown)}, and ra_lens does "
            "not know when these run, or how often. Please report the architecture."
        )
    # In a decoder block self-attention (attn, self_attn) comes before cross_attn.
    order = sorted(found, key=lambda m: (_STACKS.index(m[1]), int(m[3]), "cross" in m[4]))
    return {i: _site(model, i, m[0], hook_names) for i, m in enumerate(order)}


def _site(model: Any, layer: int, pattern_name: str, hook_names: Collection[str]) -> Site:
    prefix = pattern_name.removesuffix(".hook_pattern")
    attn = model.get_submodule(prefix)
    return Site(
        layer=layer,
        prefix=prefix,
        n_heads=facts.n_heads(attn, model.cfg),
        n_key_value_heads=facts.n_key_value_heads(attn, model.cfg),
        scale=facts.softmax_scale(attn),
        window=facts.attention_window(attn),
        causal=facts.is_causal(attn, model.cfg),
        cross=prefix.endswith("cross_attn"),
        values=facts.values_of(attn, prefix, hook_names),
        gate=facts.gate_of(attn),
        repeated=prefix.startswith(_REPEATED),
    )


def _nothing_found(model: Any, hook_names: Collection[str]) -> str:
    others = sorted(name for name in hook_names if name.endswith("hook_pattern"))
    return (
        f"{_describe(model)} has no hook point named blocks.{{layer}}.attn.hook_pattern "
        f"(found: {f'only {others[:4]}' if others else 'none'}): either it has no softmax "
        "attention, as Mamba and RWKV, or this TransformerLens does not show its pattern. "
        "Reversed Attention needs one; load another model with ra_lens.load_model(name)."
    )


def _describe(model: Any) -> str:
    name = getattr(getattr(model, "cfg", None), "model_name", None)
    return f"{type(model).__name__} {name!r}" if name else type(model).__name__
