"""What an attention module says about itself: scale, heads, direction, window, values, gate.

On a HookedTransformer it is TransformerLens's own module, on a TransformerBridge the Hugging Face
module inside (`original_component`; BERT keeps the attention proper in its `.self`). Everything is
read from that module. Where it cannot tell, a line below says what its code does, and why that is
so; what no line covers stays unknown.

Whether a model's value biases have been moved into the output biases of its attention layers.

Rows of a pattern sum to 1, so a head adds its value bias b_V·W_O at every position whatever it
attends to. TransformerLens's weight processing (`fold_value_biases`, which `from_pretrained` and
`enable_compatibility_mode` do unless told otherwise) therefore adds b_V·W_O of all heads to b_O and
sets b_V to zero. The logits stay; z does not: setting z of a head to zero then leaves behind
what its value bias writes, which zeroing the head's rows of W_O in the original weights removes.

Neither class records that it was done, so the weights are read: all value biases are zero, and an
output bias is not. GPT-Neo looks like that as published (its values have no bias, its output has
one); there a value bias can only come from folding the shift of the layer norm.

Finding the attention layers of a model among its hook points.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor

from ra_lens.errors import UnsupportedModel
from ra_lens.model.sites import Gate, Site


def attention_module(attn: Any) -> Any:
    """The module that computes the attention: Hugging Face's own inside a bridge."""
    original = getattr(attn, "original_component", None)
    return attn if original is None else getattr(original, "self", original)


