"""Whether a model's value biases have been moved into the output biases of its attention layers.

Rows of a pattern sum to 1, so a head adds its value bias b_V·W_O at every position whatever it
attends to. TransformerLens's weight processing (`fold_value_biases`, which `from_pretrained` and
`enable_compatibility_mode` do unless told otherwise) therefore adds b_V·W_O of all heads to b_O and
sets b_V to zero. The logits stay; z does not: setting z of a head to zero then leaves behind
what its value bias writes, which zeroing the head's rows of W_O in the original weights removes.

Neither class records that it was done, so the weights are read: all value biases are zero, and an
output bias is not. GPT-Neo looks like that as published (its values have no bias, its output has
one); there a value bias can only come from folding the shift of the layer norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

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
