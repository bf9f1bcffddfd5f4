"""Tensors that a module keeps in a plain attribute, where the forward pass left them.

A bridge's attention with joint queries, keys and values keeps its last pattern (`_pattern`), which
nothing reads. With a graph behind it the model cannot be copied, and the graph stays in memory.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def tensors_put_back(
    modules: Iterable[nn.Module], attentions: Collection[nn.Module]
) -> Generator[None, None, None]:
    """Let modules keep, when the context closes, the tensors that they kept before.

    What has no graph may belong to a cache that its module counts on, of positions for example. It
    is put back in the attention layers themselves only.
    """
    # Not by getattr and setattr, which a bridge hands on to the module that it wraps.
    before = [(module, dict(vars(module))) for module in modules]
    try:
        yield
    finally:
        for module, old in before:
            new = vars(module)
            if not all(map(operator.is_, old.values(), new.values())) or len(old) != len(new):
                _put_back(old, new, every=module in attentions)


def _put_back(old: dict[str, object], new: dict[str, object], *, every: bool) -> None:
    for name, value in list(new.items()):
        before = old.get(name)
        kept = {type(x) for x in (value, before) if x is not None}
        if value is before or not all(issubclass(kind, Tensor) for kind in kept):
            continue
        if every or (isinstance(value, Tensor) and value.requires_grad):
            if name in old:
                new[name] = before
            else:
                del new[name]


def forget_pattern(attention: nn.Module) -> None:
    """Let a bridge's attention not keep its last pattern."""
    if "_pattern" in vars(attention):
        vars(attention)["_pattern"] = None
