"""HTML from plain data: every text is escaped here, and only here.

Scripts run only if they are one of ours: the page's policy names each by its SHA-256, and allows
nothing to be fetched. plotly.js is in a page only if a plotly figure is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from ra_lens.text import ISOLATED

if TYPE_CHECKING:
    from ra_lens.paths import TraceResult

# Figures are drawn once the page around them has its final layout, each from the data beside it.
_DRAW = """for (const data of document.querySelectorAll("script.figure")) {
  const figure = JSON.parse(data.textContent);
  Plotly.newPlot(data.previousElementSibling, figure.data, figure.layout, {
    responsive: true, displaylogo: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  });
}"""
# What a parser would drop or replace, and what UTF-8 cannot write.
_UNREADABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_PATHS = '<div class="ra-paths">'


@dataclass(frozen=True)
class Table:
    """A table of plain text.

    Attributes:
        columns: Headings.
        rows: Texts, one row each.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """A part of a report, in plain text; nothing in it is read as HTML.

    Attributes:
        title: Its heading.
        paragraphs: Text in front.
        table: After the text.
        figures: After the table, plotly figures under headings; those of one inner tuple stand side
            by side where there is room.
        notes: Small print at the end.
        traces: Paths, as one interactive picture with a tab for each, before the notes.
    """

    title: str
    paragraphs: tuple[str, ...] = ()
    table: Table | None = None
    figures: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    notes: tuple[str, ...] = ()
    traces: tuple[TraceResult, ...] = ()


def page(title: str, body: Sequence[str], *, script: str | None = None) -> str:
    """Join parts into a complete document.

    Args:
        title: Heading.
        body: HTML of its parts.
        script: A script to run once all is there.
    """
    scripts = [] if script is None else [script]
    head: list[str] = []
    if any('<script class="figure"' in part for part in body):
        from plotly.offline import get_plotlyjs

        head.append(get_plotlyjs())
        scripts.append(_DRAW)
    styles = [resource("page.css")]
    if any(_PATHS in part for part in body):
        from ra_lens.paths.page import paths_script, paths_style

        styles.append(paths_style())
        scripts.append(paths_script())
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, [*head, *scripts])) or _NONE}; "
        "style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(policy, quote=False)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}</title>",
            *[f"<style>\n{one}</style>" for one in styles],
            *[f"<script>{one}</script>" for one in head],
            "</head>",
            "<body>",
            f"<h1>{text(title)}</h1>",
            *body,
            *[f"<script>{one}</script>" for one in scripts],
            "</body>",
            "</html>",
            "",
        ]
    )


def resource(name: str) -> str:
    """Read a file that lies beside this module."""
    return resources.files("ra_lens.report").joinpath(name).read_text(encoding="utf-8")


def text(plain: str) -> str:
    """Escape text; characters that a page cannot hold are named: `U+0000`."""
    return escape(_UNREADABLE.sub(lambda found: f"U+{ord(found.group()):04X}", plain))


def tokens_apart(plain: str) -> str:
    """Escape text in which tokens are isolated; each of them becomes a `<bdi>`."""
    return ISOLATED.sub(r"<bdi>\1</bdi>", text(plain))


def data(value: Any) -> str:
    """Write JSON that cannot end the script block around it, nor open a comment in it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def prompt(tokens: Sequence[tuple[str, str]], *, label: str = "Prompt", side: str = "input") -> str:
    """Show tokens one by one; each comes with its classes: `''`, `special`, `target`, …."""
    chips = (
        f'<bdi class="token{" " + kind if kind else ""}">{text(token)}</bdi>'
        + ("<br>" if token.endswith("⏎") else "<wbr>")
        for token, kind in tokens
    )
    return (
        f'<div class="card prompt" role="group" tabindex="0" aria-label="{text(label)}" '
        f'data-side="{side}">'
        f"{''.join(chips)}</div>"
    )


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """List what is known, name by name."""
    lines = "".join(
        f'<tr><th scope="row">{text(name)}</th>{_cell(value)}</tr>' for name, value in rows
    )
    return f'<div class="scroll"><table class="facts">{lines}</table></div>'


def note(plain: str) -> str:
    """Render small print."""
    return f'<p class="soft">{tokens_apart(plain)}</p>'


def section(part: Section) -> str:
    """Render a section."""
    lines = [f"<section><h2>{text(part.title)}</h2>"]
    lines += [f"<p>{tokens_apart(paragraph)}</p>" for paragraph in part.paragraphs]
    if part.table is not None:
        lines.append(table(part.table))
    for heading, figures in part.figures:
        lines.append(f"<h3>{text(heading)}</h3>" if heading else "")
        inner = "".join(map(_figure, figures))
        lines.append(f'<div class="card figures">{inner}</div>')
    if part.traces:
        from ra_lens.paths.page import paths_fragment
        from ra_lens.paths.result import page_data

        lines.append(paths_fragment([page_data(trace) for trace in part.traces]))
    lines += map(note, part.notes)
    return "\n".join([*lines, "</section>"])


def table(part: Table) -> str:
    """Render a table; it scrolls by itself where it is wider than the page."""
    head = "".join(f'<th scope="col">{tokens_apart(name)}</th>' for name in part.columns)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in part.rows)
    titles = f"<thead><tr>{head}</tr></thead>" if any(part.columns) else ""
    return f'<div class="scroll"><table>{titles}<tbody>{rows}</tbody></table></div>'


def _cell(plain: str) -> str:
    # Around tokens that are isolated a cell reads from left to right: `from → to`.
    shown = tokens_apart(plain)
    return f"<td>{shown}</td>" if "<bdi>" in shown else f"<td><bdi>{shown}</bdi></td>"


def _figure(figure: Any) -> str:
    import plotly.graph_objects as go

    clear = "rgba(0,0,0,0)"
    shown = go.Figure(figure).update_layout(paper_bgcolor=clear, modebar_bgcolor=clear)
    # The data block must not be able to end itself, nor to open a comment.
    written = str(shown.to_json()).replace("<", "\\u003c")
    layout: Any = shown.layout
    height = int(layout.height or 450)
    return (
        f'<div><div class="plot" style="height:{height}px"></div>'
        f'<script class="figure" type="application/json">{written}</script></div>'
    )


_NONE = "'none'"


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
