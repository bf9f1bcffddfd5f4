"""Activation checkpointing: blocks run again in the backward pass, and their graph is not kept.

A block's first forward pass is made without a graph and only what goes in is kept; when its
gradient arrives the block runs again, with a graph, gives its maps and is forgotten. So the
attention tensors of one layer are alive at a time. The result is the same, as the same operations
run on the same tensors; the cost is one more forward pass. The last block is not run twice: its
gradient comes first.

Hugging Face's cache of keys and values, to which a second run would add, is kept from the blocks.
Hooks inside a block run twice as well. What they return must not depend on how often they ran.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ra_lens.replaced import replaced

# Inputs of a block that have gradients, to its outputs that may have.
Run = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
_TENSOR = object()


@contextmanager
def recomputed(blocks: Sequence[nn.Module], token: Tensor) -> Generator[None, None, None]:
    """Run `blocks` with checkpoints, in the context; the last one as it is.

    Args:
        blocks: Modules, in the order in which they run.
        token: The root of the graph, which every block is tied to.
    """
    with replaced({block: _checkpointed(block.forward, token) for block in blocks[:-1]}):
        yield


def _checkpointed(forward: Callable[..., Any], token: Tensor) -> Callable[..., Any]:
    """A block's forward pass with one autograd node in place of its graph."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        given, form = pytree.tree_flatten((args, kwargs), is_leaf=_is_cache)
        given = [None if _is_cache(leaf) else leaf for leaf in given]
        moving = [i for i, x in enumerate(given) if isinstance(x, Tensor) and x.requires_grad]
        made: list[Any] = []  # the output's form; its leaves, _TENSOR where it is a floating tensor

        def again(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            leaves = list(given)
            for i, tensor in zip(moving, tensors, strict=True):
                leaves[i] = tensor
            positional, keyword = pytree.tree_unflatten(leaves, form)
            found, found_form = pytree.tree_flatten(forward(*positional, **keyword))
            if not made:
                made.extend((found_form, [_TENSOR if _is_floating(x) else x for x in found]))
            return tuple(filter(_is_floating, found))

        outputs: Any = _Block.apply(again, token, *(given[i] for i in moving))
        of_form, leaves = made
        remaining = iter(outputs)
        whole = [next(remaining) if leaf is _TENSOR else leaf for leaf in leaves]
        return pytree.tree_unflatten(whole, of_form)

    return run


def _is_cache(leaf: object) -> bool:
    return any(kind.__name__ == "Cache" for kind in type(leaf).__mro__)


def _is_floating(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class _Block(torch.autograd.Function):
    """A block as one node: keeps its inputs, and runs again for their gradients."""

    @staticmethod
    def forward(ctx: Any, again: Run, token: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.again, ctx.token = again, token
        # What nothing uses (a pattern that is only shown) has no gradient, rather than a zero one.
        ctx.set_materialize_grads(False)
        kinds = {"cpu", *(x.device.type for x in inputs)}
        ctx.autocast = [(kind, _autocast(kind)) for kind in kinds]
        ctx.save_for_backward(*inputs)
        return again(inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for kind, options in ctx.autocast:  # a GPU's backward pass has a thread of its own
                stack.enter_context(torch.autocast(kind, **options))
            outputs = ctx.again(inputs)
        pairs = zip(outputs, grad_outputs, strict=True)
        reached = [(x, grad) for x, grad in pairs if x.requires_grad and grad is not None]
        if not reached:
            return (None, None, *(None for _ in inputs))
        some, grads = zip(*reached, strict=True)
        # The token too: where a hook cuts the inputs off, what is above them has maps.
        found = torch.autograd.grad(some, [*inputs, ctx.token], grads, allow_unused=True)
        return (None, None, *found[:-1])


def _autocast(kind: str) -> dict[str, Any]:
    return {
        "enabled": torch.is_autocast_enabled(kind),
        "dtype": torch.get_autocast_dtype(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
