"""Forward passes that begin at a later block, from what the blocks before it returned earlier.

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

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from ra_lens.replaced import replaced
from ra_lens.sites import Lens, Site


class Prefix:
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
        with replaced({block: keeping(block) for block in last}):
            yield

    @contextmanager
    def reused(self, layer: int, examples: Int[Tensor, "row"]) -> Generator[None, None, None]:
        """Skip the blocks before an attention layer while the context is open.

        Batches must be as wide, and padded on the same side, as in the pass recorded.

        Args:
            layer: The layer, as a key of the model's sites.
            examples: Which of the examples recorded is in each row of the batch.
        """
        skipped = self._before[layer]
        if not skipped:
            yield
            return
        output = _select(self._returned[skipped[-1]], examples, self._n)

        def forward(*_args: Any, **_kwargs: Any) -> Any:
            return output

        with replaced(dict.fromkeys(skipped, forward)):
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
