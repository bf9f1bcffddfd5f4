"""The exceptions ra_lens raises on purpose: each says what was found, what is needed, what to call.

All derive from `RALensError`, so a caller (and the command line) can tell a refusal from a bug.
They also derive from the built-in exception people already catch.
"""

from __future__ import annotations

from collections.abc import Iterable


class RALensError(Exception):
    """Base of every exception that ra_lens raises on purpose."""


class RALensWarning(UserWarning):
    """Something was decided for the user that may not be what was meant."""


class BadInput(RALensError, ValueError):
    """The input, target or option given cannot be used; the message says what can."""


class UnsupportedModel(RALensError, RuntimeError):
    """The model, or the state it is in, does not let its attention be read or edited exactly."""


class NothingToDifferentiate(RALensError, RuntimeError):
    """No gradient reached the attention: a loss that is NaN, constant, or cut off from it."""


class NotEnoughMemory(RALensError, MemoryError):
    """A run needs more memory than a device has left; the message says which, and what fits."""


class BadFile(RALensError, ValueError):
    """A file is missing, damaged, or not of the kind that is read here."""


class UnfinishedGrid(RALensError, RuntimeError):
    """Cells of a grid failed, or were not computed; the message says which, the rest is kept."""


class DownloadFailed(RALensError, OSError):
    """A published file cannot be had now: no network, no such file, or a broken connection."""


class NotStored(RALensError, KeyError):
    """A map was asked for that this cache does not hold."""

    def __str__(self) -> str:
        """Give the message itself; `KeyError` would print it in quotes."""
        return str(self.args[0]) if self.args else ""


def one_of(name: str, value: object, choices: Iterable[object], *, where: str = "") -> None:
    """Raise BadInput unless an option has one of its values; `where` goes behind what was found."""
    if value in (known := list(choices)):
        return
    *others, last = map(repr, known)
    said = f"{others[0]} or {last}" if len(known) == 2 else f"one of {', '.join([*others, last])}"
    raise BadInput(f"found {name}={value!r}{where}; give {said}.")


def at_least(least: int, **counts: int) -> None:
    """Raise BadInput if one of these numbers, given by name, is below `least`."""
    for name, number in counts.items():
        if number < least:
            raise BadInput(f"found {name}={number}; give at least {least}.")
