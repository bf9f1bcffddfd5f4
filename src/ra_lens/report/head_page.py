"""`write_head_page`: one head on one prompt, as one self-contained HTML file.

Its three maps side by side, the edges that the answer needs of it, which queries and keys the loss
draws together and where they lie in its latent space, what its vectors say in the vocabulary, and
its part in the gradient of the weights. With plotly.js inside it takes about 5 MB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ra_lens.cache import RACache
from ra_lens.files import PAGE, check_output, write_whole
from ra_lens.head_maps import HeadMaps
from ra_lens.head_names import Head
from ra_lens.html import Table, facts, note, resource
from ra_lens.latent.said import said_of_limits
from ra_lens.numbers import Whole
from ra_lens.report.explorer import token_chips
from ra_lens.report.head_facts import HeadFacts, WeightFacts, head_facts
from ra_lens.report.sections import Section, how_it_was_made, page
from ra_lens.text import label
from ra_lens.vocabulary import Kind

_WIDE = 900  # pixels of the latent space, which scrolls where there are fewer
_ROWS = 12  # of tokens; more are summed up

KIND_NAMES: dict[Kind, str] = {
    "z": "writes (z)",
    "z_step": "should write (−e)",
    "query": "looks for (q)",
    "query_step": "should look for (−δ_q)",
    "value": "tells who looks (v)",
    "value_step": "should tell (−δ_v)",
    "key": "is found by (k)",
    "key_step": "should be found by (−δ_k)",
}
"""What is read in the vocabulary, in words; `ra_lens.vocabulary` has the formulas."""


def write_head_page(
    ra: RACache,
    model: nn.Module | None,
    head: Head,
    path: str | Path,
    *,
    example: Whole = 0,
    top: Whole = 10,
    max_tokens: Whole = 48,
    title: str | None = None,
    command: str | None = None,
) -> Path:
    """Write all there is to say of one head on one prompt as one self-contained HTML file.

        _, ra = run_with_ra(model, prompt, target=" Paris", vectors=True)
        write_head_page(ra, model, "L23H4", "head.html")

    Args:
        ra: A cache with its maps. Without vectors (`run_with_ra(..., vectors=True)`) the page has
            maps and edges, and says what it lacks.
        model: The model of the cache, which the vocabulary needs. None: without.
        head: `"L2H3"`, `(layer, head)` or a `HeadScore`.
        path: The file, whose name ends in `.html`; a page that is there is replaced, only when the
            new one is complete.
        example: Which prompt.
        top: So many edges and pairs are listed.
        max_tokens: Of a longer prompt the maps and the latent space show the last so many tokens.
        title: Heading. Default: names head and model.
        command: The command that made the page, to be told at the end.

    Returns:
        The file written.

    Raises:
        BadInput: the path cannot be written or holds something else than a page, no such head or
            example, or an option below 1.
        NotStored: the maps were not kept.
    """
    check_output(path, PAGE)
    found = head_facts(ra, model, head, example=example, top=top, max_tokens=max_tokens)
    return write_found(ra, found, path, max_tokens=max_tokens, title=title, command=command)


def write_found(
    ra: RACache,
    found: HeadFacts,
    path: str | Path,
    *,
    max_tokens: Whole = 48,
    title: str | None = None,
    command: str | None = None,
) -> Path:
    """Write the page of what was found; see `write_head_page`."""
    heading = title or f"Head {found.maps.label} of {ra.info.model_name}"
    body = head_body(ra, found, max_tokens=max_tokens)
    styles = [resource("ra_lens.report", name) for name in ("explorer.css", "head_page.css")]
    written = page(heading, [*body, how_it_was_made(command)], styles=styles)
    return write_whole(path, written, PAGE)


def head_body(ra: RACache, found: HeadFacts, *, max_tokens: Whole) -> list[str | Section]:
    """Give the parts of the page."""
    parts: list[str | Section] = [
        token_chips(ra, found.example),
        facts([*ra.model_facts()[:1], *ra.facts(found.example), *about(found)]),
        _maps(ra, found, max_tokens),
        _edges(ra, found),
    ]
    if found.latent is not None or found.pulls:
        parts.append(_moves(ra, found, max_tokens))
    if found.readings:
        parts.append(_vocabulary(found))
    if found.weights:
        parts += [_gradient(found), *_shares(found)]
    parts += [note(f"Not here: {said}") for said in said_of_missing(found)]
    return parts


def about(found: HeadFacts) -> list[tuple[str, str]]:
    """Name the head's layer, whose keys it reads, and how large its map is."""
    site, maps = found.site, found.maps
    where = f"{site.label}, head {maps.head} of {site.n_heads}"
    if site.n_key_value_heads < site.n_heads:
        share = site.n_heads // site.n_key_value_heads
        group = site.kv_group(maps.head)
        first, last = group * share, (group + 1) * share - 1
        where += f"; heads {first} to {last} share key/value head {group}"
    size = f"{found.norm:.4g}, rank {found.rank} of {found.among}; {found.share:.1%} of all norms"
    return [("Head", where), ("‖R‖", size)]


