"""The oracle: Hugging Face's own eager models, their attention softmaxes open to the tests.

Nothing here comes from ra_lens or TransformerLens. While a forward pass runs, a torch function mode
sees every call. It keeps the input S of each attention softmax, so that autograd gives dL/dS, can
add to it (so that finite differences do) or edit its output A, and keeps the product q·k that came
before it, from which the softmax scale is measured. Everything is computed in float64, casts to
float32 included, unless the model cannot.

A softmax is attention's if its last two axes are (query, key) of this input and the ones before
them (example, head). That leaves out the routers of experts, whose last axis counts experts. A
softmax with one column more than there are keys has an attention sink, which is left out of S.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Loss = Callable[[Tensor], Tensor]
Edit = Callable[[int, Tensor], Tensor]
Asked = Sequence[tuple[list[int], int]]
"""Ids of questions, each with the first token of its answer."""

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum}
_ADDED_PRODUCTS = {torch.baddbmm, Tensor.baddbmm}


@dataclass
class Seen:
    """One attention softmax of a forward pass; tensors are [example, head, query, key].

    `factors` are what was multiplied to give `product`, `values` what the pattern was multiplied
    with, as the model's own code handed them over, with their graph.
    """

    site: int
    scores: Tensor
    pattern: Tensor
    product: Tensor | None
    factors: tuple[Tensor, Tensor] | None = None
    values: Tensor | None = None


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
        deltas: What to add to the softmax inputs, by call: as many as sites, unless some repeat.
        edit: What to make of the softmax output of a site (counted in the order of the first
            calls of their modules), [example, head, query, key].
    """

    def __init__(
        self,
        n_examples: int,
        lengths: set[tuple[int, int]],
        deltas: dict[int, Tensor],
        edit: Edit | None,
    ) -> None:
        super().__init__()
        self.n_examples, self.lengths = n_examples, lengths
        self.deltas, self.edit = deltas, edit
        self.seen: list[Seen] = []
        self.module = ""  # the attention module that is running
        self._sites: dict[str, int] = {}
        self._product: Tensor | None = None
        self._factors: tuple[Tensor, Tensor] | None = None

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
        if func in _PRODUCTS:
            args = tuple(_of_its_own(a) for a in args)
        out = func(*args, **kwargs)
        if func in _PRODUCTS:
            self._factors_of_values(args)
        if func in _PRODUCTS and self._is_attention(out):
            self._product = out.detach().clone()  # what comes next may divide it in place
            self._factors = (args[-2], args[-1])
        elif func in _ADDED_PRODUCTS and self._is_attention(out):
            left = _argument("batch1", 1, args, kwargs)
            right = _argument("batch2", 2, args, kwargs)
            self._product = (left @ right).detach()
            self._factors = (left, right)
        return out

    def _factors_of_values(self, args: tuple[Any, ...]) -> None:
        left, right = args[-2], args[-1]
        if not self.seen or self.seen[-1].values is not None or not self._is_attention(left):
            return
        if left.numel() == self.seen[-1].pattern.numel() and left.shape[-1] == right.shape[-2]:
            self.seen[-1].values = right

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
        if len(self.seen) in self.deltas:
            x = x + self.deltas[len(self.seen)]
        elif x.requires_grad:
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
        by_head = self._by_head(pattern.detach())[..., :n_keys]
        self.seen.append(Seen(site, x, by_head, product, self._factors))
        if self.edit is None:
            return pattern
        by_head = self._by_head(pattern)
        edited = self.edit(site, by_head[..., :n_keys]).to(pattern.dtype)
        return torch.cat([edited, by_head[..., n_keys:]], dim=-1).reshape(pattern.shape)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(self.n_examples, -1, *x.shape[-2:])


def _of_its_own(given: Any) -> Any:
    """A tensor as another one that the graph goes through, which autograd is asked about."""
    graph = isinstance(given, Tensor) and given.requires_grad
    return given.view_as(given) if graph else given


