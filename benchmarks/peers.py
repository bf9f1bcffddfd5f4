"""run_with_ra against the authors' way and against plain Hugging Face, on the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.models import HUGGING_FACE, gpt2_small, random_tokens
from benchmarks.timing import interleaved, ratio_spread
from ra_lens import run_with_ra
from ra_lens.model import available_kinds

HF_FORWARD = "Hugging Face forward pass, no_grad"
AUTHORS = "the authors' way, one by one"
RETAIN = "Hugging Face, retain_grad on the attentions"
TARGET = 5

Maps = list[Tensor]  # per layer, [batch, head, query, key]


def authors_way(model: Any, tokens: Tensor) -> Maps:
    """R per layer and head from the gradient at the input of W_O and the values, one by one.

    Written from the description of the experiments: a full backward pass in which only attention
    weights require a gradient, hooks on the input of W_O, and then, head by head,
    Ẽ = e Vᵀ and R = A ⊙ (Ẽ − rowsum(A ⊙ Ẽ)) / √d_head.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".attn." in name)
    blocks = model.transformer.h
    values: dict[int, Tensor] = {}
    gradients: dict[int, Tensor] = {}
    handles: list[Any] = []
    for i, block in enumerate(blocks):

        def keep_values(_m: Any, _a: Any, out: Tensor, i: int = i) -> None:
            values[i] = out.detach().chunk(3, dim=-1)[2]

        def keep_gradient(_m: Any, grads: Any, _o: Any, i: int = i) -> None:
            gradients[i] = grads[0].detach()

        handles.append(block.attn.c_attn.register_forward_hook(keep_values))
        handles.append(block.attn.c_proj.register_full_backward_hook(keep_gradient))
    found: list[Maps] = []
    try:
        for row in tokens:
            out = model(row[None], output_attentions=True)
            (-out.logits[0, -1].log_softmax(-1)[TARGET]).backward()
            n_head = model.config.n_head
            d_head = model.config.n_embd // n_head
            found.append([])
            for i in range(len(blocks)):
                pattern = out.attentions[i][0].detach()
                of_heads: Maps = []
                for head in range(n_head):
                    part = slice(head * d_head, (head + 1) * d_head)
                    e = gradients[i][0, :, part] @ values[i][0, :, part].T
                    product = pattern[head] * e
                    mean = product.sum(-1, keepdim=True)
                    of_heads.append((product - pattern[head] * mean) / d_head**0.5)
                found[-1].append(torch.stack(of_heads))
            model.zero_grad()
    finally:
        for handle in handles:
            handle.remove()
        model.requires_grad_(True)
    return [torch.stack([row[i] for row in found]) for i in range(len(blocks))]


def retain_grad(model: Any, tokens: Tensor) -> Maps:
    """R from `output_attentions` and `retain_grad`, one batch, a full backward pass."""
    out = model(tokens, output_attentions=True)
    for pattern in out.attentions:
        pattern.retain_grad()
    (-out.logits[:, -1].log_softmax(-1)[:, TARGET].sum()).backward()
    scale = (model.config.n_embd // model.config.n_head) ** -0.5
    maps: Maps = []
    for pattern in out.attentions:
        product = pattern.detach() * pattern.grad
        maps.append(scale * (product - pattern.detach() * product.sum(-1, keepdim=True)))
    model.zero_grad()
    return maps


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Time all of them on 25 × 64, 8 × 64 and 1 × 512 tokens."""
    n_layer = 2 if quick else 12
    shapes = ((2, 8),) if quick else ((25, 64), (8, 64), (1, 512))
    inside = gpt2_small(HUGGING_FACE, n_layer=n_layer)
    models = {kind: gpt2_small(kind, n_layer=n_layer) for kind in available_kinds()}
    rows: list[list[Any]] = []
    for shape in shapes:
        tokens = random_tokens(*shape)

        def forward(model: Any, tokens: Tensor = tokens) -> None:
            with torch.no_grad():
                model(tokens)

        named: dict[str, Any] = {
            HF_FORWARD: lambda t=tokens, f=forward: f(inside, t),
            AUTHORS: lambda t=tokens: authors_way(inside, t),
            RETAIN: lambda t=tokens: retain_grad(inside, t),
        }
        for kind, model in models.items():
            named[f"{kind} forward pass, no_grad"] = lambda m=model, t=tokens, f=forward: f(m, t)
            named[f"run_with_ra, {kind}"] = lambda m=model, t=tokens: run_with_ra(
                m, t, target=TARGET
            )
        times = interleaved(named, rounds=rounds)
        base, authors = times[HF_FORWARD], times[AUTHORS].median
        rows += [
            [
                f"{shape[0]} × {shape[1]}",
                name,
                t.median,
                t.median / base.median,
                ratio_spread(t.seconds, base.seconds),
                authors / t.median,
            ]
            for name, t in times.items()
        ]
    return {
        "title": "Against the authors' way and Hugging Face alone",
        "how": (
            "The same random weights of GPT-2 small's shape in Hugging Face's eager GPT-2 and in "
            "TransformerLens. The authors' way is written anew from the description of their "
            "experiments: one example at a time, a full backward pass, then every layer and head "
            "in Python. retain_grad runs the batch at once and differentiates every parameter. All "
            "give every map. The spread is that of the ratio within a round. "
            f"Medians of {rounds} rounds, interleaved."
        ),
        "columns": [
            "batch × tokens",
            "route",
            "s",
            "over Hugging Face's forward pass",
            "spread",
            "authors' way over it",
        ],
        "rows": rows,
    }
