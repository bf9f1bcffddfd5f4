"""Activation checkpointing: blocks run again in the backward pass, and their graph is not kept.

A block's first forward pass is made without a graph and only what goes in is kept; when its
gradient arrives the block runs again, with a graph, gives its maps and is forgotten. So the
attention tensors of one layer are alive at a time. The result is the same, as the same operations
run on the same tensors; the cost is one more forward pass. The last block is not run twice: its
gradient comes first.

Hugging Face's cache of keys and values, to which a second run would add, is kept from the blocks.
Hooks inside a block run twice as well. What they return must not depend on how often they ran.

Forward passes that begin at a later block, from what the blocks before it returned earlier.

A change at an attention layer changes nothing before the layer's block. What the blocks before it
return is therefore recorded once, in a pass without the change, and handed out again: each of them
is called as ever, but instead of its own `forward` it runs one that returns what the last of them
returned then, for the examples that are in the batch now. All else, masks, positions, hooks and
every later block, is the model's own. So it works for any model whose blocks hand on what they
return and nothing else. Whoever uses it has to make sure of that: models whose layers share keys
and values, or are run several times, are not among them.

Memory: the output of one block for each attention layer, for the examples recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ra_lens.model.forward import with_forward
from ra_lens.model.lens import Lens
from ra_lens.model.sites import Site

# Inputs of a block that have gradients, to its outputs that may have.
Run = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
Rewire = Callable[[Sequence[Tensor]], None]
_TENSOR = object()


@contextmanager
def recomputed(
    blocks: Sequence[nn.Module], token: Tensor, rewire: Rewire
) -> Generator[None, None, None]:
    """Run `blocks` with checkpoints, in the context; the last one as it is.

    Every block is tied to `token`, the root of the graph. `rewire` is shown what a block gives when
    it runs again, before that is differentiated.
    """
    functions = {block: _checkpointed(block.forward, token, rewire) for block in blocks[:-1]}
    with with_forward(functions):
        yield


def _checkpointed(forward: Callable[..., Any], token: Tensor, rewire: Rewire) -> Callable[..., Any]:
    """A block's forward pass with one autograd node in place of its graph."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        given, form = pytree.tree_flatten((args, kwargs), is_leaf=is_cache)
        given = [None if is_cache(leaf) else leaf for leaf in given]
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

        outputs: Any = _Block.apply(again, rewire, token, *(given[i] for i in moving))
        of_form, leaves = made
        remaining = iter(outputs)
        whole = [next(remaining) if leaf is _TENSOR else leaf for leaf in leaves]
        return pytree.tree_unflatten(whole, of_form)

    return run


def is_cache(leaf: object) -> bool:
    """Whether something is Hugging Face's cache of keys and values."""
    return any(kind.__name__ == "Cache" for kind in type(leaf).__mro__)


def _is_floating(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class _Block(torch.autograd.Function):
    """A block as one node: keeps its inputs, and runs again for their gradients."""

    @staticmethod
    def forward(
        ctx: Any, again: Run, rewire: Rewire, token: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.again, ctx.rewire, ctx.token = again, rewire, token
        # What nothing uses (a pattern that is only shown) has no gradient, rather than a zero one.
        ctx.set_materialize_grads(False)
        kinds = {"cpu", *(x.device.type for x in inputs)}
        ctx.autocast = [(kind, autocast_options(kind)) for kind in kinds]
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
            return (None, None, None, *(None for _ in inputs))
        some, grads = zip(*reached, strict=True)
        ctx.rewire(some)
        # The token too: where a hook cuts the inputs off, what is above them has maps.
        found = torch.autograd.grad(some, [*inputs, ctx.token], grads, allow_unused=True)
        return (None, None, None, *found[:-1])


def autocast_options(kind: str) -> dict[str, Any]:
    """Options of `torch.autocast` as they are now, for a backward pass in another thread."""
    return {
        "enabled": torch.is_autocast_enabled(kind),
        "dtype": torch.get_autocast_dtype(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


class SkippedBlocks:
    """What the blocks before each attention layer returned for some examples."""

    def __init__(self, lens: Lens) -> None:
        """Find the blocks before each attention layer; nothing is recorded yet."""
        self._before = {layer: _blocks_before(lens, site) for layer, site in lens.sites.items()}
        self._returned: dict[nn.Module, Any] = {}
        self._n = 0

    @contextmanager
    def recorded(self, n_examples: int) -> Generator[None, None, None]:
        """Record a forward pass of `n_examples` while the context is open."""

        def keeping(block: nn.Module) -> Callable[..., Any]:
            own = block.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                self._returned[block] = output = own(*args, **kwargs)
                return output

            return forward

        self._n = n_examples
        last = {blocks[-1] for blocks in self._before.values() if blocks}
        with with_forward({block: keeping(block) for block in last}):
            yield

    @contextmanager
    def reused(self, layer: int, examples: Int[Tensor, "row"]) -> Generator[None, None, None]:
        """Skip the blocks before an attention layer while the context is open.

        Batches must be as wide, and padded on the same side, as in the pass recorded; `examples`
        says which of the examples recorded is in each row.
        """
        skipped = self._before[layer]
        if not skipped:
            yield
            return
        output = _select(self._returned[skipped[-1]], examples, self._n)

        def forward(*_args: Any, **_kwargs: Any) -> Any:
            return output

        with with_forward(dict.fromkeys(skipped, forward)):
            yield


def _blocks_before(lens: Lens, site: Site) -> list[nn.Module]:
    """Blocks before that of the site, those without attention included, in the order they run."""
    stack, _, index = site.block.rpartition(".")
    return list(lens.module.get_submodule(stack).children())[: int(index)]


def _select(output: Any, examples: Tensor, n_examples: int) -> Any:
    if isinstance(output, Tensor):
        by_example = output.ndim > 0 and output.shape[0] == n_examples
        return output[examples.to(output.device)] if by_example else output
    if isinstance(output, tuple | list):
        return type(output)(_select(part, examples, n_examples) for part in output)
    return output
