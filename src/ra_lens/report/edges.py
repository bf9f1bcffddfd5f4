"""The edges of a prompt that matter most, as a table: what blocking each would do to the loss.

Rows are those of `RACache.top_edges`. Each is a button, by which the explorer's script shows the
head with that cell marked; the table is text without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ra_lens import html
from ra_lens.cache import RACache
from ra_lens.knockouts.edges import Edge, Edges
from ra_lens.model import Sites
from ra_lens.text import label


def strongest_edges(ra: RACache, examples: Sequence[int], k: int) -> list[Edges] | None:
    """Give the `k` strongest edges of each of the examples, of the layers whose maps were kept.

    None where no layer has both R and its attention.
    """
    kept = {layer: site for layer, site in ra.sites.items() if ("knockout", layer) in ra}
    if not kept:
        return None
    part = replace(ra, sites=Sites(kept, ra.sites.n_layers))
    if ra.has_batch_dim and list(examples) != list(range(ra.batch_size)):
        part = part.apply_slice_to_batch_dim(list(examples))
    return part.top_edges(k).by_example()


def said_of_edges(ra: RACache, found: Sequence[Edges]) -> str:
    """Say what the numbers are, and which edges are left out."""
    text = (
        f"Foretold to first order, one edge at a time, in {ra.loss_unit}. Positive: the loss would "
        "rise, the answer needs this look. Negative: it would fall, the look is in the way."
    )
    names = left_out(found)
    return text + f" Looks at {names} are left out: many heads rest there." * bool(names)


def left_out(found: Sequence[Edges]) -> str:
    """Spell the tokens edges to which are left out, each once."""
    names = dict.fromkeys(name for one in found for names in one.left_out for name in names)
    return ", ".join(f"“{name}”" for name in names)


def edges_html(ra: RACache, found: Sequence[Edges]) -> str:
    """Write a table for each prompt; the explorer shows that of the prompt chosen."""
    several = len(found) > 1
    tables = "".join(_table(ra, edges, i, several=several) for i, edges in enumerate(found))
    return (
        '<div id="ra-edges"><h2>Strongest edges: loss if one look were blocked</h2>'
        f"{tables}{html.note(said_of_edges(ra, found))}</div>"
    )


def _table(ra: RACache, edges: Sequence[Edge], place: int, *, several: bool) -> str:
    name = f"<h3>Prompt {place + 1}</h3>" if several else ""
    columns = "".join(
        f'<th scope="col"{" class=number" * numeric}>{html.text(name)}</th>'
        for name, numeric in (
            ("Head", False),
            ("from (query) → to (key)", False),
            ("A", True),
            (f"loss ({ra.loss_unit})", True),
        )
    )
    rows = (
        "".join(map(_row, edges)) or '<tr><td colspan="4">The gradient is 0 everywhere.</td></tr>'
    )
    return (
        f'<div class="scroll edges" data-example="{place}">{name}<table>'
        f"<thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(edge: Edge) -> str:
    cell = f"{edge.layer}.{edge.head}.{edge.query}.{edge.key}"
    query, key = (
        f"<bdi>{html.text(label(token, 24))}</bdi> ({at})" if token else f"#{at}"
        for token, at in ((edge.query_token, edge.query), (edge.key_token, edge.key))
    )
    colour = "needs" if edge.effect > 0 else "hinders"
    effect = f"{edge.effect:+.3g}".replace("-", "−")
    return (
        f"<tr><td>{edge.label}</td>"
        f'<td><button type="button" data-edge="{cell}">{query} → {key}</button></td>'
        f'<td class="number">{edge.pattern:.3f}</td>'
        f'<td class="number {colour}">{effect}</td></tr>'
    )
