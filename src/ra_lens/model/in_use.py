"""What an attention layer that is running is using, where no hook point shows it in time.

A bridge that leaves the attention to Hugging Face shows the pattern when the layer is done. While
hook_z fires, the layer is still running: the function that computed the pattern, or called what
did, is on the call stack, and the pattern is one of its local variables. They are looked through,
from hook_z up to the bridge's attention module. Nothing is put on the model for that, so nothing
can be left on it.

What is found are candidates, known by their shape alone. Whoever uses one must check that it gives
z, and that it is what hook_pattern shows afterwards.

What a projection has read is found in the same way, while the hook of what it gives is running, by
the name of its argument: as it was after every hook that changed it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


def patterns_in_use(n_examples: int, n_heads: int, n_queries: int) -> list[Tensor]:
    """Tensors `[example, head, query, any]` of the attention layer whose hook is running."""
    found: dict[int, Tensor] = {}
    for frame in _frames_of_layer(sys._getframe(1)):  # pyright: ignore[reportPrivateUsage]
        for value in _tensors(frame.f_locals.values()):
            if value.ndim == 4 and value.shape[:3] == (n_examples, n_heads, n_queries):
                found.setdefault(id(value), value)
    return [value for value in found.values() if value.is_floating_point()]


def argument_in_use(owner: nn.Module, name: str) -> Tensor | None:
    """The argument `name` of the method of `owner` that is running; None where there is none."""
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if frame.f_locals.get("self") is owner and name in frame.f_locals:
            value = frame.f_locals[name]
            return value if isinstance(value, torch.Tensor) else None
        frame = frame.f_back
    return None


def _frames_of_layer(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None and not _is_attention_bridge(frame.f_locals.get("self")):
        yield frame
        frame = frame.f_back


def _is_attention_bridge(owner: Any) -> bool:
    return isinstance(owner, nn.Module) and "hook_pattern" in owner._modules  # pyright: ignore[reportPrivateUsage]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) in (tuple, list):
            yield from (one for one in value if isinstance(one, torch.Tensor))
