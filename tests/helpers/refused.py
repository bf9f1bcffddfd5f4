"""Calls that are refused, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from ra_lens.errors import BadInput, RALensError


def unchecked(function: Any) -> Any:
    """The function without the type check of the tests, as a notebook calls it."""
    return getattr(function, "__wrapped__", function)


def refused(
    call: Callable[..., object],
    options: Mapping[str, Any],
    message: str,
    *,
    error: type[RALensError] = BadInput,
) -> None:
    """The call with these options raises an error that says this, a regular expression."""
    with pytest.raises(error, match=message):
        call(**options)
