"""Pixels of a drawing of a latent space: points, arrows, and labels that do not lie on each other.

Both dimensions have one scale, so that angles and distances are those of the plane. Labels are put
beside their points one after the other, those of the strongest pairs first, each where the least is
in its way: near, on the side away from the other points, and off the arrows. One that finds no
place is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from rich.cells import cell_len

from ra_lens.latent.space import LatentSpace, Points
from ra_lens.text import label

Pixels = tuple[float, float]
Side = Literal["query", "key"]

FONT = 12
_CHARACTER, _LINE = 6.9, 15.0  # pixels of a character of that size, and of a line
_MARKER = 6.0  # half of what a marker takes
_ARROW = 0.16  # of the width: the longest arrow
_LEAST = 3.0  # pixels of an arrow; shorter ones are not seen
_LOWEST, _TALLEST = 300, 620
_LABEL = 14  # characters
_STRONG = 0.2  # of the largest |R|: whose line labels keep off
_AROUND = 24  # directions in which a label is tried
_AWAY = (9.0, 16.0, 26.0, 40.0, 56.0, 76.0, 100.0)


@dataclass(frozen=True)
class Label:
    """A token's name, and where its middle is."""

    text: str
    middle: Pixels
    far: bool  # from its point, so that a line leads to it


@dataclass(frozen=True)
class Dot:
    """A query or a key."""

    side: Side
    index: int
    at: Pixels
    arrow: Pixels | None  # its end; None where nothing moves it, or too little to be seen
    label: Label | None  # None where there was no room


@dataclass(frozen=True)
class Drawing:
    """Where everything lies, in pixels from the top left of the plot.

    Attributes:
        width: Of the plot.
        height: Of the plot.
        per_pixel: Units of the plane per pixel.
        corner: Top left of the plot, in the plane.
        origin: Where the vector 0 lies.
        queries: The queries.
        keys: The keys.
        times: What the arrows of queries and of keys are times −δ; 0 where there are none.
    """

    width: float
    height: float
    per_pixel: float
    corner: tuple[float, float]
    origin: Pixels
    queries: tuple[Dot, ...]
    keys: tuple[Dot, ...]
    times: tuple[float, float]

    @property
    def dots(self) -> tuple[Dot, ...]:
        """Queries and keys."""
        return self.queries + self.keys

    def in_plane(self, pixels: Pixels) -> tuple[float, float]:
        """The point of the plane that lies there."""
        x, y = pixels
        return self.corner[0] + x * self.per_pixel, self.corner[1] - y * self.per_pixel


def lay_out(space: LatentSpace, *, width: float, step: float | None = None) -> Drawing:
    """Place points, arrows and labels in a plot of some width.

    Args:
        space: What to draw.
        width: In pixels.
        step: What arrows are times −δ, those of queries as those of keys. None: as much as makes
            the longest of each a sixth of the width.
    """
    queries, keys = space.queries, space.keys
    margin = (min(120.0, 0.16 * width), 44.0)
    still = np.concatenate([queries.at, keys.at, space.origin[None]])
    longest = _ARROW * width * _per_pixel(still, width, margin)
    own = tuple(longest / side.longest if side.longest > 0 else 0.0 for side in (queries, keys))
    times = own if step is None else tuple(step if one else 0.0 for one in own)
    ends = [
        side.at + factor * side.step
        for side, factor in zip((queries, keys), times, strict=True)
        if side.step is not None
    ]
    every = np.concatenate([still, *ends])
    per_pixel = _per_pixel(every, width, margin)
    low, high = every.min(axis=0), every.max(axis=0)
    height = float(max(_LOWEST, (high - low)[1] / per_pixel + 2 * margin[1]))
    middle = (low + high) / 2
    corner = (
        float(middle[0] - width / 2 * per_pixel),
        float(middle[1] + height / 2 * per_pixel),
    )

    def pixels(at: Float[np.ndarray, "2"]) -> Pixels:
        return float(at[0] - corner[0]) / per_pixel, float(corner[1] - at[1]) / per_pixel

    placed: dict[Side, list[tuple[Pixels, Pixels | None]]] = {"query": [], "key": []}
    sides: tuple[tuple[Side, Points, float], ...] = (
        ("query", queries, times[0]),
        ("key", keys, times[1]),
    )
    for name, side, factor in sides:
        for i, at in enumerate(side.at):
            end = None
            if side.step is not None and factor:
                moved = factor * side.step[i]
                if float(np.hypot(*moved)) >= _LEAST * per_pixel:
                    end = pixels(at + moved)
            placed[name].append((pixels(at), end))
    labels = _labels(space, placed, (width, height))
    dots: dict[Side, tuple[Dot, ...]] = {
        side: tuple(
            Dot(side, i, at, end, labels.get((side, i))) for i, (at, end) in enumerate(places)
        )
        for side, places in placed.items()
    }
    return Drawing(
        float(width), height, per_pixel, corner, pixels(space.origin), dots["query"], dots["key"],
        (times[0], times[1]),
    )  # fmt: skip


def _per_pixel(points: Float[np.ndarray, "point 2"], width: float, margin: Pixels) -> float:
    """Units of the plane per pixel, so that all points lie within the margins."""
    size = points.max(axis=0) - points.min(axis=0)
    across = size[0] / (width - 2 * margin[0])
    return float(max(across, size[1] / (_TALLEST - 2 * margin[1])) or 1.0)


def names(side: Points) -> list[str]:
    """Name each token; with its position where another one is the same."""
    shown = [label(token, _LABEL) for token in side.tokens]
    often = Counter(shown)
    return [
        f"{name} ({side.first + i})" if often[name] > 1 else name for i, name in enumerate(shown)
    ]


