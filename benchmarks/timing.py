"""Timing several routes in turn, so that what slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of one route, one value per round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)


def ratio_spread(values: Sequence[float], base: Sequence[float]) -> str | None:
    """Smallest to largest `value / base` of one round."""
    return spread(a / b for a, b in zip(values, base, strict=True))


def difference_spread(values: Sequence[float], base: Sequence[float]) -> str | None:
    """Smallest to largest `value - base` of one round."""
    return spread(a - b for a, b in zip(values, base, strict=True))


def spread(values: Iterable[float]) -> str | None:
    """Smallest to largest, as a table shows them; None of a single value, which has no spread."""
    # + 0.0, as what is rounded to -0.0 would be shown with its sign
    rounded = sorted(round(value, 2) + 0.0 for value in values)
    return f"{rounded[0]:.2f} to {rounded[-1]:.2f}" if len(rounded) > 1 else None


def low_high(shown: str | None) -> tuple[float, float] | None:
    """The two numbers of a `spread`."""
    if shown is None:
        return None
    low, high = shown.split(" to ")
    return float(low), float(high)


def interleaved(
    routes: dict[str, Callable[[], object]],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Run each route `rounds` times, taking turns, after a first round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for number in range(rounds + 1):
        for name, run in routes.items():
            start = clock()
            run()
            if number:
                seconds[name].append(clock() - start)
    return {name: Times(values) for name, values in seconds.items()}