def said_of_missing(found: HeadFacts) -> list[str]:
    """Say what could not be had and why, what has one reason together."""
    reasons: dict[str, list[str]] = {}
    for name, why in found.missing:
        reasons.setdefault(why, []).append(name)
    return [f"{', '.join(names)}: {why}." for why, names in reasons.items()]


def said_of_left_out(found: HeadFacts) -> tuple[str, ...]:
    """Say edges to which tokens are not listed."""
    names = ", ".join(f"“{name}”" for name in found.left_out)
    return (f"Looks at {names}, where heads rest, are left out.",) if names else ()


def signed(value: float, digits: int = 3) -> str:
    """Write a number with its sign."""
    return f"{value:+.{digits}g}".replace("-", "−")


def pair(maps: HeadMaps, query: int, key: int, width: int = 24) -> str:
    """Name a query and a key by token and position."""
    from_ = label(maps.tokens[query - maps.first], width)
    return f"{from_} ({query}) → {label(maps.key_tokens[key - maps.first_key], width)} ({key})"


# ---- parts ---------------------------------------------------------------------------------------


def _maps(ra: RACache, found: HeadFacts, max_tokens: Whole) -> Section:
    from ra_lens.figures import head_map

    own = (found.maps.layer, found.maps.head)
    pattern, r, blocked = (
        head_map(ra, own, kind=kind, example=found.example, max_tokens=max_tokens)
        for kind in ("pattern", "ra", "knockout")
    )
    for figure in (pattern, r, blocked):  # beside two others there is no room for it in one line
        traces: Any = figure.data
        bar = traces[0].colorbar.title
        bar.text = "<br>".join(bar.text.split("   ", 1))
    return Section(
        "Its maps",
        figures=(("", (pattern, r, blocked)),),
        notes=(
            "From left to right: its attention A; −R, where a step of descent would move that; the "
            "loss if one look were blocked. Rows attend, columns are attended to.",
            *_cut(found, max_tokens),
        ),
    )


def _cut(found: HeadFacts, max_tokens: Whole) -> tuple[str, ...]:
    longest = max(len(found.maps.tokens), len(found.maps.key_tokens))
    if longest <= int(max_tokens):
        return ()
    return (f"Drawn are the last {int(max_tokens)} tokens of {longest}; tables are of all.",)


def _edges(ra: RACache, found: HeadFacts) -> Section:
    unit = ra.loss_unit
    rows = tuple(
        (
            pair(found.maps, cell.query, cell.key),
            f"{cell.pattern:.3f}",
            signed(-cell.ra),
            signed(cell.knockout),
            "is needed" if cell.knockout > 0 else "is in the way",
        )
        for cell in found.edges
    )
    notes = (
        f"Foretold to first order, one edge at a time, in {unit}. Positive: the loss would rise.",
        *said_of_left_out(found),
    )
    if not rows:
        return Section("Edges it matters for", ("The gradient is 0 at every edge.",), notes=notes)
    columns = ("from (query) → to (key)", "A", "−R", f"loss if blocked ({unit})", "this look")
    return Section("Edges it matters for", table=Table(columns, rows), notes=notes)


