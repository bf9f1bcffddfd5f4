"""Maps as text: half-precision numbers of the cells that a query can look at, in base64.

A map holds A, then R divided by its largest |R|, both row by row; of a causal map only the lower
triangle. Half precision keeps three digits (relative error at most 2⁻¹¹) down to 6·10⁻⁵ of the
largest |R|, below which the error is at most 3·10⁻⁸ of it. Four bytes per cell, 5.3 in base64.

The part of a report that answers to a click: prompts, the grid of heads, a head's two maps.

Written as data and plain HTML; `report.js` draws from it. Token text stands in the page once, as
text, and the script reads it there.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ra_lens.cache import RACache
from ra_lens.head_maps import HeadMaps, head_of_example
from ra_lens.head_names import HeadScore
from ra_lens.model import Side
from ra_lens.report import page
from ra_lens.report.predictions import PatchedPrompt, Predictions
from ra_lens.report.run_facts import example_facts
from ra_lens.text import label, visible

BYTES_PER_CELL = 4


@dataclass(frozen=True)
class PackedMaps:
    """One head's maps on one example as they stand in a page.

    Attributes:
        text: Base64.
        limit: What R was divided by: its largest |R|, or 1.
        causal: Whether only the lower triangle is there.
    """

    text: str
    limit: float
    causal: bool


def pack(maps: HeadMaps) -> PackedMaps:
    """Write a head's maps as text."""
    kept = maps.reachable()
    limit = maps.limit or 1.0
    with np.errstate(over="ignore"):  # what is infinite stays so
        halves = np.concatenate([maps.pattern[kept], maps.ra[kept] / limit]).astype("<f2")
    return PackedMaps(base64.b64encode(halves.tobytes()).decode(), limit, maps.causal)


def unpack(packed: PackedMaps, shape: tuple[int, int]) -> tuple[Any, Any]:
    """Read A and R back, NaN where a query cannot look; what the page's script does."""
    halves = np.frombuffer(base64.b64decode(packed.text), "<f2").astype(np.float64)
    kept = np.tril(np.ones(shape, bool)) if packed.causal else np.ones(shape, bool)
    both: Sequence[Any] = [np.full(shape, np.nan), np.full(shape, np.nan)]
    n = int(kept.sum())
    both[0][kept], both[1][kept] = halves[:n], halves[n:] * packed.limit
    return both[0], both[1]


@dataclass(frozen=True)
class Shown:
    """What a page holds of a cache.

    Attributes:
        examples: Which examples.
        heads: The heads, most important first, over the mean norm of all examples.
        stored: How many of `heads` have their maps in the page.
        max_tokens: So many of the last tokens are rows and columns of maps.
    """

    examples: tuple[int, ...]
    heads: tuple[HeadScore, ...]
    stored: int
    max_tokens: int


def choose(ra: RACache, examples: Sequence[int], *, max_tokens: int, max_bytes: int) -> Shown:
    """Choose how many heads' maps go into a page of limited size, most important heads first."""
    heads = ra.top_heads(len(ra.layers) * ra.n_heads)
    sizes = {layer: [_n_cells(ra, layer, i, max_tokens) for i in examples] for layer in ra.layers}
    total, stored = 0, 0
    for head in heads:
        total += BYTES_PER_CELL * sum(sizes[head.layer])
        if total > max_bytes and stored:
            break
        stored += 1
    return Shown(tuple(examples), tuple(heads), stored, max_tokens)


def explorer(
    ra: RACache,
    shown: Shown,
    *,
    sign: str,
    top: int,
    patched: Sequence[PatchedPrompt],
) -> str:
    """Render it: HTML, then the data."""
    blocks: list[str] = []
    counts = ra.sites.n_heads
    data: dict[str, Any] = {
        "sign": sign,
        "top": top,
        "layers": [{"layer": layer, "name": _layer_name(ra, layer)} for layer in ra.layers],
        "heads": ra.n_heads,
        "norms": _rounded(_mean(ra, "ra"), counts),
        "examples": [],
    }
    prompts: list[str] = []
    for place, example in enumerate(shown.examples):
        maps: dict[str, Any] = {}
        for head in shown.heads[: shown.stored]:
            found = head_of_example(ra, head, example=example, max_tokens=shown.max_tokens)
            packed = pack(found)
            key = f"{place}.{head.layer}.{head.head}"
            maps[f"{head.layer}.{head.head}"] = _facts_of(ra, found, packed.limit)
            blocks.append(f'<script type="text/plain" data-map="{key}">{packed.text}</script>')
        data["examples"].append(
            {
                "norms": _rounded(_of_example(ra, "ra", example), counts),
                "attention": _rounded(_of_example(ra, "pattern", example), counts),
                "maps": maps,
            }
        )
        one = patched[place] if patched else None
        prompts.append(_prompt(ra, example, place, one, only=len(shown.examples) == 1))
    script = f'<script type="application/json" id="ra-data">{page.data(data)}</script>'
    return "\n".join([_frame("\n".join(prompts), shown), *blocks, script])


