"""From gradients at the patterns to Reversed Attention, layer by layer, as the gradients arrive.

With A the pattern (softmax output), G = ∂L/∂A and c the softmax scale,

    R~ = A ⊙ (G − rowsum(A ⊙ G)) = ∂L/∂S        (S: the softmax input)
    R  = c · R~                   = ∂L/∂(q·k)    (paper eq. 17)

A is the tensor that the softmax made, taken before any edit of the pattern, and G its gradient
through such edits; so R is exactly the gradient of the intervened model.

How the gradient is obtained. A tap is an identity whose only purpose is to give the graph a root:
it ties a tensor to a scalar `token`, and the backward pass asks for the gradient of that token
alone. Autograd then runs exactly the part of the graph that lies between the loss and the taps, no
parameter is involved, and nothing is held after its layer is done. Where the user runs the backward
pass, and may run another through the same graph, the graph itself keeps the patterns.

Where the model goes on with the pattern that it shows, the tap at the pattern also stands in for
the softmax: R~ is the gradient at the scores, so it is handed on there as it is. The softmax's own
part of the graph, a second copy of the pattern included, is neither kept nor run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.errors import NothingToDifferentiate, UnsupportedModel
from ra_lens.model import Lens, Site
from ra_lens.model.backward import Backward, Rewiring, softened
from ra_lens.model.blocks import recomputed
from ra_lens.model.rows import in_rows
from ra_lens.model.sites import StoredKind, VectorKind
from ra_lens.vectors import VectorCollector

Store = Literal["maps", "norms", "mean"]

Deliver = Callable[[Site, dict[StoredKind, Tensor]], None]
# Takes the gradient at a pattern, gives that at its scores.
Receive = Callable[[Tensor], Tensor]
# Takes a pattern and the gradient at it.
ReceiveBoth = Callable[[Tensor, Tensor], None]


def reversed_attention(
    pattern: Float[Tensor, "batch head query key"],
    pattern_grad: Float[Tensor, "batch head query key"],
    scale: float,
) -> Float[Tensor, "batch head query key"]:
    """R = scale · A ⊙ (G − rowsum(A ⊙ G)), paper eq. 17; a scale of 1 gives R~."""
    # The formula in one pass over memory: the kernel behind every softmax's backward pass.
    step: Tensor = torch.ops.aten._softmax_backward_data(pattern_grad, pattern, -1, pattern.dtype)
    return step if scale == 1 else step.mul_(scale)


class _Tap(torch.autograd.Function):
    """Identity that makes its output depend on `token`; hands on its input with the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, _token: Tensor, copy: bool, receive: ReceiveBoth | None
    ) -> Tensor:
        ctx.receive = receive
        if receive is not None:
            # For as long as another backward pass can come: autograd lets go of it in the one that
            # does not retain the graph.
            ctx.save_for_backward(x)
        # A copy where somebody else's hook comes next: such hooks edit in place, which autograd
        # forbids on a view and which would change the pattern that is kept.
        return x.clone() if copy else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None, None]:
        if ctx.receive is not None:
            ctx.receive(ctx.saved_tensors[0].detach(), grad_outputs[0])
        return grad_outputs[0], None, None, None


class _PatternTap(_Tap):
    """A tap at a pattern; the name tells `ra_lens.model.backward` so."""


