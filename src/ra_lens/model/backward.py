"""Other backward passes through the same forward pass: RelP, and GIM.

A gradient is the slope at one point. Two published methods hand relevance back in other ways, each
by changing what single operations do to the gradient that passes them; values stay as they are.

    operation                exact            relp                   gim
    norm, x/σ(x), or         all of ∂/∂x      σ held constant        σ held constant
      (x − mean)/σ(x)
    activation a(x)          a′(x)            a(x)/x held constant   a′(x)
    gated MLP, a(g) ⊙ u      to g and u       half of each           half of each
    softmax, A of S          A ⊙ (G − ΣA⊙G)   the same               softmax(S/2) in the place of A
    q·k                      to q and k       the same               a quarter of each
    A·v                      to A and v       the same               all to A, half to v
    matrices, sums, turns    linear           the same               the same

relp: Rezaei Jafari, Eberle, Khakzar and Nanda 2025 (arXiv 2508.21258), the rules that the authors'
code and its README switch on: LN, Identity and Half. The mean of a LayerNorm is not held, as there.
Their fourth, AH, which holds the pattern constant, is not among them: R would be 0. a(x)/x is taken
as its limit, as in sigmoid(x) for SiLU, so that x = 0 needs no stabiliser; of ReLU it is ReLU's own
slope. gim: Edin et al. 2025 (arXiv 2505.17630), with the factors of the authors' package: the
temperature of the softmax's backward pass is 2, without the 1/2 that a softmax of S/2 would have.

So under `gim` the Reversed Attention of a run is scale · A′ ⊙ (G − rowsum(A′ ⊙ G)) with A′ =
softmax(S/2) and the G of that pass; and what is kept as `query_grad`, `key_grad` and `value_grad`
is what is handed on, after the quarter and the half.

How. The forward pass is left alone. Afterwards autograd's graph is walked from the logits down, and
every node in it is told apart: what is linear stays, what the table names gets a hook that hands on
another gradient, and what is neither is refused, so that no operation is passed over. It needs no
knowledge of a model's classes, sees what hooks of the user's add, and there is nothing to put back
on the model. What comes after the logits, the loss, is differentiated as it is. There is no rule
for mixtures of experts (their router), gates by a sigmoid (of attention, or of shared experts),
clipped queries, keys and values, xIELU, state-space layers above an attention layer, and softmaxes
with a sink.

Cost: that of an ordinary backward pass, and the walk, some microseconds for each operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.errors import UnsupportedModel

Backward = Literal["exact", "relp", "gim"]
BACKWARDS: tuple[Backward, ...] = get_args(Backward)
"""Backward passes: that of the loss, and the two above."""

TEMPERATURE = 2.0
_OF_SCORES, _OF_VALUES, _OF_GATES = 0.25, 0.5, 0.5

# An operation in autograd's graph, and an input of it: the operation it comes from, and as which of
# that one's results.
Node = Any
Edge = tuple[Node, int]
# Where in a model the walk is.
Place = Literal["stream", "pattern", "scores"]
Grads = tuple[Tensor | None, ...]

# Linear in all that they take together, whatever it is.
_LINEAR = frozenset(
    f"{name}Backward{n}"
    for name in (
        *("Add", "Sub", "Neg", "Mean", "Sum", "Clone", "ToCopy", "Alias", "View", "UnsafeView"),
        *("ReshapeAlias", "Transpose", "T", "Permute", "Expand", "Unsqueeze", "Squeeze", "Slice"),
        *("Select", "Index", "IndexPut", "IndexSelect", "Split", "SplitWithSizes", "Unbind"),
        *("Cat", "Stack", "Repeat", "Where", "MaskedFill", "ConstantPadNd", "Tril", "Detach"),
        *("ViewAsReal", "ViewAsComplex", "AsStrided", "Unfold", "Roll", "Flip", "Narrow"),
    )
    for n in range(3)
) | {
    "torch::autograd::CopySlices",
    "BackwardHookFunctionBackward",
    "_TapBackward",
    "_PatternTapBackward",
}
_CUTS = ("SliceBackward0", "SelectBackward0", "IndexBackward0", "SplitBackward0")
_RECOMPUTED = ("_BlockBackward", "_PiecesBackward")
_END = "torch::autograd::AccumulateGrad"
_PRODUCTS = ("BmmBackward0", "BaddbmmBackward0")
_MATRICES = ("MmBackward0", "AddmmBackward0")
# Linear in one of their two factors where the other is constant.
_TIMES = ("MulBackward0", "DivBackward0")
# Of the same size as what they take, entry by entry: what may lie between a value and its gate.
_ENTRIES = ("AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "PowBackward0")
_SQUASHES = ("TanhBackward0", "SigmoidBackward0", "ErfBackward0")
_SAME_ENTRIES = ("ToCopyBackward0", "CloneBackward0", "AliasBackward0", "ViewBackward0")
_SIZES = ("SqrtBackward0", "RsqrtBackward0", "StdBackward0", "LinalgVectorNormBackward0")
_BLOOM = "GeLUFunctionBackward"  # of transformers: GELU with tanh, as a function of its own


def softened(pattern: Float[Tensor, "*some key"]) -> Float[Tensor, "*some key"]:
    """softmax(S/2) of the scores S that a pattern was made of, which is A^½ / Σ A^½."""
    roots = pattern.pow(1 / TEMPERATURE)
    total = roots.sum(dim=-1, keepdim=True)
    return roots / total.where(total != 0, 1.0)  # at padding a row is 0


class Rewiring:
    """Makes one graph, or several parts of it, hand back other gradients."""

    def __init__(self, backward: Backward, model_name: str) -> None:
        """Nothing is rewired yet; the name is for messages."""
        self._relp, self._backward, self._name = backward == "relp", backward, model_name
        self.patterns = 0
        """How many patterns the graph has that are multiplied with values."""

    def of(self, results: Iterable[Tensor]) -> None:
        """Rewire what these tensors were computed from; once for each part of a graph.

        Raises:
            UnsupportedModel: an operation is none of those known.
        """
        seen = set[Node]()
        waiting: list[tuple[Node, Place, Node]] = []
        for result in results:
            waiting.append((result.grad_fn, "stream", None))
        while waiting:
            node, place, consumer = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                for edge, at in self._at(node, place, consumer):
                    waiting.append((edge[0], at, node))

    # ---- telling nodes apart --------------------------------------------------------------------

    def _at(self, node: Node, place: Place, consumer: Node) -> list[tuple[Edge, Place]]:
        """Rewire a node; gives the inputs to go on with, and where they are."""
        name, edges = node.name(), _inputs(node)
        if place == "pattern" and name in _CUTS and not self._relp:
            raise self._unknown(name, place)  # softmax(S/2) cannot be told from a part of its A
        if name in _LINEAR or name == _END:
            return [(edge, place) for edge in edges]
        if name in _PRODUCTS:
            return self._product(node, edges, place)
        if name in _TIMES:
            return self._times(node, edges, place)
        if name == "SoftmaxBackward0" and place == "pattern":
            if not self._relp:
                _soften(node)
            return [(edge, "scores") for edge in edges]
        if name == "MaximumBackward0" and place == "scores" and len(edges) == 1:
            return [(edges[0], place)]  # XGLM: with the lowest number there is
        if name == "TanhBackward0" and _caps(node, consumer):
            return [(edge, place) for edge in edges]
        if place == "stream":
            if name in _MATRICES and len(_factors(node)) == 1:
                return [(edge, place) for edge in edges]
            if name in _RECOMPUTED:  # rewired when it runs again
                return [(edge, place) for edge in edges]
            if name == "NativeLayerNormBackward0" and len(node._saved_normalized_shape) == 1:
                _hold_size(node)
                return [(edges[0], place)]
            if _is_activation(node):
                if self._relp:
                    _hold_ratio(node)
                return [(edge, place) for edge in edges]
        raise self._unknown(name, place)

    def _product(self, node: Node, edges: list[Edge], place: Place) -> list[tuple[Edge, Place]]:
        """q·k, A·v, or a matrix of weights times what it reads."""
        factors = _factors(node)
        if place == "scores":
            if not self._relp:
                _scale(node, _OF_SCORES)
            return [(edge, "stream") for edge in edges]
        if place == "pattern" or not factors:
            raise self._unknown(node.name(), place)
        patterns = [edge for edge in factors if _leads_to_pattern(edge)]
        if len(factors) == 2 and len(patterns) != 1:
            raise self._unknown(node.name(), place)
        self.patterns += len(patterns)
        if len(factors) == 2 and not self._relp:
            last_is_pattern = patterns == factors[1:]
            _scale(node, _OF_VALUES, only=-2 if last_is_pattern else -1)
        return [(edge, "pattern" if edge in patterns else place) for edge in edges]

    def _times(self, node: Node, edges: list[Edge], place: Place) -> list[tuple[Edge, Place]]:
        """x/σ of a norm, x·squash(x) of an activation, a(g)·u of a gated MLP, or x by a number."""
        if len(edges) == 1 and edges == [node.next_functions[0]]:
            return [(edges[0], place)]
        if len(edges) == 1 and node.name() == "MulBackward0":
            return [(edges[0], place)]
        sizes = [edge for edge in edges if _is_size(edge)]
        times = node.name() == "MulBackward0"
        if len(sizes) == 1 and place == "stream" and (times or sizes == edges[1:]):
            _drop(node, node.next_functions.index(sizes[0]))
            return [(edge, place) for edge in edges if edge not in sizes]
        if times and place == "stream":
            squash = _squash_of_the_same(edges)
            if squash is not None:
                if self._relp:
                    _drop(node, squash)
                return [(edges[1 - squash], place)]
            if sum(_is_activated(edge) for edge in edges) == 1:
                _scale(node, _OF_GATES)
                return [(edge, place) for edge in edges]
        what = "a product of two that depend on the input"
        raise self._unknown(f"{node.name()}, {what},", place)

    def _unknown(self, name: str, place: Place) -> UnsupportedModel:
        where = {"stream": "", "pattern": " between softmax and values", "scores": " of the scores"}
        return UnsupportedModel(
            f"found {name}{where[place]} in the graph of {self._name}, which is not among what "
            f"backward={self._backward!r} has a rule for: LayerNorm and RMSNorm, GELU, SiLU, ReLU "
            "and its square, gated MLPs, capped scores or logits, softmax attention, and what is "
            "linear. The model computes it, or a hook. Use backward='exact'."
        )


def _inputs(node: Node) -> list[Edge]:
    """Inputs that are differentiated."""
    return [edge for edge in node.next_functions if edge[0] is not None]


def _factors(node: Node) -> list[Edge]:
    """Those of the two last inputs, the factors of a product, that are differentiated."""
    return [edge for edge in node.next_functions[-2:] if edge[0] is not None]


def _leads_to_pattern(edge: Edge) -> bool:
    """Whether a factor is a softmax's output, or a tap at one, as hooks may have edited it."""
    waiting, seen = [edge[0]], set[Node]()
    while waiting:
        node = waiting.pop()
        name = node.name()
        if name in ("SoftmaxBackward0", "_PatternTapBackward"):
            return True
        if node in seen or not (name in _LINEAR or (name in _TIMES and len(_inputs(node)) == 1)):
            continue
        seen.add(node)
        waiting += [before for before, _ in _inputs(node)]
    return False


