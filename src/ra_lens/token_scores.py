"""Scores of tokens: how much the last token of a prompt looks at each one, by five methods.

With A, R and R~ of the row of the query, and sums over heads and layers,

    method       score of a key                      what it tells
    ra           −Σ R                                where descent wants the query to look more
    knockout     Σ −R~ / (1 − A)                     what the loss rises by if it could not look
    pattern      Σ A                                 where it looks
    value_norm   Σ A · ‖v W_O‖                       how much it takes from there, whatever the use
    rollout      row of Π ½(A + I)                   where its stream comes from, by these layers

Larger: more. `ra` and `knockout` ask about the loss, have a sign, and need its backward pass; the
others do not know what was asked for. `ra` is in units of the loss per q·k, `knockout` in those of
the loss, to first order and one layer's heads at a time. `pattern` and `value_norm` look one step
back, and what stands there need not be about the token any more; `rollout` takes A, averaged over
heads, for all that a layer does, with half for the residual stream, so that early tokens gather
much. Attention sinks score high in `pattern` and `rollout`, and little in `value_norm`.

Sources: value_norm, Kobayashi, Kuribayashi, Yokoi and Inui 2020 ("Attention is Not Only a Weight",
arXiv 2004.10102), the norms of heads added up; v has its bias. rollout, Abnar and Zuidema 2020
(arXiv 2005.00928): rows of A + I divided by their sums, the first layer's on the right.

Cost: sums over maps that are there. `value_norm` runs a few tokens through the model, once for each
layer, to check that heads write what is taken for it.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, UnsupportedModel, one_of
from ra_lens.model import Site, as_lens
from ra_lens.model.values import by_query_head
from ra_lens.model.weights import head_weights
from ra_lens.numbers import Whole, whole

TokenMethod = Literal["ra", "knockout", "pattern", "value_norm", "rollout"]
TOKEN_METHODS: tuple[TokenMethod, ...] = get_args(TokenMethod)


def token_scores(
    ra: RACache,
    *,
    method: TokenMethod = "ra",
    query: Whole = -1,
    model: nn.Module | None = None,
) -> Float[Tensor, "*batch pos"]:
    """Score every token of each prompt by how much one of its tokens looks at it.

    Args:
        ra: A run, with its maps; of the layers in it.
        method: `"ra"`, `"knockout"`, `"pattern"`, `"value_norm"` or `"rollout"`; see the module.
        query: The token that looks: a position within each example, negative from its end.
            Default: the last one, where a loss of one token is read.
        model: For `"value_norm"`, which reads W_O, the model that the cache is of; the run is then
            one with `vectors=["value"]`.

    Returns:
        A score for each column of the maps, larger where it counts for more; 0 at padding and after
        the query. No batch dimension where the cache has none.

    Raises:
        BadInput: an unknown method, a token that is not there, `"value_norm"` without a model, or
            `"ra"` and `"knockout"` of another backward pass than the loss's own.
        NotStored: maps or values that were not kept.
        UnsupportedModel: layers that attend to another text, or, for `"value_norm"`, whose heads do
            not write Σ A·v W_O.
    """
    one_of("method", method, TOKEN_METHODS)
    query = whole("query", query)
    for site in ra.sites.values():
        if site.cross or site.query_side != ra.sites[ra.layers[0]].query_side:
            raise UnsupportedModel(
                f"{site.label} of {ra.info.model_name} attends from one text to another, and "
                "token_scores adds up what looks at the tokens of one text. Take some layers of "
                "one side: run_with_ra(layers=...)."
            )
    if method in ("ra", "knockout"):
        ra.info.need_exact("a score of tokens by it")
    if method == "value_norm":
        if model is None:
            raise BadInput("found method='value_norm' without model=; give the cache's model.")
        return _value_norms(ra, model, query)
    if method == "rollout":
        return _rolled_out(ra, query)
    scores = ra.flow(queries=query, by=method).sum(dim=-2)
    return -scores if method == "ra" else scores


def _rolled_out(ra: RACache, query: int) -> Float[Tensor, "*batch pos"]:
    seen: Tensor | None = None
    for layer in ra.layers:
        pattern = _batched(ra, ra["pattern", layer]).mean(dim=1)
        stays = torch.eye(pattern.shape[-1]).to(pattern)
        mixed = pattern + stays
        mixed = mixed / mixed.sum(dim=-1, keepdim=True)
        seen = mixed if seen is None else mixed @ seen.to(mixed.device)
    assert seen is not None
    found = seen[torch.arange(len(seen)), _columns(ra, query, seen.shape[-1]).to(seen.device)]
    return found if ra.has_batch_dim else found[0]


def _value_norms(ra: RACache, model: nn.Module, query: int) -> Float[Tensor, "*batch pos"]:
    lens, total = as_lens(model), None
    for layer, site in ra.sites.items():
        own: Site | None = lens.sites.get(layer)
        if own is None or (own.prefix, own.n_heads) != (site.prefix, site.n_heads):
            raise BadInput(
                f"{lens.name} has no {site.label} as the cache has, which is of "
                f"{ra.info.model_name}. Give the model that was run."
            )
        values = by_query_head(_batched(ra, ra["value", layer]), site.n_heads)
        weight = head_weights(lens, own, ("W_O",), applied_to_values=True)["W_O"].to(values)
        terms = "batch key head d_head, head d_head d_model -> batch head key d_model"
        written = einsum(values, weight, terms).norm(dim=-1)
        pattern = _batched(ra, ra["pattern", layer])
        rows = _columns(ra, query, pattern.shape[-1]).to(pattern.device)
        row = pattern[torch.arange(len(pattern)), :, rows]
        of_layer = (row * written.to(row)).sum(dim=1)
        total = of_layer if total is None else total + of_layer.to(total.device)
    assert total is not None
    return total if ra.has_batch_dim else total[0]


def _batched(ra: RACache, value: Tensor) -> Tensor:
    return value if ra.has_batch_dim else value[None]


def _columns(ra: RACache, query: int, width: int) -> Int[Tensor, "batch"]:
    """Column of a token of each example."""
    tokens = ra.info.tokens_of(ra.sites[ra.layers[0]].query_side)
    lengths = [width] * ra.batch_size if tokens is None else [len(row) for row in tokens]
    starts = ra.info.starts if tokens is ra.info.str_tokens else None
    found: list[int] = []
    for i, length in enumerate(lengths):
        if not -length <= query < length:
            raise BadInput(f"found query={query}; example {i} has {length} tokens.")
        found.append((0 if starts is None else starts[i]) + query % length)
    return torch.tensor(found)
