"""Attention in blocks of query rows, for prompts whose maps of one layer would not fit.

A row of a pattern hangs on its own query and on the keys and values up to it; a row of R~ on its
own row of A and of G. So a block of the model can run piece by piece: some tokens at a time, each
piece after the keys and values of the tokens before, which is what the model's own key/value cache
is for. Nothing else of a block passes from one token to another, and no map is wider than a piece.

Forwards, without a graph: each piece hands its keys and values to the next ones; kept are the
block's input and all its keys and values. Backwards the last piece comes first. It runs again, with
a graph, from the kept keys and values of the tokens before it, and leaves a gradient at them; a
piece's own keys and values get theirs from all later pieces, before it is its turn. So every piece
runs backwards once, and the sums are those of the whole map in another order.

Memory, beside the model, for n tokens and pieces of r: three tensors of n · d_model for each layer,
and the graph of one piece, whose maps are heads · r · n. Cost: one more forward pass, as for every
recomputing; the keys are turned by rotary positions once for each piece in HookedTransformer, which
caches them unturned.

It needs a causal model without padding, in whose blocks attention is all that passes between
tokens, and takes keys and values from its cache. Of what else a block is given, masks and rotary
angles for instance, a piece gets its own part. Which dimensions are tokens is not told from their
size, as a prompt may be as long as a head is wide: two short prompts show it (`learn_layout`).
Whoever uses this compares it with a plain run first (`ra_lens.rows` does).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ra_lens.errors import UnsupportedModel
from ra_lens.model.blocks import Rewire, autocast_options, is_cache
from ra_lens.model.forward import with_forward
from ra_lens.model.lens import Lens
from ra_lens.model.prefix import hugging_face_cache

# Arguments whose only dimension of tokens is that of the keys; of all others it is the queries.
_OF_KEYS = ("attention_mask", "alibi", "position_bias")
_LENGTHS = (7, 5)  # of the prompts that show which dimensions are tokens
_layouts: weakref.WeakKeyDictionary[nn.Module, dict[object, Layout]] = weakref.WeakKeyDictionary()


class Layout:
    """Which dimensions of each argument of a block are as long as the prompt, whatever its length.

    An argument is known by its place: `[1]['position_embeddings'][0]`.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._dims: dict[str, set[int]] = {}

    def note(self, given: Any) -> None:
        """Note what a block is given for a prompt."""
        leaves, _ = pytree.tree_flatten_with_path(given, is_leaf=is_cache)
        n = next((leaf.shape[1] for _, leaf in leaves if _is_residual(leaf)), None)
        for path, leaf in leaves:
            if isinstance(leaf, Tensor):
                place = pytree.keystr(path)
                found = {i for i, size in enumerate(leaf.shape) if size == n}
                self._dims[place] = self._dims.get(place, found) & found

    def piece(self, value: Tensor, path: Any, start: int, end: int) -> Tensor:
        """What of an argument belongs to the queries from `start` to `end` and keys before `end`.

        Raises:
            UnsupportedModel: the short prompts did not show what it is.
        """
        dims = sorted(self._dims.get(pytree.keystr(path), {value.ndim}))
        if any(dim >= value.ndim for dim in dims) or len(dims) > 2:
            raise UnsupportedModel(
                f"a block is given {pytree.keystr(path[1:])}, which short prompts did not show"
            )
        of_keys = len(dims) == 2 or getattr(path[1], "key", None) in _OF_KEYS
        if dims and of_keys:
            value = value.narrow(dims.pop(), 0, end)
        return value.narrow(dims[0], start, end - start) if dims else value


