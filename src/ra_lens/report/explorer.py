"""The part of a report that answers to a click: prompts, the grid of heads, a head's three maps.

Python writes plain HTML and data; `explorer.js` draws from it. Token text stands in the page once,
as text, and the script reads it there; the few tokens of the table of edges stand there again.

A map is text: half-precision numbers of the cells that a query can look at, in base64. It holds A,
then R divided by its largest |R|, both row by row; of a causal map only the lower triangle. Half
precision keeps three digits (relative error at most 2⁻¹¹) down to 6·10⁻⁵ of the largest |R|, below
which the error is at most 3·10⁻⁸ of it. Four bytes per cell, 5.3 in base64.

What blocking an edge does to the loss, −R~ / (1 − A), the script makes of these where A, as
written, is at most ½. Where it is more, 1 − A has too few digits; there, for one cell of a row at
most, the number itself follows at the end, divided by the largest.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ra_lens import html
from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.head_maps import HeadMaps, head_of_example, kept_tokens, largest
from ra_lens.head_names import HeadScore
from ra_lens.model.sites import MapKind
from ra_lens.report.edges import edges_html, strongest_edges
from ra_lens.report.predictions import PatchedPrompt, Predictions
from ra_lens.report.prompt_tokens import prompt_tokens, sides
from ra_lens.report.scale_curve import scale_svg
from ra_lens.scales import PAPER_SCALE
from ra_lens.text import label, scale_name

BYTES_PER_CELL = 4
BYTES_PER_ROW = 2


@dataclass(frozen=True)
class Shown:
    """What a page holds of a cache.

    Attributes:
        examples: Which examples.
        heads: The heads, most important first, over the mean norm of all examples.
        mapped: Those of them whose maps are in the page.
        max_tokens: So many of the last tokens are rows and columns of maps.
    """

    examples: tuple[int, ...]
    heads: tuple[HeadScore, ...]
    mapped: tuple[HeadScore, ...]
    max_tokens: int

    @property
    def cut(self) -> int:
        """How many heads are shown by their norms only."""
        return len(self.heads) - len(self.mapped)


def choose(ra: RACache, examples: Sequence[int], *, max_tokens: int, max_bytes: int) -> Shown:
    """Choose how many heads' maps go into a page of limited size, most important heads first."""
    heads = tuple(ra.top_heads(len(ra.layers) * ra.n_heads))
    sizes = {layer: sum(_bytes(ra, layer, i, max_tokens) for i in examples) for layer in ra.layers}
    total, stored = 0, 0
    for head in heads:
        total += sizes[head.layer]
        if total > max_bytes and stored:
            break
        stored += 1
    return Shown(tuple(examples), heads, heads[:stored], max_tokens)


