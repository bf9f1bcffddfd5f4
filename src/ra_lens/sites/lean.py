"""What a run computes in fewer steps than the model does.

* `gelu_new` is written as eight operations in Hugging Face and TransformerLens, layer norm as eight
  in TransformerLens, and a backward pass keeps most of what comes between. torch has each in one.
* HookedTransformer copies its unembedding in every forward pass, for the rounding of bfloat16.

The functions are the same, so results differ by rounding. In half precision the model's own steps,
each of which rounds, are kept; so are those with a hook in between.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ra_lens.replaced import replaced
from ra_lens.sites.kept import forget_pattern

Function = Callable[[Tensor], Tensor]


@contextmanager
def lean(modules: list[nn.Module]) -> Generator[None, None, None]:
    """Run the modules that have a faster equal as that, while the context is open."""
    with ExitStack() as stack:
        for module in modules:
            found = _fused(module)
            if found is not None:
                name, fused = found
                either = partial(_in_full_precision, fused, getattr(module, name))
                stack.enter_context(replaced({module: either}, name))
        yield


@contextmanager
def no_attention_returned(
    modules: list[nn.Module], attentions: list[nn.Module]
) -> Generator[None, None, None]:
    """Let no pattern outlive its layer in a bridge, while the context is open.

    It asks the Hugging Face model to return them all at the end, and may keep each one in an
    attribute; see `ra_lens.sites.kept`.
    """
    configs = {id(c): c for m in modules if (c := vars(m).get("config")) is not None}.values()
    asked: list[Any] = [c for c in configs if getattr(c, "output_attentions", False) is True]

    def forget(attention: nn.Module, _args: Any, _output: Any) -> None:
        forget_pattern(attention)

    handles = [module.register_forward_hook(forget) for module in attentions]
    try:
        for config in asked:
            config.output_attentions = False
        yield
    finally:
        for handle in handles:
            handle.remove()
        for config in asked:
            config.output_attentions = True


def _fused(module: Any) -> tuple[str, Function] | None:
    """Attribute of a module that has a faster equal, and that equal."""
    if "forward" in vars(module):  # somebody's own, as accelerate puts it there
        return None
    kind = type(module)
    if kind.__name__ == "NewGELUActivation":  # transformers
        return "forward", partial(functional.gelu, approximate="tanh")
    if kind.__name__ == "NormalizationBridge":
        inside = module.original_component
        if type(inside) is not nn.LayerNorm or _is_norm_hooked(module):
            return None
        eps = getattr(module.config, "eps", 1e-5)
        return "_python_norm_forward", lambda x: functional.layer_norm(
            x, x.shape[-1:], module.weight, inside.bias, eps
        )
    if not kind.__module__.startswith("transformer_lens.components"):
        return None
    if getattr(vars(module).get("act_fn"), "__name__", "") == "gelu_new":
        return "act_fn", partial(functional.gelu, approximate="tanh")
    if kind.__name__ in ("LayerNorm", "LayerNormPre"):
        if _is_norm_hooked(module):
            return None
        weight, bias = getattr(module, "w", None), getattr(module, "b", None)
        return "forward", lambda x: functional.layer_norm(x, x.shape[-1:], weight, bias, module.eps)
    if kind.__name__ == "Unembed" and hasattr(module, "hook_in"):  # not in TransformerLens 2
        return "forward", lambda x: module.hook_out(
            functional.linear(module.hook_in(x), module.W_U.T, module.b_U)
        )
    return None


def _in_full_precision(fused: Function, slow: Function, x: Tensor) -> Tensor:
    return (fused if x.dtype in (torch.float32, torch.float64) else slow)(x)


def _is_norm_hooked(norm: Any) -> bool:
    points = (norm.hook_scale, norm.hook_normalized)
    return any(point._forward_hooks or point._backward_hooks for point in points)
