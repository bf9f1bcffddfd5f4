"""What there is to say of one head on one prompt, as plain data: for its page, a terminal, JSON.

Its maps are needed. What else cannot be had, as the run kept no vectors or the architecture does
not allow it, is left out, with the reason in a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import NotStored, RALensError
from ra_lens.head_maps import Cell, HeadMaps, head_of_example, read_example
from ra_lens.head_names import Head
from ra_lens.knockouts.read import rests
from ra_lens.latent import LatentSpace, latent_space_of
from ra_lens.model import Site
from ra_lens.model.sites import VECTOR_KINDS
from ra_lens.numbers import Whole, whole, whole_or_none
from ra_lens.steps import Pull, pulls
from ra_lens.text import label
from ra_lens.vjp import WEIGHTS, Weight, weight_gradient, weight_norms
from ra_lens.vocabulary import Kind, VectorReading, Vocabulary

T = TypeVar("T")

_OF_QUERIES: tuple[Kind, ...] = ("z", "z_step", "query", "query_step")
_OF_KEYS: tuple[Kind, ...] = ("value", "value_step", "key", "key_step")
_QUERIES, _KEYS, _TOKENS = 2, 3, 5  # so many are read in the vocabulary, in so many tokens
_STRONG = 0.05  # of the largest |R|: of which cells
_WITHOUT_VECTORS = "the run kept no vectors; run_with_ra(..., vectors=True) keeps them"


@dataclass(frozen=True)
class WeightFacts:
    """The gradient of the loss at one of a head's matrices.

    Attributes:
        weight: Which matrix.
        norm: ‖∂L/∂W‖.
        rank: Place of that among those of all heads, or key/value heads, that were collected; 1 the
            largest.
        among: How many these are.
        first: Share of its first singular value in ‖∂L/∂W‖²; 1: it is of rank 1.
        shares: Share of each token in it; they add up to 1. NaN where the gradient is 0.
        tokens: These tokens.
    """

    weight: Weight
    norm: float
    rank: int
    among: int
    first: float
    shares: tuple[float, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class HeadFacts:
    """One head on one prompt.

    Attributes:
        maps: Its maps.
        site: Its layer.
        example: Which prompt.
        norm: ‖R‖.
        rank: Place of that among the heads collected, 1 the largest.
        among: How many these are.
        share: Its share of the sum of all norms.
        edges: Its edges, the largest foretold change of the loss first.
        left_out: Tokens edges to which are not listed, as heads rest there.
        latent: Its queries and keys in two dimensions.
        pulls: The pairs that the loss wants nearer to each other or further apart.
        weights: The gradients of its matrices.
        readings: Some of its vectors in tokens of the vocabulary.
        missing: What could not be had: its name and the reason.
    """

    maps: HeadMaps
    site: Site
    example: int
    norm: float
    rank: int
    among: int
    share: float
    edges: tuple[Cell, ...]
    left_out: tuple[str, ...]
    latent: LatentSpace | None
    pulls: tuple[Pull, ...]
    weights: tuple[WeightFacts, ...]
    readings: tuple[VectorReading, ...]
    missing: tuple[tuple[str, str], ...]


def head_facts(
    ra: RACache,
    model: nn.Module | None,
    head: Head,
    *,
    example: Whole = 0,
    top: Whole = 10,
    max_tokens: Whole | None = 48,
) -> HeadFacts:
    """Collect what there is to say of a head.

    Args:
        ra: A cache with its maps; vectors make most of the rest.
        model: The model of the cache, for the vocabulary. None: without.
        head: `"L2H3"`, `(layer, head)` or a `HeadScore`.
        example: Which prompt.
        top: So many edges, and so many pairs.
        max_tokens: Of a longer prompt the latent space has the last so many tokens.

    Raises:
        BadInput: no such head or example, or `top` below 1.
        NotStored: the maps were not kept.
    """
    top, example = whole("top", top, least=1), read_example(ra, example)
    max_tokens = whole_or_none("max_tokens", max_tokens, least=1)
    maps = head_of_example(ra, head, example=example)
    site, own = ra.sites[maps.layer], (maps.layer, maps.head)
    norms = _of_example(ra, ra.norms(), example)
    norm = float(norms[ra.layers.index(maps.layer), maps.head])
    heads = norms[ra.sites.places]
    missing: dict[str, str] = {}

    def have(name: str, get: Callable[[], T], otherwise: T) -> T:
        try:
            return get()
        except NotStored:
            held = any((kind, maps.layer) in ra for kind in VECTOR_KINDS)
            missing[name] = _none(site) if held else _WITHOUT_VECTORS
        except RALensError as error:
            missing[name] = _short(error)
        return otherwise

    latent = have(
        "latent space",
        lambda: latent_space_of(ra, own, k=top, example=example, max_tokens=max_tokens),
        None,
    )
    pairs = have("pulls", lambda: tuple(pulls(ra, own, example=example, k=top)), ())
    weights: list[WeightFacts] = []
    for weight in WEIGHTS:
        found = have(
            f"gradient of {weight}", lambda w=weight: _weight(ra, site, own, w, example), None
        )
        weights += [] if found is None else [found]
    readings: tuple[VectorReading, ...] = ()
    if model is not None and not any((kind, maps.layer) in ra for kind in VECTOR_KINDS):
        missing["vocabulary"] = _WITHOUT_VECTORS
    elif model is not None:
        given: nn.Module = model
        readings = have("vocabulary", lambda: _readings(ra, given, own, maps, example, missing), ())
    resting = rests(ra)[example] if site.key_side == "input" else ()
    tokens = ra.info.tokens_of("input")
    return HeadFacts(
        maps,
        site,
        example,
        norm,
        1 + int((heads > norm).sum()),
        len(heads),
        norm / (float(heads.sum()) or 1.0),
        _edges(maps, resting, top),
        tuple(label(tokens[example][at]) if tokens else f"#{at}" for at in resting),
        latent,
        pairs,
        tuple(weights),
        readings,
        tuple(missing.items()),
    )


def _none(site: Site) -> str:
    return f"the attention of {site.label} has no such vectors, or the run did not keep them"


def _short(error: RALensError) -> str:
    """What was found, without what to do: nobody asked for this by name."""
    return str(error.args[0]).split(". ")[0].rstrip(".")


def _of_example(
    ra: RACache, values: Float[Tensor, "*batch layer head"], example: int
) -> Float[Tensor, "layer head"]:
    return values[example] if ra.has_batch_dim else values


def _edges(maps: HeadMaps, resting: tuple[int, ...], k: int) -> tuple[Cell, ...]:
    size = np.nan_to_num(np.abs(maps.knockout), posinf=0.0)
    for at in resting:
        if at >= maps.first_key:
            size[:, at - maps.first_key] = 0.0
    order = np.argsort(-size, axis=None, kind="stable")[:k]
    found: list[Cell] = []
    for row, column in zip(*np.unravel_index(order, size.shape), strict=True):
        if size[row, column] > 0:
            values = (float(one[row, column]) for one in (maps.ra, maps.pattern, maps.knockout))
            found.append(Cell(maps.first + int(row), maps.first_key + int(column), *values))
    return tuple(found)


def _weight(
    ra: RACache, site: Site, head: tuple[int, int], weight: Weight, example: int
) -> WeightFacts:
    gradient = weight_gradient(ra, weight, head, example=example)
    norms = _of_example(ra, weight_norms(ra, weight), example)
    shared = weight in ("W_K", "W_V")
    index = site.kv_group(head[1]) if shared else head[1]
    own = norms[ra.layers.index(site.layer), index]
    squares = gradient.singular_values.double() ** 2
    total = float(squares.sum())
    return WeightFacts(
        weight,
        gradient.norm,
        1 + int((norms > own).sum()),
        int((~norms.isnan()).sum()),
        float(squares[0]) / total if total else math.nan,
        tuple(gradient.shares.tolist()),
        gradient.tokens,
    )


def _readings(
    ra: RACache,
    model: nn.Module,
    head: tuple[int, int],
    maps: HeadMaps,
    example: int,
    missing: dict[str, str],
) -> tuple[VectorReading, ...]:
    """Read the queries and keys of the strongest cells in the vocabulary."""
    cells = [c for c in maps.strongest(20) if abs(c.ra) >= _STRONG * maps.limit]
    queries = list(dict.fromkeys(cell.query for cell in cells))[:_QUERIES]
    keys = list(dict.fromkeys(cell.key for cell in cells))[:_KEYS]
    target = None if ra.info.targets is None else ra.info.targets[example]
    vocabulary = Vocabulary(model)
    found: list[VectorReading] = []
    for kinds, positions in ((_OF_QUERIES, queries), (_OF_KEYS, keys)):
        own: list[VectorReading] = []
        for kind in kinds if positions else ():
            try:
                own += vocabulary.read(
                    ra, head, kinds=kind, positions=positions, example=example,
                    target=target or None, k=_TOKENS,
                )  # fmt: skip
            except NotStored:
                missing[f"{kind} in the vocabulary"] = _none(ra.sites[head[0]])
            except RALensError as error:
                missing[f"{kind} in the vocabulary"] = _short(error)
        found += sorted(own, key=lambda one, at=positions: at.index(one.position))
    return tuple(found)
