"""Whose hooks are on a model, who runs it, and the tensors that its modules keep.

Hooks lie on the model, where every pass meets them, so one thread runs at a time (`alone`).

Some modules keep tensors in a plain attribute, where the forward pass left them: a bridge's
attention with joint queries, keys and values keeps its last pattern (`_pattern`), which nothing
reads. With a graph behind it the model cannot be copied, and the graph stays in memory.
"""

from __future__ import annotations

import inspect
import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ra_lens.errors import UnsupportedModel

# Who attaches hooks of its own to the modules of a model, which edit nothing that a user would.
_LIBRARIES = ("transformer_lens.", "transformers.", "accelerate.")


def is_hooked_by_a_user(module: nn.Module) -> bool:
    """Whether a module has a hook that no library attached by itself."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = (hook for name in names for hook in getattr(module, name).values())
    return any(not _home(hook).startswith(_LIBRARIES) for hook in hooks)


def _home(hook: Any) -> str:
    """Where a hook was written; of one that a hook point has wrapped, the one inside."""
    home = getattr(hook, "__module__", None) or ""
    if home == "transformer_lens.hook_points":
        hook = inspect.getclosurevars(hook).nonlocals.get("hook")
        home = getattr(hook, "__module__", None) or ""
    return home


@contextmanager
def without_hooks(points: Iterable[Any]) -> Generator[None, None, None]:
    """Leave out the TransformerLens hooks of these hook points while the context is open.

    What runs inside is none of theirs: they may fit one batch only, or count how often they ran.
    Permanent ones stay, some of which are a bridge's own.
    """
    before: dict[Any, Any] = {}
    try:
        for point in points:
            theirs = {handle.hook.id for handle in point.fwd_hooks if not handle.is_permanent}
            if theirs and point not in before:
                before[point] = point._forward_hooks
                others = [(i, hook) for i, hook in before[point].items() if i not in theirs]
                vars(point)["_forward_hooks"] = OrderedDict(others)
        yield
    finally:
        for point, hooks in before.items():
            vars(point)["_forward_hooks"] = hooks


@dataclass(eq=False)
class _Use:
    thread: int
    is_run: bool


_lock = threading.Lock()
_uses: weakref.WeakKeyDictionary[nn.Module, list[_Use]] = weakref.WeakKeyDictionary()


@contextmanager
def alone(model: nn.Module, name: str, *, run: bool = False) -> Generator[None, None, None]:
    """Use a model while no other thread does.

    Args:
        model: What is used.
        name: What it is called, for the message.
        run: Whether this is a run, within which the same thread may not start another one.

    Raises:
        UnsupportedModel: it is being used; the message says by whom.
    """
    own = _Use(threading.get_ident(), run)
    with _lock:
        uses = _uses.setdefault(model, [])
        if any(use.thread != own.thread for use in uses):
            raise UnsupportedModel(
                f"found {name} at work in another thread: one run at a time per model, as the "
                "hooks of one would act in the passes of the other. Run one after the other, or "
                "load the model once for each thread."
            )
        if run and any(use.is_run for use in uses):
            raise UnsupportedModel(
                f"found run_with_ra called with {name} inside a run of the same model, by a "
                "metric or a hook: one run at a time per model. Call it before or after, or load "
                "the model a second time."
            )
        uses.append(own)
    try:
        yield
    finally:
        with _lock:
            uses.remove(own)


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