def _is_size(edge: Edge) -> bool:
    """Whether an input of a product is the size of something, or one over it."""
    node = edge[0]
    while True:
        name, before = node.name(), _inputs(node)
        if name in _SIZES or (name == "PowBackward0" and abs(node._saved_exponent) == 0.5):
            return True
        passes = name in (*_SAME_ENTRIES, *_ENTRIES, "ExpandBackward0", "ReciprocalBackward0")
        if len(before) != 1 or not (passes or name.startswith("Clamp")):
            return False
        node = before[0][0]


def _is_activation(node: Node) -> bool:
    name = node.name()
    if name == "PowBackward0":  # the square of ReLU
        return node._saved_exponent == 2 and _inputs(node)[0][0].name() == "ReluBackward0"
    return name in ("SiluBackward0", "GeluBackward0", "ReluBackward0", _BLOOM)


def _is_activated(edge: Edge) -> bool:
    """Whether a factor is the output of an activation."""
    node = edge[0]
    while not _is_activation(node):
        before = _inputs(node)
        if node.name() == "MulBackward0" and len(before) == 2:
            return _squash_of_the_same(before) is not None
        if len(before) != 1 or node.name() not in (*_LINEAR, *_TIMES):
            return False
        node = before[0][0]
    return True


def _squash_of_the_same(edges: Sequence[Edge]) -> int | None:
    """Which of two factors is a squashed form of the other, as in x·sigmoid(x); None: neither."""
    (first, first_squashed), (second, second_squashed) = map(_origins, edges)
    if first != second or first_squashed == second_squashed:
        return None
    return 0 if first_squashed else 1


