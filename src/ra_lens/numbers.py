"""Reading the numbers that people hand over: Python's, NumPy's, torch's, pandas'.

A whole number is anything with `__index__` (`int`, `np.int64`, an integer tensor of one element),
but not a bool. A sequence is anything that iterates over numbers (list, range, array, tensor,
Series, generator); one number alone is a sequence of one. Some of n things are chosen by numbers,
by a slice, or by a bool for each.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any, Literal, SupportsFloat, SupportsIndex

from ra_lens.errors import BadInput, at_least

Whole = SupportsIndex
Wholes = SupportsIndex | Iterable[SupportsIndex]
Real = SupportsFloat | SupportsIndex
Reals = Real | Iterable[Real]
BatchSize = Whole | Literal["auto"]
"""How many rows run at a time; `"auto"`: as many as fit (`ra_lens.fitting`)."""


def whole(name: str, value: object, *, least: int | None = None) -> int:
    """Give a whole number as an `int`; refuse all else, called `name`, and less than `least`."""
    number = as_whole(value)
    if number is None:
        from_least = "" if least is None else f" from {least} on"
        raise BadInput(f"found {name}={_shown(value)}; give a whole number{from_least}.")
    if least is not None:
        at_least(least, **{name: number})
    return number


def whole_or_none(name: str, value: object, *, least: int | None = None) -> int | None:
    """Give a whole number, see `whole`, or None where none was given."""
    return None if value is None else whole(name, value, least=least)


def read_batch_size(batch_size: object) -> int | Literal["auto"]:
    """Give how many rows may run at a time, at least one, or `"auto"`."""
    if isinstance(batch_size, str) and batch_size == "auto":
        return "auto"
    if as_whole(batch_size) is None:
        raise BadInput(
            f"found batch_size={_shown(batch_size)}; give a whole number from 1 on, or 'auto'."
        )
    return whole("batch_size", batch_size, least=1)


def wholes(
    name: str, values: object, *, least: int | None = None, none_at_all: bool = False
) -> list[int]:
    """Give whole numbers, see `whole`, as a list; refuse an empty one unless `none_at_all`."""
    given = _several(name, values, "whole number", none_at_all=none_at_all)
    return [whole(name, value, least=least) for value in given]


def real(name: str, value: object) -> float:
    """Give a finite number as a `float`; refuse all else, called `name`."""
    number = _as_float(value)
    if number is None:
        raise BadInput(f"found {name}={_shown(value)}; give a number.")
    if not math.isfinite(number):
        raise BadInput(f"found {name}={number}; give a finite number.")
    return number


def real_or_none(name: str, value: object) -> float | None:
    """Give a finite number, see `real`, or None where none was given."""
    return None if value is None else real(name, value)


def reals(name: str, values: object) -> list[float]:
    """Give finite numbers, at least one, as a list of `float`."""
    return [real(name, value) for value in _several(name, values, "number")]


def flag(name: str, value: object) -> bool:
    """Give True or False, of NumPy, torch or Python; refuse all else, called `name`."""
    if not _is_bool(value) or getattr(value, "ndim", 0):
        raise BadInput(f"found {name}={_shown(value)}; give True or False.")
    return bool(value)


def places(name: str, which: object, n: int, things: str) -> list[int]:
    """Give the places chosen among `n` things, at least one, from 0 on and in the order given.

    `which` is one place or several (negative: from the end), a slice, or a bool for each thing.
    """
    shown = f"found {name}={_shown(which)}"
    found = _read_places(which, n)
    if found is None:
        raise BadInput(
            f"{shown}; give whole numbers, a slice, or a bool for each of the {n} {things}."
        )
    outside = [place for place in found if not -n <= place < n]
    if outside:
        raise BadInput(
            f"{shown}, but {outside[0]} is none of the {n} {things}: 0 to {n - 1}, or {-n} to -1 "
            "from their end."
        )
    if not found:
        raise BadInput(f"{shown}, which is none of the {n} {things}. Give at least one.")
    return [place % n for place in found]


def is_several(which: object) -> bool:
    """Whether a choice is of several things, as a list of one is, and not of one."""
    return isinstance(which, Iterable | slice) and getattr(which, "ndim", None) != 0


def as_whole(value: object) -> int | None:
    """Give a whole number of any type as an `int`; None for everything else, a bool included."""
    if _is_bool(value) or isinstance(value, str | bytes):
        return None
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, RuntimeError):  # tensors of several elements, or on no device
        return None


def _as_float(value: object) -> float | None:
    if _is_bool(value) or isinstance(value, str | bytes) or getattr(value, "ndim", 0):
        return None
    try:
        return float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _read_places(which: Any, n: int) -> list[int] | None:
    """The places chosen, negative ones as they are; None for what is no choice among `n` things."""
    if isinstance(which, slice):
        try:
            return list(range(n)[which])
        except (TypeError, ValueError):  # ends that are not whole numbers, or a step of 0
            return None
    if isinstance(which, str | bytes | Mapping) or getattr(which, "ndim", 1) > 1:
        return None
    # NumPy, torch and pandas give Python's numbers all at once.
    given: Any = which.tolist() if hasattr(which, "tolist") else which
    several: list[object] = list(given) if isinstance(given, Iterable) else [given]
    if several and is_several(which) and all(map(_is_bool, several)):
        return [i for i, keep in enumerate(several) if keep] if len(several) == n else None
    found = [number for number in map(as_whole, several) if number is not None]
    return found if len(found) == len(several) else None


def _several(name: str, values: Any, what: str, *, none_at_all: bool = False) -> list[object]:
    if isinstance(values, str | bytes | Mapping | slice):
        raise BadInput(f"found {name}={_shown(values)}; give a {what}, or several in a list.")
    alone = not isinstance(values, Iterable) or getattr(values, "ndim", None) == 0
    given: list[object] = [values] if alone else list(values)
    if not given and not none_at_all:
        raise BadInput(f"found {name} without a number in it; give at least one.")
    return given


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}… ({type(value).__name__})"
