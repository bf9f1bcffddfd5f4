"""Text: tokens to be looked at, and what people hand over to be read.

A token among other text is a `label`: whitespace is visible, and one written from right to left
turns nothing around it. Byte-level tokenizers (GPT-2's kind) and those that fall back to bytes
(Llama's) cut what they have no token for, an emoji, Hebrew, Chinese, into bytes, each of which
decodes to U+FFFD. The piece that completes a character shows it, those before show their bytes:
`⟨E2 9C⟩`, then `✓`.

A Python string can hold half a character, a lone surrogate: of a JSON escape that lost its partner,
or of bytes decoded with `surrogateescape`, as the words of a command line are. No tokenizer reads
it and no file holds it, so `whole_text` refuses it.
"""

from __future__ import annotations

import codecs
import math
import re
import unicodedata
from collections.abc import Sequence

from ra_lens.errors import BadFile, BadInput

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
    """Give the bytes of a token, called `name` in its vocabulary, that decodes to `text`.

    Where the text is whole it counts; where not, the name (`âľ`, `<0xE2>`) is read as bytes, if
    these decode to the same. The name of an `added` token is its text, which byte-level tokenizers
    decode as if it were written in bytes.
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
    """Write what each piece adds to a text: the characters it completes, all else as bytes."""
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


_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # which begins as that of UTF-16 does
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def whole_text(where: str, text: str, *, error: type[BadFile | BadInput] = BadInput) -> str:
    """Give a text as a plain `str`; raise `error` if it, called `where`, has half a character."""
    text = str(text)
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as found:
        raise error(
            f"{where} has half a character, {text[found.start]!r} at place {found.start}, which "
            "is no text: its bytes were read with the wrong encoding, or cut. Decode them as what "
            "they are, such as bytes.decode('latin-1'), or drop it: text.encode('utf-8', "
            "'ignore').decode()."
        ) from found
    return text


def decoded(where: str, raw: bytes, *, error: type[BadFile | BadInput] = BadInput) -> str:
    """Read bytes from `where` as UTF-8, less a byte order mark; raise `error` if they are not."""
    for mark, encoding in _MARKS.items():
        if raw.startswith(mark):
            raise error(
                f"{where}: found text that is not UTF-8 but {encoding}, by its byte order mark. "
                f"Convert it: iconv -f {encoding} -t UTF-8."
            )
    if b"\0" in raw:
        raise error(
            f"{where}: found a zero byte at place {raw.index(0)}, which is in no text: it may be "
            "UTF-16 without a byte order mark. Convert it: iconv -f UTF-16LE -t UTF-8."
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as found:
        raise error(
            f"{where}: found text that is not UTF-8 (byte {raw[found.start]:#04x} at place "
            f"{found.start}). Convert it from what it is: iconv -f LATIN1 -t UTF-8, for example."
        ) from found


def short(value: float) -> str:
    """Write an area in few characters: `.39`, `1.0`, `−.05`, and nothing where there is none."""
    if math.isnan(value):
        return ""
    text = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}"
    return text.replace("0.", ".", 1).replace("-", "−") if abs(value) < 0.995 else text


def scale_name(scale: float) -> str:
    """Write a scale: `−30`, `+1`, `0`."""
    return "0" if scale == 0 else f"{scale:+g}".replace("-", "−")


def shots_name(n: int) -> str:
    """Name a number of shots: `1 shot`, `5 shots`."""
    return f"{n} shot" if n == 1 else f"{n} shots"
