"""Tokens as text to read: bytes where a token is less than a character, and a direction of its own.

Byte-level tokenizers (GPT-2's kind) and those that fall back to bytes (Llama's) cut what they have
no token for, an emoji, Hebrew, Chinese, into bytes. Alone, such a token decodes to U+FFFD and all
of them look the same. Here the piece that completes a character shows the character, and the ones
before show their bytes: `⟨E2 9C⟩`, then `✓`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

BYTES_SHOWN = re.compile("(⟨[0-9A-F]{2}(?: [0-9A-F]{2})*⟩)")
"""How bytes are written."""

ISOLATED = re.compile("\u2068([^\u2068\u2069]*)\u2069")
"""How `isolated` writes a text."""

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# Characters that stand for bytes. In GPT-2's alphabet the printable ones of Latin-1 are themselves
# and the other bytes follow from U+0100; ByT5 has all of Latin-1.
_BYTE_OF = {chr(byte): byte for byte in range(256)} | {
    chr(0x100 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))
}
_ESCAPED = re.compile("[\udc80-\udcff]+")


def bytes_of(name: str | None, text: str, *, added: bool = False) -> bytes:
    """Give the bytes that a token stands for.

    Args:
        name: The token as its vocabulary has it: `âľ`, `<0xE2>`, `▁Paris`; None if it has none.
        text: What the tokenizer decodes it to. Where that is whole it counts; where not, the name
            is read as bytes, if these decode to the same.
        added: Whether the token was added to the vocabulary, which byte-level tokenizers decode as
            if it were written in bytes: its name is its text.
    """
    if not name or (text and "\ufffd" not in text):
        return text.encode()
    found = _BYTE_TOKEN.fullmatch(name)
    if found is not None:
        read = bytes.fromhex(found[1])
    elif added:
        return name.encode()
    elif all(character in _BYTE_OF for character in name):
        read = bytes(_BYTE_OF[character] for character in name)
    else:
        return text.encode()
    same = text in (read.decode("utf-8", "replace"), read.decode("utf-8", "ignore"))
    return read if same else text.encode()


def pieces_as_read(pieces: Sequence[bytes]) -> tuple[str, ...]:
    """Write what each piece of a text adds to it.

    A character stands with the piece that completes it; bytes of it in pieces before, and bytes
    that belong to no character, are written as bytes.
    """
    owner = [i for i, piece in enumerate(pieces) for _ in piece]
    said = [""] * len(pieces)
    at = 0
    # What is no character comes byte by byte, each as a surrogate, which no text holds.
    for character in b"".join(pieces).decode("utf-8", "surrogateescape"):
        encoded = character.encode("utf-8", "surrogateescape")
        *before, last = owner[at : at + len(encoded)]
        for i, byte in zip(before, encoded, strict=False):
            said[i] += chr(0xDC00 + byte) * (i != last)
        said[last] += character
        at += len(encoded)
    return tuple(_ESCAPED.sub(_hexadecimal, text) for text in said)


def isolated(text: str) -> str:
    """Keep text that is written from right to left from turning what stands around it.

    Such text is put between U+2068 and U+2069, which have no width; other text stays as it is.
    """
    turns = any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in text)
    return f"\u2068{text}\u2069" if turns else text


def _hexadecimal(found: re.Match[str]) -> str:
    return f"⟨{found[0].encode('utf-8', 'surrogateescape').hex(' ').upper()}⟩"
