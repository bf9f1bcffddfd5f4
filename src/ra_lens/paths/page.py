"""Paths as an interactive picture: one HTML file that opens from disk and asks the network nothing.

Tokens stand in columns by position. Through one layer, a token stands in the row of the best path
that visits it; across layers, rows are layers, the embedding at the bottom. One column per position
(and one row per layer) means that no two tokens lie on each other, however many there are.

Data goes in as JSON (`ra_lens.paths.result.page_data` makes it), and the script puts every text in
as text: no token can be markup. The page's policy names its one script by its SHA-256.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ra_lens import html
from ra_lens.errors import BadInput

MOST_PATHS = 500
"""So many paths of a trace are shown, the best.

Through 4 to 48 layers a browser takes 1 to 3 s to draw them, and less than 1 s to answer a click;
the file has 0.5 to 5 MB.
"""


def paths_page(title: str, traces: Sequence[Mapping[str, Any]]) -> str:
    """Write a whole page with one tab per trace."""
    body = [paths_fragment(traces)]
    return html.page(title, body, styles=[paths_style()], scripts=[paths_script()])


def paths_fragment(traces: Sequence[Mapping[str, Any]]) -> str:
    """Write the part of a page that shows traces; `paths_script` must run once, after all."""
    if not traces:
        raise BadInput("found no traces to show. Give at least one, from trace_paths.")
    data = html.data(traces)
    return f'<div class="ra-paths"><script type="application/ra-paths+json">{data}</script></div>'


def paths_style() -> str:
    """Give the style sheet of all fragments of a page."""
    return html.resource("ra_lens.paths", "page.css")


def paths_script() -> str:
    """Give the script of all fragments of a page, to run after them."""
    return html.resource("ra_lens.paths", "page.js")
