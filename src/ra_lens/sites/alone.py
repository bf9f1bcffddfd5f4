"""One thread at a time, and one run: hooks lie on the model, where every pass meets them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ra_lens.errors import UnsupportedModel


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
