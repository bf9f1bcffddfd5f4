"""Several values after one option: `--shots 0 1 5 10`, `--scales -30 1`, `--task antonym synonym`.

Click takes one value per option, and repeated options for several. A command of this class repeats
the option for the user: words that follow it, up to the next option, are its values. A word that
starts like a negative number is a value. `--shots 0,1,5,10` works too, see `split_values`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

from ra_lens.cli.command import Command
from ra_lens.cli.options import reported
from ra_lens.errors import BadInput

_NEGATIVE = re.compile(r"-\.?\d")
_MOST_VALUES = 10_000


class ManyValuesCommand(Command):
    """A command whose repeatable options take several values at once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the options that were given several values, then parse as usual."""
        options: Any = [
            param for param in self.get_params(ctx) if param.param_type_name == "option"
        ]
        many = {name for option in options if option.multiple for name in option.opts}
        with reported(debug=False):
            repeated = repeat_options(args, many)
        return super().parse_args(ctx, repeated)


def repeat_options(arguments: Sequence[str], many: Collection[str]) -> list[str]:
    """Write `--shots 0 1` as `--shots=0 --shots=1` for the options in `many`.

    Raises:
        BadInput: more values than are ever meant.
    """
    given: list[str] = []
    rest = deque(arguments)
    while rest:
        word = rest.popleft()
        if word == "--":
            return [*given, word, *rest]
        name, equals, value = word.partition("=")
        if name not in many:
            given.append(word)
            continue
        values = [value] if equals else []
        while rest and _is_value(rest[0]):
            values.append(rest.popleft())
        if len(values) > _MOST_VALUES:
            raise BadInput(
                f"found {len(values):,} values of {name}; give {_MOST_VALUES:,} at most."
            )
        for v in values:  # -t and an empty word, written as one, would take the next word
            given += [f"{name}={v}"] if name.startswith("--") else [name, v]
        if not values:
            given.append(word)  # click says what is missing
    return given


def split_values(values: Sequence[str], option: str) -> list[str]:
    """Give single values where several were written with commas between.

    Raises:
        BadInput: a word without a value in it.
    """
    parts: list[str] = []
    for value in values:
        found = [part.strip() for part in value.split(",") if part.strip()]
        if not found:
            raise BadInput(
                f"found {option} {value!r}, which is empty. Give a value, or leave it out."
            )
        parts += found
    return parts


def whole_numbers(values: Sequence[str] | None, option: str) -> list[int] | None:
    """Read whole numbers.

    Raises:
        BadInput: one is not.
    """
    if values is None:
        return None
    parts = split_values(values, option)
    try:
        return [int(part) for part in parts]
    except ValueError:
        raise BadInput(
            f"found {option} {_shown(values)}; give whole numbers such as 0 1 5 10."
        ) from None


def numbers(values: Sequence[str] | None, option: str) -> list[float] | None:
    """Read numbers.

    Raises:
        BadInput: one is not.
    """
    if values is None:
        return None
    parts = split_values(values, option)
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise BadInput(f"found {option} {_shown(values)}; give numbers such as -30 1.") from None


def _shown(words: Sequence[str]) -> str:
    text = " ".join(words)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_value(word: str) -> bool:
    return not word.startswith("-") or _NEGATIVE.match(word) is not None
