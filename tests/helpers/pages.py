"""HTML pages as a browser sees them, and text that tries to be markup."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np

EVIL = "</script><script>alert(1)</script>"
HOSTILE = (
    EVIL, "\"'`", "🙂", "שלום", "<!--", "%{y}", "&lt;", "\u202eabc", "\n", "]]>", "\x00"
)  # fmt: skip


class Page(HTMLParser):
    """Collects what a browser would see of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._in: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style", "title"):
            self._in.append(tag)
            if tag == "script":
                self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._in and self._in[-1] == tag:
            self._in.pop()

    def handle_data(self, data: str) -> None:
        if self._in and self._in[-1] == "script":
            self.scripts[-1] += data
        elif not self._in:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def blocks(self) -> list[tuple[dict[str, str | None], str]]:
        """Scripts with their attributes; those with a type are data."""
        kinds = [attrs for tag, attrs in self.tags if tag == "script"]
        return list(zip(kinds, self.scripts, strict=True))

    def data(self) -> Any:
        return json.loads(next(text for attrs, text in self.blocks() if attrs.get("id")))

    def maps(self) -> dict[str, str]:
        return {str(a["data-map"]): text for a, text in self.blocks() if "data-map" in a}


def lower_triangles(text: str, limit: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A and R of a page's block, read without the package: halves, row by row."""
    flat = np.frombuffer(base64.b64decode(text), "<f2").astype(float)
    both, cells = [], n * (n + 1) // 2
    for part, factor in ((flat[:cells], 1.0), (flat[cells : 2 * cells], limit)):
        square = np.full((n, n), np.nan)
        square[np.tril_indices(n)] = part * factor
        both.append(square)
    return both[0], both[1]


def blocked(text: str, facts: Any, scale: float) -> np.ndarray:
    """What blocking an edge does, of a page's block: made of A and R, or written at its end."""
    n = facts["rows"][2]
    a, r = lower_triangles(text, facts["limit"], n)
    flat = np.frombuffer(base64.b64decode(text), "<f2").astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = -r / (scale * (1 - a))
    mostly = np.tri(n, dtype=bool) & ~(a <= 0.5)
    found[mostly] = flat[n * (n + 1) :] * facts["blocked"]
    return found
