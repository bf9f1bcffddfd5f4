"""`knockout_hooks`: `(hook name, hook)` pairs that really cut edges of attention.

    renormalised       A′ = 0 at the edges, A / (1 − a) elsewhere, with a the sum of A over the
                       edges of the row: the softmax with their scores at −∞
    not renormalised   A′ = 0 at the edges, A elsewhere

An attention sink takes part in the renormalising, and so does whatever else a row lacks to 1, such
as edges cut before without renormalising. A row that would have nothing left stays as it is, as its
softmax would have no keys.

Where the model only shows its pattern, A′ − A is added through z: see
`ra_lens.patching.through_z`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.knockouts.edges import Box, Edge, EdgeSet, Positions
from ra_lens.knockouts.predict import lacking
from ra_lens.model import Site, Sites, as_lens
from ra_lens.numbers import Real, real
from ra_lens.patching.hooks import HookPairs
from ra_lens.patching.place import map_indices, read_mask
from ra_lens.patching.through_z import ThroughZ, need_values

Cuts = Edge | EdgeSet | Iterable["Edge | EdgeSet | Iterable[Edge]"]


def knockout_hooks(
    model: nn.Module,
    edges: Cuts,
    *,
    renormalise: bool = True,
    amount: Real | Float[Tensor, "example"] = 1.0,
    attention_mask: Tensor | None = None,
) -> HookPairs:
    """Forward hooks that cut edges of attention.

    Where an edit of hook_pattern is discarded (`site.observe_only`: OPT, GPT-J and others on the
    TransformerBridge), the same cut is made through z, which costs two products of a pattern
    with the values, and is checked in every forward pass. It needs all values in that pass: with a
    key/value cache only tokens of which nothing is cut can follow; else it raises, and `generate`
    needs `use_past_kv_cache=False`.

        edges = ra.edges(queries=-1, keys="Beats Music", layers=range(10, 16))
        with model.hooks(fwd_hooks=knockout_hooks(model, edges)):
            logits = model(prompt)

    Args:
        model: A HookedTransformer or TransformerBridge.
        edges: What is cut: an `Edge`, several, such as `ra.top_edges(5)` of one prompt, or an
            `EdgeSet` from `ra.edges(...)`. Or a list with one of these for each example of the
            batch that is run, such as `ra.top_edges(5).by_example()`, an empty list where nothing
            is cut.
        renormalise: Whether the other keys of a row get what the cut ones had, as if those were not
            there.
        amount: How far the cut is made: A + amount · (A′ − A), from 0, nothing, to 1. A number, or
            a tensor with one for each example, through which the loss can be differentiated.
        attention_mask: `[batch, pos]`, 1 at real tokens, for batches with padding: positions then
            count real tokens. Without it they are columns. Not for encoder-decoders.

    Returns:
        `(hook name, hook)` pairs for `model.hooks(fwd_hooks=...)`, `run_with_hooks`, `run_with_ra`
        or `model.generate`; they compose with other hooks in the order of registration. Where the
        cut is made through z, they must come before hooks that change z. Tokens generated after
        the prompt keep their attention, unless the set has no end.

    Raises:
        BadInput: edges that this model does not have, or of another number of examples than is
            run; the latter from the hooks.
        UnsupportedModel: a layer of which it is not known whether an edit changes anything, or
            whose pattern is only shown, without the values; from the hooks, where the cut cannot
            be made exactly.
    """
    lens = as_lens(model)
    cuts = read_cuts(edges, lens.sites)
    _check_sides([lens.sites[layer] for layer in cuts.layers], attention_mask)
    share = amount if isinstance(amount, Tensor) and amount.ndim else real("amount", amount)
    if isinstance(share, Tensor) and share.ndim > 1:
        raise BadInput(
            f"found an amount of shape {tuple(share.shape)}. Give a number, or a tensor with one "
            "for each example."
        )
    n_amounts = len(share) if isinstance(share, Tensor) else 1
    places = _Places(read_mask(attention_mask), n_amounts)
    do = partial(without, renormalise=renormalise, amount=share)
    return [pair for layer in cuts.layers for pair in _hooks(lens.sites[layer], cuts, places, do)]


def _hooks(site: Site, cuts: EdgeSet, places: _Places, do: Callable[..., Tensor]) -> HookPairs:
    if site.observe_only is None:
        raise UnsupportedModel(
            f"it is not known whether an edit of hook_pattern at layer {site.layer} changes "
            "anything in this model. run_with_ra finds out: run it once before."
        )

    if site.observe_only:
        need_values(site, "no edge can be cut", "Cut edges of other layers.")

        def difference(
            shape: Sequence[int], device: torch.device, pattern: Callable[[], Tensor]
        ) -> Tensor | None:
            marks = places.marks(cuts, site, shape)
            if marks is None:
                return None
            before = pattern()
            return do(before, marks.to(device)) - before

        return ThroughZ(site, "cut", difference).pairs()

    def cut(pattern: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001  TransformerLens passes it by name
        marks = places.marks(cuts, site, pattern.shape)
        return None if marks is None else do(pattern, marks.to(pattern.device))

    return [(site.pattern_name, cut)]


def without(
    pattern: Float[Tensor, "batch head query key"],
    edges: Bool[Tensor, "some head query key"],
    *,
    renormalise: bool,
    amount: float | Float[Tensor, "example"] = 1.0,
) -> Float[Tensor, "batch head query key"]:
    """A′; see the module's text. Rows in which nothing is cut stay as they are, to the bit."""
    wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    kept = after = wide.masked_fill(edges, 0.0)
    meant = edges.any(dim=-1, keepdim=True)
    if renormalise:
        left = kept.sum(dim=-1, keepdim=True) + lacking(pattern)
        gone = (wide - kept).sum(dim=-1, keepdim=True)
        after = kept * ((left + gone) / torch.where(left > 0, left, 1.0))
        meant = meant & (left > 0)
    if isinstance(amount, Tensor):
        after = wide + amount.to(wide)[:, None, None, None] * (after - wide)
    elif amount != 1:
        after = wide + amount * (after - wide)
    return torch.where(meant, after.to(pattern.dtype), pattern)