# What the attention modules call the factor, and how it enters the scores.
_SCALE_ATTRIBUTES: tuple[tuple[str, Callable[[Any], float]], ...] = (
    ("scaling", float),
    ("softmax_scale", float),  # MPT
    ("inv_norm_factor", float),  # Bloom, Falcon
    ("scale_attn", lambda divisor: 1.0 / float(divisor)),  # GPT-J, CodeGen
    ("attn_scale", lambda divisor: 1.0 / float(divisor)),  # HookedTransformer, boot_native
)
# Modules without an attribute for it.
_SCALE_BY_CLASS: dict[str, Callable[[Any], float]] = {
    # `attn_weights = torch.matmul(query, key.transpose(-1, -2))`, and then the softmax
    "GPTNeoSelfAttention": lambda _module: 1.0,
    # OpenAI GPT: `if self.scale: w = w / math.sqrt(v.size(-1))`
    "Attention": lambda m: 1 / math.sqrt(m.split_size // m.n_head) if m.scale else 1.0,
    # TransformerLens's own, of boot_native: `torch.matmul(q, k.transpose(-2, -1)) / self.scale`
    "NativeAttention": lambda m: 1 / m.scale,
}


def softmax_scale(attn: Any) -> float | None:
    """The factor between q·k and the softmax input; None if the module does not say."""
    module = attention_module(attn)
    for name, convert in _SCALE_ATTRIBUTES:
        value = getattr(module, name, None)
        if value is not None:
            return convert(value)
    by_class = _SCALE_BY_CLASS.get(type(module).__name__)
    try:
        return None if by_class is None else by_class(module)
    except AttributeError:  # another class of that name
        return None


def attention_window(attn: Any) -> int | None:
    """How many keys a query reaches; None: all.

    HookedTransformer has local attention too, but its key/value cache drops nothing.
    """
    original = getattr(attn, "original_component", None)
    # Modules whose layers differ hold their own; others leave it in the configuration.
    owner = original if hasattr(original, "sliding_window") else getattr(original, "config", None)
    window = getattr(owner, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def is_causal(attn: Any, cfg: Any) -> bool:
    """Whether queries reach no keys after them. Every Hugging Face module says so itself."""
    own = getattr(attention_module(attn), "is_causal", None)
    return getattr(cfg, "attention_dir", "causal") == "causal" if own is None else bool(own)


def n_heads(attn: Any, cfg: Any) -> int:
    """Query heads of this layer; they differ between layers in some models."""
    module = attention_module(attn)
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    found = (getattr(module, name, None) for name in names)
    return next((n for n in found if isinstance(n, int)), int(cfg.n_heads))


def n_key_value_heads(attn: Any, cfg: Any) -> int:
    """Heads that keys and values have in this layer."""
    module, heads = attention_module(attn), n_heads(attn, cfg)
    groups = getattr(module, "num_key_value_groups", None)
    if isinstance(groups, int) and groups > 0 and heads % groups == 0:
        return heads // groups
    return int(getattr(cfg, "n_key_value_heads", None) or heads)


# Attention whose output is multiplied with a gate before hook_z, where TransformerLens leaves the
# computation to Hugging Face; elsewhere maps are added to the pattern and the gate does not matter.
_GATES: dict[str, Gate] = {
    "AfmoeAttention": "sigmoid",  # `output = output * torch.sigmoid(gate_states)`
    "LagunaAttention": "softplus",  # `gate = F.softplus(self.g_proj(hidden_states).float())`
}
# Attention whose values no hook point shows as they are used.
_HIDDEN_VALUES = ("JetMoeAttention",)  # queries and outputs go through a mixture of experts


def gate_of(attn: Any) -> Gate | None:
    """What z is multiplied with before `hook_z`."""
    return _GATES.get(type(attention_module(attn)).__name__)


def values_of(attn: Any, prefix: str, hook_names: Collection[str]) -> str | None:
    """The hook point, below `prefix`, that shows the values as the pattern is applied to them."""
    module = attention_module(attn)
    # Gemma 4: layers that reuse the keys and values of an earlier layer have none of their own.
    if type(module).__name__ in _HIDDEN_VALUES or getattr(module, "is_kv_shared_layer", False):
        return None
    # Gemma 4: values are normalised after hook_v.
    for name in ("v_norm.hook_out", "hook_v"):
        if f"{prefix}.{name}" in hook_names:
            return name
    return None


def remarks(attn: Any, cfg: Any) -> list[str]:
    """What is unusual about an attention module."""
    module = attention_module(attn)
    found: list[str] = []
    cap = getattr(module, "attn_logit_softcapping", None) or getattr(cfg, "attn_scores_soft_cap", 0)
    if cap and cap > 0:
        found.append(f"scores capped at {float(cap):g}: R is scale · dL/dscores after the cap")
    if getattr(module, "kv_lora_rank", None):
        found.append("latent attention (MLA)")
    if getattr(module, "is_kv_shared_layer", False):
        found.append("keys and values of an earlier layer")
    return found


def processing_problems(attention: Iterable[Any]) -> list[str]:
    """What folding and centring do to models that they do not fit."""
    if any(type(attention_module(attn)).__name__ == "BitNetAttention" for attn in attention):
        return [
            "the weights were processed, but BitNet quantises them when it uses them: folded and "
            "centred weights give other logits. Use enable_compatibility_mode(no_processing=True)."
        ]
    return []


# HookedTransformer gives every architecture both biases, zero where there is none.
_OUTPUT_BIAS_ONLY = ("GPTNeoForCausalLM",)


def value_biases_folded(model: Any, prefixes: Iterable[str]) -> bool:
    """Whether the value biases of attention layers are zero because the output biases hold them.

    Judged from the weights: a model whose value biases are zero of themselves, but whose output
    biases are not, counts as folded too.
    """
    names = list(prefixes)
    layers = [model.get_submodule(name) for name in names]
    values = [_bias(attn, "v", "b_V") for attn in layers]
    outputs = [_bias(attn, "o", "b_O") for attn in layers]
    # A bridge keeps the difference between no bias and a bias of zero.
    has_values = any(isinstance(bias, Tensor) for bias in values)
    if not has_values or any(map(_is_nonzero, values)) or not any(map(_is_nonzero, outputs)):
        return False
    if getattr(model.cfg, "original_architecture", None) in _OUTPUT_BIAS_ONLY:
        blocks = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        return not any(_is_nonzero(getattr(block.ln1, "b", None)) for block in blocks)
    return True


def _bias(attn: Any, component: str, name: str) -> Any:
    linear = getattr(attn, component, None)  # of a TransformerBridge
    if linear is not None:
        return getattr(linear, "bias", None)
    try:
        return getattr(attn, name, None)
    except NotImplementedError:  # latent attention (MLA) has no such weights, and nothing to fold
        return None


def _is_nonzero(bias: Any) -> bool:
    return isinstance(bias, Tensor) and bool(bias.detach().any())


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
        n_heads=n_heads(attn, model.cfg),
        n_key_value_heads=n_key_value_heads(attn, model.cfg),
        scale=softmax_scale(attn),
        window=attention_window(attn),
        causal=is_causal(attn, model.cfg),
        cross=prefix.endswith("cross_attn"),
        values=values_of(attn, prefix, hook_names),
        gate=gate_of(attn),
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
