"""Tokens as labels: whitespace made visible, duplicates told apart, markup made harmless."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_VISIBLE = {"\n": "⏎", " ": "·", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u200d": "\u200d"}


def visible(token: str) -> str:
    """Write a token so that all of it can be seen: `·` space, `⏎` newline, `U+200F` for controls.

    The empty token is shown as `∅`.
    """
    return "".join(_visible_character(c) for c in token) or "∅"


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
    return [f"{plotly_text(visible(token))} ({i})" for i, token in enumerate(tokens, start=first)]


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
