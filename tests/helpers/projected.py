"""What Hugging Face's own model computes in each attention layer, and the gradients there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from tiny_models import D_HEAD, D_MODEL, N_HEADS, N_KV

_PLACES = {
    "gpt2": ("transformer.h.{}.attn", "transformer.h.{}.ln_1", "c_proj", "transformer.ln_f"),
    "gptj": ("transformer.h.{}.attn", "transformer.h.{}.ln_1", "out_proj", "transformer.ln_f"),
    "llama": (
        "model.layers.{}.self_attn",
        "model.layers.{}.input_layernorm",
        "o_proj",
        "model.norm",
    ),
    "opt": (
        "model.decoder.layers.{}.self_attn",
        "model.decoder.layers.{}.self_attn_layer_norm",
        "out_proj",
        "model.decoder.final_layer_norm",
    ),
}


@dataclass
class Layer:
    """Weights as in TransformerLens's notation, and tensors of one run, `[pos, …]`, by name.

    `x` is what the norm in front gave, `r` what it took; `q`, `k`, `v` are what the projections
    gave, `z` what the output projection took and `out` what it gave; `….grad` are gradients.
    """

    weights: dict[str, Tensor]
    gain: Tensor
    centred: bool
    seen: dict[str, Tensor] = field(default_factory=dict)

    def back(self, directions: Tensor) -> Tensor:
        """From behind the norm to in front of it, without what the size does."""
        scaled = directions * self.gain
        return scaled - scaled.mean(-1, keepdim=True) if self.centred else scaled


def load_projected(arch: str, folder: Any) -> Any:
    """Hugging Face's model of a folder in float64."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), attn_implementation="eager", dtype=torch.float64
    ).eval()


def final(arch: str, model: Any) -> tuple[Tensor, bool, Tensor]:
    """Gain of the final norm, whether it centres, and W_U `[d_model, d_vocab]`."""
    norm = model.get_submodule(_PLACES[arch][3])
    return norm.weight.detach(), arch != "llama", model.lm_head.weight.detach().T


def layer_of(arch: str, model: Any, index: int, ids: Tensor, target: int) -> Layer:
    """Run one prompt with −log p of a token that follows as its loss."""
    attention, norm, output, _ = _PLACES[arch]
    attn = model.get_submodule(attention.format(index))
    before, after = model.get_submodule(norm.format(index)), getattr(attn, output)
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        value.retain_grad()
        seen[name] = value

    def at_norm(_module: Any, args: Any, value: Tensor) -> None:
        keep("r", args[0])
        keep("x", value)

    def at_output(_module: Any, args: Any, value: Tensor) -> None:
        keep("z", args[0])
        keep("out", value)

    hooks = [before.register_forward_hook(at_norm), after.register_forward_hook(at_output)]
    if arch == "gpt2":
        joint = attn.c_attn.weight.detach().T
        q_w, k_w, v_w = joint.split(D_MODEL)
        hooks.append(attn.c_attn.register_forward_hook(lambda _m, _a, out: keep("qkv", out)))
        o_w = after.weight.detach()
    else:
        q_w, k_w, v_w = (getattr(attn, f"{n}_proj").weight.detach() for n in "qkv")
        o_w = after.weight.detach().T
        for name in "qkv":
            hooks.append(
                getattr(attn, f"{name}_proj").register_forward_hook(
                    lambda _m, _a, out, name=name: keep(name, out)
                )
            )
    loss = -model(ids[None]).logits[0, -1].log_softmax(-1)[target]
    loss.backward()
    for hook in hooks:
        hook.remove()
    found: dict[str, Tensor] = {}
    for name, value in seen.items():
        grad = value.grad
        assert grad is not None
        parts = (
            zip("qkv", value.split(D_MODEL, -1), grad.split(D_MODEL, -1), strict=True)
            if name == "qkv"
            else [(name, value, grad)]
        )
        for part, one, its_grad in parts:
            rows = ids.shape[0]
            found[part] = one.detach().reshape(rows, -1)
            found[f"{part}.grad"] = its_grad.reshape(rows, -1)
    kv = N_KV if arch == "llama" else N_HEADS
    weights = {
        "W_Q": q_w.reshape(N_HEADS, D_HEAD, D_MODEL).transpose(1, 2),
        "W_K": k_w.reshape(kv, D_HEAD, D_MODEL).transpose(1, 2),
        "W_V": v_w.reshape(kv, D_HEAD, D_MODEL).transpose(1, 2),
        "W_O": o_w.reshape(N_HEADS, D_HEAD, D_MODEL),
    }
    for name in ("q", "k", "v", "z", "q.grad", "k.grad", "v.grad", "z.grad"):
        found[name] = found[name].unflatten(-1, (-1, D_HEAD))
    model.zero_grad()
    return Layer(weights, before.weight.detach(), arch != "llama", found)