def _moves(ra: RACache, found: HeadFacts, max_tokens: Whole) -> Section:
    from ra_lens.figures import latent_space, query_key_pull

    own = (found.maps.layer, found.maps.head)
    rows = tuple(
        (
            f"{label(one.query_token, 24)} ({one.query}) → {label(one.key_token, 24)} ({one.key})",
            signed(one.ra),
            "together" if one.together else "apart",
            f"{one.product:.4g}".replace("-", "−"),
            f"{one.cosine:.3f}".replace("-", "−"),
        )
        for one in found.pulls
    )
    options: dict[str, Any] = {"example": found.example, "max_tokens": max_tokens}
    figures = [("Which query is drawn to which key", (query_key_pull(ra, own, **options),))]
    notes: tuple[str, ...] = ()
    if found.latent is not None:
        drawn = latent_space(ra, own, k=len(found.latent.pairs), width=_WIDE, **options)
        figures.append(("Queries and keys in two dimensions", (drawn,)))
        notes = said_of_limits()
    columns = ("query → key", "R", "descent moves them", "q·k now", "cosine now")
    return Section(
        "Which queries and keys are moved",
        (
            "R of a pair is the gradient at q·k: where it is negative, a step of descent draws the "
            "query and the key together.",
        ),
        Table(columns, rows) if rows else None,
        tuple(figures),
        notes,
    )


def _vocabulary(found: HeadFacts) -> Section:
    rows: list[tuple[str, ...]] = []
    for one in found.readings:
        towards, away = (
            " ".join(label(score.token, 14) for score in scores) for scores in (one.top, one.bottom)
        )
        rows.append(
            (
                f"{label(one.token, 18)} ({one.position})",
                KIND_NAMES[one.kind],
                towards or "nothing: it is 0",
                away,
                "" if one.rank is None else f"{one.rank:,}",
            )
        )
    columns = ["token", "", "nearest", "furthest", "rank of the target"]
    if all(one.rank is None for one in found.readings):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Section(
        "What its vectors say in the vocabulary",
        table=Table(tuple(columns), tuple(rows)),
        notes=(
            "Its vectors at the tokens of its strongest pairs, led by its weights to the residual "
            "stream and by the unembedding to tokens: those nearest, and those furthest. What a "
            "token should do is minus the gradient. Early layers need not use the directions of "
            "the last one.",
        ),
    )


def _gradient(found: HeadFacts) -> Section:
    sizes = tuple(
        (
            f"‖∂L/∂{one.weight}‖",
            f"{one.norm:.4g}",
            f"{one.rank} of {one.among}",
            "" if math.isnan(one.first) else f"{one.first:.1%}",
        )
        for one in found.weights
    )
    columns = ("gradient", "norm", "rank", "in its first direction")
    shared = found.site.n_key_value_heads < found.site.n_heads
    notes = (
        "∂L/∂W is a sum over tokens of what W read times the gradient at what it gave. In its "
        "first direction: the share of its first singular value in ‖∂L/∂W‖².",
        *("W_K and W_V are those of the key/value head that it shares." for _ in range(shared)),
    )
    return Section("Its part in the gradient", table=Table(columns, sizes), notes=notes)


def _shares(found: HeadFacts) -> list[Section]:
    """Each token's share in each matrix; of queries and keys apart where their tokens differ."""
    sides: dict[tuple[str, ...], list[WeightFacts]] = {}
    for one in found.weights:
        sides.setdefault(one.tokens, []).append(one)
    return [
        Section(
            "Share of each token in it" if i == 0 else "",
            table=_share_table(tokens, weights),
            notes=() if i else ("A token whose part points against the sum has a negative share.",),
        )
        for i, (tokens, weights) in enumerate(sides.items())
    ]


def _share_table(tokens: Sequence[str], weights: Sequence[WeightFacts]) -> Table:
    """A row for each token; of a long prompt for those with the largest shares, and the rest."""
    n = len(tokens)
    largest = [max(abs(one.shares[i]) for one in weights) for i in range(n)]
    shown = sorted(sorted(range(n), key=lambda i: -largest[i])[:_ROWS])
    rows = [
        (f"{label(tokens[i], 24)} ({i})", *(_percent(one.shares[i]) for one in weights))
        for i in shown
    ]
    if rest := [i for i in range(n) if i not in shown]:
        sums = [sum(one.shares[i] for i in rest) for one in weights]
        rows.append((f"{len(rest)} other tokens together", *map(_percent, sums)))
    return Table(("token", *(one.weight for one in weights)), tuple(rows))


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %".replace("-", "−")