def _frame(prompts: str, shown: Shown) -> str:
    choices = "".join(
        f'<option value="{place}">prompt {place + 1} of {len(shown.examples)}</option>'
        for place in range(len(shown.examples))
    )
    several = len(shown.examples) > 1
    mean = '<option value="mean">‖R‖, mean of all prompts</option>' if several else ""
    some = shown.stored < len(shown.heads)
    note = (
        f"This file holds the maps of the {shown.stored} heads with the largest norms; the other "
        f"{len(shown.heads) - shown.stored} are shown by their norms only."
    )
    return f"""<section id="explorer">
<noscript><p>The grid of heads and the maps are drawn by the script of this page, which does not run
here. Prompts, predictions and tables can be read without it.</p></noscript>
<p class="controls script" {"" if several else "hidden"}><label>Show <select id="ra-example">
{choices}</select></label></p>
<div id="ra-prompts">{prompts}</div>
<div class="script">
<h2>Heads</h2>
<p class="soft">Each square is a head, coloured by the norm of its map: the brighter, the more the
loss depends on where it attends. Numbers rank the first ones. Choose one to see its maps.</p>
<p class="controls">
<label>Colour <select id="ra-kind"><option value="norms">‖R‖, Reversed Attention</option>{mean}
<option value="attention">‖A‖, attention</option></select></label>
<label>Order <select id="ra-order"><option value="index">as in the model</option>
<option value="norm">by norm, within each layer</option></select></label>
</p>
<div class="card"><div id="ra-grid" role="grid" aria-label="Heads: a row per layer"></div>
<div id="ra-grid-bar" class="bar"></div></div>
{f'<p class="soft">{note}</p>' if some else ""}
<div id="ra-head">
<h2 id="ra-title" aria-live="polite"></h2>
<p class="controls">
<button type="button" id="ra-before">◀ stronger head</button>
<button type="button" id="ra-after">weaker head ▶</button>
<label>Colours of R <select id="ra-scale"><option value="own">this head’s own scale</option>
<option value="shared">one scale for all heads</option></select></label>
</p>
<div id="ra-maps" class="card maps">
<figure><figcaption id="ra-name-a"></figcaption><canvas id="ra-a" tabindex="0"
role="application" aria-describedby="ra-readout"></canvas>
<div class="bar" id="ra-bar-a"></div></figure>
<figure><figcaption id="ra-name-r"></figcaption><canvas id="ra-r" tabindex="0"
role="application" aria-describedby="ra-readout"></canvas>
<div class="bar" id="ra-bar-r"></div></figure>
<p id="ra-readout" aria-live="polite"></p>
</div>
<p class="soft">Point at a cell, or focus a map and use the arrow keys: its row shades the prompt.
Hatched: a token cannot attend there. <span id="ra-cut"></span></p>
<h3>Largest entries of this head</h3>
<div class="scroll"><table id="ra-cells"><thead><tr><th scope="col">from (query) → to (key)</th>
<th scope="col" class="number" id="ra-column-r"></th><th scope="col" class="number">attention A</th>
<th scope="col">descent wants</th></tr></thead><tbody></tbody></table></div>
</div></div></section>"""


def _prompt(
    ra: RACache, example: int, place: int, patched: PatchedPrompt | None, *, only: bool
) -> str:
    cards: list[str] = []
    for side, name in _texts(ra).items():
        heading = f'<p class="soft">{name}</p>' if name else ""
        cards.append(heading + _chips(ra, example, side, place, last=side == _last_side(ra)))
    title = "" if only else f"<h2>Prompt {place + 1}</h2>"
    after = "" if patched is None else _predictions(ra, example, patched)
    chips = f'<div class="stick">{"".join(cards)}</div>'
    facts = page.facts(example_facts(ra, example))
    # Chips come first in a container as tall as the whole explorer, so that they stay in sight.
    return (
        f'<div class="example" data-example="{place}">{title}{chips}'
        f'<div class="beside">{facts}{after}</div></div>'
    )


