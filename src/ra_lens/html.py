"""HTML from plain data: this module escapes every text, and no other does.

A page runs only the scripts it is given: its policy names each by its SHA-256, and allows nothing
to be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from ra_lens.text import ISOLATED

# What a parser would drop or replace, and what UTF-8 cannot write.
_UNREADABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Table:
    """A table of plain text.

    Attributes:
        columns: Headings.
        rows: Texts, one row each.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def page(
    title: str,
    body: Iterable[str],
    *,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    libraries: Sequence[str] = (),
) -> str:
    """Write a complete document.

    Args:
        title: Heading.
        body: HTML of its parts.
        styles: Style sheets after that of every page.
        scripts: Scripts that run once the body is there.
        libraries: Scripts that run before.
    """
    allowed = " ".join(map(_hash, [*libraries, *scripts])) or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; "
        "style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
    )
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy, quote=False)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title>",
        *[f"<style>\n{one}</style>" for one in (resource("ra_lens", "page.css"), *styles)],
        *[f"<script>{one}</script>" for one in libraries],
        "</head>",
        "<body>",
        f"<h1>{text(title)}</h1>",
        *body,
        *[f"<script>{one}</script>" for one in scripts],
        "</body>",
        "</html>",
        "",
    ]
    return "\n".join(lines)


def resource(package: str, name: str) -> str:
    """Read a script or style sheet that lies beside the modules of a package."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def text(plain: str) -> str:
    """Escape text; characters that a page cannot hold are named: `U+0000`."""
    return escape(_UNREADABLE.sub(lambda found: f"U+{ord(found.group()):04X}", plain))


def tokens_apart(plain: str) -> str:
    """Escape text in which tokens are isolated; each of them becomes a `<bdi>`."""
    return ISOLATED.sub(r"<bdi>\1</bdi>", text(plain))


def data(value: Any) -> str:
    """Write JSON for a script block."""
    return inert(json.dumps(value, separators=(",", ":"), allow_nan=False))


def inert(written: str) -> str:
    """Rewrite JSON so that it cannot end the script block around it, nor open a comment in it."""
    return written.replace("<", "\\u003c")


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """List what is known, name by name."""
    lines = "".join(
        f'<tr><th scope="row">{text(name)}</th>{_cell(value)}</tr>' for name, value in rows
    )
    return f'<div class="scroll"><table class="facts">{lines}</table></div>'


def note(plain: str) -> str:
    """Write small print."""
    return f'<p class="soft">{tokens_apart(plain)}</p>'


def table(part: Table) -> str:
    """Write a table, which scrolls by itself where it is wider than the page."""
    head = "".join(f'<th scope="col">{tokens_apart(name)}</th>' for name in part.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in part.rows)
    titles = f"<thead><tr>{head}</tr></thead>" if any(part.columns) else ""
    return f'<div class="scroll"><table>{titles}<tbody>{rows}</tbody></table></div>'


def _cell(plain: str) -> str:
    # Around tokens that are isolated a cell reads from left to right: `from → to`.
    shown = tokens_apart(plain)
    return f"<td>{shown}</td>" if "<bdi>" in shown else f"<td><bdi>{shown}</bdi></td>"


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
