"""Randomness that is the same on every machine and every version of Python.

Only `random.Random.random` is used to draw: its sequence for an integer seed is guaranteed,
while `shuffle`, `sample` and `choice` have changed between versions. `hash` differs from process
to process, so keys are digested instead.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def stable_int(*parts: object) -> int:
    """Return a 64-bit integer that depends on the text of `parts` alone."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """Return one of `items`."""
    return items[int(rng.random() * len(items))]


def draw(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """Return `count` of `items` without replacement, in random order."""
    rest = list(items)
    for i in range(count):
        j = i + int(rng.random() * (len(rest) - i))
        rest[i], rest[j] = rest[j], rest[i]
    return rest[:count]
