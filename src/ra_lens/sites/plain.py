"""The Hugging Face model inside a TransformerBridge, run without the bridge.

A bridge puts its own components in the place of the Hugging Face modules, and keeps each module in
the component. With the modules put back for a moment, the model is Hugging Face's own: its logits
are what the bridge's should be. Weight processing (folding, centring) writes to some of the
modules, so after it there is nothing to compare with.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def weights_processed(model: Any) -> bool:
    """Whether a bridge has folded or centred its weights."""
    return bool(getattr(model, "_weights_processed", False))


@torch.no_grad()
def huggingface_logits(model: Any, **inputs: Tensor) -> Tensor | None:
    """Logits of the Hugging Face model inside a bridge; None where there is none to compare with.

    The bridge's hooks do not fire.
    """
    inside = getattr(model, "original_model", None)
    if not isinstance(inside, nn.Module) or weights_processed(model):
        return None
    with _modules_put_back(inside):
        return inside(**inputs).logits


@contextmanager
def _modules_put_back(inside: nn.Module) -> Generator[None, None, None]:
    replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def put_back(parent: nn.Module) -> None:
        for name, child in list(parent.named_children()):
            original = getattr(child, "original_component", None)
            if isinstance(original, nn.Module):
                replaced.append((parent, name, child))
                parent._modules[name] = original  # pyright: ignore[reportPrivateUsage]
                child = original
            put_back(child)

    try:
        put_back(inside)
        yield
    finally:
        for parent, name, child in reversed(replaced):
            parent._modules[name] = child  # pyright: ignore[reportPrivateUsage]
