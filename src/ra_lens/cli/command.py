"""What every command does with the words it is given, and how it tells mistakes.

An option whose value is empty is one whose value got lost, as that of an unset variable of the
shell; so is one whose value is another option's name.

Several values may follow one option: `--shots 0 1 5 10`, `--scales -30 1`. Click takes one value
per option, and repeated options for several, so `ManyValuesCommand` repeats the option for the
user: words that follow it, up to the next option, are its values. A word that starts like a
negative number is a value. `--shots 0,1,5,10` works too, see `split_values`.

This module imports neither torch nor plotly, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar, cast

import typer
from typer.core import TyperCommand, TyperGroup

from ra_lens.errors import BadInput, RALensError, UnfinishedGrid
from ra_lens.files import FULL

# These are read as they are: an empty prompt or target is told as such, and nothing between solved
# examples is a format.
_TEXTS = ("prompt", "target", "separator")
_NEGATIVE = re.compile(r"-\.?\d")
_MOST_VALUES = 10_000
# What the system says of a file that only the user can do something about.
_OF_THE_SYSTEM = (*FULL, errno.EACCES, errno.ENAMETOOLONG, errno.EPERM, errno.EROFS)
_LONGEST = 2000  # characters of an error: some lines of a terminal

N = TypeVar("N", int, float)


class Commands(TyperGroup):
    """The commands, behind a look at what was typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse words whose bytes are no text, whatever they are meant as, then parse as usual.

        Python puts a lone surrogate in the place of each such byte. The message names the option.
        """
        option = "an argument"
        for word in args:
            if word.startswith("-"):
                option = word.split("=")[0] if word.startswith("--") else word[:2]
            odd = re.search("[\ud800-\udfff]", word)
            if odd is None:
                continue
            byte = f"byte {ord(odd[0]) - 0xDC00:#04x}" if odd[0] >= "\udc80" else "half a character"
            with reported(debug=False):
                raise BadInput(
                    f"found text that is not UTF-8 as {option} ({byte} at place {odd.start()} of "
                    f"{ascii(word)[:60]}). Give it in UTF-8."
                )
        return super().parse_args(ctx, args)


class Command(TyperCommand):
    """A command that reads no empty word, and no option's name, as a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as usual, then look at the values as they were typed."""
        given = list(args)
        typed: dict[str, Any] = self.make_parser(ctx).parse_args(list(args))[0]
        rest = super().parse_args(ctx, args)
        params: Any = self.get_params(ctx)
        options = {name for param in params for name in param.opts if name.startswith("-")}
        with reported(debug=False):
            for param in params:
                values = typed.get(param.name)
                several = isinstance(values, list | tuple)
                for value in cast("list[object]", values) if several else [values]:
                    if isinstance(value, str):
                        _check(param, value, options, given)
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command and tell its mistakes."""
        with reported(debug=ctx.params["debug"]):
            return super().invoke(ctx)


class ManyValuesCommand(Command):
    """A command whose repeatable options take several values at once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the options that were given several values, then parse as usual."""
        params: Any = self.get_params(ctx)
        options = [param for param in params if param.param_type_name == "option"]
        many = {name for option in options if option.multiple for name in option.opts}
        with reported(debug=False):
            repeated = repeat_options(args, many)
        return super().parse_args(ctx, repeated)


def _check(param: Any, value: str, options: Collection[str], given: Sequence[str]) -> None:
    name = "/".join(param.opts) if param.opts[0].startswith("-") else param.opts[0].upper()
    if not value.strip() and param.name not in _TEXTS:
        raise _empty(name, value)
    if value in options and not any(f"{one}={value}" in given for one in param.opts):
        raise BadInput(
            f"found {value} where the value of {name} is needed. Give one; if {value} is meant, "
            f"write {param.opts[0]}={value}."
        )


def repeat_options(arguments: Sequence[str], many: Collection[str]) -> list[str]:
    """Write `--shots 0 1` as `--shots=0 --shots=1` for the options in `many`."""
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
        while rest and (not rest[0].startswith("-") or _NEGATIVE.match(rest[0])):
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
    """Give single values where several were written with commas between."""
    parts: list[str] = []
    for value in values:
        found = [part.strip() for part in value.split(",") if part.strip()]
        if not found:
            raise _empty(option, value)
        parts += found
    return parts


def some_of(values: list[str], option: str, known: Sequence[str]) -> list[str]:
    """Read values of an option that are some of those known; refuse others."""
    given = split_values(values, option)
    unknown = [value for value in given if value not in known]
    if unknown:
        raise BadInput(f"found {option} {unknown[0]}; give some of {', '.join(known)}.")
    return given


def whole_numbers(values: Sequence[str], option: str) -> list[int]:
    """Read whole numbers."""
    return _each(int, values, option, "whole numbers such as 0 1 5 10")


def numbers(values: Sequence[str], option: str) -> list[float]:
    """Read numbers."""
    return _each(float, values, option, "numbers such as -30 1")


def read_batch_size(text: str) -> int | Literal["auto"]:
    """Read how many rows run at a time."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"found --batch-size {text}; give a whole number from 1 on, or auto.")
    return int(text)


def _each(read: Callable[[str], N], values: Sequence[str], option: str, needed: str) -> list[N]:
    parts = split_values(values, option)
    try:
        return [read(part) for part in parts]
    except ValueError:
        text = " ".join(values)
        found = text if len(text) <= 60 else f"{text[:57]}…"
        raise BadInput(f"found {option} {found}; give {needed}.") from None


def _empty(option: str, value: str) -> BadInput:
    return BadInput(f"found {option} {value!r}, which is empty. Give a value, or leave it out.")


@contextmanager
def reported(*, debug: bool) -> Generator[None]:
    """Turn exceptions into one line and an exit code."""
    try:
        yield
        if sys.stdout is not None:  # what is still to be written may find the disk full
            sys.stdout.flush()
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = " ".join(str(error).split())
        expected = isinstance(error, RALensError)
        if isinstance(error, OSError) and not expected:
            if error.filename and error.errno in _OF_THE_SYSTEM:
                expected, text = True, f"{error.filename} cannot be used: {error.strerror}."
            elif error.errno in FULL:  # of what was open already, and files have their own errors
                expected, text = True, f"cannot write what is printed: {error.strerror}."
                _drop_what_is_printed()
        if not expected:
            text = f"{type(error).__name__}: {text} (unexpected; --debug shows where)"
        if len(text) > _LONGEST:  # what is needed stands at the end
            text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
        with suppress(OSError):
            typer.echo(f"error: {text}", err=True)
        code = 4 if isinstance(error, UnfinishedGrid) else 2 if expected else 1
        raise typer.Exit(code) from None


def _drop_what_is_printed() -> None:
    # What could not be written would be tried again at the end, with an exit code of its own.
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
