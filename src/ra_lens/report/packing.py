"""Maps as text: half-precision numbers of the cells that a query can look at, in base64.

A map holds A, then R divided by its largest |R|, both row by row; of a causal map only the lower
triangle. Half precision keeps three digits (relative error at most 2⁻¹¹) down to 6·10⁻⁵ of the
largest |R|, below which the error is at most 3·10⁻⁸ of it. Four bytes per cell, 5.3 in base64.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ra_lens.display.maps import HeadMaps

BYTES_PER_CELL = 4


@dataclass(frozen=True)
class PackedMaps:
    """One head's maps on one example as they stand in a page.

    Attributes:
        text: Base64.
        limit: What R was divided by: its largest |R|, or 1.
        causal: Whether only the lower triangle is there.
    """

    text: str
    limit: float
    causal: bool


def pack(maps: HeadMaps) -> PackedMaps:
    """Write a head's maps as text."""
    kept = maps.reachable()
    limit = maps.limit or 1.0
    with np.errstate(over="ignore"):  # what is infinite stays so
        halves = np.concatenate([maps.pattern[kept], maps.ra[kept] / limit]).astype("<f2")
    return PackedMaps(base64.b64encode(halves.tobytes()).decode(), limit, maps.causal)


def unpack(packed: PackedMaps, shape: tuple[int, int]) -> tuple[Any, Any]:
    """Read A and R back, NaN where a query cannot look; what the page's script does."""
    halves = np.frombuffer(base64.b64decode(packed.text), "<f2").astype(np.float64)
    kept = np.tril(np.ones(shape, bool)) if packed.causal else np.ones(shape, bool)
    both: Sequence[Any] = [np.full(shape, np.nan), np.full(shape, np.nan)]
    n = int(kept.sum())
    both[0][kept], both[1][kept] = halves[:n], halves[n:] * packed.limit
    return both[0], both[1]
