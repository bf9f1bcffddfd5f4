"""HTML from plain data: every text is escaped here, and only here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ra_lens.figures.paths import paths_assets, paths_fragment
from ra_lens.paths import TraceResult

# Nothing may be fetched, whatever a figure or a token asks for.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
# Figures are drawn once the page around them has its final layout, each from the data beside it.
_DRAW = """<script>
for (const data of document.querySelectorAll("script.figure")) {
  const figure = JSON.parse(data.textContent);
  Plotly.newPlot(data.previousElementSibling, figure.data, figure.layout, {
    responsive: true, displaylogo: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  });
}
</script>"""

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
        figures: After the table; those of one inner tuple stand side by side where there is room.
        notes: Small print at the end.
        traces: Paths, as one interactive picture with a tab for each, before the notes.
    """

    title: str
    paragraphs: tuple[str, ...] = ()
    table: Table | None = None
    figures: tuple[tuple[str, tuple[go.Figure, ...]], ...] = ()
    notes: tuple[str, ...] = ()
    traces: tuple[TraceResult, ...] = ()


def page(title: str, body: Sequence[str]) -> str:
    """Join parts into a complete document, plotly.js included once."""
    css = resources.files("ra_lens.report").joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{css}</style>",
            f"<script>{get_plotlyjs()}</script>",
            "</head>",
            "<body>",
            f"<h1>{escape(title)}</h1>",
            *body,
            _DRAW,
            *([paths_assets()] if any(_PATHS in part for part in body) else []),
            "</body>",
            "</html>",
            "",
        ]
    )


def prompt(tokens: Sequence[tuple[str, str]]) -> str:
    """Show tokens one by one; each comes with its class: `''`, `special` or `target`."""
    chips = (
        f'<bdi class="token{" " + kind if kind else ""}">{escape(text)}</bdi>'
        + ("<br>" if text.endswith("⏎") else "<wbr>")
        for text, kind in tokens
    )
    return f'<div class="card prompt">{"".join(chips)}</div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """List what is known, name by name."""
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td><bdi>{escape(value)}</bdi></td></tr>'
        for name, value in rows
    )
    return f'<div class="scroll"><table class="facts">{lines}</table></div>'


def section(part: Section) -> str:
    """Render a section."""
    lines = [f"<section><h2>{escape(part.title)}</h2>"]
    lines += [f"<p>{escape(text)}</p>" for text in part.paragraphs]
    if part.table is not None:
        lines.append(_table(part.table))
    for heading, figures in part.figures:
        lines.append(f"<h3>{escape(heading)}</h3>" if heading else "")
        inner = "".join(map(_figure, figures))
        lines.append(f'<div class="card figures">{inner}</div>')
    if part.traces:
        lines.append(paths_fragment(part.traces))
    lines += [f'<p class="soft">{escape(text)}</p>' for text in part.notes]
    return "\n".join([*lines, "</section>"])


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td><bdi>{escape(text)}</bdi></td>' for text in row)}</tr>"
        for row in table.rows
    )
    inner = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def _figure(figure: go.Figure) -> str:
    clear = "rgba(0,0,0,0)"
    shown = go.Figure(figure).update_layout(paper_bgcolor=clear, modebar_bgcolor=clear)
    # The data block must not be able to end itself, nor to open a comment.
    json = str(shown.to_json()).replace("<", "\\u003c")
    layout: Any = shown.layout
    height = int(layout.height or 450)
    return (
        f'<div><div class="plot" style="height:{height}px"></div>'
        f'<script class="figure" type="application/json">{json}</script></div>'
    )