def _origins(edge: Edge) -> tuple[set[Edge], bool]:
    """What a tensor is made of entry by entry, and whether it was squashed on the way."""
    found, squashed, seen = set[Edge](), False, set[Edge]()
    waiting = [edge]
    while waiting:
        node, _ = one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        squash = node.name() in _SQUASHES
        squashed = squashed or squash
        if squash or node.name() in (*_ENTRIES, "ToCopyBackward0"):
            waiting += _inputs(node)
        else:
            found.add(one)
    return found, squashed


def _caps(node: Node, consumer: Node) -> bool:
    """Whether a tanh is that of c·tanh(x/c)."""
    inside = _inputs(node)[0][0]
    times = _number(inside), _number(consumer)
    return times[0] is not None and times[1] is not None and abs(times[0] * times[1] - 1) < 1e-3


def _number(node: Node) -> float | None:
    """What a node multiplies with, where that is one number."""
    if node is None or node.name() not in _TIMES:
        return None
    other = node._saved_other
    if not isinstance(other, Tensor) or other.numel() != 1:
        return None
    return float(other) if node.name() == "MulBackward0" else 1 / float(other)


# ---- other gradients -----------------------------------------------------------------------------


def _hand_on(node: Node, change: Callable[[Grads, Grads], Grads]) -> None:
    """Have a node hand on what `change` makes of its gradients and of that at its output."""
    node.register_hook(change)


