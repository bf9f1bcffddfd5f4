"""What each head reads and gives at every token, and the gradient of the loss at it.

Of an attention layer with heads h, queries q and keys k (paper, section 3),

    q = x W_Q + b_Q,  k = x W_K + b_K,  v = x W_V + b_V        then rotated, normalised …
    S = c·q·k,  A = softmax(S),  z = A·v,  out = Σ_h z W_O + b_O

    kind                      shape                       what it is, and the TransformerLens hook
    query_in, key_in,         [batch, pos, d_model]       x, what W_Q, W_K and W_V read; on a bridge
    value_in                                              attn.q.hook_in, k.hook_in, v.hook_in
    q_grad, k_grad, v_grad    [batch, pos, head, d_head]  gradient at what the projections give,
                                                          before rotation and norms: hook_q, hook_k,
                                                          hook_v
    query, key                [batch, pos, head, d_head]  q and k as they enter their product:
                                                          hook_rot_q, hook_rot_k where the model
                                                          rotates, hook_q, hook_k where not, less
                                                          norms that come after the hook
    value                     [batch, pos, head, d_head]  v as the pattern is applied to it: hook_v
    z                         [batch, pos, head, d_head]  what the heads give to W_O: hook_z
    query_grad, key_grad,     as those                    δ_q, δ_k, δ_v and e: the gradients there
    value_grad, z_grad
    attn_out_grad             [batch, pos, d_model]       δ_o, the gradient at the layer's output:
                                                          hook_attn_out, where no norm precedes it

Keys and values have as many heads as the model has key/value heads; their gradients are summed over
the query heads of a group. A positive gradient: the loss rises along it, and descent goes the other
way. `ra_lens.vjp` has the paper's equations between these; here autograd gives each of them.

How they are found. Keys, queries and values are the factors of the two products of the layer, which
autograd keeps for its backward pass (`ra_lens.model.products`); so they are what the model really
multiplies, whatever it did before, in every class of attention. Where a model scales its queries
before the product, c is taken out again. The graph begins at the input of each block, not at its
pattern, so that the first layer collected costs a little more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ra_lens.model import Lens, Site
from ra_lens.model.products import product_behind
from ra_lens.model.projections import Projections
from ra_lens.model.sites import VectorKind


class VectorCollector:
    """Keeps vectors of the layers of one forward and backward pass."""

    def __init__(
        self,
        lens: Lens,
        sites: dict[int, Site],
        kinds: frozenset[VectorKind],
        root: Callable[[Tensor], Tensor],
    ) -> None:
        """Keep `kinds` of vectors at `sites`.

        `root` makes a tensor that depends on nothing one of which a gradient can be asked.
        """
        self._lens, self._sites, self._kinds, self._root = lens, sites, kinds, root
        self._found: dict[int, dict[VectorKind, Tensor]] = {layer: {} for layer in sites}
        self._shapes: dict[int, dict[VectorKind, Tensor]] = {layer: {} for layer in sites}
        self._times: Counter[tuple[int, str]] = Counter()  # how often each was shown

    def _want(self, *kinds: VectorKind) -> bool:
        return not self._kinds.isdisjoint(kinds)

    # ---- attaching ------------------------------------------------------------------------------

    @contextmanager
    def attached(self) -> Generator[None, None, None]:
        """Attach to the model; what is behind the patterns is found by `at_pattern`."""
        with ExitStack() as stack:

            def before(point: nn.Module | None, hook: Callable[..., Any]) -> None:
                if point is not None:
                    stack.callback(point.register_forward_pre_hook(hook, prepend=True).remove)

            def after(point: nn.Module | None, hook: Callable[..., Any]) -> None:
                if point is not None:
                    stack.callback(point.register_forward_hook(hook).remove)

            for layer, site in self._sites.items():
                at = Projections(self._lens, site)
                if self._want("value", "value_grad"):
                    before(at.z, partial(self._at_product_with_values, layer))
                if self._want("z", "z_grad"):
                    after(at.z, partial(self._at_z, layer))
                if self._want("attn_out_grad"):
                    after(at.out, partial(self._at_out, layer))
                for name, grad in at.GRADIENTS.items():
                    if self._want(grad):
                        before(at.gives(name), partial(self._at_projection, layer, grad))
                if at.reads_by_name and self._want(*at.INPUTS):
                    read = partial(self._at_inputs, layer)
                    handle = at.module.register_forward_pre_hook(read, with_kwargs=True)
                    stack.callback(handle.remove)
                elif not at.reads_by_name:
                    for kind in filter(self._want, at.INPUTS):
                        after(at.reads(kind), partial(self._at_input, layer, kind))
            yield

    # ---- in the forward pass --------------------------------------------------------------------

    def at_pattern(self, layer: int, pattern: Tensor) -> None:
        """Find queries and keys behind a pattern that has just been made."""
        if not self._want("query", "key", "query_grad", "key_grad"):
            return
        site = self._sites[layer]
        n, n_heads, rows, columns = pattern.shape
        product = product_behind(pattern, rows, columns)
        if product is None:  # a hook replaces queries or keys, so that autograd keeps none
            return
        times = product.factor / site.need_scale()  # 1 where nothing was scaled before the product

        def of_queries(left: Tensor) -> Tensor:
            return left.unflatten(0, (n, n_heads)).transpose(1, 2)

        def of_keys(right: Tensor) -> Tensor:
            return right.unflatten(0, (n, n_heads)).permute(0, 3, 1, 2)

        query, key = of_queries(product.left), _first_of_group(site, of_keys(product.right))
        self._keep(layer, "query", query if times == 1 else query * times)
        self._keep(layer, "key", key)
        self._expect(layer, "query_grad", query)
        self._expect(layer, "key_grad", key)
        latest = self._latest(layer, "query")

        def receive(left: Tensor | None, right: Tensor | None) -> None:
            if latest() and left is not None and right is not None:
                grad = of_queries(left)
                self._keep(layer, "query_grad", grad if times == 1 else grad / times)
                self._keep(layer, "key_grad", _sum_of_group(site, of_keys(right)))

        if self._want("query_grad", "key_grad"):
            product.on_gradients(receive)

    def _at_product_with_values(
        self, layer: int, _module: nn.Module, args: tuple[Any, ...]
    ) -> None:
        site, z = self._sites[layer], args[0]
        product = product_behind(z, z.shape[1]) if torch.is_grad_enabled() else None
        if product is None:
            return

        n = z.shape[0]  # z itself must not be held by a hook of the graph that z holds

        def of_values(right: Tensor) -> Tensor:
            return right.unflatten(0, (n, site.n_heads)).transpose(1, 2)

        value = _first_of_group(site, of_values(product.right))
        self._keep(layer, "value", value)
        self._expect(layer, "value_grad", value)
        latest = self._latest(layer, "value")

        def receive(_left: Tensor | None, right: Tensor | None) -> None:
            if latest() and right is not None:
                self._keep(layer, "value_grad", _sum_of_group(site, of_values(right)))

        if self._want("value_grad"):
            product.on_gradients(receive)

    def _at_z(self, layer: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        rooted = output if output.requires_grad else self._root(output)
        by_head = rooted.detach().reshape(*rooted.shape[:2], self._sites[layer].n_heads, -1)
        self._keep(layer, "z", by_head)
        self._keep_gradient(layer, "z_grad", rooted, by_head.shape)
        return rooted

    def _at_out(self, layer: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        rooted = output if output.requires_grad else self._root(output)
        self._keep_gradient(layer, "attn_out_grad", rooted, rooted.shape)
        return rooted

    def _at_projection(
        self, layer: int, kind: VectorKind, _module: nn.Module, args: tuple[Any, ...]
    ) -> None:
        site, given = self._sites[layer], args[0]
        if not torch.is_grad_enabled() or not given.requires_grad:
            return
        heads = site.n_heads if kind == "q_grad" else site.n_key_value_heads
        shape, group = (*given.shape[:2], heads, given[0, 0].numel() // heads), None
        if given.ndim == 4 and given.shape[2] > heads:
            # A HookedTransformer that gives every query head keys of its own, all of one weight.
            shape, group = tuple(given.shape), site
        self._keep_gradient(layer, kind, given, shape, group)

    def _at_input(
        self, layer: int, kind: VectorKind, _module: nn.Module, _args: Any, output: Tensor
    ) -> None:
        self._keep(layer, kind, output.detach())

    def _at_inputs(
        self, layer: int, _module: nn.Module, _args: Any, kwargs: dict[str, Tensor]
    ) -> None:
        # TransformerLens calls its own attention with query_input, key_input and value_input.
        for kind in Projections.INPUTS:
            given = kwargs[f"{kind}put"]
            if given.ndim == 3:  # of split inputs there is one for each head
                self._keep(layer, kind, given.detach())

    # ---- keeping --------------------------------------------------------------------------------

    def _keep_gradient(
        self,
        layer: int,
        kind: VectorKind,
        at: Tensor,
        shape: tuple[int, ...],
        group: Site | None = None,
    ) -> None:
        """Keep the gradient that will arrive at a tensor, in this shape; of a group, its sum."""
        if kind not in self._kinds:
            return

        def laid_out(value: Tensor) -> Tensor:
            value = value.reshape(shape)
            return value if group is None else _sum_of_group(group, value)

        self._expect(layer, kind, laid_out(at.detach()))
        latest = self._latest(layer, kind)

        def receive(grad: Tensor) -> None:
            if latest():
                self._keep(layer, kind, laid_out(grad))

        at.register_hook(receive)

    def _latest(self, layer: int, what: str) -> Callable[[], bool]:
        """Tell later whether nothing else was shown there meanwhile."""
        # Of a layer that runs several times the vectors are those of the last.
        self._times[layer, what] += 1
        time = self._times[layer, what]
        return lambda: self._times[layer, what] == time

    def _keep(self, layer: int, kind: VectorKind, value: Tensor) -> None:
        if kind in self._kinds:
            self._found[layer][kind] = value

    def _expect(self, layer: int, kind: VectorKind, like: Tensor) -> None:
        """Remember the shape of a gradient, which is 0 where none arrives."""
        if kind in self._kinds:
            self._shapes[layer][kind] = like.detach().new_zeros(()).expand(like.shape)

    # ---- afterwards -----------------------------------------------------------------------------

    def found(self, loss_scale: float = 1.0) -> Iterator[tuple[Site, dict[VectorKind, Tensor]]]:
        """Give what was found, layer by layer, in float32 at least.

        Gradients are divided by `loss_scale`, and 0 where the loss does not depend on what there is
        the gradient of.
        """
        for layer, found in self._found.items():
            found |= {k: zero for k, zero in self._shapes[layer].items() if k not in found}
            vectors = dict[VectorKind, Tensor]()
            for kind, value in found.items():
                wide = value.to(torch.promote_types(value.dtype, torch.float32))
                scaled = loss_scale != 1 and kind.endswith("_grad")
                vectors[kind] = wide / loss_scale if scaled else wide
            found.clear()
            yield self._sites[layer], vectors


def _first_of_group(site: Site, per_query_head: Tensor) -> Tensor:
    """One head for each key/value head, where they were repeated for their query heads."""
    share = per_query_head.shape[2] // site.n_key_value_heads
    return per_query_head if share == 1 else per_query_head[:, :, ::share].contiguous()


def _sum_of_group(site: Site, per_query_head: Tensor) -> Tensor:
    share = per_query_head.shape[2] // site.n_key_value_heads
    return per_query_head if share == 1 else per_query_head.unflatten(2, (-1, share)).sum(3)
