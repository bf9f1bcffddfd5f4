"""Timing several routes in turn, so that what slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of one route, one value per round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """The shortest."""
        return min(self.seconds)

    @property
    def high(self) -> float:
        """The longest."""
        return max(self.seconds)


def interleaved(routes: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, Times]:
    """Run each route `rounds` times, taking turns, after a first round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for number in range(rounds + 1):
        for name, run in routes.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: Times(values) for name, values in seconds.items()}