def _scale(node: Node, factor: float, only: int | None = None) -> None:
    """Multiply the gradients at both factors, or at one of them."""

    def change(grads: Grads, _at_output: Grads) -> Grads:
        scaled = list(grads)
        for i in (-2, -1) if only is None else (only,):
            grad = scaled[i]
            scaled[i] = None if grad is None else grad * factor
        return tuple(scaled)

    _hand_on(node, change)


def _drop(node: Node, which: int) -> None:
    """Hand on no gradient to one of the inputs."""

    def change(grads: Grads, _at_output: Grads) -> Grads:
        kept = list(grads)
        grad = kept[which]
        kept[which] = None if grad is None else torch.zeros_like(grad)
        return tuple(kept)

    _hand_on(node, change)


def _hold_size(node: Node) -> None:
    """LayerNorm: hold 1/σ; what is left is linear, (x − mean) · gain / σ."""
    # Saved tensors are taken out of their list when they are used: the graph, which holds this
    # hook, would otherwise hold them until it is gone.
    kept = [(node._saved_result2.detach(), node._saved_weight)]

    def change(grads: Grads, at_output: Grads) -> Grads:
        inverse, weight = kept.pop()
        grad = at_output[0]
        if grad is None:
            return grads
        step = grad if weight is None else grad * weight.detach()
        step = (step - step.mean(dim=-1, keepdim=True)) * inverse
        return (step.to(grad.dtype), *grads[1:])

    _hand_on(node, change)


def _hold_ratio(node: Node) -> None:
    """Activation: the gradient times a(x)/x."""
    name = node.name()
    if name == "ReluBackward0":
        return
    if name == "PowBackward0":  # r² of r = relu(x): r·r with one of them held
        _scale_first(node, 0.5)
        return
    approximate = "tanh" if name == _BLOOM else getattr(node, "_saved_approximate", None)
    saved = node.saved_tensors[0] if name == _BLOOM else node._saved_self
    kept = [saved.detach()]

    def change(_grads: Grads, at_output: Grads) -> Grads:
        x, grad = kept.pop(), at_output[0]
        return (None if grad is None else grad * _ratio(x, approximate).to(grad.dtype),)

    _hand_on(node, change)


def _scale_first(node: Node, factor: float) -> None:
    def change(grads: Grads, _at_output: Grads) -> Grads:
        return (None if grads[0] is None else grads[0] * factor, *grads[1:])

    _hand_on(node, change)


def _ratio(x: Tensor, approximate: str | None) -> Tensor:
    """a(x)/x of GELU, exact or by tanh, and of SiLU."""
    if approximate is None:
        return x.sigmoid()
    if approximate == "none":
        return (1 + torch.erf(x * 0.5**0.5)) / 2
    inside = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    return (1 + torch.tanh(inside)) / 2


def _soften(node: Node) -> None:
    """Softmax: A ⊙ (G − rowsum(A ⊙ G)) with softmax(S/2) in the place of A."""
    kept = [node._saved_result.detach()]

    def change(grads: Grads, at_output: Grads) -> Grads:
        pattern, grad = softened(kept.pop()), at_output[0]
        if grad is None:
            return grads
        step = pattern * (grad - (pattern * grad).sum(dim=-1, keepdim=True))
        return (step, *grads[1:])

    _hand_on(node, change)
