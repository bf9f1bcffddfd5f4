"""What tests of patches share: prompts, hooks, and logits of a model with hooks on it."""

from __future__ import annotations

from typing import Any

import torch

from tiny_models import random_ids

POS, TARGET = 6, 8
IDS = random_ids(3, POS)


def pattern_of(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_pattern"


def adding(value: torch.Tensor) -> Any:
    def hook(pattern, hook):
        return pattern + value

    return hook


def keeping(name: str, seen: dict[Any, Any], key: Any = None) -> tuple[str, Any]:
    """A hook that keeps a copy of what it sees under a key, its name if none is given."""

    def keep(value, hook):
        seen[name if key is None else key] = value.detach().clone()

    return name, keep


def logits_with(model: Any, fwd_hooks: Any, ids: torch.Tensor = IDS, **inputs: Any) -> torch.Tensor:
    with torch.no_grad(), model.hooks(fwd_hooks=fwd_hooks):
        return model(ids, **inputs)
