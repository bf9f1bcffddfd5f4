"""The two products of an attention layer, q·k and A·V, as the autograd graph holds them.

Models come to them in many ways: rotated, normalised, scaled before or after, with biases, capped,
written as a matmul, an einsum or a sum with a bias. What they have in common is a batched product
of matrices, and for its backward pass autograd keeps both factors. Walking back from the pattern,
or from z, to the nearest such product finds them as they entered it, and a hook on that node of the
graph is given the gradients of both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# What autograd calls a batched product, and where it keeps the two factors and the multiplier.
_PRODUCTS = {
    "BmmBackward0": ("_saved_self", "_saved_mat2", None),
    "BaddbmmBackward0": ("_saved_batch1", "_saved_batch2", "_saved_alpha"),
}
_FAR = 2000  # nodes between a pattern and its product: a dozen in the models known


@dataclass(frozen=True)
class Product:
    """left @ right for every example and head; both `[example·head, …]`.

    Attributes:
        node: The product in the autograd graph.
        left: `[example·head, row, inner]`.
        right: `[example·head, inner, column]`.
        factor: The numbers that the product is multiplied with on the way to where it was found.
    """

    node: Any
    left: Tensor
    right: Tensor
    factor: float

    def on_gradients(self, receive: Callable[[Tensor | None, Tensor | None], None]) -> None:
        """Have `receive` called with the gradients at left and right."""

        def hook(inputs: tuple[Tensor | None, ...], _outputs: tuple[Tensor, ...]) -> None:
            *_bias, left, right = inputs
            receive(left, right)

        self.node.register_hook(hook)


def product_behind(result: Tensor, rows: int, columns: int | None = None) -> Product | None:
    """Find the nearest product `[…, rows, columns]` that `result` was computed from.

    None where there is none, or where autograd did not keep both factors, as one of them depends on
    nothing that is differentiated.
    """
    waiting = deque([(result.grad_fn, 1.0)])
    seen = set[Any]()
    while waiting and len(seen) < _FAR:
        node, factor = waiting.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        if name in _PRODUCTS:
            first, second, multiplier = _PRODUCTS[name]
            left: Tensor | None = getattr(node, first)
            right: Tensor | None = getattr(node, second)
            if left is not None and right is not None and _fits(left, right, rows, columns):
                times = 1.0 if multiplier is None else float(getattr(node, multiplier))
                return Product(node, left.detach(), right.detach(), factor * times)
            continue
        factor *= _multiplied_with(node, name)
        waiting.extend((before, factor) for before, _ in node.next_functions)
    return None


def _fits(left: Tensor, right: Tensor, rows: int, columns: int | None) -> bool:
    return left.shape[-2] == rows and columns in (None, right.shape[-1])


def _multiplied_with(node: Any, name: str) -> float:
    if name not in ("MulBackward0", "DivBackward0"):
        return 1.0
    other = node._saved_other
    if not isinstance(other, Tensor) or other.numel() != 1:
        return 1.0
    return float(other) if name == "MulBackward0" else 1 / float(other)