def learn_layout(lens: Lens) -> None:
    """Find out by two short forward passes what of a block's arguments is tokens, for `in_rows`."""
    layout = Layout()

    def noted(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            layout.note((args, kwargs))
            return forward(*args, **kwargs)

        return call

    runs = {block: noted(block.forward) for block in lens.blocks_from(min(lens.sites))}
    for n in _LENGTHS:
        tokens = torch.arange(n, device=lens.device).unsqueeze(0) % lens.d_vocab
        with torch.no_grad(), lens.tensors_put_back(), lens.running(None), with_forward(dict(runs)):
            lens.forward(tokens, torch.ones_like(tokens, dtype=torch.bool), past=_options(lens))
    _layouts.setdefault(lens.module, {})[lens.state] = layout


def _options(lens: Lens) -> Mapping[str, Any]:
    """What a forward pass whose blocks run in pieces is given."""
    if lens.kind == "HookedTransformer":
        return {}
    return {"past_key_values": hugging_face_cache(lens), "use_cache": True}


@contextmanager
def in_rows(
    lens: Lens, first: int, token: Tensor, n_rows: int, rewire: Rewire
) -> Generator[Mapping[str, Any], None, None]:
    """Run all blocks with attention in pieces of `n_rows` tokens, in the context.

    Those from attention layer `first` on are tied to `token`; the ones before have no graph.
    `rewire` is shown what a piece gives when it has run with a graph. Gives the options that the
    forward pass needs (`Lens.forward(past=...)`). `learn_layout` comes first.
    """
    hooked, layout = lens.kind == "HookedTransformer", _layouts[lens.module][lens.state]
    tied = lens.blocks_from(first)
    runs = {
        block: _Block(
            block.forward, token if block in tied else None, n_rows, rewire, layout, hooked
        )
        for block in lens.blocks_from(min(lens.sites))
    }
    with with_forward(dict(runs)):
        yield _options(lens)


@dataclass(frozen=True)
class _Block:
    """A block's forward pass, in pieces, with one autograd node in place of its graph."""

    forward: Callable[..., Any]
    token: Tensor | None  # None: without a graph
    n_rows: int
    rewire: Rewire
    layout: Layout
    hooked: bool  # a HookedTransformer, whose cache is another

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, _ = pytree.tree_flatten((args, kwargs), is_leaf=is_cache)
        at = next((i for i, x in enumerate(leaves) if _is_residual(x)), None)
        moving = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        if at is None or set(moving) - {at}:
            raise self.refuse("takes more than the residual stream")
        call = _Call(self, args, kwargs, leaves[at])
        with torch.set_grad_enabled(self.token is not None and torch.is_grad_enabled()):
            made: Any = _Pieces.apply(call, self.token, leaves[at])
        found, form = call.output
        return pytree.tree_unflatten([made if x is _RESIDUAL else x for x in found], form)

    def refuse(self, what: str) -> UnsupportedModel:
        """What to raise where a block does something else than it must."""
        return UnsupportedModel(f"a block {what}")


_RESIDUAL = object()


def _is_residual(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim == 3 and leaf.is_floating_point()


class _Call:
    """One call of a block, with what it was given; runs pieces of it."""

    def __init__(
        self, block: _Block, args: tuple[Any, ...], kwargs: dict[str, Any], whole: Tensor
    ) -> None:
        self.block, self.args, self.kwargs, self.whole = block, args, kwargs, whole
        self.n = whole.shape[1]
        self.output: Any = None

    def pieces(self) -> list[tuple[int, int]]:
        """First token of each piece, and the first after it."""
        size = self.block.n_rows
        return [(a, min(a + size, self.n)) for a in range(0, self.n, size)]

    def run(
        self, x: Tensor, start: int, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the tokens from `start` on after the keys and values before; give theirs too."""
        cache, end = _Cache(past, 1 if self.block.hooked else -2), start + x.shape[1]

        def cut(path: Any, leaf: Any) -> Any:
            if leaf is self.whole:
                return x
            if is_cache(leaf):
                return cache.hugging_face(leaf, start)
            if isinstance(leaf, Tensor):
                return self.block.layout.piece(leaf, path, start, end)
            return leaf

        args, kwargs = pytree.tree_map_with_path(cut, (self.args, self.kwargs), is_leaf=is_cache)
        if self.block.hooked:
            kwargs["past_kv_cache_entry"] = cache
        found = self.block.forward(*args, **kwargs)
        if cache.keys is None or cache.values is None:
            raise self.block.refuse("does not use the cache of keys and values")
        leaves, form = pytree.tree_flatten(found, is_leaf=is_cache)
        at = next((i for i, leaf in enumerate(leaves) if _is_residual(leaf)), None)
        if at is None:
            raise self.block.refuse("does not give the residual stream")
        # Whatever else it shows, its pattern for one, is of this piece only.
        kept = [None if isinstance(leaf, Tensor) or is_cache(leaf) else leaf for leaf in leaves]
        self.output = [*kept[:at], _RESIDUAL, *kept[at + 1 :]], form
        return leaves[at], cache.keys, cache.values


class _Cache:
    """The keys and values before a piece, as the model's own cache of one layer gives them.

    Its names are those of HookedTransformer's cache; `hugging_face` gives one of the other kind.
    """

    def __init__(self, past: tuple[Tensor, Tensor] | None, dim: int) -> None:
        self._past, self._dim = past, dim
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def past_keys(self) -> Tensor:
        return torch.empty(0, 0) if self._past is None else self._past[0]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        # Views are not handed on as they are: they get a gradient of their own.
        self.keys, self.values = keys, values
        if self._past is None:
            return keys, values
        return (
            torch.cat([self._past[0], keys], dim=self._dim),
            torch.cat([self._past[1], values], dim=self._dim),
        )

    def hugging_face(self, like: Any, n_before: int) -> Any:
        cache = copy.copy(like)

        def update(keys: Tensor, values: Tensor, *_args: Any, **_kwargs: Any) -> Any:
            return self.append(keys, values)

        def length(*_args: Any, **_kwargs: Any) -> int:
            return n_before

        cache.update, cache.get_seq_length = update, length
        return cache


class _Pieces(torch.autograd.Function):
    """A block as one node: keeps its input, keys and values, and runs again for their gradients."""

    @staticmethod
    def forward(ctx: Any, call: _Call, token: Tensor | None, x: Tensor) -> Tensor:
        ctx.call, ctx.token = call, token
        ctx.autocast = [(kind, autocast_options(kind)) for kind in {"cpu", x.device.type}]
        dim = 1 if call.block.hooked else -2
        parts: list[Tensor] = []
        kept: list[Tensor] = []
        for start, end in call.pieces():
            past = _until(kept, dim, start)
            made, *new = call.run(x[:, start:end], start, past)
            if not kept:
                kept = [_wide(one, dim, call.n) for one in new]
            for whole, one in zip(kept, new, strict=True):
                whole.narrow(dim, start, end - start).copy_(one)
            parts.append(made)
        ctx.save_for_backward(x, *kept)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, None, Tensor]:
        x, *kept = ctx.saved_tensors
        call: _Call = ctx.call
        dim = 1 if call.block.hooked else -2
        of_input = torch.zeros_like(x)
        of_kept = [torch.zeros_like(one) for one in kept]
        for start, end in reversed(call.pieces()):
            n = end - start
            piece = x[:, start:end].detach().requires_grad_()
            past = _until(kept, dim, start)
            before = [] if past is None else [one.detach().requires_grad_() for one in past]
            with ExitStack() as stack:
                stack.enter_context(torch.enable_grad())
                for kind, options in ctx.autocast:
                    stack.enter_context(torch.autocast(kind, **options))
                made = call.run(piece, start, (before[0], before[1]) if before else None)
            given = [
                grad_outputs[0][:, start:end],
                *(one.narrow(dim, start, n) for one in of_kept),
            ]
            pairs = [pair for pair in zip(made, given, strict=True) if pair[0].requires_grad]
            if not pairs:
                continue
            some, grads = zip(*pairs, strict=True)
            call.block.rewire(some)
            found = torch.autograd.grad(some, [piece, *before, ctx.token], grads, allow_unused=True)
            if found[0] is not None:
                of_input[:, start:end] = found[0]
            for whole, one in zip(of_kept, found[1:-1], strict=False):
                if one is not None:
                    whole.narrow(dim, 0, start).add_(one)
        return None, None, of_input


def _until(kept: Sequence[Tensor], dim: int, n: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values of the first `n` tokens; None where there are none."""
    if n == 0:
        return None
    keys, values = (one.narrow(dim, 0, n) for one in kept)
    return keys, values


def _wide(piece: Tensor, dim: int, n: int) -> Tensor:
    """Room for what all tokens have where a piece has `piece`."""
    shape = list(piece.shape)
    shape[dim] = n
    return piece.new_empty(shape)
