"""One attention layer of one model: its hook names, its heads and its softmax scale.

The softmax scale c is the factor between the products q·k and the softmax input, S = c·q·k. The
paper's Reversed Attention is the gradient with respect to q·k, hence R = c·dL/dS (paper eq. 15 and
17, where c = 1/√d_head). It is read from the model's own attention module, never guessed: on a
`TransformerBridge` `cfg.attn_scale` is unset, and 1/√d_head is wrong for GPT-Neo, T5, Gemma,
Granite and every model that scales by layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ra_lens.errors import UnsupportedModel

_PATTERN_NAME = re.compile(r"^blocks\.(\d+)\.attn\.hook_pattern$")


@dataclass(frozen=True)
class Site:
    """One attention layer.

    Attributes:
        layer: Index of the block, as in `blocks.{layer}`.
        prefix: Hook prefix, `blocks.{layer}.attn`.
        n_heads: Query heads.
        n_key_value_heads: Key/value heads; fewer than `n_heads` with grouped queries.
        scale: Softmax scale c, so that the softmax input is c·q·k.
        observe_only: True where hook_pattern only shows a copy of what the model has already used:
            an edit there changes nothing. None until a run has shown which it is.
        window: Keys that a query reaches, itself included, where attention is local; a key/value
            cache drops what lies outside.
    """

    layer: int
    prefix: str
    n_heads: int
    n_key_value_heads: int
    scale: float
    observe_only: bool | None = None
    window: int | None = None

    @property
    def pattern_name(self) -> str:
        """Full hook name of the pattern."""
        return f"{self.prefix}.hook_pattern"

    @property
    def value_name(self) -> str:
        """Full hook name of the values, `[batch, pos, key/value head, d_head]`."""
        return f"{self.prefix}.hook_v"

    @property
    def z_name(self) -> str:
        """Full hook name of what the heads give to W_O, `[batch, pos, head, d_head]`."""
        return f"{self.prefix}.hook_z"

    @property
    def block_output_name(self) -> str:
        """Full hook name of the residual stream after the block (TransformerBridge)."""
        return f"blocks.{self.layer}.hook_out"

    def kv_group(self, head: int) -> int:
        """Index of the key/value head that query head `head` reads (grouped queries)."""
        return head // (self.n_heads // self.n_key_value_heads)


def find_sites(model: Any, hook_names: Iterable[str]) -> dict[int, Site]:
    """Find the attention layers of `model` among its `hook_names`, in layer order.

    Raises:
        UnsupportedModel: no `blocks.{i}.attn.hook_pattern`, or a softmax scale that cannot be read.
    """
    names = list(hook_names)
    layers = sorted({int(m.group(1)) for m in map(_PATTERN_NAME.match, names) if m})
    if not layers:
        others = sorted(name for name in names if name.endswith("hook_pattern"))
        found = f"only {others[:4]}" if others else "none"
        raise UnsupportedModel(
            f"{_describe(model)} has no hook point named blocks.{{layer}}.attn.hook_pattern "
            f"(found: {found}). Reversed Attention needs a decoder with softmax attention; load "
            "one with ra_lens.load_model(name)."
        )
    n_heads = int(model.cfg.n_heads)
    n_kv = int(getattr(model.cfg, "n_key_value_heads", None) or n_heads)
    return {
        layer: Site(
            layer=layer,
            prefix=f"blocks.{layer}.attn",
            n_heads=n_heads,
            n_key_value_heads=n_kv,
            scale=softmax_scale(model.blocks[layer].attn, layer),
            window=attention_window(model.blocks[layer].attn),
        )
        for layer in layers
    }


# What the Hugging Face attention modules call the factor, and how it enters the scores.
_SCALE_ATTRIBUTES: tuple[tuple[str, Callable[[float], float]], ...] = (
    ("scaling", float),
    ("softmax_scale", float),
    ("inv_norm_factor", float),
    ("scale_attn", lambda divisor: 1.0 / float(divisor)),
)


def softmax_scale(attn: Any, layer: int) -> float:
    """Read the factor between q·k and the softmax input from an attention module.

    Raises:
        UnsupportedModel: the module does not say.
    """
    original = getattr(attn, "original_component", None)
    if original is None:  # HookedTransformer divides the products by `attn_scale`.
        divisor = getattr(attn, "attn_scale", None)
        if divisor is not None:
            return 1.0 / float(divisor)
    for name, convert in _SCALE_ATTRIBUTES:
        value = getattr(original, name, None)
        if value is not None:
            return convert(value)
    raise UnsupportedModel(
        f"the softmax scale of layer {layer} is unknown: its attention is a "
        f"{type(original if original is not None else attn).__name__}, which has none of "
        f"{[name for name, _ in _SCALE_ATTRIBUTES]}. Reversed Attention is defined with that "
        "scale (R = scale · dL/dscores); please report the architecture."
    )


def attention_window(attn: Any) -> int | None:
    """Read from a Hugging Face attention module how many keys a query reaches; None: all.

    HookedTransformer has local attention too, but its key/value cache drops nothing.
    """
    original = getattr(attn, "original_component", None)
    # Modules whose layers differ hold their own; others leave it in the configuration.
    owner = original if hasattr(original, "sliding_window") else getattr(original, "config", None)
    window = getattr(owner, "sliding_window", None)
    return int(window) if isinstance(window, int) else None


def spell_layers(layers: Sequence[int]) -> str:
    """Spell layer indices: `0…11`, or `0, 3, 7` where they are not consecutive."""
    consecutive = list(layers) == list(range(layers[0], layers[-1] + 1))
    if consecutive and len(layers) > 1:
        return f"{layers[0]}…{layers[-1]}"
    return ", ".join(map(str, layers))


def _describe(model: Any) -> str:
    name = getattr(getattr(model, "cfg", None), "model_name", None)
    return f"{type(model).__name__} {name!r}" if name else type(model).__name__
