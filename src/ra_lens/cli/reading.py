"""What the user typed, turned into what a run needs; each mistake is one sentence."""

from __future__ import annotations

import io
import re
import sys

import torch

from ra_lens.errors import BadInput
from ra_lens.text import decoded

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
_MOST_LAYERS = 10_000  # more than any model has; a longer range is a slip of the keyboard


def read_text(text: str, *, escapes: bool) -> str:
    """Read a prompt or target: `-` is standard input, and `\\n` a newline where escapes are on.

    A byte order mark in front is dropped, which a file brings along.

    Raises:
        BadInput: standard input is closed, or is not UTF-8.
    """
    if text == "-":
        text = _standard_input().removesuffix("\n")
    text = text.removeprefix("\ufeff")
    return unescaped(text) if escapes else text


def _standard_input() -> str:
    stream = sys.stdin
    if stream is None or stream.closed:  # pyright: ignore[reportUnnecessaryComparison]
        raise BadInput("found -, but standard input is closed. Give the text itself.")
    # Bytes, since the stream would read them with the encoding of the terminal.
    text = decoded("standard input", stream.buffer.read())
    return io.StringIO(text, newline=None).read()  # each end of a line is a newline


def unescaped(text: str) -> str:
    r"""Read \n and \t as whitespace, and \\ as one backslash."""
    return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match.group()], text)


def read_layers(text: str | None) -> list[int] | None:
    """Read a list of layers such as `0,5-8,-1`.

    Raises:
        BadInput: something else.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        several = range(int(first), int(last) + 1)
        # No match, a range that runs backwards, or one that no model has the layers for.
        if not several or len(layers) + len(several) > _MOST_LAYERS:
            raise BadInput(
                f"found --layers {text if len(text) <= 60 else text[:57] + '…'!r}; give numbers "
                "and rising ranges with commas between, such as 0,5-8,-1 (negative: from the end), "
                f"of at most {_MOST_LAYERS:,} layers."
            )
        layers += several
    return layers


def check_device(name: str | None) -> None:
    """Find out whether a device exists.

    Raises:
        BadInput: it does not, or torch knows no such kind.
    """
    if name is None:
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise BadInput(f"cannot use --device {name}: {reason}. Try --device cpu.") from error


def hints(prompt: str, target: str | None, *, escapes: bool) -> list[str]:
    """Say what looks like a slip of the shell, before anything runs."""
    found: list[str] = []
    if not escapes and (r"\n" in prompt or r"\n" in (target or "")):
        found.append(
            r"found a backslash and an n in the text; add -e to have \n read as a newline."
        )
    if target and target[0].isalnum() and prompt and not prompt[-1].isspace():
        found.append(
            f"the target {target!r} has no leading space, so it is read as going on from "
            f"{prompt[-12:]!r}; a new word is {' ' + target!r}."
        )
    return found
