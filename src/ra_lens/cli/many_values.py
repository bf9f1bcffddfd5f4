"""Several values after one option: `--shots 0 1 5 10`, `--scales -30 1`, `--task antonym synonym`.

Click takes one value per option, and repeated options for several. A command of this class repeats
the option for the user: words that follow it, up to the next option, are its values. A word that
starts like a negative number is a value. `--shots 0,1,5,10` works too, see `split_values`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from typer.core import TyperCommand

from ra_lens.errors import BadInput

_NEGATIVE = re.compile(r"-\.?\d")


class ManyValuesCommand(TyperCommand):
    """A command whose repeatable options take several values at once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the options that were given several values, then parse as usual."""
        options: Any = [
            param for param in self.get_params(ctx) if param.param_type_name == "option"
        ]
        many = {name for option in options if option.multiple for name in option.opts}
        return super().parse_args(ctx, repeat_options(args, many))


def repeat_options(arguments: Sequence[str], many: Collection[str]) -> list[str]:
    """Write `--shots 0 1` as `--shots=0 --shots=1` for the options in `many`."""
    given: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*given, word, *rest]
        name, equals, value = word.partition("=")
        if name not in many:
            given.append(word)
            continue
        values = [value] if equals else []
        while rest and _is_value(rest[0]):
            values.append(rest.pop(0))
        given += [f"{name}={v}" if name.startswith("--") else f"{name}{v}" for v in values]
        if not values:
            given.append(word)  # click says what is missing
    return given


def split_values(values: Sequence[str]) -> list[str]:
    """Give single values where several were written with commas between."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()]


def whole_numbers(values: Sequence[str] | None, option: str) -> list[int] | None:
    """Read whole numbers.

    Raises:
        BadInput: one is not.
    """
    try:
        return None if values is None else [int(value) for value in split_values(values)]
    except ValueError:
        raise BadInput(
            f"found {option} {' '.join(values or ())}; give whole numbers such as 0 1 5 10."
        ) from None


def numbers(values: Sequence[str] | None, option: str) -> list[float] | None:
    """Read numbers.

    Raises:
        BadInput: one is not.
    """
    try:
        return None if values is None else [float(value) for value in split_values(values)]
    except ValueError:
        raise BadInput(
            f"found {option} {' '.join(values or ())}; give numbers such as -30 1."
        ) from None


def _is_value(word: str) -> bool:
    return not word.startswith("-") or _NEGATIVE.match(word) is not None
