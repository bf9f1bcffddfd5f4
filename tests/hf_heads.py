"""Heads changed in a Hugging Face model: rows of W_O set to zero, or what W_O reads replaced.

Nothing here comes from ra_lens or TransformerLens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn


class HFHeads:
    """A model whose heads can be changed one at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), attn_implementation="eager", dtype=dtype
        ).eval()
        cfg = self.model.config
        self.n_layers = cfg.num_hidden_layers
        same = [cfg.num_attention_heads] * self.n_layers
        self.n_heads = getattr(cfg, "num_attention_heads_per_layer", None) or same
        self._blocks: Any = next(
            m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m)
        )

    def attention(self, layer: int) -> Any:
        block = self._blocks[layer]
        return block.attn if hasattr(block, "attn") else block.self_attn

    def output(self, layer: int) -> Any:
        """The module that holds W_O."""
        names = ("c_proj", "o_proj", "out_proj")
        return next(m for n, m in self.attention(layer).named_children() if n in names)

    def value_bias(self, layer: int) -> Tensor:
        """b_V, heads one after the other."""
        attention = self.attention(layer)
        if hasattr(attention, "c_attn"):  # GPT-2: queries, keys and values in one
            return attention.c_attn.bias.detach().chunk(3)[2]
        return attention.v_proj.bias.detach()

    def rows(self, layer: int, head: int) -> tuple[Tensor, slice]:
        """W_O as [in, out] (a view of the weight), and the rows of a head in it."""
        module = self.output(layer)
        # Conv1D is input × output, nn.Linear output × input.
        weight = module.weight.data.T if isinstance(module, nn.Linear) else module.weight.data
        size = weight.shape[0] // self.n_heads[layer]
        return weight, slice(head * size, (head + 1) * size)

    @contextmanager
    def zeroed(self, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
        """The rows of W_O of some (layer, head) are zero; the output bias stays."""
        before = [(*self.rows(layer, head),) for layer, head in heads]
        kept = [weight[rows].clone() for weight, rows in before]
        try:
            for weight, rows in before:
                weight[rows] = 0.0
            yield
        finally:
            for (weight, rows), value in zip(before, kept, strict=True):
                weight[rows] = value

    @contextmanager
    def replaced(self, layer: int, head: int, position: int, value: Tensor) -> Iterator[None]:
        """What W_O reads from one head at one position is `value`."""
        _, rows = self.rows(layer, head)

        def put(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone()
            z[:, position, rows] = value.to(z.dtype)
            return (z,)

        handle = self.output(layer).register_forward_pre_hook(put)
        try:
            yield
        finally:
            handle.remove()

    def z(self, ids: Tensor) -> list[Tensor]:
        """What W_O reads in each layer, [batch, pos, heads · d_head]."""
        seen: list[Tensor] = []
        handles = [
            self.output(layer).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
            for layer in range(self.n_layers)
        ]
        try:
            self.logits(ids)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(ids).logits

    def probability(self, ids: list[int], token: int) -> float:
        """p(token) after the last of `ids`."""
        return float(self.logits(torch.tensor([ids]))[0, -1].double().softmax(-1)[token])
