"""The plane in which a head's queries and keys differ most (paper, figure 3b).

Queries and keys of one head are vectors of one space, `[d_head]`, as they enter q·k. Their plane is
that of the first two principal components of all of them together, about their common mean. A step
of descent moves a query by −η·δ_q and a key by −η·δ_k; of both that part is seen which lies in the
plane.

What counts for attention is the product q·k, hence lengths and angles from the vector 0, and not
the distance between two points; where 0 lies in the plane is told too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.head_maps import Cell, HeadMaps, head_of_example, kept_tokens, read_example
from ra_lens.head_names import Head
from ra_lens.model.sites import VectorKind
from ra_lens.numbers import Whole, whole, whole_or_none


@dataclass(frozen=True)
class Points:
    """The queries of a head, or its keys.

    Attributes:
        tokens: Their tokens.
        first: Position of the first; not 0 where a long prompt was cut.
        at: Where they lie in the plane.
        step: −δ in the plane, by which a step of descent of size 1 moves them; None where the cache
            does not hold the gradients.
        lengths: Lengths of the vectors themselves, in all dimensions.
        steps: Lengths of δ, in all dimensions; None likewise.
    """

    tokens: tuple[str, ...]
    first: int
    at: Float[np.ndarray, "token 2"]
    step: Float[np.ndarray, "token 2"] | None
    lengths: Float[np.ndarray, "token"]
    steps: Float[np.ndarray, "token"] | None

    @property
    def seen(self) -> float:
        """Share of the squared lengths of δ that lies in the plane; NaN where there is none."""
        if self.step is None or self.steps is None or not self.steps.any():
            return float("nan")
        return float((self.step**2).sum() / (self.steps**2).sum())

    @property
    def longest(self) -> float:
        """The longest step in the plane; 0 where there is none."""
        return 0.0 if self.step is None else float(np.hypot(*self.step.T).max(initial=0.0))


@dataclass(frozen=True)
class LatentSpace:
    """A head's queries and keys of one example in their plane.

    Attributes:
        maps: The head's maps, of the same tokens.
        queries: Its queries.
        keys: Its keys.
        origin: Where the vector 0 lies in the plane.
        variance: Share of the variance of queries and keys, about their mean, along each dimension.
        pairs: The query–key pairs with the largest |R|, largest first.
        shared_by: Heads that read the same keys, this one included; a key's step is of all.
    """

    maps: HeadMaps
    queries: Points
    keys: Points
    origin: Float[np.ndarray, "2"]
    variance: tuple[float, float]
    pairs: tuple[Cell, ...]
    shared_by: tuple[int, ...]


def latent_space_of(
    ra: RACache,
    head: Head,
    *,
    k: Whole = 8,
    example: Whole = 0,
    max_tokens: Whole | None = 48,
) -> LatentSpace:
    """Lay the queries and keys of one head into the plane in which they differ most.

    Args:
        ra: A cache of `run_with_ra(..., vectors=True)`, or at least of `vectors=["query", "key"]`;
            steps need `query_grad` and `key_grad` too.
        head: `"L2H3"`, `(layer, head)` or a `HeadScore`.
        k: So many of the pairs with the largest |R|.
        example: Which example.
        max_tokens: Only so many of the last tokens, here as in the plane. None: all of them.

    Raises:
        BadInput: no such head or example, `k` below 0, or vectors that are not finite.
        NotStored: the cache holds no queries and keys, or no maps.
    """
    k = whole("k", k, least=0)
    example, max_tokens = read_example(ra, example), whole_or_none("max_tokens", max_tokens)
    maps = head_of_example(ra, head, example=example, max_tokens=max_tokens)
    site = ra.sites[maps.layer]
    group = site.kv_group(maps.head)

    def vectors(kind: VectorKind, index: int) -> Float[np.ndarray, "token d_head"] | None:
        if kind.endswith("_grad") and (kind, maps.layer) not in ra:
            return None
        values = ra[kind, maps.layer]
        values = values[example] if ra.has_batch_dim else values
        *_, kept = kept_tokens(ra, site.side_of(kind), example, values.shape[0], max_tokens)
        return _array(values[kept, index])

    query, key = vectors("query", maps.head), vectors("key", group)
    gradients = vectors("query_grad", maps.head), vectors("key_grad", group)
    assert query is not None and key is not None  # the cache refuses what it does not hold
    if not all(np.isfinite(one).all() for one in (query, key, *gradients) if one is not None):
        raise BadInput(f"found queries, keys or gradients of {maps.label} that are not finite.")
    together = np.concatenate([query, key])
    mean = together.mean(axis=0)
    plane, variance = _plane(together - mean, query.mean(axis=0) - key.mean(axis=0))
    share = site.n_heads // site.n_key_value_heads
    return LatentSpace(
        maps,
        _points(maps.tokens, maps.first, query, gradients[0], mean, plane),
        _points(maps.key_tokens, maps.first_key, key, gradients[1], mean, plane),
        -mean @ plane,
        variance,
        tuple(maps.strongest(k)) if k else (),
        tuple(range(group * share, (group + 1) * share)),
    )


def _plane(
    centred: Float[np.ndarray, "vector d"], from_keys: Float[np.ndarray, "d"]
) -> tuple[Float[np.ndarray, "d 2"], tuple[float, float]]:
    """Give the first two principal components, as columns, and their shares of the variance."""
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    plane = np.zeros((centred.shape[1], 2))
    n = min(2, len(directions))  # of a single dimension, the other one is empty
    plane[:, :n] = directions[:n].T
    # Of the two directions of each component: queries to the right, the largest weight upwards.
    signs = (from_keys @ plane[:, 0], plane[np.abs(plane[:, 1]).argmax(), 1])
    plane *= [-1.0 if sign < 0 else 1.0 for sign in signs]
    shares = sizes**2 / ((sizes**2).sum() or 1.0)
    first, second = (*shares[:2].tolist(), 0.0, 0.0)[:2]
    return plane, (first, second)


def _points(
    tokens: tuple[str, ...],
    first: int,
    vectors: Float[np.ndarray, "token d"],
    gradients: Float[np.ndarray, "token d"] | None,
    mean: Float[np.ndarray, "d"],
    plane: Float[np.ndarray, "d 2"],
) -> Points:
    return Points(
        tokens,
        first,
        (vectors - mean) @ plane,
        None if gradients is None else -gradients @ plane,
        np.linalg.norm(vectors, axis=1),
        None if gradients is None else np.linalg.norm(gradients, axis=1),
    )


def _array(values: Float[Tensor, "token d"]) -> Float[np.ndarray, "token d"]:
    return values.detach().cpu().double().numpy()
