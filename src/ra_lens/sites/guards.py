"""States of a model in which its maps would be wrong or could not be had, and ways around them."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
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
