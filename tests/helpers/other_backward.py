"""The oracle of other backward passes: Hugging Face models whose modules are written anew.

Nothing here comes from ra_lens. Norms, activations and gated MLPs compute what they did, with
`detach` where RelP and GIM hold something constant; queries, keys and values get a share of their
gradient where their projections give them; and the softmax is an autograd function of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from oracle import Loss, Oracle


def share(x: Tensor, part: float) -> Tensor:
    """The same value, with a part of the gradient."""
    return part * x + ((1 - part) * x).detach()


class HeldNorm(nn.Module):
    """A norm that divides by a constant."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.centred = "LayerNorm" in type(norm).__name__
        self.eps = next(getattr(norm, n) for n in ("eps", "variance_epsilon") if hasattr(norm, n))
        plus = 1.0 if "Gemma" in type(norm).__name__ else 0.0
        self.gain = norm.weight.detach().double() + plus
        self.bias = norm.bias.detach().double() if self.centred else 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(dim=-1, keepdim=True)
        size = (x.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()
        return x / size.detach() * self.gain + self.bias


class HeldRatio(nn.Module):
    """An activation as x times a constant."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.activation(x) / x).detach()


class SharedGate(nn.Module):
    """A gated MLP whose product gives each factor half."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        return mlp.down_proj(share(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), 0.5))


class SoftBackward(torch.autograd.Function):
    """Softmax; going back, that of half the scores, without the half."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.save_for_backward(scores)
        return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (scores,), (grad,) = ctx.saved_tensors, grads
        half = scores / 2
        soft = torch.exp(half - torch.logsumexp(half, -1, keepdim=True))
        return soft * grad - soft * (soft * grad).sum(-1, keepdim=True)


class Softened(TorchFunctionMode):
    """Every softmax is `SoftBackward` while this is open."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            return SoftBackward.apply(args[0] if args else kwargs["input"])
        return func(*args, **(kwargs or {}))


def _shared_projections(module: Any) -> None:
    if hasattr(module, "c_attn"):  # GPT-2: queries, keys and values in one

        def joint(_module: Any, _args: Any, out: Tensor) -> Tensor:
            q, k, v = out.chunk(3, dim=-1)
            return torch.cat([share(q, 0.25), share(k, 0.25), share(v, 0.5)], dim=-1)

        module.c_attn.register_forward_hook(joint)
    for name, part in (("q_proj", 0.25), ("k_proj", 0.25), ("v_proj", 0.5)):
        if hasattr(module, name):
            hook = lambda _module, _args, out, part=part: share(out, part)  # noqa: E731
            getattr(module, name).register_forward_hook(hook)


def _output(module: Any) -> Any:
    names = ("c_proj", "o_proj", "out_proj")
    return next(getattr(module, name) for name in names if hasattr(module, name))


class OtherBackward:
    """A Hugging Face model that hands back RelP's or GIM's gradients."""

    def __init__(self, oracle: Oracle, backward: Literal["relp", "gim"]) -> None:
        self.backward = backward
        self.oracle = Oracle(copy.deepcopy(oracle.model))
        model = self.oracle.model
        self.attentions = [
            m for m in model.modules() if type(m).__name__.endswith("Attention") and has_heads(m)
        ]
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if "Norm" in type(child).__name__:
                    setattr(module, name, HeldNorm(child))
                elif backward == "relp" and name in ("act", "act_fn", "activation_fn"):
                    setattr(module, name, HeldRatio(child))
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if hasattr(child, "gate_proj"):
                    setattr(module, name, SharedGate(child))
        if backward == "gim":
            for attention in self.attentions:
                _shared_projections(attention)

    def gradients(
        self, ids: Tensor, loss: Loss
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Sequence[Tensor], Tensor]:
        """dL/dS, A and dL/dA of each layer, dL/dz of each, and the logits."""
        sites = range(len(self.attentions))
        with Softened() if self.backward == "gim" else nullcontext():
            maps = self.oracle.all_gradients(ids, loss, sites)
            width = self.oracle.model.config.hidden_size
            outputs = [_output(attention) for attention in self.attentions]
            width = outputs[0].weight.numel() // width
            probes = torch.zeros(len(sites), *ids.shape, width, dtype=torch.float64)
            probes.requires_grad_(True)
            handles = [
                output.register_forward_pre_hook(lambda _m, args, i=i: (args[0] + probes[i],))
                for i, output in enumerate(outputs)
            ]
            at_z = self.oracle.gradient(probes, ids, loss, lambda _site, pattern: pattern)
            for handle in handles:
                handle.remove()
            return [maps[i] for i in sites], at_z, self.oracle.logits(ids)


def has_heads(module: Any) -> bool:
    """Whether it is the module with the projections."""
    return any(hasattr(module, name) for name in ("c_attn", "q_proj"))