def _argument(name: str, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[index] if len(args) > index else kwargs.get(name)


class Oracle:
    """A Hugging Face model that gives logits, patterns, dL/dS and measured softmax scales.

    `inputs` of its methods are what the model reads beside the ids.
    """

    def __init__(self, model: Any, *, wide: bool = True) -> None:
        """Take over `model`, in eager mode, in float64; with `wide` False as it is."""
        self.model: Any = model.double() if wide else model
        self.wide = wide

    @classmethod
    def sound(cls, model: Any, ids: Tensor, **inputs: Any) -> Oracle:
        """In float64 if the model computes the same there as in float32."""
        narrow = cls(model, wide=False).logits(ids, **inputs)
        try:
            wide = cls(model)
            if float((wide.logits(ids, **inputs) - narrow).norm() / narrow.norm()) < 1e-4:
                return wide
        except Exception:  # not every model's code runs in float64
            pass
        return cls(model.float(), wide=False)

    def logits(
        self,
        ids: Tensor,
        deltas: dict[int, Tensor] | None = None,
        pattern_deltas: dict[int, Tensor] | None = None,
        edit: Edit | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Logits, with `deltas` (by call) added to the softmax inputs and `pattern_deltas` (by
        site) to the softmax outputs, or these edited, whenever a site runs."""
        edit = edit or adding(pattern_deltas)
        with torch.no_grad(), self._open(ids, deltas, edit, inputs) as (run, _seen):
            return run()

    def seen(
        self,
        ids: Tensor,
        loss: Loss,
        pattern_deltas: dict[int, Tensor] | None = None,
        edit: Edit | None = None,
        **inputs: Any,
    ) -> tuple[list[Tensor], list[Seen]]:
        """dL/dS of each site in the order of the model, and what was seen there.

        Of a layer that runs several times it is the last time that counts.
        """
        edit = edit or adding(pattern_deltas)
        with torch.enable_grad(), self._open(ids, None, edit, inputs) as (run, seen):
            total = loss(run())
        last = {one.site: one for one in seen}
        seen = [last[site] for site in sorted(last)]
        gradients = torch.autograd.grad(total, [one.scores for one in seen])
        by_head = [
            g.reshape(len(ids), -1, *g.shape[-2:])[..., : one.pattern.shape[-1]]
            for g, one in zip(gradients, seen, strict=True)
        ]
        return by_head, seen

    def with_graph(self, ids: Tensor, loss: Loss, **inputs: Any) -> tuple[Tensor, list[Seen]]:
        """The loss with its graph, and what was seen at each site in the order of the model."""
        with torch.enable_grad(), self._open(ids, None, None, inputs) as (run, seen):
            total = loss(run())
        last = {one.site: one for one in seen}
        return total, [last[site] for site in sorted(last)]

    def score_gradients(
        self,
        ids: Tensor,
        loss: Loss,
        pattern_deltas: dict[int, Tensor] | None = None,
        edit: Edit | None = None,
        **inputs: Any,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """dL/dS and A per site, each [batch, head, query, key], by autograd."""
        gradients, seen = self.seen(ids, loss, pattern_deltas, edit, **inputs)
        return gradients, [one.pattern for one in seen]

    def all_gradients(
        self, ids: Tensor, loss: Loss, sites: Sequence[int]
    ) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """dL/dS, A and dL/dA of some sites, each [batch, head, query, key], by autograd."""
        added = {site: torch.zeros((), dtype=torch.float64) for site in sites}

        def edit(site: int, pattern: Tensor) -> Tensor:
            if site not in added:
                return pattern
            added[site] = torch.zeros_like(pattern, requires_grad=True)
            return pattern + added[site]

        with torch.enable_grad(), self._open(ids, None, edit, {}) as (run, seen):
            total = loss(run())
        by_site = {one.site: one for one in seen}
        asked = [by_site[site].scores for site in sites] + [added[site] for site in sites]
        found = torch.autograd.grad(total, asked)
        return {
            site: (found[i], by_site[site].pattern, found[len(sites) + i])
            for i, site in enumerate(sites)
        }

    def gradient(self, by: Tensor, ids: Tensor, loss: Loss, edit: Edit, **inputs: Any) -> Tensor:
        """Gradient of the loss by what an edit of the patterns makes use of."""
        with torch.enable_grad(), self._open(ids, None, edit, inputs) as (run, _seen):
            (found,) = torch.autograd.grad(loss(run()), [by])
        return found

    def ra(self, ids: Tensor, loss: Loss, scales: Sequence[float]) -> list[Tensor]:
        """R per layer: dL/d(q·k) = scale · dL/dS."""
        gradients, _ = self.score_gradients(ids, loss)
        return [g * c for g, c in zip(gradients, scales, strict=True)]

    def finite_differences(
        self, ids: Tensor, loss: Loss, layer: int, directions: Tensor, step: float = 1e-4
    ) -> Tensor:
        """Central differences of the loss of one example ([1, pos]) along score perturbations.

        `directions` is [n, head, query, key]; `loss` gives one value per example.
        """
        many = ids.expand(directions.shape[0], -1)
        up = loss(self.logits(many, {layer: step * directions}))
        down = loss(self.logits(many, {layer: -step * directions}))
        return (up - down) / (2 * step)

    def sites_called(self, ids: Tensor, **inputs: Any) -> list[int]:
        """The site of each attention softmax, in the order in which they are run."""
        with torch.no_grad(), self._open(ids, None, None, inputs) as (run, seen):
            run()
        return [one.site for one in seen]

    def projected_products(self, ids: Tensor, **inputs: Any) -> list[Tensor]:
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
            with torch.no_grad(), self._open(ids, None, None, inputs) as (run, seen):
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
    def _open(
        self,
        ids: Tensor,
        deltas: dict[int, Tensor] | None,
        edit: Edit | None,
        inputs: dict[str, Any],
    ) -> Iterator[tuple[Callable[[], Tensor], list[Seen]]]:
        n = ids.shape[1]
        lengths = {(n, n)}
        if "decoder_input_ids" in inputs:
            m = inputs["decoder_input_ids"].shape[1]
            lengths |= {(m, m), (m, n)}
        mode = Open(len(ids), lengths, deltas or {}, edit)

        def run() -> Tensor:
            with Wide() if self.wide else nullcontext(), mode:
                return self.model(ids, use_cache=False, **inputs).logits

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


def adding(deltas: dict[int, Tensor] | None) -> Edit | None:
    """The edit that adds maps to the patterns of some sites."""
    if not deltas:
        return None
    return lambda site, pattern: pattern + deltas.get(site, 0.0)


def load_oracle(folder: Path) -> Oracle:
    """The model of a folder, in float64."""
    auto = transformers.AutoModelForCausalLM
    return Oracle(auto.from_pretrained(str(folder), attn_implementation="eager").eval())


def nll(*tokens: int) -> Loss:
    """−log p of one token per example at the last position, summed."""

    def loss(logits: Tensor) -> Tensor:
        return -sum(logits[i, -1].log_softmax(-1)[t] for i, t in enumerate(tokens))

    return loss


class HFHeads:
    """A model whose heads can be changed: rows of W_O set to zero, or what W_O reads replaced."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), attn_implementation="eager", dtype=dtype
        ).eval()
        cfg = self.model.config
        self.n_layers = cfg.num_hidden_layers
        same = [cfg.num_attention_heads] * self.n_layers
        self.n_heads = getattr(cfg, "num_attention_heads_per_layer", None) or same
        self._blocks: Any = next(
            m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m)
        )

    def attention(self, layer: int) -> Any:
        block = self._blocks[layer]
        return block.attn if hasattr(block, "attn") else block.self_attn

    def output(self, layer: int) -> Any:
        """The module that holds W_O."""
        names = ("c_proj", "o_proj", "out_proj")
        return next(m for n, m in self.attention(layer).named_children() if n in names)

    def value_bias(self, layer: int) -> Tensor:
        """b_V, heads one after the other."""
        attention = self.attention(layer)
        if hasattr(attention, "c_attn"):  # GPT-2: queries, keys and values in one
            return attention.c_attn.bias.detach().chunk(3)[2]
        return attention.v_proj.bias.detach()

    def rows(self, layer: int, head: int) -> tuple[Tensor, slice]:
        """W_O as [in, out] (a view of the weight), and the rows of a head in it."""
        module = self.output(layer)
        # Conv1D is input × output, nn.Linear output × input.
        weight = module.weight.data.T if isinstance(module, nn.Linear) else module.weight.data
        size = weight.shape[0] // self.n_heads[layer]
        return weight, slice(head * size, (head + 1) * size)

    @contextmanager
    def zeroed(self, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
        """The rows of W_O of some (layer, head) are zero; the output bias stays."""
        before = [(*self.rows(layer, head),) for layer, head in heads]
        kept = [weight[rows].clone() for weight, rows in before]
        try:
            for weight, rows in before:
                weight[rows] = 0.0
            yield
        finally:
            for (weight, rows), value in zip(before, kept, strict=True):
                weight[rows] = value

    @contextmanager
    def replaced(
        self, layer: int, head: int, position: int | slice, value: Tensor
    ) -> Iterator[None]:
        """What W_O reads from one head at one position, or at some, is `value`."""
        _, rows = self.rows(layer, head)

        def put(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].clone()
            z[:, position, rows] = value.to(z.dtype)
            return (z,)

        handle = self.output(layer).register_forward_pre_hook(put)
        try:
            yield
        finally:
            handle.remove()

    def z(self, ids: Tensor) -> list[Tensor]:
        """What W_O reads in each layer, [batch, pos, heads · d_head]."""
        seen: list[Tensor] = []
        handles = [
            self.output(layer).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
            for layer in range(self.n_layers)
        ]
        try:
            self.logits(ids)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(ids).logits

    def probability(self, ids: list[int], token: int) -> float:
        """p(token) after the last of `ids`."""
        return float(self.logits(torch.tensor([ids]))[0, -1].double().softmax(-1)[token])

    def lost(self, asked: Asked, layer: int, head: int) -> float:
        """What zeroed rows of W_O cost the answers, on average."""
        with self.zeroed([(layer, head)]):
            after = [self.probability(*one) for one in asked]
        return self._mean_loss(asked, after)

    def lost_at_the_end(self, asked: Asked, layer: int, head: int) -> float:
        """What it costs the answers that a head gives nothing at the last token."""
        _, rows = self.rows(layer, head)
        nothing = torch.zeros(rows.stop - rows.start)
        after: list[float] = []
        for ids, token in asked:
            with self.replaced(layer, head, len(ids) - 1, nothing):
                after.append(self.probability(ids, token))
        return self._mean_loss(asked, after)

    def gained(self, asked: Asked, right: Sequence[list[int]], layer: int, head: int) -> float:
        """What the answers gain by the mean of a head at the end of the others in `right`."""
        _, rows = self.rows(layer, head)
        last = [self.z(torch.tensor([ids]))[layer][0, -1, rows].double() for ids in right]
        after: list[float] = []
        for i, (ids, token) in enumerate(asked):
            mean = torch.stack([z for j, z in enumerate(last) if j != i]).mean(0)
            with self.replaced(layer, head, len(ids) - 1, mean):
                after.append(self.probability(ids, token))
        return -self._mean_loss(asked, after)

    def _mean_loss(self, asked: Asked, after: list[float]) -> float:
        before = sum(self.probability(*one) for one in asked)
        return (before - sum(after)) / len(asked)