def _bytes(ra: RACache, layer: int, example: int, max_tokens: int) -> int:
    # As if causal; a map that is not takes twice as much, at most.
    rows, columns = ra["ra", layer].shape[-2:]
    if ra.info.str_tokens is not None and rows == columns:
        rows = columns = min(rows, len(ra.info.str_tokens[example]))
    rows, columns = min(rows, max_tokens), min(columns, max_tokens)
    return BYTES_PER_CELL * (rows * (columns + 1) // 2) + BYTES_PER_ROW * rows


def pack(maps: HeadMaps) -> str:
    """Write a head's maps as text."""
    kept = maps.reachable()
    with np.errstate(over="ignore"):  # what is infinite stays so
        pattern = maps.pattern[kept].astype("<f2")
        r = (maps.ra[kept] / (maps.limit or 1.0)).astype("<f2")
        blocked = maps.knockout[kept][~(pattern <= 0.5)] / (largest(maps.knockout) or 1.0)
        numbers = np.concatenate([pattern, r, blocked.astype("<f2")])
    return base64.b64encode(numbers.tobytes()).decode()


def explorer(
    ra: RACache,
    shown: Shown,
    *,
    sign: str,
    top: int,
    patched: Sequence[PatchedPrompt],
    flow: bool = False,
    latent: str = "",
    note: str = "",
) -> str:
    """Write it: HTML with a note below the grid, then the data.

    With `flow`, layers × tokens. `latent` is the HTML of `ra_lens.report.latent_svg`.
    """
    norms = {kind: _norms(ra, kind) for kind in ("ra", "pattern")}
    counts = ra.sites.n_heads
    data: dict[str, Any] = {
        "sign": sign,
        "top": top,
        "unit": ra.loss_unit,
        "layers": [
            {
                "layer": layer,
                "name": site.label.removeprefix("layer "),
                "scale": site.scale,
            }
            for layer, site in ra.sites.items()
        ],
        "heads": ra.n_heads,
        "norms": _rounded(norms["ra"].mean(dim=0), counts),
        "examples": [],
    }
    blocks: list[str] = []
    for place, example in enumerate(shown.examples):
        maps: dict[str, Any] = {}
        for head in shown.mapped:
            found = head_of_example(ra, head, example=example, max_tokens=shown.max_tokens)
            key = f"{head.layer}.{head.head}"
            site = ra.sites[head.layer]
            maps[key] = {
                "limit": found.limit or 1.0,
                "blocked": largest(found.knockout) or 1.0,
                "causal": found.causal,
                "rows": [site.query_side, found.first, len(found.tokens)],
                "columns": [site.key_side, found.first_key, len(found.key_tokens)],
            }
            blocks.append(
                f'<script type="text/plain" data-map="{place}.{key}">{pack(found)}</script>'
            )
        facts: dict[str, Any] = {
            "norms": _rounded(norms["ra"][example], counts),
            "attention": _rounded(norms["pattern"][example], counts),
            "maps": maps,
        }
        if flow:
            facts["flow"] = _flow(ra, example, shown.max_tokens)
        data["examples"].append(facts)
    script = f'<script type="application/json" id="ra-data">{html.data(data)}</script>'
    edges = strongest_edges(ra, shown.examples, top)
    table = "" if edges is None else edges_html(ra, edges)
    drawn = _frame(ra, shown, patched, note, edges=table, flow=flow, latent=latent)
    return "\n".join([drawn, *blocks, script])


def _flow(ra: RACache, example: int, max_tokens: int) -> dict[str, Any] | None:
    """Give what blocking each token does, by layer, to the token after which the answer is read.

    None where nothing is read there, or where layers attend to tokens of different texts.
    """
    answer = 0 if ra.info.answer_lengths is None else ra.info.answer_lengths[example]
    one = ra.apply_slice_to_batch_dim(example) if ra.has_batch_dim else ra
    query = -1 - answer
    try:
        flows = (one.flow(queries=query, by=by) for by in ("knockout", "pattern"))
        values, seen = (flow.cpu().numpy() for flow in flows)
    except BadInput:
        return None
    sites = ra.sites[ra.layers[0]]
    tokens, first, columns = kept_tokens(ra, sites.key_side, example, seen.shape[-1], max_tokens)
    values, limit = values[:, columns], largest(values[:, columns])
    if not limit:
        return None
    with np.errstate(over="ignore"):
        numbers = np.where(seen[:, columns] == 0, np.nan, values / limit).astype("<f2")
    queries = ra.info.tokens_of(sites.query_side)
    length = ra["ra", ra.layers[0]].shape[-2] if queries is None else len(queries[example])
    return {
        "values": base64.b64encode(numbers.tobytes()).decode(),
        "limit": limit,
        "query": [sites.query_side, length + query],
        "columns": [sites.key_side, first, len(tokens)],
    }


def _norms(ra: RACache, kind: MapKind) -> Float[Tensor, "batch layer head"]:
    norms = ra.norms(kind).float()
    return norms if ra.has_batch_dim else norms.unsqueeze(0)


def _rounded(norms: Float[Tensor, "layer head"], counts: Sequence[int]) -> list[list[float | None]]:
    """Norms with few digits, of the heads that each layer has."""
    return [
        [float(f"{value:.5g}") if math.isfinite(value) else None for value in row[:n]]
        for row, n in zip(norms.tolist(), counts, strict=True)
    ]


def _frame(
    ra: RACache,
    shown: Shown,
    patched: Sequence[PatchedPrompt],
    note: str,
    *,
    edges: str,
    flow: bool,
    latent: str,
) -> str:
    n = len(shown.examples)
    mean = '<option value="mean">‖R‖, mean of all prompts</option>'
    choices = (f'<option value="{i}">prompt {i + 1} of {n}</option>' for i in range(n))
    return Template(html.resource("ra_lens.report", "explorer.html")).substitute(
        hidden="" if n > 1 else "hidden",
        choices="".join(choices),
        prompts="\n".join(_prompt(ra, shown, i, patched) for i in range(n)),
        mean=mean if n > 1 else "",
        note=html.note(note) if note else "",
        edges=edges,
        latent=latent,
        flow=html.resource("ra_lens.report", "flow.html") if flow else "",
        choose=" Choose one to see its maps." if shown.mapped else "",
    )


def _prompt(ra: RACache, shown: Shown, place: int, patched: Sequence[PatchedPrompt]) -> str:
    example = shown.examples[place]
    title = f"<h2>Prompt {place + 1}</h2>" if len(shown.examples) > 1 else ""
    chips = token_chips(ra, example, place)
    after = _predictions(ra, example, patched[place]) if patched else ""
    # Chips come first in a container as tall as the whole explorer, so that they stay in sight.
    return (
        f'<div class="example" data-example="{place}">{title}<div class="stick">{chips}</div>'
        f'<div class="beside">{html.facts(ra.facts(example))}{after}</div></div>'
    )


def token_chips(ra: RACache, example: int, place: int = 0) -> str:
    """Write the tokens of an example, the prompt at some place of a page."""
    read = sides(ra)
    last, chips = read[-1], ""
    for side, name in zip(read, ("encoder", "decoder"), strict=False):
        chips += f'<p class="soft">The {name} reads</p>' if len(read) > 1 else ""
        tokens = prompt_tokens(ra, example, side, target=side == last)
        chips += _chips(tokens, side, place) if tokens else ""
    return chips


def _chips(tokens: Sequence[tuple[str, str]], side: str, place: int) -> str:
    chips = (
        f'<bdi class="token{" " + kind if kind else ""}">{html.text(token)}</bdi>'
        + ("<br>" if token.endswith("⏎") else "<wbr>")
        for token, kind in tokens
    )
    return (
        '<div class="card prompt" role="group" tabindex="0" '
        f'aria-label="Tokens of prompt {place + 1}" data-side="{side}">{"".join(chips)}</div>'
    )


def _predictions(ra: RACache, example: int, patched: PatchedPrompt) -> str:
    scale = scale_name(patched.scale)
    target = "" if ra.info.targets is None else label(ra.info.targets[example])
    columns = [f"p(“{target}”)", "Its rank", "Top predictions"]

    def row(name: str, one: Predictions) -> tuple[str, ...]:
        likely = " · ".join(f"“{label(text)}” {_percent(chance)}" for text, chance in one.top)
        chance = "–" if one.target is None else _percent(one.target)
        return (name, chance, "–" if one.rank is None else str(one.rank), likely)

    table = html.Table(
        ("", *columns),
        (row("As it is", patched.before), row(f"Patched, {scale}", patched.after)),
    )
    place = "attention" if patched.at == "pattern" else "attention scores"
    note = (
        f"Patched: {scale} times this prompt’s own R is added to the {place} of every head; "
        "the weights stay as they are."
    )
    drawing, found = "", patched.found
    if found is not None:
        note += f" Of {len(found.scales)} scales this one makes the loss smallest"
        note += ", the last tried" * found.at_the_end
        note += "; it was chosen with the target at hand."
        paper = PAPER_SCALE["ra"]
        if paper in found.scales:
            note += (
                f" At {scale_name(paper)}, the paper’s scale for a mean over prompts, "
                f"p(target) is {_percent(found.probability_at(paper))}."
            )
        drawing = scale_svg(found)
    return f"<div><h3>What comes next</h3>{html.table(table)}{drawing}{html.note(note)}</div>"


def _percent(share: float) -> str:
    """Three digits, counted from the end that is nearer: `0.0325 %`, `43.6 %`, `99.9218 %`."""
    nearer = 100 * min(share, 1 - share)
    if nearer <= 0:
        return f"{100 * share:.0f} %"
    digits = max(0, min(6, 2 - math.floor(math.log10(nearer))))
    return f"{100 * share:.{digits}f} %"
