"""From gradients at the patterns to Reversed Attention, layer by layer, as the gradients arrive.

With A the pattern (softmax output), G = ∂L/∂A and c the softmax scale,

    R~ = A ⊙ (G − rowsum(A ⊙ G)) = ∂L/∂S        (S: the softmax input)
    R  = c · R~                   = ∂L/∂(q·k)    (paper eq. 17)

A is the tensor that the softmax made, taken before any edit of the pattern, and G its gradient
through such edits; so R is exactly the gradient of the intervened model.

How the gradient is obtained. A `Tap` is an identity whose only purpose is to give the graph a
root: it ties a tensor to a scalar `token`, and the backward pass asks for the gradient of that
token alone. Autograd then runs exactly the part of the graph that lies between the loss and the
taps, no parameter is involved, and nothing is held after its layer is done.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.errors import NothingToDifferentiate, UnsupportedModel
from ra_lens.sites import Lens, Site

MapKind = Literal["ra", "pattern", "pattern_grad"]
MAP_KINDS: tuple[MapKind, ...] = ("ra", "pattern", "pattern_grad")

Deliver = Callable[[Site, dict[MapKind, Tensor]], None]


def reversed_attention(
    pattern: Float[Tensor, "batch head query key"],
    pattern_grad: Float[Tensor, "batch head query key"],
    scale: float,
) -> Float[Tensor, "batch head query key"]:
    """R = scale · A ⊙ (G − rowsum(A ⊙ G)), paper eq. 17.

    Args:
        pattern: A, the softmax output.
        pattern_grad: G, the gradient of the loss with respect to it.
        scale: Softmax scale of the layer; 1 gives R~, the gradient with respect to the scores.

    Returns:
        R, in the dtype of the arguments; where it is positive, descent lowers this attention.
    """
    product = pattern * pattern_grad
    row_sum = product.sum(dim=-1, keepdim=True)
    return product.addcmul_(pattern, row_sum, value=-1).mul_(scale)


class _Tap(torch.autograd.Function):
    """Identity that makes its output depend on `token`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _token: Tensor, copy: bool) -> Tensor:  # noqa: ARG004
        # A copy where somebody else's hook comes next: such hooks edit in place, which autograd
        # forbids on a view and which would change the pattern that is kept.
        return x.clone() if copy else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:  # noqa: ARG004
        return grad_outputs[0], None, None


def _discard(_site: Site, _maps: dict[MapKind, Tensor]) -> None:
    """Receive maps of a run that is over."""


