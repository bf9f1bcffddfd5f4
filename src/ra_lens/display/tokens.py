"""Tokens as labels: whitespace made visible, duplicates told apart, markup made harmless.

A token that stands in a text with anything else is a `label`: isolated, so that one written from
right to left turns nothing around it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from ra_lens.token_text import BYTES_SHOWN, isolated

_JOINER = "\u200d"
_VISIBLE = {"\n": "⏎", " ": "·", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", _JOINER: _JOINER}


def visible(token: str) -> str:
    """Write a token so that all of it can be seen: `·` space, `⏎` newline, `U+200F` for controls.

    The empty token is shown as `∅`, a mark whose letter is in the token before as `◌́`.
    """
    parts = BYTES_SHOWN.split(token)  # text, bytes, text, …
    parts[::2] = ["".join(map(_visible_character, part)) for part in parts[::2]]
    return _supported("".join(parts)) or "∅"


def label(token: str, width: int | None = None) -> str:
    """Write a token as part of a text: visible, cut to `width` characters, isolated."""
    text = visible(token)
    return isolated(text if width is None else shorten(text, width))


def shorten(text: str, width: int) -> str:
    """Cut to at most `width` characters, the last being `…` where something was cut."""
    return text if len(text) <= width else text[: width - 1] + "…"


def plotly_text(text: str) -> str:
    """Escape text for plotly, which reads some HTML tags and, between dollars, TeX."""
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("$", "&#36;")):
        text = text.replace(character, entity)
    return text


def distinct(tokens: Sequence[str], *, first: int = 0) -> list[str]:
    """Names of the tokens by position, all different: `Paris (3)`, escaped for plotly."""
    return [f"{plotly_text(label(token))} ({i})" for i, token in enumerate(tokens, start=first)]


def thinned(n: int, room: int) -> list[int]:
    """Choose evenly spaced positions out of `n`, at most `room`, always with the last one."""
    step = -(-n // max(room, 1))
    return list(range(n - 1, -1, -step))[::-1]


def _visible_character(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"):
        return f"U+{ord(character):04X}"
    return character


def _supported(text: str) -> str:
    """Give a mark at the start something to stand on, and what joins or varies nothing a name."""
    if not text or not (text[0] == _JOINER or unicodedata.category(text[0]) in ("Mn", "Me")):
        return text
    if text[0] == _JOINER or unicodedata.name(text[0], "").startswith("VARIATION SELECTOR"):
        return f"U+{ord(text[0]):04X}{text[1:]}"
    return f"◌{text}"
