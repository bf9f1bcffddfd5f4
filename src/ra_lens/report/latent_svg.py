"""Queries and keys of a head in two dimensions, as SVG inside the page.

What `ra_lens.figures.latent_space` draws, without plotly.js: nothing in it is computed by a script,
and colours are those of the page, light or dark. Pointing at a marker or a line tells what it is.
"""

from __future__ import annotations

from ra_lens import html
from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NotStored
from ra_lens.head_maps import Cell
from ra_lens.head_names import Head
from ra_lens.latent import Drawing, LatentSpace, Points, latent_space_of, lay_out
from ra_lens.latent.layout import Dot
from ra_lens.latent.said import said_of_arrows, said_of_plane, said_of_sharing
from ra_lens.report.explorer import Shown
from ra_lens.text import label

_WIDTH, _PAIRS = 640.0, 8
MOST_SPACES = 40
"""So many latent spaces are drawn in a page, of some ten kilobytes each."""


def holds_vectors(ra: RACache) -> bool:
    """Whether a cache holds queries and keys of a layer, and its maps."""
    kinds = ("query", "key", "ra", "pattern")
    return any(all((kind, layer) in ra for kind in kinds) for layer in ra.layers)


def latent_spaces(ra: RACache, shown: Shown, top: int) -> str:
    """Draw queries and keys of the `top` heads of each example, or of fewer where they are many.

    Nothing where the cache holds no vectors. `latent.js` shows those of the head that is chosen.
    """
    if not holds_vectors(ra):
        return ""
    drawn: list[str] = []
    per_example = max(1, min(top, MOST_SPACES // len(shown.examples)))
    heads = shown.mapped[:per_example]
    for place, example in enumerate(shown.examples[:MOST_SPACES]):
        for head in heads:
            space = latent_svg(ra, head, example=example, max_tokens=shown.max_tokens)
            name = f"{place}.{head.layer}.{head.head}"
            if space:
                drawn.append(f'<div class="latent" data-latent="{name}" hidden>{space}</div>')
    if not drawn:
        return ""
    of = "" if len(shown.examples) <= MOST_SPACES else f" of the first {MOST_SPACES} prompts"
    plural = f"the {len(heads)} heads" if len(heads) > 1 else "the head"
    return (
        "<h3>Its queries and keys in two dimensions</h3>"
        '<p class="soft"><span class="query">●</span> queries, <span class="key">■</span> keys; '
        'largest |R|: descent <span class="pull">raises q·k</span>, <span class="push">lowers it'
        f"</span>.</p>{''.join(drawn)}"
        f'<p class="soft" id="ra-latent-none" hidden>Drawn for {plural} with the largest norms{of}.'
        "</p>"
    )


def latent_svg(ra: RACache, head: Head, *, example: int, max_tokens: int) -> str:
    """Draw the latent space of a head; nothing where it cannot be had."""
    try:
        space = latent_space_of(ra, head, k=_PAIRS, example=example, max_tokens=min(max_tokens, 48))
    except (NotStored, BadInput):  # a layer without vectors, or with some that are not finite
        return ""
    drawing = lay_out(space, width=_WIDTH)
    first, second = said_of_plane(space)
    said = [f"{first}, across; {second}, upwards", said_of_arrows(space, drawing, None)]
    said += [said_of_sharing(space)] * bool(drawing.times[1])
    lines = [
        f'<svg viewBox="0 0 {_n(drawing.width)} {_n(drawing.height)}" role="img" aria-label="'
        f'{html.text(f"Queries and keys of {space.maps.label}; {said[0]}")}">'
    ]
    lines += [_pair(space, drawing, cell) for cell in reversed(space.pairs)]
    x, y = drawing.origin
    lines.append(f'<path class="zero" d="M{_n(x - 5)} {_n(y)}h10m-5 -5v10"/>')
    for dots, side in ((drawing.queries, space.queries), (drawing.keys, space.keys)):
        lines += [_marker(dot, side) for dot in dots]
        lines += [_arrow(dot) for dot in dots if dot.arrow is not None]
        lines += [_label(dot) for dot in dots]
    lines.append("</svg>")
    text = ". ".join(one[0].upper() + one[1:] for one in said if one)
    return "".join(lines) + html.note(f"{text}.")


def _pair(space: LatentSpace, drawing: Drawing, cell: Cell) -> str:
    share = abs(cell.ra) / (space.maps.limit or 1.0)
    x, y = drawing.queries[cell.query - space.queries.first].at
    to_x, to_y = drawing.keys[cell.key - space.keys.first].at
    query, key = label(space.maps.query_token(cell)), label(space.maps.key_token(cell))
    told = f"{query} ({cell.query}) → {key} ({cell.key}): −R {-cell.ra:+.3g}, A {cell.pattern:.3g}"
    return (
        f'<line class="{"pull" if cell.ra < 0 else "push"}" x1="{_n(x)}" y1="{_n(y)}" '
        f'x2="{_n(to_x)}" y2="{_n(to_y)}" stroke-width="{0.8 + 3.2 * share:.1f}" '
        f'opacity="{0.35 + 0.5 * share:.2f}"><title>{html.text(told.replace("-", "−"))}</title>'
        "</line>"
    )


def _marker(dot: Dot, side: Points) -> str:
    x, y = dot.at
    told = f"{dot.side} {label(side.tokens[dot.index])} ({side.first + dot.index})"
    told += f", length {side.lengths[dot.index]:.3g}"
    if side.steps is not None:
        told += f", length of δ {side.steps[dot.index]:.3g}"
    title = f"<title>{html.text(told)}</title>"
    if dot.side == "query":
        return f'<circle class="query" cx="{_n(x)}" cy="{_n(y)}" r="4">{title}</circle>'
    return f'<rect class="key" x="{_n(x - 4)}" y="{_n(y - 4)}" width="8" height="8">{title}</rect>'


def _arrow(dot: Dot) -> str:
    assert dot.arrow is not None
    (x, y), (to_x, to_y) = dot.at, dot.arrow
    across, down = to_x - x, to_y - y
    long = (across**2 + down**2) ** 0.5
    across, down = across / long, down / long
    size = min(7.0, long)
    back = to_x - size * across, to_y - size * down
    wing = -0.45 * size * down, 0.45 * size * across
    return (
        f'<path class="step {dot.side}" d="M{_n(x)} {_n(y)}L{_n(to_x)} {_n(to_y)}'
        f"M{_n(back[0] + wing[0])} {_n(back[1] + wing[1])}L{_n(to_x)} {_n(to_y)}"
        f'L{_n(back[0] - wing[0])} {_n(back[1] - wing[1])}"/>'
    )


def _label(dot: Dot) -> str:
    if dot.label is None:
        return ""
    (x, y), (at_x, at_y) = dot.label.middle, dot.at
    line = ""
    if dot.label.far:
        line = f'<path class="lead" d="M{_n(at_x)} {_n(at_y)}L{_n(x)} {_n(y)}"/>'
    return f'{line}<text x="{_n(x)}" y="{_n(y + 4)}">{html.text(dot.label.text)}</text>'


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
