"""The best paths, through one map or through all layers, exactly; and beam search.

Through one map. With w[q, k] the weight of the step from query q back to key k < q, a path
p₀ > p₁ > … > p_m from the target p₀ has the score

    S = Σᵢ log w[pᵢ, pᵢ₊₁],    compared as S / m^α    (α = 0: `none`, ½: `sqrt`, 1: `avg_logprob`).

It ends where it must: at position 0, at a BOS token it arrives at, or where no step is left.

Through all layers. Nodes are (layer, position): the residual stream in front of a layer, and after
the last one. A step goes from the stream after layer l at q back to the stream in front of it:
through head h to k ≤ q with weight w[l, h, q, k], or along the residual connection, at q, with
weight ρ[l, q]. What the MLP does stays at its position and belongs to the residual step. Every path
has one step per layer, so scores Σ log w compare as they are. A path that never leaves the target
says nothing about where it came from and is left out (`moved` is part of the node).

Exact. The best rest of a path is a dynamic programme. Through one map, as positions fall:

    rest[p] = 0 at an end, else max_k log w[p, k] + rest[k]

and for α ≠ 0 the same per number of steps left, rest[r, p]; through layers, per layer. With it the
score of the best way to go on from any beginning is known, so beginnings taken in that order (a
priority queue) come out as complete paths in the order of their scores: the k best, no others
touched. Cost for n tokens: n² operations, or n³/3 for α ≠ 0, then about k·m·n; layers · heads · n².

Beam. From each of the `top_beam` best beginnings of one length the `top_k` heaviest steps are
taken; the best `top_beam` of these go on. It misses every path whose beginning falls behind.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from ra_lens.errors import BadInput

_BLOCK = 64

Found = tuple[list[int], float]
"""Positions of a path from the target on, and its score S."""

Edge = tuple[int, int | None, int, int]
"""Row of the layer, head (None: residual), query, key."""


def read_norm(length_norm: str) -> float:
    """Read the α of a normalisation of scores by the number of steps."""
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


# ---- every exact search -------------------------------------------------------------------------

_Place = tuple[int, ...]
"""How many steps are left (or 1 where that is not counted, 0 at an end), position, and more."""

_Step = tuple[float, float, _Place]
"""Score of the best rest of a path that begins with this step, its log w, where it leads."""


def _best_first(
    starts: Iterable[tuple[float, _Place]],
    steps_from: Callable[[_Place], Iterable[_Step]],
    n: int,
    compared: Callable[[float, _Place], float] = lambda score, _: score,
) -> list[tuple[tuple[_Place, ...], float]]:
    """Give the n best complete paths, best first, as places and score.

    `starts` come with the score of the best path from there; `compared` says how a score counts.
    """
    tie = itertools.count()
    queue: list[tuple[float, int, tuple[_Place, ...], float]] = [
        (-compared(best, start), next(tie), (start,), 0.0) for best, start in starts
    ]
    heapq.heapify(queue)
    found: list[tuple[tuple[_Place, ...], float]] = []
    while queue and len(found) < n:
        _, _, path, score = heapq.heappop(queue)
        if path[-1][0] == 0:
            found.append((path, score))
            continue
        for rest, weight, place in steps_from(path[-1]):
            key = -compared(score + rest, place)
            heapq.heappush(queue, (key, next(tie), (*path, place), score + weight))
    return found


def _largest(values: Float[np.ndarray, "_any"], k: int) -> list[int]:
    """Places of the k largest finite values, largest first, the earliest first among equals."""
    if len(values) > 4 * k:  # only k of them can matter
        threshold = np.partition(values, len(values) - k)[len(values) - k]
        places = np.flatnonzero(values >= threshold)
    else:
        places = np.arange(len(values))
    places = places[np.isfinite(values[places])]
    order = np.argsort(-values[places], kind="stable")[:k]
    return places[order].tolist()


# ---- through one map ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Map:
    """What paths run through, up to the target, its last position.

    Attributes:
        log: log w, −∞ where there is no step.
        stops: Where a path that arrives there ends.
        ends: The same, the target apart, and where no step is left.
    """

    log: Float[np.ndarray, "query key"]
    stops: Bool[np.ndarray, "query"]
    ends: Bool[np.ndarray, "query"]

    @staticmethod
    def make(
        weights: Float[np.ndarray, "pos pos"],
        target: int,
        *,
        bos: Iterable[int] = (),
        usable: Bool[np.ndarray, "pos"] | None = None,
        min_attn: float = 0.0,
        top_k: int | None = None,
    ) -> Map:
        """Keep the steps to usable, strictly earlier keys that weigh at least `min_attn`.

        `top_k` keeps the heaviest so many of each query; a path ends where it arrives at a `bos`.
        """
        n = target + 1
        kept = np.tril(np.nan_to_num(weights[:n, :n]), k=-1)
        kept = np.where(kept >= min_attn, kept, 0.0)
        if usable is not None:
            kept = np.where(usable[:n], kept, 0.0)
        if top_k is not None and top_k < n:
            dropped = np.argsort(-kept, axis=1, kind="stable")[:, top_k:]
            np.put_along_axis(kept, dropped, 0.0, axis=1)
        with np.errstate(divide="ignore"):
            log = np.log(np.maximum(kept, 0.0))
        stops = np.isin(np.arange(n), [0, *bos])
        stuck = np.asarray(~np.isfinite(log).any(axis=1))
        return Map(log, stops, np.where(np.arange(n) == target, stuck, stops | stuck))


def exact_paths(map: Map, k: int, power: float) -> list[Found]:
    """Find the k best paths from the target, best first."""
    log, ends, target = map.log, map.ends, len(map.log) - 1
    counted = power != 0.0
    # A place is: steps left, position, steps in all; where not counted, 1 (0 at an end) and 0.
    if counted:
        table = _rest_by_steps(log, ends)
        ways = enumerate(table[:, target].tolist())
        starts = [(best, (m, target, m)) for m, best in ways if math.isfinite(best)]
    else:
        table = _rest(log, ends)[None]
        starts = [(0.0, (int(not ends[target]), target, 0))]

    def steps_from(place: _Place) -> Iterable[_Step]:
        left, p, m = place
        values = log[p, :p] + table[left - 1, :p]
        for q in _largest(values, k):
            after = left - 1 if counted else int(not ends[q])
            yield float(values[q]), float(log[p, q]), (after, q, m)

    def compared(score: float, place: _Place) -> float:
        return normalised(score, place[2], power)

    found = _best_first(starts, steps_from, k, compared)
    return [([p for _, p, _ in path], score) for path, score in found]


def _rest(log: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """rest[p]: the best S of a path from p to an end."""
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


def beam_paths(map: Map, top_beam: int, power: float) -> list[Found]:
    """Find paths from the target by beam search, best first, at most `top_beam`."""
    active: list[Found] = [([len(map.log) - 1], 0.0)]
    done: list[Found] = []
    while active:
        grown: list[Found] = []
        for path, score in active:
            p = path[-1]
            if map.ends[p]:
                done.append((path, score))
                continue
            row = map.log[p, :p]
            grown += [([*path, q], score + float(row[q])) for q in _largest(row, p)]
        # Where no step is left shows only when it is tried: such beginnings compete with others.
        done += [found for found in grown if map.stops[found[0][-1]]]
        going = [found for found in grown if not map.stops[found[0][-1]]]
        active = _best(going, top_beam, power)
    return _best(done, top_beam, power)


def _best(found: list[Found], n: int, power: float) -> list[Found]:
    return sorted(found, key=lambda f: -normalised(f[1], len(f[0]) - 1, power))[:n]


# ---- through all layers -------------------------------------------------------------------------


def layered_paths(
    heads: Sequence[Float[np.ndarray, "_head query key"]],
    residual: Sequence[Float[np.ndarray, "pos"]],
    start: int,
    k: int,
    *,
    must_move: bool = True,
) -> list[tuple[list[Edge], float]]:
    """Find the k best paths from `start` after the last layer, best first, as edges and score.

    `heads` is log w of each layer, −∞ where there is no step, and `residual` log ρ. `must_move`
    leaves out the paths that never leave `start`.
    """
    n = start + 1
    heads, stays = [layer[:, :n, :n] for layer in heads], [layer[:n] for layer in residual]
    rest = _rest_of_layers(heads, stays, must_move=must_move)

    # A place is: layers left, position, whether it has moved, the head that led there (−1: none).
    def steps_from(place: _Place) -> Iterable[_Step]:
        left, p, moved, _ = place
        row, below = left - 1, rest[left - 1]
        goes = below[1, : p + 1].copy()
        goes[p] = below[moved, p]
        weights = np.concatenate([[stays[row][p]], heads[row][:, p, : p + 1].ravel()])
        values = weights + np.concatenate([[below[moved, p]], np.tile(goes, len(heads[row]))])
        for i in _largest(values, k):
            head, key = divmod(i - 1, p + 1)  # −1 and p for the first, the residual connection
            after = (row, key, int(moved or key != p), head)
            yield float(values[i]), float(weights[i]), after

    def edge(here: _Place, there: _Place) -> Edge:
        row, key, _, head = there
        return row, None if head < 0 else head, here[1], key

    best = float(rest[-1][0, start])
    starts = [(best, (len(heads), start, 0, -1))] if math.isfinite(best) else []
    found = _best_first(starts, steps_from, k)
    return [([edge(*pair) for pair in itertools.pairwise(path)], score) for path, score in found]


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