def _chips(ra: RACache, example: int, side: Side, place: int, *, last: bool) -> str:
    info = ra.info
    rows: Mapping[int, Sequence[str]] | Sequence[Sequence[str]] | None = info.tokens_of(side)
    if rows is None:  # the cache was not told; positions stand for tokens
        n = next(ra["ra", layer].shape[-1] for layer in ra.layers)
        rows = {example: [f"#{i}" for i in range(n)]}
    tokens = [(visible(token), "") for token in rows[example]]
    target = None if info.targets is None else info.targets[example]
    answer = 0 if info.answer_lengths is None else info.answer_lengths[example]
    if last and target is not None:
        first = len(tokens) - answer
        tokens[first:] = [(text, "target") for text, _ in tokens[first:]]
        if not answer:
            tokens.append((visible(target), "target next"))
    if tokens and info.bos_prepended and side == "input":
        tokens[0] = (tokens[0][0], "special")
    return page.prompt(tokens, label=f"Tokens of prompt {place + 1}", side=side)


def _predictions(ra: RACache, example: int, patched: PatchedPrompt) -> str:
    scale = f"{patched.scale:g}".replace("-", "−")
    target = "" if ra.info.targets is None else label(ra.info.targets[example])
    columns = [f"p(“{target}”)", "Its rank", "Top predictions"]

    def row(name: str, one: Predictions) -> tuple[str, ...]:
        likely = " · ".join(f"“{label(text)}” {_percent(chance)}" for text, chance in one.top)
        chance = "–" if one.target is None else _percent(one.target)
        return (name, chance, "–" if one.rank is None else str(one.rank), likely)

    table = page.Table(
        ("", *columns),
        (row("As it is", patched.before), row("Patched", patched.after)),
    )
    note = (
        f"Patched: {scale} times this prompt’s own R is added to the attention of every head; "
        "the weights stay as they are."
    )
    return f"<div><h3>What comes next</h3>{page.table(table)}{page.note(note)}</div>"


def _percent(share: float) -> str:
    """Three digits, counted from the end that is nearer: `0.0325 %`, `43.6 %`, `99.9218 %`."""
    nearer = 100 * min(share, 1 - share)
    if nearer <= 0:
        return f"{100 * share:.0f} %"
    digits = max(0, min(6, 2 - math.floor(math.log10(nearer))))
    return f"{100 * share:.{digits}f} %"


def _facts_of(ra: RACache, maps: HeadMaps, limit: float) -> dict[str, Any]:
    site = ra.sites[maps.layer]
    return {
        "limit": limit,
        "causal": maps.causal,
        "rows": [site.query_side, maps.first, len(maps.tokens)],
        "columns": [site.key_side, maps.first_key, len(maps.key_tokens)],
    }


def _texts(ra: RACache) -> dict[Side, str]:
    if all(site.query_side == site.key_side == "input" for site in ra.sites.values()):
        return {"input": ""}
    return {"input": "The encoder reads", "decoder": "The decoder reads"}


def _last_side(ra: RACache) -> Side:
    return list(_texts(ra))[-1]


def _layer_name(ra: RACache, layer: int) -> str:
    return ra.sites[layer].label.removeprefix("layer ")


def _n_cells(ra: RACache, layer: int, example: int, max_tokens: int) -> int:
    # As if causal; a map that is not takes twice as much, at most.
    rows, columns = ra["ra", layer].shape[-2:]
    if ra.info.str_tokens is not None and rows == columns:
        rows = columns = min(rows, len(ra.info.str_tokens[example]))
    rows, columns = min(rows, max_tokens), min(columns, max_tokens)
    return rows * (columns + 1) // 2


def _of_example(ra: RACache, kind: Any, example: int) -> Float[Tensor, "layer head"]:
    norms = ra.norms(kind)
    return norms[example] if ra.has_batch_dim else norms


def _mean(ra: RACache, kind: Any) -> Float[Tensor, "layer head"]:
    norms = ra.norms(kind)
    return norms.mean(dim=0) if ra.has_batch_dim else norms


def _rounded(norms: Float[Tensor, "layer head"], counts: Sequence[int]) -> list[list[float | None]]:
    """Norms with few digits, of the heads that each layer has."""
    return [
        [float(f"{value:.5g}") if math.isfinite(value) else None for value in row[:n]]
        for row, n in zip(norms.float().tolist(), counts, strict=True)
    ]