class Collector:
    """Hands the maps of each layer to `deliver` when that layer's gradient has arrived."""

    def __init__(self, lens: Lens, sites: dict[int, Site], deliver: Deliver) -> None:
        """Collect at `sites` of `lens`."""
        self._lens = lens
        self._sites = sites
        self._deliver = deliver
        self._token = torch.zeros((), requires_grad=True)
        self._patterns: dict[int, Tensor] = {}
        self._arrived: set[int] = set()
        self._consumed: set[int] = set()

    # ---- attaching ------------------------------------------------------------------------------

    @contextmanager
    def attached(self) -> Generator[None, None, None]:
        """Attach to the model: the patterns before every other hook, the block input after."""
        above: set[str] = set()  # self- and cross-attention of a decoder block share one input
        with ExitStack() as stack:
            for layer, site in self._sites.items():
                site.need_scale()
                point = self._lens.hook_points[site.pattern_name]
                # A pre-hook sees the tensor itself. Forward hooks come after other people's
                # edits, and after the wrapper that a backward hook puts around the HookPoint.
                handle = point.register_forward_pre_hook(self._at_pattern(layer), prepend=True)
                stack.callback(handle.remove)
                # Where the model goes on with the tensor hooked, the graph begins at the pattern.
                # Elsewhere it must begin above, and at every layer, as a hook may have replaced
                # what came before.
                if site.observe_only is not False:
                    above.add(self._lens.block_input_name(site))
            for name in above:
                point = self._lens.hook_points[name]
                stack.callback(point.register_forward_hook(self._tap_input).remove)
            stack.callback(self._release)
            yield

    def _release(self) -> None:
        # The model may keep the last pattern, whose gradient hooks hold this collector: it must
        # not hold the maps in turn.
        self._patterns.clear()
        self._deliver = _discard

    def _tap_input(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return self._tap(output, copy=True)

    def _tap(self, x: Tensor, *, copy: bool) -> Tensor:
        result: Any = _Tap.apply(x, self._token, copy)
        return result

    def _at_pattern(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # TransformerLens hooks are forward hooks of the HookPoint; where the pattern is only
            # shown, further hook points may get the same tensor.
            hooked = bool(module._forward_hooks)  # pyright: ignore[reportPrivateUsage]
            edited_next = hooked or self._sites[layer].observe_only is not False
            return (self.observe(layer, args[0], copy=edited_next), *args[1:])

        return hook

    def observe(self, layer: int, pattern: Tensor, *, copy: bool = True) -> Tensor:
        """Collect from a pattern; returns the tensor that the model goes on with.

        Args:
            layer: Its layer.
            pattern: The softmax output, as the model has it.
            copy: Whether other hooks may edit the tensor returned in place.
        """
        repeated = self._sites[layer].repeated
        if repeated and not torch.is_grad_enabled():
            self._patterns.pop(layer, None)  # what came before is not the last time either
            return pattern
        if not torch.is_grad_enabled():
            raise UnsupportedModel(
                "found gradients switched off (torch.no_grad) in a forward pass whose hooks "
                "collect them. Run the forward and the backward pass under torch.enable_grad(), "
                "or use run_with_ra, which does."
            )
        if layer in self._patterns and not repeated:
            raise UnsupportedModel(
                f"{self._sites[layer].pattern_name} fired twice before a backward pass. With "
                "get_ra_caching_hooks: run backward after each forward pass, and make the hooks "
                "again after a forward pass that failed or had none. Otherwise the model runs "
                "one layer repeatedly, which is not supported."
            )
        observe_only = self._sites[layer].observe_only
        if observe_only and not pattern.requires_grad:
            raise UnsupportedModel(
                f"the pattern of layer {layer} depends on nothing that can be differentiated: "
                "a hook replaces its queries and keys, and this model only shows the pattern "
                f"(hook_pattern is observe-only). Leave layer {layer} out with layers=, or drop "
                "that hook."
            )
        self._patterns[layer] = pattern.detach()
        tapped = self._tap(pattern, copy=copy)
        if observe_only is not False and pattern.requires_grad:
            # Whether the gradient comes through the tensor handed on, or past it, tells whether
            # the model uses what hooks return.
            pattern.register_hook(lambda grad: self._receive(layer, grad))
            tapped.register_hook(lambda _grad: self._consumed.add(layer))
        else:
            tapped.register_hook(lambda grad: self._receive(layer, grad, consumed=True))
        return tapped

    def root(self, residual: Tensor) -> Tensor:
        """Begin the graph at a residual stream that has none (all parameters frozen)."""
        return residual if residual.requires_grad else self._tap(residual, copy=True)

    # ---- gradients ------------------------------------------------------------------------------

    def _receive(self, layer: int, grad: Tensor, *, consumed: bool = False) -> None:
        # Of a layer that runs several times the last one's gradient comes first, and is kept.
        if consumed:  # the gradient came through the tensor that was handed on
            self._consumed.add(layer)
        pattern = self._patterns.pop(layer, None)
        if pattern is None:
            return  # a second backward pass through a graph that the user kept
        site = self._sites[layer]
        if site.observe_only is None:
            site = replace(site, observe_only=layer not in self._consumed)
            self._sites[layer] = site
            self._lens.learn_route(layer, observe_only=layer not in self._consumed)
        dtype = torch.float64 if pattern.dtype == torch.float64 else torch.float32
        pattern, grad = pattern.to(dtype), grad.detach().to(dtype)
        maps: dict[MapKind, Tensor] = {
            "ra": reversed_attention(pattern, grad, site.need_scale()),
            "pattern": pattern,
            "pattern_grad": grad,
        }
        self._arrived.add(layer)
        self._deliver(site, maps)

    def backward(self, total: Float[Tensor, ""]) -> None:
        """Differentiate `total` down to the first layer and deliver every layer's maps.

        Raises:
            NothingToDifferentiate: the loss does not depend on the attention.
            UnsupportedModel: a layer whose pattern was never seen, or is cut off from the loss.
        """
        unseen = [layer for layer in self._sites if layer not in self._patterns]
        if unseen:
            raise UnsupportedModel(
                f"hook_pattern of layers {unseen} did not fire in the forward pass, so there is "
                "nothing to read. The model probably runs fused attention: load it with "
                "attn_implementation='eager'."
            )
        if total.requires_grad:
            torch.autograd.grad(total, [self._token], allow_unused=True)
        missing = [layer for layer in self._sites if layer not in self._arrived]
        if len(missing) == len(self._sites):
            raise NothingToDifferentiate(
                "found a loss that does not depend on the attention of "
                f"layers {list(self._sites)}: no gradient reached hook_pattern. The metric must "
                "be computed from the logits it is given, without detach() or .item(), and hooks "
                "must not freeze every pattern, nor replace everything above these layers."
            )
        undecided = [layer for layer in missing if self._sites[layer].observe_only is None]
        if undecided:
            raise UnsupportedModel(
                f"no gradient reached hook_pattern of layers {undecided}, and it is not known yet "
                "whether a hook cuts them off from the loss or the model does not expose them. "
                "Call run_with_ra once without other hooks on the model first."
            )
        for layer in missing:  # really cut off by an edit: the gradient is zero
            self._receive(layer, torch.zeros_like(self._patterns[layer]))
