"""What a run refuses, and what it puts back.

States of a model in which its maps would be wrong, or could not be had, and ways around them. Hooks
lie on the model, where every pass meets them, so one thread runs at a time (`alone`).

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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
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


def refuse_dropout(model: nn.Module) -> None:
    """Raise if a forward pass would draw dropout masks."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        rate = module.p if isinstance(module, nn.Dropout) else 0.0
        for attribute in ("attention_dropout", "attn_dropout", "dropout", "hidden_dropout"):
            value = getattr(module, attribute, 0.0)
            rate = max(rate, value if isinstance(value, float) else 0.0)
        if rate > 0:
            raise UnsupportedModel(
                f"the model is in train mode and {name or type(module).__name__} drops out "
                f"with probability {rate:g}: dropout acts before hook_pattern, so the map "
                "would not be the gradient of this loss. Call model.eval() first."
            )


def refuse_checkpointing(modules: Iterable[nn.Module]) -> None:
    """Raise if blocks would run without a graph, and again in the backward pass."""
    for module in modules:
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise UnsupportedModel(
                "the model is in train mode with gradient checkpointing, which runs its blocks "
                "without gradients, and again in the backward pass. Call model.eval() first, or "
                "gradient_checkpointing_disable() of the Hugging Face model "
                "(model.original_model). run_with_ra(recompute=True) saves as much memory."
            )


def refuse_meta(device: torch.device, name: str) -> None:
    """Raise where a forward pass would compute nothing."""
    if device.type == "meta":
        raise UnsupportedModel(
            f"{name} is on the meta device, where tensors have a shape and no values. Load it with "
            "its weights, on a CPU or GPU: ra_lens.load_model(name, device='cpu')."
        )


def refuse_inference_mode(model: nn.Module) -> None:
    """Raise if tensors made now could never take part in a backward pass."""
    if torch.is_inference_mode_enabled():
        raise UnsupportedModel(
            "found torch.inference_mode(), under which nothing can be differentiated. Use "
            "torch.no_grad() instead (it is allowed around run_with_ra), or leave the context."
        )
    if any(p.is_inference() for p in model.parameters()):
        raise UnsupportedModel(
            "the model's parameters were created under torch.inference_mode(), so nothing can "
            "be differentiated through them. Load the model outside of that context."
        )


@contextmanager
def fully_masked_rows_apart(score_points: Iterable[nn.Module]) -> Generator[None, None, None]:
    """Give no gradient to rows of scores that are −∞ throughout, while the context is open.

    At padding on the left a query sees no key. TransformerBridge 3.9 in compatibility mode sets the
    NaN that the softmax makes of such a row to 0, which says that its gradient is 0; the softmax
    still multiplies by the NaN, and hands it on to every key.
    """

    def at_scores(_module: nn.Module, args: tuple[Any, ...]) -> None:
        scores: Tensor = args[0]
        if scores.requires_grad:
            dead = scores.detach().isneginf().all(dim=-1, keepdim=True)
            if bool(dead.any()):
                scores.register_hook(lambda grad: grad.masked_fill(dead, 0.0))

    with ExitStack() as stack:
        for point in score_points:
            stack.callback(point.register_forward_pre_hook(at_scores).remove)
        yield


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
