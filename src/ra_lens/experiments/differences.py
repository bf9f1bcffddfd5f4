"""Which settings of two runs differ, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

_LONG = 60  # characters of a value in a message
_NOTHING = "nothing"  # where a setting is not among those of a run


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which settings differ and how: `seed: there 1, here 2`; nothing where none does."""
    found = [
        text
        for name in {**was, **now}
        for text in _differing(name, was.get(name, _NOTHING), now.get(name, _NOTHING))
    ]
    more = f"; and {len(found) - 5} more" * (len(found) > 5)
    return "; ".join(found[:5]) + more


def _differing(name: str, was: object, now: object) -> Iterator[str]:
    if was == now:
        return
    before, after = _named(was), _named(now)
    if before and list(before) == list(after):  # of the same tasks, or methods
        for one, facts in before.items():
            others = after[one]
            for fact in {**facts, **others}:
                values = facts.get(fact, _NOTHING), others.get(fact, _NOTHING)
                yield from _differing(f"{fact} of {one}", *values)
    else:
        yield f"{name}: {_there_and_here(list(before) or was, list(after) or now)}"


def _there_and_here(was: object, now: object) -> str:
    """Two values, or of long ones where they differ."""
    there, here = (value if isinstance(value, str) else repr(value) for value in (was, now))
    if max(len(there), len(here)) <= _LONG:
        return f"there {there}, here {here}"
    if isinstance(was, list) and isinstance(now, list):
        ours, theirs = cast("list[object]", now), cast("list[object]", was)
        only_there, only_here = (
            [value for value in one if value not in other]
            for one, other in ((theirs, ours), (ours, theirs))
        )
        if only_there or only_here:
            return f"only there {short(only_there)}, only here {short(only_here)}"
    letters = zip(there, here, strict=False)
    same = next((i for i, (a, b) in enumerate(letters) if a != b), min(len(there), len(here)))
    start = max(same - 10, 0)
    before, after = (f"{'…' * (start > 0)}{text[start:]}" for text in (there, here))
    return f"there {_cut(before)}, here {_cut(after)}"


def _named(value: object) -> dict[str, dict[str, Any]]:
    """Parts of a setting by their names; nothing where it is no list of such."""
    if not isinstance(value, list):
        return {}
    parts = cast("list[object]", value)
    named = [cast("dict[str, Any]", part) for part in parts if isinstance(part, dict)]
    by_name = {str(part["name"]): part for part in named if "name" in part}
    return by_name if len(by_name) == len(parts) else {}


def short(value: object) -> str:
    """Write a value in few characters."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"
