"""Paths as an interactive picture: one HTML file that opens from disk and asks the network nothing.

Tokens stand in columns by position. Through one layer, a token stands in the row of the best path
that visits it; across layers, rows are layers, the embedding at the bottom. One column per position
(and one row per layer) means that no two tokens lie on each other, however many there are.

Data goes in as JSON (`ra_lens.paths.result.page_data` makes it), and the script puts every text in
as text: no token can be markup. The page's policy names its one script by its SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from ra_lens.errors import BadInput

MOST_PATHS = 500
"""So many paths of a trace are shown, the best.

Through 4 to 48 layers a browser takes 1 to 3 s to draw them, and less than 1 s to answer a click;
the file has 0.5 to 5 MB.
"""

_STYLE = """body{margin:0 auto;max-width:80rem;padding:1rem;background:#fbfbfa;color:#1f2328;
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.4rem;overflow-wrap:anywhere}
@media(prefers-color-scheme:dark){body{background:#14171b;color:#e4e7eb}}
"""


def paths_page(title: str, traces: Sequence[Mapping[str, Any]]) -> str:
    """Write a whole page with one tab per trace."""
    script = paths_script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy, quote=False)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}{paths_style()}</style>",
        "</head>",
        f"<body><h1>{escape(title)}</h1>",
        paths_fragment(traces),
        f"<script>{script}</script>",
        "</body>",
        "</html>",
        "",
    ]
    return "\n".join(lines)


def paths_fragment(traces: Sequence[Mapping[str, Any]]) -> str:
    """Write the part of a page that shows traces; `paths_script` must run once, after all."""
    if not traces:
        raise BadInput("found no traces to show. Give at least one, from trace_paths.")
    # The data must not be able to end its own element, nor to open a comment.
    data = json.dumps(traces, allow_nan=False)
    safe = data.replace("<", "\\u003c")
    return f'<div class="ra-paths"><script type="application/ra-paths+json">{safe}</script></div>'


def paths_style() -> str:
    """Give the style sheet of all fragments of a page."""
    return resources.files("ra_lens.paths").joinpath("page.css").read_text(encoding="utf-8")


def paths_script() -> str:
    """Give the script of all fragments of a page, to run after them."""
    return resources.files("ra_lens.paths").joinpath("page.js").read_text(encoding="utf-8")