# ---- labels -------------------------------------------------------------------------------------

Boxes = Float[np.ndarray, "_ 4"]  # left, top, right, bottom


def _labels(
    space: LatentSpace,
    placed: dict[Side, list[tuple[Pixels, Pixels | None]]],
    size: Pixels,
) -> dict[tuple[Side, int], Label]:
    texts: dict[Side, list[str]] = {"query": names(space.queries), "key": names(space.keys)}
    points = np.array([at for places in placed.values() for at, _ in places])
    taken = np.concatenate([points - _MARKER, points + _MARKER], axis=1)
    arrows = _joined(
        _along(at, end) for places in placed.values() for at, end in places if end is not None
    )
    lines = _joined(
        _along(
            placed["query"][cell.query - space.queries.first][0],
            placed["key"][cell.key - space.keys.first][0],
        )
        for cell in space.pairs
        if abs(cell.ra) > _STRONG * space.maps.limit
    )
    middles = {side: np.mean([at for at, _ in places], axis=0) for side, places in placed.items()}
    found: dict[tuple[Side, int], Label] = {}
    for side, i in _order(space, placed):
        at = np.asarray(placed[side][i][0])
        away = at - middles["key" if side == "query" else "query"]
        half = np.array([cell_len(texts[side][i]) * _CHARACTER / 2 + 1, _LINE / 2])
        centres, cost, far = _places(at, half, math.atan2(away[1], away[0]))
        boxes = np.concatenate([centres - half, centres + half], axis=1)
        inside = (boxes[:, :2] >= 0).all(axis=1) & (boxes[:, 2:] <= size).all(axis=1)
        free = inside & ~_overlap(boxes, taken).any(axis=1)
        cost = (
            cost + 12 * _within(boxes, arrows).sum(axis=1) + 3 * _within(boxes, lines).sum(axis=1)
        )
        # Nearer to another point it would be read as that one's.
        others = points[(points != at).any(axis=1)]
        cost += 14 * (_gap(boxes, others) < _gap(boxes, at[None]) + 4).sum(axis=1)
        for n in np.flatnonzero(free)[np.argsort(cost[free], kind="stable")]:
            middle = centres[n]
            way = np.array(_along((at[0], at[1]), (middle[0], middle[1]))[3:])
            if far[n] and _within(taken[len(points) :], way).any():
                continue
            taken = np.concatenate([taken, boxes[n : n + 1]])
            found[side, i] = Label(
                texts[side][i], (float(middle[0]), float(middle[1])), bool(far[n])
            )
            break
    return found


def _order(
    space: LatentSpace, placed: dict[Side, list[tuple[Pixels, Pixels | None]]]
) -> list[tuple[Side, int]]:
    """Those of the strongest pairs, then the others from top to bottom."""
    first: list[tuple[Side, int]] = []
    for cell in space.pairs:
        first.append(("query", cell.query - space.queries.first))
        first.append(("key", cell.key - space.keys.first))
    rest: list[tuple[float, tuple[Side, int]]] = [
        (at[1], (side, i)) for side, places in placed.items() for i, (at, _) in enumerate(places)
    ]
    return list(dict.fromkeys([*first, *(one for _, one in sorted(rest))]))


def _places(
    at: Float[np.ndarray, "2"], half: Float[np.ndarray, "2"], away: float
) -> tuple[Float[np.ndarray, "place 2"], Float[np.ndarray, "place"], Bool[np.ndarray, "place"]]:
    """Give where the middle of a label may be, what each place costs, and which of them are far."""
    turns = 2 * math.pi * np.arange(_AROUND) / _AROUND
    turn, distance = (grid.ravel() for grid in np.meshgrid(turns, np.array(_AWAY)))
    towards = np.stack([np.cos(away + turn), np.sin(away + turn)], axis=1)
    # From the middle of the label to its edge, in the direction of the point.
    edge = (half / np.maximum(np.abs(towards), 1e-9)).min(axis=1)
    cost = distance + 8 * (1 - np.cos(turn))
    return at + (distance + edge)[:, None] * towards, cost, distance > _AWAY[1]


def _along(start: Pixels, end: Pixels) -> list[Pixels]:
    n = max(2, int(math.dist(start, end) / 5))
    return [
        (start[0] + (end[0] - start[0]) * i / n, start[1] + (end[1] - start[1]) * i / n)
        for i in range(n + 1)
    ]


def _joined(ways: Iterable[list[Pixels]]) -> Float[np.ndarray, "point 2"]:
    return np.array([point for way in ways for point in way]).reshape(-1, 2)


def _overlap(ones: Boxes, others: Boxes) -> Bool[np.ndarray, "_ _"]:
    one, other = ones[:, None], others[None]
    return np.all((one[..., :2] < other[..., 2:]) & (other[..., :2] < one[..., 2:]), axis=-1)


def _within(boxes: Boxes, points: Float[np.ndarray, "point 2"]) -> Bool[np.ndarray, "_ point"]:
    box, point = boxes[:, None], points[None]
    return np.all((box[..., :2] <= point) & (point <= box[..., 2:]), axis=-1)


def _gap(boxes: Boxes, points: Float[np.ndarray, "point 2"]) -> Float[np.ndarray, "_ point"]:
    """Pixels between boxes and points; 0 inside."""
    box, point = boxes[:, None], points[None]
    return np.linalg.norm(
        np.maximum(np.maximum(box[..., :2] - point, point - box[..., 2:]), 0), axis=-1
    )
