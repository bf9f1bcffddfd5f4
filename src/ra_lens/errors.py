"""The exceptions ra_lens raises on purpose: each says what was found, what is needed, what to call.

All derive from `RALensError`, so a caller (and the command line) can tell a refusal from a bug.
They also derive from the built-in exception people already catch.
"""

from __future__ import annotations


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
    """A run needs more memory than its device has left; the message says which options fit."""


class BadFile(RALensError, ValueError):
    """A file is missing, damaged, or not of the kind that is read here."""


class DownloadFailed(RALensError, OSError):
    """A published file cannot be had now: no network, no such file, or a broken connection."""


class NotStored(RALensError, KeyError):
    """A map was asked for that this cache does not hold."""

    def __str__(self) -> str:
        """Give the message itself; `KeyError` would print it in quotes."""
        return str(self.args[0]) if self.args else ""
