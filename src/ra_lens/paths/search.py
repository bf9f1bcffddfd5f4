"""Best paths through one map, exactly or by beam search.

With w[q, k] the weight of the step from query q back to key k < q, a path p₀ > p₁ > … > p_m from
the target p₀ has the score

    S = Σᵢ log w[pᵢ, pᵢ₊₁],    compared as S / m^α    (α = 0: `none`, ½: `sqrt`, 1: `avg_logprob`).

It ends where it must: at position 0, at a BOS token it arrives at, or where no step is left.

Exact. The best rest of a path from each position is a dynamic programme, as positions fall:

    rest[p] = 0 at an end, else max_k log w[p, k] + rest[k]

and for α ≠ 0 the same per number of steps left, rest[r, p]. With it the score of the best way to go
on from any beginning is known, so beginnings taken in that order (a priority queue) come out as
complete paths in the order of their scores: the k best, no others touched. Cost for n tokens: n²
operations, or n³/3 for α ≠ 0; then about k·m·n.

Beam. From each of the `top_beam` best beginnings of one length the `top_k` heaviest steps are
taken; the best `top_beam` of these go on. It misses every path whose beginning falls behind.

Best paths through all layers, exactly.

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
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from ra_lens.errors import BadInput

_BLOCK = 64

Found = tuple[list[int], float]
"""Positions of a path from the target on, and its score S."""


def read_norm(length_norm: str) -> float:
    """The α of a normalisation of scores by the number of steps.

    Raises:
        BadInput: none of `none`, `avg_logprob`, `sqrt`, `pow:α`.
    """
    known = {"none": 0.0, "avg_logprob": 1.0, "sqrt": 0.5}
    if length_norm in known:
        return known[length_norm]
    kind, _, number = length_norm.partition(":")
    try:
        power = float(number) if kind == "pow" else math.nan
    except ValueError:
        power = math.nan
    if not math.isfinite(power):
        raise BadInput(
            f"found length_norm={length_norm!r}; give 'none', 'avg_logprob', 'sqrt' or 'pow:α' "
            "with a number, such as 'pow:0.7'."
        )
    return power


def normalised(score: float, steps: int, power: float) -> float:
    """S / m^α; a path without steps has the score 0."""
    return score / steps**power if steps else score


@dataclass(frozen=True)
class Map:
    """What paths run through.

    Attributes:
        log: log w, −∞ where there is no step.
        ends: Where a path that arrives there ends, besides where no step is left.
    """

    log: Float[np.ndarray, "query key"]
    ends: Bool[np.ndarray, "pos"]

    @staticmethod
    def make(
        weights: Float[np.ndarray, "query key"],
        *,
        ends: Bool[np.ndarray, "pos"],
        usable: Bool[np.ndarray, "pos"] | None = None,
        min_attn: float = 0.0,
        top_k: int | None = None,
    ) -> Map:
        """Keep the steps to usable, strictly earlier keys that weigh at least `min_attn`.

        `top_k` keeps the heaviest so many of each query.
        """
        kept = np.tril(np.nan_to_num(weights), k=-1)
        kept = np.where(kept >= min_attn, kept, 0.0)
        if usable is not None:
            kept = np.where(usable, kept, 0.0)
        if top_k is not None and top_k < len(kept):
            dropped = np.argsort(-kept, axis=1, kind="stable")[:, top_k:]
            np.put_along_axis(kept, dropped, 0.0, axis=1)
        with np.errstate(divide="ignore"):
            return Map(np.log(np.maximum(kept, 0.0)), ends)

    def is_end(self, position: int, start: int) -> bool:
        """Whether a path from `start` ends here."""
        stuck = not np.isfinite(self.log[position, :position]).any()
        return stuck or (bool(self.ends[position]) and position != start)


def exact_paths(map: Map, start: int, k: int, power: float) -> list[Found]:
    """The k best paths from `start`, best first."""
    n = start + 1
    log = map.log[:n, :n]
    stuck = np.asarray(~np.isfinite(log).any(axis=1))
    ends = stuck | map.ends[:n]
    ends[start] = stuck[start]
    if power == 0.0:
        rest = _rest(log, ends)
        return list(itertools.islice(_in_order(log, ends, start, k, rest), k))
    table = _rest_by_steps(log, ends)
    return list(itertools.islice(_in_order_by_steps(log, start, k, table, power), k))


def _rest(log: np.ndarray, ends: np.ndarray) -> np.ndarray:
    rest = np.zeros(len(log))
    for p in range(len(log)):
        if not ends[p]:
            rest[p] = np.max(log[p, :p] + rest[:p])
    return rest


def _rest_by_steps(log: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """rest[r, p]: the best S of r more steps from p to an end; −∞ where there are none."""
    n = len(log)
    table = np.full((n, n), -np.inf)
    table[0, ends] = 0.0
    # Some rows at a time: sums stay in the processor's cache, and few lie above the diagonal.
    blocks = [(p, min(p + _BLOCK, n)) for p in range(0, n, _BLOCK)]
    sums = np.empty((_BLOCK, n))
    for r in range(1, n):
        # r steps back from p need p >= r, and leave a position with r - 1 steps to go.
        for first, after in blocks[r // _BLOCK :]:
            top = max(first, r)
            part = sums[: after - top, : after - r]
            np.add(log[top:after, r - 1 : after - 1], table[r - 1, r - 1 : after - 1], out=part)
            np.max(part, axis=1, out=table[r, top:after])
        table[r, ends] = -np.inf
        if not np.isfinite(table[r]).any():
            return table[:r]
    return table


def _in_order(
    log: np.ndarray, ends: np.ndarray, start: int, k: int, rest: np.ndarray
) -> Iterator[Found]:
    tie = itertools.count()
    queue: list[tuple[float, int, tuple[int, ...], float]] = [(0.0, 0, (start,), 0.0)]
    while queue:
        _, _, path, score = heapq.heappop(queue)
        p = path[-1]
        if ends[p]:
            yield list(path), score
            continue
        values = log[p, :p] + rest[:p]
        for q in _largest(values, k):
            key = -(score + values[q])
            heapq.heappush(queue, (key, next(tie), (*path, q), score + float(log[p, q])))


def _in_order_by_steps(
    log: np.ndarray, start: int, k: int, table: np.ndarray, power: float
) -> Iterator[Found]:
    tie = itertools.count()
    queue: list[tuple[float, int, tuple[int, ...], float, int, int]] = []
    for steps in range(len(table)):
        score = float(table[steps, start])
        if np.isfinite(score):
            key = -normalised(score, steps, power)
            queue.append((key, next(tie), (start,), 0.0, steps, steps))
    heapq.heapify(queue)
    while queue:
        _, _, path, score, left, steps = heapq.heappop(queue)
        if left == 0:
            yield list(path), score
            continue
        p = path[-1]
        values = log[p, :p] + table[left - 1, :p]
        for q in _largest(values, k):
            key = -normalised(score + float(values[q]), steps, power)
            after = score + float(log[p, q])
            heapq.heappush(queue, (key, next(tie), (*path, q), after, left - 1, steps))


def _largest(values: np.ndarray, k: int) -> list[int]:
    """Places of the k largest finite values, largest first, the earliest first among equals."""
    if len(values) > 4 * k:  # only k of them can matter
        threshold = np.partition(values, len(values) - k)[len(values) - k]
        places = np.flatnonzero(values >= threshold)
    else:
        places = np.arange(len(values))
    places = places[np.isfinite(values[places])]
    order = np.argsort(-values[places], kind="stable")[:k]
    return [int(i) for i in places[order]]


def beam_paths(map: Map, start: int, top_beam: int, power: float) -> list[Found]:
    """Paths from `start` that beam search finds, best first, at most `top_beam`."""
    active: list[Found] = [([start], 0.0)]
    done: list[Found] = []
    while active:
        grown: list[Found] = []
        for path, score in active:
            p = path[-1]
            if map.is_end(p, start):
                done.append((path, score))
                continue
            row = map.log[p, :p]
            order = np.argsort(-row, kind="stable")
            grown += [
                ([*path, int(q)], score + float(row[q])) for q in order if np.isfinite(row[q])
            ]
        done += [found for found in grown if _arrived(map, found[0][-1])]
        going = [found for found in grown if not _arrived(map, found[0][-1])]
        active = _best(going, top_beam, power)
    return _best(done, top_beam, power)


def _arrived(map: Map, position: int) -> bool:
    # Where no step is left shows only when it is tried: such beginnings compete with the others.
    return position == 0 or bool(map.ends[position])


def _best(found: list[Found], n: int, power: float) -> list[Found]:
    return sorted(found, key=lambda f: -normalised(f[1], len(f[0]) - 1, power))[:n]


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
    rest = _rest_of_layers(heads, stays, must_move=must_move)
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


def _rest_of_layers(
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
