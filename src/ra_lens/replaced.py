"""Another function in the place of a module's own, for a while."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced(
    functions: Mapping[nn.Module, Callable[..., Any]], name: str = "forward"
) -> Generator[None, None, None]:
    """Let modules have these functions under `name` while the context is open."""
    # On the instance, where others (accelerate, for one) may have put theirs; and not by setattr,
    # which a bridge hands on to the module that it wraps.
    before = {module: vars(module).get(name) for module in functions}
    try:
        for module, function in functions.items():
            vars(module)[name] = function
        yield
    finally:
        for module, own in before.items():
            if own is None:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = own
