"""The oracle: Hugging Face's own eager model, its attention softmaxes open to the tests.

Nothing here comes from ra_lens or TransformerLens. While a forward pass runs, a torch function mode
sees every call. It keeps the input S of each attention softmax, so that autograd gives dL/dS, adds
maps to its output, and keeps the product q·k that came before it, from which the softmax scale is
measured. Everything is computed in float64, casts to float32 included, unless the model cannot.

A softmax is attention's if its last two axes are (query, key) of this input and the ones before
them (example, head). That leaves out the routers of experts, whose last axis counts experts. A
softmax with one column more than there are keys has an attention sink, which is left out of S.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Loss = Callable[[Tensor], Tensor]
Edit = Callable[[int, Tensor], Tensor]

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum}
_ADDED_PRODUCTS = {torch.baddbmm, Tensor.baddbmm}


@dataclass
class Seen:
    """One attention softmax of a forward pass; tensors are [example, head, query, key]."""

    site: int
    scores: Tensor
    pattern: Tensor
    product: Tensor | None


class Wide(TorchFunctionMode):
    """Casts to float32, of which models' code has many, give float64 while this is open."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)


class Open(TorchFunctionMode):
    """Opens the attention softmaxes of a forward pass.

    Args:
        n_examples: Size of the batch.
        lengths: The (queries, keys) that attention has here.
        edit: What to make of the softmax output of a site (counted in the order of the first
            calls of their modules), [example, head, query, key].
    """

    def __init__(self, n_examples: int, lengths: set[tuple[int, int]], edit: Edit | None) -> None:
        super().__init__()
        self.n_examples, self.lengths, self.edit = n_examples, lengths, edit
        self.seen: list[Seen] = []
        self.module = ""  # the attention module that is running
        self._sites: dict[str, int] = {}
        self._product: Tensor | None = None

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SOFTMAX and self._is_attention(_argument("input", 0, args, kwargs)):
            return self._softmax(func, args, kwargs)
        out = func(*args, **kwargs)
        if func in _PRODUCTS and self._is_attention(out):
            self._product = out.detach().clone()  # what comes next may divide it in place
        elif func in _ADDED_PRODUCTS and self._is_attention(out):
            left = _argument("batch1", 1, args, kwargs)
            right = _argument("batch2", 2, args, kwargs)
            self._product = (left @ right).detach()
        return out

    def _is_attention(self, x: object) -> bool:
        if not isinstance(x, Tensor) or x.ndim not in (3, 4):
            return False
        n_queries, n_keys = x.shape[-2:]
        fits = any(n_queries == q and n_keys in (k, k + 1) for q, k in self.lengths)
        if x.ndim == 4:
            return fits and x.shape[0] == self.n_examples
        return fits and x.shape[0] > self.n_examples and x.shape[0] % self.n_examples == 0

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x = _argument("input", 0, args, kwargs)
        if x.requires_grad:
            x = x.view_as(x)  # a tensor of its own, which autograd is asked about
        args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})
        pattern = func(*args, **kwargs)
        keys = {k for q, k in self.lengths if q == x.shape[-2] and x.shape[-1] in (k, k + 1)}
        n_keys = x.shape[-1] if x.shape[-1] in keys else x.shape[-1] - 1
        product = self._product
        if product is not None and product.numel() == x[..., :n_keys].numel():
            product = self._by_head(product)
        else:
            product = None
        site = self._sites.setdefault(self.module, len(self._sites))
        self.seen.append(Seen(site, x, self._by_head(pattern.detach())[..., :n_keys], product))
        if self.edit is None:
            return pattern
        by_head = self._by_head(pattern)
        edited = self.edit(site, by_head[..., :n_keys]).to(pattern.dtype)
        return torch.cat([edited, by_head[..., n_keys:]], dim=-1).reshape(pattern.shape)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(self.n_examples, -1, *x.shape[-2:])


