"""What modules of a model take and give in one short run, to check what is thought of them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ra_lens.model.lens import Lens

_LENGTH = 5


@dataclass(frozen=True, eq=False)
class Seen:
    """What a module took and gave, in float32 at least; the first tensor of each.

    Attributes:
        taken: Its first tensor.
        named: The tensors that it was given by name.
        gave: Its output, or the first part of it.
        times: How often it ran; of several times the last is here.
    """

    taken: Tensor | None
    named: dict[str, Tensor]
    gave: Tensor | None
    times: int


def short_run(lens: Lens, modules: Iterable[nn.Module]) -> tuple[dict[nn.Module, Seen], Tensor]:
    """Run a few tokens without the user's hooks; give what modules saw, and the logits.

    Modules that did not run are left out.
    """
    seen: dict[nn.Module, Seen] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = next((arg for arg in args if isinstance(arg, Tensor)), None)
        named = {name: _wide(v) for name, v in kwargs.items() if isinstance(v, Tensor)}
        first = out[0] if isinstance(out, tuple | list) and out else out
        if given is None:
            given = kwargs.get("hidden_states")
        times = seen[module].times + 1 if module in seen else 1
        seen[module] = Seen(_wide_or_none(given), named, _wide_or_none(first), times)

    # Spread over the vocabulary, so that no two are the same.
    ids = torch.linspace(0.15 * lens.d_vocab, 0.95 * lens.d_vocab - 1, _LENGTH).long()[None]
    tokens = ids.to(lens.device)
    with ExitStack() as stack:
        stack.enter_context(lens.without_hooks())
        stack.enter_context(lens.tensors_put_back())
        stack.enter_context(torch.no_grad())
        for module in dict.fromkeys(modules):
            handle = module.register_forward_hook(look, with_kwargs=True)
            stack.callback(handle.remove)
        logits = lens.logits_at(tokens, torch.ones_like(tokens, dtype=torch.bool))
    return seen, _wide(logits)


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors are the same up to rounding, in half precision too, and not all 0."""
    return bool(wanted.any()) and fits(found, wanted)


def fits(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors are the same up to rounding, in half precision too."""
    if found.shape != wanted.shape:
        return False
    found = found.to(wanted.device)  # of a model over several devices
    return float((found - wanted).norm()) <= 0.03 * float(wanted.norm()) + 1e-6


def _wide(value: Tensor) -> Tensor:
    value = value.detach()
    if not value.is_floating_point():
        return value
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _wide_or_none(value: Any) -> Tensor | None:
    return _wide(value) if isinstance(value, Tensor) else None
