"""Text that a tokenizer can read: whole characters, from bytes that are UTF-8.

A Python string can hold half a character, a lone surrogate: of a JSON escape that lost its partner,
or of bytes that were decoded with `surrogateescape`, as the words of a command line are. No
tokenizer reads it, and no file can hold it.
"""

from __future__ import annotations

import codecs

from ra_lens.errors import BadFile, BadInput

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # which begins as that of UTF-16 does
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def whole_text(where: str, text: str, *, error: type[BadFile | BadInput] = BadInput) -> str:
    """Give a text back as a plain `str` if all of its characters are whole.

    Args:
        where: What the text is, for the message.
        text: Any text.
        error: What to raise.

    Raises:
        BadInput: half a character (or `error`).
    """
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
    """Read bytes as UTF-8, without the byte order mark that may be in front.

    Args:
        where: Where they are from, for the message.
        raw: The bytes.
        error: What to raise.

    Raises:
        BadInput: they are something else (or `error`).
    """
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
