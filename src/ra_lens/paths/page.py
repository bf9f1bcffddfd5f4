"""Paths as an interactive picture: one HTML file that opens from disk and asks the network nothing.

Tokens stand in columns by position. Through one layer, a token stands in the row of the best path
that visits it; across layers, rows are layers, the embedding at the bottom. One column per position
(and one row per layer) means that no two tokens lie on each other, however many there are.

Data goes in as JSON, and the script puts every text in as text: no token can be markup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from ra_lens.errors import BadInput
from ra_lens.paths.result import Step, TracedPath, TraceResult, boundaries_of, path_text, step_text
from ra_lens.text import label, shorten, visible

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
_FOLLOW = {
    "pattern": "attention",
    "value_norm": "attention × norm of what is written",
    "more": "where descent wants more attention (−R)",
    "less": "where descent wants less attention (R)",
    "abs": "where descent changes attention (|R|)",
}
_SIGNED = ("more", "less", "abs")

MOST_PATHS = 500
"""So many paths of a trace are shown, the best.

Through 4 to 48 layers a browser takes 1 to 3 s to draw them, and less than 1 s to answer a click;
the file has 0.5 to 5 MB.
"""


def paths_page(traces: Sequence[TraceResult], *, title: str | None = None) -> str:
    """Give a whole HTML page with one tab per trace.

    Args:
        traces: What to show.
        title: Heading. Default: names the model.

    Raises:
        BadInput: no traces.
    """
    body = paths_fragment(traces)
    heading = escape(title or f"Attention paths of {traces[0].model_name}")
    style = (
        "body{margin:0 auto;max-width:80rem;padding:1rem;background:#fbfbfa;color:#1f2328;"
        "font:16px/1.5 system-ui,sans-serif}h1{font-size:1.4rem;overflow-wrap:anywhere}"
        "@media(prefers-color-scheme:dark){body{background:#14171b;color:#e4e7eb}}"
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{heading}</title>",
            f"<style>{style}</style>",
            "</head>",
            f"<body><h1>{heading}</h1>",
            body,
            paths_assets(),
            "</body>",
            "</html>",
            "",
        ]
    )


def paths_fragment(traces: Sequence[TraceResult]) -> str:
    """Give the part of a page that shows traces; `paths_assets` must follow once, after all.

    Raises:
        BadInput: no traces.
    """
    if not traces:
        raise BadInput("found no traces to show. Give at least one, from trace_paths.")
    # The data must not be able to end its own element, nor to open a comment.
    data = json.dumps([_data(trace) for trace in traces], allow_nan=False)
    safe = data.replace("<", "\\u003c")
    return f'<div class="ra-paths"><script type="application/ra-paths+json">{safe}</script></div>'


def paths_assets() -> str:
    """Give style and script of all fragments of a page."""
    return f"<style>\n{paths_style()}</style>\n<script>\n{paths_script()}</script>"


def paths_style() -> str:
    """Give the style sheet of all fragments of a page."""
    return resources.files("ra_lens.paths").joinpath("page.css").read_text(encoding="utf-8")


def paths_script() -> str:
    """Give the script of all fragments of a page, to run after them."""
    return resources.files("ra_lens.paths").joinpath("page.js").read_text(encoding="utf-8")


def _data(trace: TraceResult) -> dict[str, Any]:
    nodes: dict[str, dict[str, Any]] = {}
    shown = trace.beams[:MOST_PATHS]
    for lane, beam in enumerate(shown):
        for layer, position in zip(boundaries_of(trace, beam), beam.positions, strict=True):
            row = layer if trace.is_layered else lane
            nodes.setdefault(
                _id(layer, position),
                {
                    "id": _id(layer, position),
                    "position": position,
                    "row": row,
                    "label": _label(trace, layer),
                },
            )
    top = trace.layers[-1] + 1 if trace.is_layered else trace.layers[-1]
    return {
        "title": _title(trace),
        "about": _about(trace),
        "layered": trace.is_layered,
        "signed": trace.follow in _SIGNED,
        "tokens": [visible(token) for token in trace.tokens],
        "target": _id(top, trace.target_pos),
        "nodes": list(nodes.values()),
        "beams": [_beam_data(trace, beam, path_text(trace, beam)) for beam in shown],
    }


def _beam_data(trace: TraceResult, beam: TracedPath, text: str) -> dict[str, Any]:
    ids = [_id(*p) for p in zip(boundaries_of(trace, beam), beam.positions, strict=True)]
    n = len(beam.steps)
    return {
        "text": shorten(text.rpartition(" (score")[0], 400),
        "note": f"score {beam.score_norm:.4g}, {n} step{'s' * (n != 1)}",
        "nodes": ids,
        "steps": [
            {
                "source": source,
                "target": target,
                "weight": step.weight,
                "value": step.value,
                "kind": step.kind,
                "text": step_text(trace, step),
                "shown": _shown(trace, step),
            }
            for step, target, source in zip(beam.steps, ids, ids[1:], strict=False)
        ],
    }


def _shown(trace: TraceResult, step: Step) -> str:
    if step.kind == "residual" or trace.follow == "pattern":
        return ""
    name = "norm" if trace.follow == "value_norm" else "−R"
    return f", {name} {step.value:.3g}"


def _id(layer: int, position: int) -> str:
    return f"L{layer}_P{position}"


def _label(trace: TraceResult, layer: int) -> str:
    if not trace.is_layered:
        return f"Layer {layer}"
    after = layer == trace.layers[-1] + 1
    return f"after layer {layer - 1}" if after else f"in front of layer {layer}"


def _title(trace: TraceResult) -> str:
    where = "All layers" if trace.is_layered else f"Layer {trace.layer}"
    return f"{where}: {_FOLLOW[trace.follow]}"


def _about(trace: TraceResult) -> str:
    token = label(trace.tokens[trace.target_pos])
    n = len(trace.beams)
    paths = f"{n} best paths" if n <= MOST_PATHS else f"{MOST_PATHS} best of {n} paths"
    return (
        f"The {paths} to “{token}” (position {trace.target_pos} of {trace.seq_len}) along "
        f"{_FOLLOW[trace.follow]}, {trace.search} search."
    )
