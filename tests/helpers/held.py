"""Counts the tensors that graphs of autograd keep, and those that are alive at all."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


class Held:
    """A tensor that a graph keeps, counted while it is kept."""

    alive = most = 0

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        Held.alive += 1
        Held.most = max(Held.most, Held.alive)

    def __del__(self) -> None:
        Held.alive -= 1


def forget_older() -> None:
    """Let `tensors_of` look through what is made from now on only, which is much less."""
    gc.collect()
    gc.freeze()


def tensors_of(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """The tensors of a shape that are alive, garbage included."""
    # By type(), as isinstance asks objects of other libraries, some of which then warn.
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return [t for t in tensors if tuple(t.shape) == shape]


def counted(which: Callable[[torch.Tensor], bool]) -> Any:
    """While it is open, tensors of this sort that graphs keep are `Held`; counting starts anew."""
    Held.alive = Held.most = 0

    def pack(x: torch.Tensor) -> Any:
        # Detached: a tensor that its own node keeps would be held for ever.
        return Held(x.detach()) if which(x) else x

    def unpack(kept: Any) -> torch.Tensor:
        return kept.x if isinstance(kept, Held) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