class _SoftmaxTap(torch.autograd.Function):
    """The pattern as a function of its scores, whose backward pass is R~ (and of `token`)."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, pattern: Tensor, _token: Tensor, copy: bool, receive: Receive
    ) -> Tensor:
        ctx.receive, ctx.dtype = receive, scores.dtype
        return pattern.clone() if copy else pattern.view_as(pattern)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, None, None, None, None]:
        step = ctx.receive(grad_outputs[0])
        return step.to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, None, None, None


def _discard(_site: Site, _maps: dict[StoredKind, Tensor]) -> None:
    """Drop maps that arrive when the run is over."""


class Collector:
    """Hands the maps of each layer to `deliver` when that layer's gradient has arrived."""

    def __init__(
        self,
        lens: Lens,
        sites: dict[int, Site],
        deliver: Deliver,
        *,
        edited: bool = True,
        retained: bool = False,
        vectors: frozenset[VectorKind] = frozenset(),
        backward: Backward = "exact",
    ) -> None:
        """Collect at `sites` of `lens` and hand each layer's maps to `deliver`.

        Hooks of the user's may cut layers off from the loss if `edited`; each of several backward
        passes through one graph delivers if `retained`. These `vectors` are kept beside the maps.
        The gradients are those of this `backward` pass.
        """
        self._lens = lens
        self._sites = sites
        self._deliver = deliver
        self._edited = edited
        self._retained = retained
        self._backward: Backward = backward
        self._rewiring = None if backward == "exact" else Rewiring(backward, lens.name)
        self._loss_scale = 1.0
        self._token = torch.zeros((), requires_grad=True)
        self._recompute = False
        self._scores: dict[int, Tensor] = {}
        self._patterns: dict[int, Tensor] = {}  # whose gradient has not arrived
        self._times: Counter[int] = Counter()  # how often each was shown
        self._arrived: set[int] = set()
        self._consumed: set[int] = set()
        self.vectors = VectorCollector(lens, sites, vectors, self.root) if vectors else None

    # ---- attaching ------------------------------------------------------------------------------

    @contextmanager
    def attached(
        self, *, recompute: bool = False, rows: int | None = None
    ) -> Generator[Mapping[str, Any] | None, None, None]:
        """Attach to the model: the patterns before every other hook, the block input after.

        With `recompute` no block's graph but the last is kept; see `ra_lens.model.blocks`. With
        `rows` too, a layer's maps come in pieces of so many queries, the last ones first; then it
        gives the options that the forward pass needs; see `ra_lens.model.rows`.
        """
        options: Mapping[str, Any] | None = None
        self._recompute = recompute
        above: set[str] = set()  # self- and cross-attention of a decoder block share one input
        with ExitStack() as stack:
            for layer, site in self._sites.items():
                site.need_scale()
                point = self._lens.hook_points[site.pattern_name]
                # A pre-hook sees the tensor itself. Forward hooks come after other people's
                # edits, and after the wrapper that a backward hook puts around the HookPoint.
                handle = point.register_forward_pre_hook(
                    partial(self._at_pattern, layer), prepend=True
                )
                stack.callback(handle.remove)
                if (scores := self._scores_point(site)) is not None:
                    handle = scores.register_forward_hook(partial(self._at_scores, layer))
                    stack.callback(handle.remove)
                # Where the model goes on with the tensor hooked, the graph begins at the pattern.
                # Elsewhere it must begin above, and at every layer, as a hook may have replaced
                # what came before.
                if site.observe_only is not False or self.vectors is not None:
                    above.add(self._lens.block_input_name(site))
            if self.vectors is not None:
                stack.enter_context(self.vectors.attached())
            for name in above:
                point = self._lens.hook_points[name]
                stack.callback(point.register_forward_hook(self._tap_input).remove)
            if recompute:
                first = next(iter(self._sites))
                if rows is None:
                    blocks = self._lens.blocks_from(first)
                    stack.enter_context(recomputed(blocks, self._token, self.rewire))
                else:
                    pieces = in_rows(self._lens, first, self._token, rows, self.rewire)
                    options = stack.enter_context(pieces)
                stack.enter_context(self._lens.no_attention_returned())
            stack.callback(self._release)
            yield options

    def _release(self) -> None:
        # The model may keep the last pattern, whose gradient hooks hold this collector: it must
        # not hold the maps in turn.
        self._patterns.clear()
        self._scores.clear()
        self._deliver = _discard

    def _scores_point(self, site: Site) -> nn.Module | None:
        """Where the softmax's input can be taken; None where R~ may not be handed on to it."""
        # An observe-only site's scores are a copy too (where that is not known yet, it shows in
        # the backward pass). A layer that runs again needs every pattern, and another backward pass
        # the softmax itself. A backward hook puts a wrapper behind the tensor that a forward hook
        # sees.
        point = self._lens.hook_points.get(site.scores_name)
        if point is None or site.observe_only or site.repeated or self._rewiring is not None:
            return None
        return None if point._backward_hooks else point  # pyright: ignore[reportPrivateUsage]

    def _at_scores(self, layer: int, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._scores[layer] = output

    def _tap_input(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return self._tap(output, copy=True)

    def _tap(self, x: Tensor, *, copy: bool, receive: ReceiveBoth | None = None) -> Tensor:
        tap = _Tap if receive is None else _PatternTap
        result: Any = tap.apply(x, self._token, copy, receive)
        return result

    def _at_pattern(self, layer: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # TransformerLens hooks are forward hooks of the HookPoint; this is one of its pre-hooks.
        # Where the pattern is only shown, further hook points may get the same tensor.
        others = len(module._forward_pre_hooks) > 1  # pyright: ignore[reportPrivateUsage]
        hooked = others or bool(module._forward_hooks)  # pyright: ignore[reportPrivateUsage]
        edited_next = hooked or self._sites[layer].observe_only is not False
        return (self.observe(layer, args[0], copy=edited_next), *args[1:])

    def observe(self, layer: int, pattern: Tensor, *, copy: bool = True) -> Tensor:
        """Collect from a pattern, the softmax output as the model has it.

        Returns the tensor that the model goes on with, a `copy` where other hooks may edit it in
        place.
        """
        self._times[layer] += 1
        repeated = self._sites[layer].repeated
        if repeated and not torch.is_grad_enabled():
            self._patterns.pop(layer, None)  # what came before is not the last time either
            return pattern
        if self._recompute and not torch.is_grad_enabled():
            self._scores.pop(layer, None)
            return pattern  # the block runs again
        if not torch.is_grad_enabled():
            raise UnsupportedModel(self._why_no_gradients(layer))
        if layer in self._patterns and not repeated:
            raise UnsupportedModel(self._why_not_twice(layer))
        observe_only = self._sites[layer].observe_only
        if observe_only and not pattern.requires_grad:
            raise UnsupportedModel(
                f"the pattern of layer {layer} depends on nothing that can be differentiated: "
                "a hook replaces its queries and keys, and this model only shows the pattern "
                f"(hook_pattern is observe-only). Leave layer {layer} out with layers=, or drop "
                "that hook."
            )
        if self.vectors is not None:
            self.vectors.at_pattern(layer, pattern)
        self._patterns[layer] = kept = pattern.detach()
        at_gradient = partial(self._at_gradient, layer, self._times[layer])
        scores = self._scores.pop(layer, None)
        past_the_tap = observe_only is not False and pattern.requires_grad
        if scores is None:
            tapped = self._tap(pattern, copy=copy, receive=None if past_the_tap else at_gradient)
        else:
            receive = partial(self._receive_waiting, layer)
            made: Any = _SoftmaxTap.apply(scores, kept, self._token, copy, receive)
            tapped = made
        # Whether the gradient comes through the tensor handed on, or past it, tells whether the
        # model uses what hooks return.
        if observe_only is None:
            tapped.register_hook(lambda _grad: self._consumed.add(layer))
        if past_the_tap:
            pattern.register_hook(partial(at_gradient, kept if self._retained else None))
        return tapped

    def root(self, residual: Tensor) -> Tensor:
        """Begin the graph at a residual stream that has none (all parameters frozen)."""
        return residual if residual.requires_grad else self._tap(residual, copy=True)

    # ---- gradients ------------------------------------------------------------------------------

    def _at_gradient(self, layer: int, time: int, kept: Tensor | None, grad: Tensor) -> None:
        """Receive the gradient at the pattern that a layer showed the `time`th time."""
        latest = time == self._times[layer]
        waiting = self._patterns.pop(layer, None) if latest else None
        pattern = waiting if kept is None else kept
        # Of a layer that runs several times the maps are those of the last.
        if pattern is not None and (latest or not self._sites[layer].repeated):
            self._receive(layer, pattern, grad)

    def _receive_waiting(self, layer: int, grad: Tensor) -> Tensor:
        """Receive the gradient at the last pattern of a layer; gives that at its scores."""
        return self._receive(layer, self._patterns.pop(layer), grad)

    def _receive(self, layer: int, pattern: Tensor, grad: Tensor) -> Tensor:
        """Deliver the maps of a layer; gives R~, the gradient at its scores."""
        site = self._sites[layer]
        if site.observe_only is None:
            site = replace(site, observe_only=layer not in self._consumed)
            self._sites[layer] = site
            self._lens.learn_route(layer, observe_only=layer not in self._consumed)
        dtype = torch.float64 if pattern.dtype == torch.float64 else torch.float32
        pattern, grad = pattern.to(dtype), grad.detach().to(dtype)
        attended = softened(pattern) if self._backward == "gim" else pattern
        step = reversed_attention(attended, grad, 1.0)
        ra = step * (site.need_scale() / self._loss_scale)
        if self._loss_scale != 1:
            grad = grad / self._loss_scale
        self._arrived.add(layer)
        self._deliver(site, {"ra": ra, "pattern": pattern, "pattern_grad": grad})
        return step

    def rewire(self, results: Sequence[Tensor]) -> None:
        """Let what these were computed from hand back the gradients of another backward pass.

        Raises:
            UnsupportedModel: it holds an operation that this backward pass has no rule for.
        """
        if self._rewiring is not None:
            self._rewiring.of(results)

    def backward(self, total: Float[Tensor, ""], scale: float = 1.0) -> None:
        """Differentiate the loss `total` down to the first layer and deliver every layer's maps.

        Gradients are multiplied with `scale` on their way, and the maps are divided by it.
        """
        unseen = [layer for layer in self._sites if layer not in self._times]
        if unseen:
            raise UnsupportedModel(
                f"hook_pattern of layers {unseen} did not fire in the forward pass, so there is "
                "nothing to read. The model probably runs fused attention: load it with "
                "attn_implementation='eager'."
            )
        if total.requires_grad:
            self._loss_scale = scale
            weight = torch.full_like(total, scale)
            torch.autograd.grad(total, [self._token], weight, allow_unused=True)
        missing = [layer for layer in self._sites if layer not in self._arrived]
        if len(missing) == len(self._sites):
            raise NothingToDifferentiate(
                "found a loss that does not depend on the attention of "
                f"layers {list(self._sites)}: no gradient reached hook_pattern. The metric must "
                "be computed from the logits it is given, without detach() or .item(); neither "
                "hooks nor the model itself (integer weights do) may cut off everything above "
                "these layers."
            )
        if missing and not self._edited:
            raise NothingToDifferentiate(
                f"no gradient reaches the attention of layers {missing}, and no hook on the model "
                f"cuts them off: the model itself does, between layer {missing[-1]} and the loss, "
                "as a module that detaches or computes in integers. Load the model without it, or "
                "give layers= above it."
            )
        undecided = [layer for layer in missing if self._sites[layer].observe_only is None]
        if undecided:
            raise UnsupportedModel(
                f"no gradient reached hook_pattern of layers {undecided}, and it is not known yet "
                "whether a hook cuts them off from the loss or the model does not expose them. "
                "Call run_with_ra once without other hooks on the model first."
            )
        forgotten = [layer for layer in missing if layer not in self._patterns]
        if forgotten:
            raise UnsupportedModel(
                f"no gradient reached the blocks of layers {forgotten}: a hook cuts them off from "
                "the loss, and with recompute=True their patterns are not at hand. Leave these "
                "layers out with layers=, or run without recompute=True."
            )
        self._need_all_patterns()
        for layer in missing:  # really cut off by an edit: the gradient is zero
            pattern = self._patterns.pop(layer)
            self._receive(layer, pattern, torch.zeros_like(pattern))

    def _need_all_patterns(self) -> None:
        # Values whose pattern is a constant of a hook's cannot be told from weights.
        if self._rewiring is None or self._backward != "gim":
            return
        first = next(iter(self._sites))
        n = sum(layer >= first for layer in self._lens.sites)
        if self._rewiring.patterns < n:
            raise UnsupportedModel(
                f"found the softmax of {self._rewiring.patterns} of {n} attention layers behind "
                "the loss: a hook replaces the others' patterns or cuts them off, and "
                "backward='gim' cannot halve the gradients of their values. Use backward='exact'."
            )

    # ---- what is said ---------------------------------------------------------------------------

    def _why_no_gradients(self, layer: int) -> str:
        if self._retained:
            return (
                "found gradients switched off (torch.no_grad) in a forward pass whose hooks "
                "collect them. Run the forward and the backward pass under torch.enable_grad(), "
                "or use run_with_ra, which does."
            )
        return (
            f"the model switches gradients off by itself before {self._sites[layer].pattern_name}, "
            "as gradient checkpointing does. Switch that off; run_with_ra(recompute=True) saves "
            "as much memory."
        )

    def _why_not_twice(self, layer: int) -> str:
        name = self._sites[layer].pattern_name
        if self._retained:
            return (
                f"{name} fired twice before a backward pass, and one set of hooks collects from "
                "one forward pass at a time. For a loss over several forward passes (clean and "
                "corrupted) call get_ra_caching_hooks once for each and run each with its own "
                "hooks. Otherwise run backward after each forward pass, and make the hooks again "
                "after one that failed or had no backward."
            )
        return (
            f"{name} fired twice in one run: the model runs this layer repeatedly, or again in the "
            "backward pass, as gradient checkpointing does. Switch checkpointing off; a layer that "
            "runs repeatedly is not supported."
        )
