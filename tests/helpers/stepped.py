"""The oracle of steps: Hugging Face's own model with its weights really changed, by autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from oracle import Oracle, Wide
from tiny_models import D_HEAD, D_MODEL, N_HEADS, N_KV

Head = tuple[int, int]
OUTPUTS = ("c_proj", "o_proj", "out_proj")


class Stepped:
    """A model of `tiny_models`, in float64, before and after one step of gradient descent."""

    def __init__(self, folder: Path) -> None:
        auto: Any = transformers.AutoModelForCausalLM
        found = auto.from_pretrained(str(folder), attn_implementation="eager").eval()
        self._take(Oracle(found))

    @classmethod
    def of(cls, oracle: Oracle) -> Stepped:
        """The same of a model that is there, such as one that was stepped."""
        new = cls.__new__(cls)
        new._take(oracle)
        return new

    def _take(self, oracle: Oracle) -> None:
        self.oracle, self.model = oracle, oracle.model
        self.n_kv = getattr(self.model.config, "num_key_value_heads", N_HEADS) or N_HEADS

    def after(
        self,
        loss: Callable[[Any], Tensor],
        heads: Iterable[Head],
        weights: Iterable[str],
        eta: float,
    ) -> tuple[Oracle, float]:
        """The model after the step, and the norm of the gradient of the slices stepped.

        `loss` is that of a model; query heads that share keys share a step.
        """
        model = copy.deepcopy(self.model)
        slices = self.slices(model, set(heads), set(weights))
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(Oracle(model)), [one for one, _ in slices])
        square = 0.0
        with torch.no_grad():
            for (parameter, mask), gradient in zip(slices, gradients, strict=True):
                parameter -= eta * gradient * mask
                square += float((gradient * mask).square().sum())
        return Oracle(model), math.sqrt(square)

    def slices(
        self, model: Any, heads: set[Head], weights: set[str]
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Weights, with 1 where they are those of these heads."""
        found: list[tuple[nn.Parameter, Tensor]] = []
        blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m))
        for layer, block in enumerate(blocks):
            own = {head for at, head in heads if at == layer}
            if not own:
                continue
            attention = block.attn if hasattr(block, "attn") else block.self_attn
            groups = {head * self.n_kv // N_HEADS for head in own}
            modules = dict(attention.named_children())
            output = next(modules[name] for name in OUTPUTS if name in modules)
            if "c_attn" in modules:  # GPT-2: input × output, q, k and v beside each other
                joint, mask = modules["c_attn"].weight, torch.zeros(D_MODEL, 3 * D_MODEL).double()
                for i, name in enumerate(("W_Q", "W_K", "W_V")):
                    for head in own if name in weights else ():
                        start = i * D_MODEL + head * D_HEAD
                        mask[:, start : start + D_HEAD] = 1
                found.append((joint, mask))
                if "W_O" in weights:
                    found.append((output.weight, _marked(output.weight, own)))
                continue
            for name, module in (("W_Q", "q_proj"), ("W_K", "k_proj"), ("W_V", "v_proj")):
                if name in weights:
                    weight = modules[module].weight
                    found.append((weight, _marked(weight, own if name == "W_Q" else groups)))
            if "W_O" in weights:
                found.append((output.weight, _marked(output.weight.T, own).T))
        return found


def _marked(weight: Tensor, heads: set[int]) -> Tensor:
    """1 in the rows of these heads."""
    mask = torch.zeros(weight.shape, dtype=weight.dtype)
    for head in heads:
        mask[head * D_HEAD : (head + 1) * D_HEAD] = 1
    return mask


def mean_nll(rows: Iterable[Tensor], targets: Iterable[int]) -> Callable[[Any], Tensor]:
    """The mean of −log p of a token after each row, the rows read one by one."""
    pairs = list(zip(rows, targets, strict=True))

    def loss(oracle: Oracle) -> Tensor:
        with Wide():
            every = [oracle.model(row.unsqueeze(0), use_cache=False).logits for row, _ in pairs]
        losses = [-one[0, -1].log_softmax(-1)[t] for one, (_, t) in zip(every, pairs, strict=True)]
        return torch.stack(losses).mean()

    return loss


assert N_KV < N_HEADS  # else shared keys would be no case of their own