class _Places:
    """Positions of the tokens in rows and columns of patterns, kept for all layers of a pass."""

    def __init__(self, mask: Bool[Tensor, "example pos"] | None, n_amounts: int) -> None:
        self._mask, self._n_amounts = mask, n_amounts
        self._last: tuple[tuple[int, int], Int[Tensor, "some key"]] | None = None

    def marks(
        self, cuts: EdgeSet, site: Site, shape: Sequence[int]
    ) -> Bool[Tensor, "some head query key"] | None:
        """The edges to cut in a pattern of this shape; None: none."""
        n_examples, n_heads, n_queries, n_keys = shape
        if site.drops_keys(n_queries, n_keys):
            if self._mask is None and cuts.ends_before(site.layer, n_keys - n_queries):
                return None
            site.refuse_dropped_keys()
        if site.cross:
            queries, keys = torch.arange(n_queries)[None], torch.arange(n_keys)[None]
        else:
            keys = self._keys(site, n_queries, n_keys)
            queries = keys[:, -n_queries:]
        found = (len(cuts.rows), len(keys), self._n_amounts)
        for what, n in zip(("edges", "rows of attention_mask", "amounts"), found, strict=True):
            if n not in (1, n_examples):
                raise BadInput(
                    f"found {n_examples} examples at {site.label}, but {what} of {n}. Run as many "
                    "examples as were chosen, or give one set for all."
                )
        marks = cuts.marks(site.layer, n_heads, queries, keys)
        return marks if bool(marks.any()) else None

    def _keys(self, site: Site, n_queries: int, n_keys: int) -> Int[Tensor, "some key"]:
        if self._last is None or self._last[0] != (n_queries, n_keys):
            index = map_indices(
                sys.maxsize, n_queries, n_keys, align="left", mask=self._mask, layer=site.layer
            )
            self._last = (n_queries, n_keys), index
        return self._last[1]


# ---- reading what people give -------------------------------------------------------------------


def read_cuts(edges: Cuts, sites: Sites) -> EdgeSet:
    """Read what is to be cut as one set."""
    if isinstance(edges, Edge | EdgeSet):
        found = _row(edges, sites)
    else:
        given = list(edges) if isinstance(edges, Iterable) else [edges]
        if all(isinstance(one, Edge) for one in given):
            found = _row(given, sites)
        else:
            rows = [_row(one, sites) for one in given]
            several = next((row for row in rows if len(row.rows) > 1), None)
            if several is not None:
                raise BadInput(
                    f"found a set of {len(several.rows)} examples in a list, which has one for "
                    "each example. Give it alone, or sets of one example each."
                )
            found = EdgeSet(tuple(row.rows[0] for row in rows))
    if not found.layers:
        raise BadInput("found no edge to cut. Give some, such as ra.top_edges(5).")
    unknown = [layer for layer in found.layers if layer not in sites]
    if unknown:
        raise BadInput(f"found edges at layer {unknown[0]}; {sites.noun} layers {sites.spell()}.")
    return found


def _row(given: Any, sites: Sites) -> EdgeSet:
    if isinstance(given, EdgeSet):
        return given
    edges: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    wrong = [edge for edge in edges if not isinstance(edge, Edge)]
    if wrong:
        raise BadInput(
            f"found {wrong[0]!r} among the edges. Give Edge(layer, head, query, key), what "
            "ra.top_edges() gives, or a set from ra.edges()."
        )
    if len({edge.example for edge in edges}) > 1:
        raise BadInput(
            "found edges of several examples in one list, whose edges are cut in every example. "
            "Give a list for each: ra.top_edges(5).by_example()."
        )
    return EdgeSet((tuple(_box(edge, sites) for edge in edges),))


def _box(edge: Edge, sites: Sites) -> Box:
    (layer, marks), *_ = sites.choose_heads((edge.layer, edge.head)).items()
    for name in ("query", "key"):
        position = getattr(edge, name)
        if position < 0:
            raise BadInput(
                f"found {name}={position} in an edge, whose positions count from the start, from 0 "
                "on. ra.edges() counts negative ones from the end."
            )
    head = int(marks.nonzero()[0, 0])
    return Box({layer: (head,)}, Positions((edge.query,)), Positions((edge.key,)))


def _check_sides(sites: Sequence[Site], attention_mask: Tensor | None) -> None:
    if attention_mask is not None and any(s.cross or s.query_side == "decoder" for s in sites):
        raise BadInput(
            "found attention_mask with edges of an encoder-decoder, of which it could mean the "
            "encoder's tokens or the decoder's. Cut in prompts of one length, without padding."
        )
