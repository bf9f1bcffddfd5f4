"""Parts of a report, in plain text, with figures and paths; the page that they make up.

plotly.js is in a page only if a plotly figure is.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ra_lens import html
from ra_lens.html import Table, resource
from ra_lens.paths import TraceResult
from ra_lens.paths.page import paths_fragment, paths_script, paths_style
from ra_lens.paths.result import page_data


@dataclass(frozen=True)
class Section:
    """A part of a report, in plain text; nothing in it is read as HTML.

    Attributes:
        title: Its heading; empty: none.
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


def page(
    title: str,
    parts: Sequence[str | Section],
    *,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
) -> str:
    """Write a document of sections and of HTML, with the scripts that the sections need."""
    sections = [part for part in parts if isinstance(part, Section)]
    styles, scripts, libraries = list(styles), list(scripts), []
    if any(part.figures for part in sections):
        from plotly.offline import get_plotlyjs

        libraries = [get_plotlyjs()]
        styles.insert(0, resource("ra_lens.report", "figures.css"))
        scripts.append(resource("ra_lens.report", "figures.js"))
    if any(part.traces for part in sections):
        styles.append(paths_style())
        scripts.append(paths_script())
    body = [part if isinstance(part, str) else _section(part) for part in parts]
    return html.page(title, body, styles=styles, scripts=scripts, libraries=libraries)


def how_it_was_made(command: str | None) -> Section:
    """Tell the command and the versions."""
    rows = [] if command is None else [("Command", command)]
    for name in ("ra-lens", "transformer-lens", "torch"):
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "unknown version"))
    rows.append(("Python", platform.python_version()))
    return Section("How this was made", table=Table(("", ""), tuple(rows)))


def _section(part: Section) -> str:
    lines = ["<section>", f"<h2>{html.text(part.title)}</h2>" if part.title else ""]
    lines += [f"<p>{html.tokens_apart(paragraph)}</p>" for paragraph in part.paragraphs]
    if part.table is not None:
        lines.append(html.table(part.table))
    for heading, figures in part.figures:
        lines.append(f"<h3>{html.text(heading)}</h3>" if heading else "")
        inner = "".join(map(_figure, figures))
        lines.append(f'<div class="card figures">{inner}</div>')
    if part.traces:
        lines.append(paths_fragment([page_data(trace) for trace in part.traces]))
    lines += map(html.note, part.notes)
    return "\n".join([*lines, "</section>"])


def _figure(figure: Any) -> str:
    import plotly.graph_objects as go

    clear = "rgba(0,0,0,0)"
    shown: Any = go.Figure(figure).update_layout(paper_bgcolor=clear, modebar_bgcolor=clear)
    return (
        f'<div><div class="plot" style="height:{int(shown.layout.height or 450)}px"></div>'
        f'<script class="figure" type="application/json">{html.inert(shown.to_json())}</script>'
        "</div>"
    )
