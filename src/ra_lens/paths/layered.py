"""Best paths through all layers, exactly.

Nodes are (layer, position): the residual stream in front of a layer, and after the last one. A step
goes from the stream after layer l at q back to the stream in front of it: through head h to k ≤ q
with weight w[l, h, q, k], or along the residual connection, at q, with weight ρ[l, q]. What the MLP
does stays at its position and belongs to the residual step. Every path has one step per layer, so
scores Σ log w compare as they are.

The best rest of a path from each node is a dynamic programme over layers; with it, beginnings taken
in the order of the best complete path they allow come out as the k best paths. A path that never
leaves the target says nothing about where it came from and is left out (`moved` is part of the
node). Cost: layers · heads · n².
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Edge = tuple[int, int | None, int, int]
"""Row of the layer, head (None: residual), query, key."""


@dataclass(frozen=True)
class Layered:
    """The graph.

    Attributes:
        heads: log w of the heads of each layer, −∞ where there is no step.
        residual: log ρ of each layer.
    """

    heads: Sequence[Float[np.ndarray, "_head query key"]]
    residual: Sequence[Float[np.ndarray, "pos"]]


def layered_paths(
    graph: Layered, start: int, k: int, *, must_move: bool = True
) -> list[tuple[list[Edge], float]]:
    """The k best paths from `start` after the last layer, best first, as edges and score."""
    n = start + 1
    heads = [layer[:, :n, :n] for layer in graph.heads]
    stays = [layer[:n] for layer in graph.residual]
    rest = _rest(heads, stays, must_move=must_move)
    tie = itertools.count()
    found: list[tuple[list[Edge], float]] = []
    # (−best score, tie, layers left, position, moved, score so far, edges)
    queue: list[tuple[float, int, int, int, int, float, tuple[Edge, ...]]] = []
    depth = len(heads)
    if np.isfinite(rest[depth][0, start]):
        queue.append((-float(rest[depth][0, start]), 0, depth, start, 0, 0.0, ()))
    while queue and len(found) < k:
        _, _, left, p, moved, score, edges = heapq.heappop(queue)
        if left == 0:
            found.append((list(edges), score))
            continue
        row, below = left - 1, rest[left - 1]
        goes = below[1, : p + 1].copy()
        goes[p] = below[moved, p]
        weights = np.concatenate([[stays[row][p]], heads[row][:, p, : p + 1].ravel()])
        values = weights + np.concatenate([[below[moved, p]], np.tile(goes, len(heads[row]))])
        for i in np.argsort(-values, kind="stable")[:k]:
            if not np.isfinite(values[i]):
                break
            head, key = (None, p) if i == 0 else divmod(int(i) - 1, p + 1)
            after = (*edges, (row, head, p, key))
            entry = (left - 1, key, int(moved or key != p), score + float(weights[i]), after)
            heapq.heappush(queue, (-(score + float(values[i])), next(tie), *entry))
    return found


def _rest(
    heads: Sequence[np.ndarray], stays: Sequence[np.ndarray], *, must_move: bool
) -> list[np.ndarray]:
    """rest[l][moved, p]: the best score of the l steps that are left from p."""
    n = len(stays[0])
    ends = np.zeros((2, n))
    if must_move:
        ends[0] = -np.inf
    rest = [ends]
    earlier = np.tril(np.ones((n, n), dtype=bool), k=-1)
    for maps, stay in zip(heads, stays, strict=True):
        best, below = maps.max(axis=0), rest[-1]  # the best head for each step
        moving = np.where(earlier, best + below[1], -np.inf).max(axis=1)
        staying = np.maximum(stay, np.diagonal(best)) + below
        rest.append(np.maximum(staying, moving))
    return rest