def _argument(name: str, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[index] if len(args) > index else kwargs.get(name)


class Reference:
    """A Hugging Face model that gives logits, patterns, dL/dS and measured softmax scales."""

    def __init__(
        self, model: Any, ids: Tensor, *, decoder_ids: Tensor | None = None, wide: bool = True
    ) -> None:
        """Take over `model`, in float64 if it computes the same there as in float32.

        Args:
            model: In eager mode.
            ids: What it reads.
            decoder_ids: What its decoder reads, if it has an encoder as well.
            wide: False: leave the model in the type it has.
        """
        self.model = model
        self.ids, self.decoder_ids = ids, decoder_ids
        self.wide = False
        if not wide:
            return
        narrow = self.logits()
        try:
            self.model = model.double()
            self.wide = True
            error = float((self.logits() - narrow).norm() / narrow.norm())
            sound = error < 1e-4
        except Exception:  # not every model's code runs in float64
            sound = False
        if not sound:
            self.model, self.wide = model.float(), False

    def logits(self, edit: Edit | None = None) -> Tensor:
        """Logits, with an edit of the softmax output of every site, whenever it runs."""
        with torch.no_grad(), self._open(edit) as (run, _seen):
            return run()

    def score_gradients(self, loss: Loss) -> tuple[list[Tensor], list[Seen]]:
        """dL/dS of each site in the order of the model, and what was seen there.

        Of a layer that runs several times it is the last time that counts.
        """
        with torch.enable_grad(), self._open(None) as (run, seen):
            total = loss(run())
        last = {one.site: one for one in seen}
        seen = [last[site] for site in sorted(last)]
        gradients = torch.autograd.grad(total, [one.scores for one in seen])
        n = self.ids.shape[0]
        by_head = [
            g.reshape(n, -1, *g.shape[-2:])[..., : one.pattern.shape[-1]]
            for g, one in zip(gradients, seen, strict=True)
        ]
        return by_head, seen

    def projected_products(self) -> list[Tensor]:
        """q·k per attention layer from the outputs of its q_proj and k_proj as they are.

        For models without rotation that scale q between the projection and the product.
        """
        outputs: dict[str, list[Tensor]] = {"q_proj": [], "k_proj": []}

        def keep(kind: str) -> Callable[..., None]:
            return lambda _module, _args, out: outputs[kind].append(out)

        handles = [
            module.register_forward_hook(keep(name.rpartition(".")[2]))
            for name, module in self.model.named_modules()
            if name.rpartition(".")[2] in outputs
        ]
        try:
            with torch.no_grad(), self._open(None) as (run, seen):
                run()
        finally:
            for handle in handles:
                handle.remove()
        products: list[Tensor] = []
        for one, *pair in zip(seen, outputs["q_proj"], outputs["k_proj"], strict=True):
            n_heads = one.pattern.shape[1]
            q, k = (x.reshape(*x.shape[:2], n_heads, -1).transpose(1, 2) for x in pair)
            products.append(q @ k.transpose(-1, -2))
        return products

    @contextmanager
    def _open(self, edit: Edit | None) -> Iterator[tuple[Callable[[], Tensor], list[Seen]]]:
        n, inputs = self.ids.shape[1], {}
        lengths = {(n, n)}
        if self.decoder_ids is not None:
            m = self.decoder_ids.shape[1]
            inputs["decoder_input_ids"] = self.decoder_ids
            lengths |= {(m, m), (m, n)}
        mode = Open(self.ids.shape[0], lengths, edit)

        def run() -> Tensor:
            with Wide() if self.wide else nullcontext(), mode:
                return self.model(self.ids, use_cache=False, **inputs).logits

        def entering(name: str) -> Callable[..., None]:
            return lambda _module, _args: setattr(mode, "module", name)

        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if self.wide else torch.float32)
        handles = [
            module.register_forward_pre_hook(entering(name))
            for name, module in self.model.named_modules()
            if "Attention" in type(module).__name__
        ]
        try:
            yield run, mode.seen
        finally:
            torch.set_default_dtype(before)
            for handle in handles:
                handle.remove()


def measured_scale(seen: Seen, *, softcap: float | None = None) -> float | None:
    """Factor c in S = c·(q·k) + bias, from two examples; None where it cannot be told.

    A bias that depends only on positions drops out of the difference of two examples, one that is
    constant along a row drops out with the row's mean. What remains must be a multiple of the
    products; if it is not, no factor is given.
    """
    if seen.product is None:
        return None
    scores = seen.scores.detach()
    scores = scores.reshape(seen.product.shape[0], -1, *scores.shape[-2:])
    scores = scores[..., : seen.product.shape[-1]].double()
    if softcap is not None:
        inside = (scores / softcap).clamp(-1 + 1e-12, 1 - 1e-12)
        allowed = scores > -1.01 * softcap
        scores = torch.where(allowed, softcap * torch.atanh(inside), scores)
    else:
        allowed = scores > -1e4
    both = allowed.all(dim=0, keepdim=True)
    s = _centred(scores[:1] - scores[1:2], both)
    p = _centred((seen.product[:1] - seen.product[1:2]).double(), both)
    factor = float((s * p).sum() / (p * p).sum())
    left = float((s - factor * p).norm() / s.norm())
    return factor if left < 1e-3 else None


def _centred(x: Tensor, where: Tensor) -> Tensor:
    x = torch.where(where, x, 0.0)
    mean = x.sum(-1, keepdim=True) / where.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(where, x - mean, 0.0)


def nll(*tokens: int) -> Loss:
    """−log p of one token per example at the last position, summed."""

    def loss(logits: Tensor) -> Tensor:
        return -sum(logits[i, -1].log_softmax(-1)[t] for i, t in enumerate(tokens))

    return loss
