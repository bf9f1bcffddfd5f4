"""One head in a terminal and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text
from torch import nn

from ra_lens.cache import RACache
from ra_lens.cli.show import facts_table, new_console, new_table
from ra_lens.cli.show import print_json as print_plain
from ra_lens.model import as_lens
from ra_lens.report.head_facts import HeadFacts, WeightFacts
from ra_lens.report.head_page import (
    KIND_NAMES,
    about,
    pair,
    said_of_left_out,
    said_of_missing,
    signed,
)
from ra_lens.text import label

_SHOWN = ("z", "z_step", "value", "value_step")  # in the vocabulary; pages and JSON have more
_TOKENS = 3  # with the largest shares


def print_head(ra: RACache, model: nn.Module, found: HeadFacts) -> None:
    """Print what there is to say of a head, in short."""
    console = new_console()
    room = max(4, min(24, (console.width - 50) // 2))
    facts = facts_table(ra, model, found.example)
    for name, value in about(found):
        facts.add_row(name, Text(value))
    parts: list[RenderableType] = [facts, "", *_edges(ra, found, room)]
    if found.pulls:
        parts += ["", _pulls(found, room)]
    if found.readings:
        parts += ["", _readings(found, console.width)]
    if found.weights:
        parts += ["", _weights(found)]
    parts += [Text(f"Not here: {said}", style="dim") for said in said_of_missing(found)]
    for part in parts:
        console.print(part)


def _edges(ra: RACache, found: HeadFacts, room: int) -> list[RenderableType]:
    loss = f"loss ({ra.loss_unit})"
    title = "Edges it matters for: the loss if this look were blocked"
    if not found.edges:
        return [Text(title, style="bold"), Text("The gradient is 0 at every edge.")]
    numbers = ("A", "−R", loss)
    table = new_table("from (query) → to (key)", *numbers, "this look", right=numbers, title=title)
    for cell in found.edges:
        needs = cell.knockout > 0
        says = Text("is needed" if needs else "is in the way", style="green" if needs else "yellow")
        table.add_row(
            Text(pair(found.maps, cell.query, cell.key, room)),
            f"{cell.pattern:.3f}",
            signed(-cell.ra),
            signed(cell.knockout),
            says,
        )
    return [table, *(Text(said, style="dim") for said in said_of_left_out(found))]


def _pulls(found: HeadFacts, room: int) -> RenderableType:
    title = "Queries and keys: how a step of descent moves them"
    numbers = ("R", "q·k", "cosine")
    table = new_table("query → key", *numbers, "moved", right=numbers, title=title)
    for one in found.pulls:
        names = (
            f"{label(token, room)} ({at})"
            for token, at in ((one.query_token, one.query), (one.key_token, one.key))
        )
        moved = Text("together", style="red") if one.together else Text("apart", style="blue")
        table.add_row(
            Text(" → ".join(names)),
            signed(one.ra),
            f"{one.product:.4g}".replace("-", "−"),
            f"{one.cosine:.3f}".replace("-", "−"),
            moved,
        )
    return table


def _readings(found: HeadFacts, width: int) -> RenderableType:
    title = "Its vectors in the vocabulary"
    ranked = any(one.rank is not None for one in found.readings)
    rank = "target’s rank"
    columns = ("token", "", "nearest", "furthest", *([rank] if ranked else []))
    table = new_table(*columns, right=(rank,), title=title)
    words = max(2, min(5, (width - 60) // 16))
    shown = [one for one in found.readings if one.kind in _SHOWN]
    for one in shown:
        ends = (
            Text(" ".join(label(score.token, 10) for score in scores[:words]))
            for scores in (one.top, one.bottom)
        )
        last = [] if not ranked else ["" if one.rank is None else f"{one.rank:,}"]
        name = Text(f"{label(one.token, 10)} ({one.position})")
        table.add_row(name, KIND_NAMES[one.kind], *ends, *last)
    return table


def _weights(found: HeadFacts) -> RenderableType:
    title = "Its part in the gradient of the weights"
    numbers = ("norm", "rank")
    table = new_table("gradient", *numbers, "most of it by", right=numbers, title=title)
    for one in found.weights:
        table.add_row(
            f"∂L/∂{one.weight}", f"{one.norm:.4g}", f"{one.rank} of {one.among}", Text(_most(one))
        )
    return table


def _most(one: WeightFacts) -> str:
    """The tokens with the largest shares."""
    order = sorted(range(len(one.shares)), key=lambda i: -abs(one.shares[i]))[:_TOKENS]
    return ", ".join(
        f"{label(one.tokens[i], 14)} ({i}) {one.shares[i]:.0%}".replace("-", "−")
        for i in order
        if abs(one.shares[i]) >= 0.005
    )


def print_json(
    ra: RACache, model: nn.Module, prompt: str, found: HeadFacts, *, page: Path | None
) -> None:
    """Print all of it as one JSON object; `ra` is R itself, negative where descent wants more."""
    maps, latent = found.maps, found.latent

    def token(side: str, at: int) -> str:
        first, tokens = (
            (maps.first, maps.tokens) if side == "query" else (maps.first_key, maps.key_tokens)
        )
        return tokens[at - first]

    print_plain(
        {
            "ra_lens": version("ra-lens"),
            "transformer_lens": version("transformer-lens"),
            "model": {"name": ra.info.model_name, "kind": as_lens(model).kind},
            "prompt": prompt,
            "tokens": list(maps.tokens),
            "prepended": ra.info.prepended,
            "target": None if ra.info.targets is None else ra.info.targets[found.example],
            "target_is_top_prediction": ra.info.target_is_top_prediction,
            "loss": ra.loss_of(found.example),
            "loss_unit": ra.loss_unit,
            "head": {
                "layer": maps.layer,
                "head": maps.head,
                "label": maps.label,
                "key_value_head": found.site.kv_group(maps.head),
                "ra_norm": found.norm,
                "rank": found.rank,
                "among": found.among,
                "share": found.share,
            },
            "edges": [
                {
                    "query": cell.query,
                    "key": cell.key,
                    "query_token": token("query", cell.query),
                    "key_token": token("key", cell.key),
                    "ra": cell.ra,
                    "pattern": cell.pattern,
                    "loss_if_blocked": cell.knockout,
                }
                for cell in found.edges
            ],
            "pulls": [
                {
                    "query": one.query,
                    "key": one.key,
                    "query_token": one.query_token,
                    "key_token": one.key_token,
                    "ra": one.ra,
                    "product": one.product,
                    "cosine": one.cosine,
                    "descent_moves": "together" if one.together else "apart",
                }
                for one in found.pulls
            ],
            "latent_variance": None if latent is None else list(latent.variance),
            "vocabulary": [asdict(one) for one in found.readings],
            "weights": [_plain(asdict(one)) for one in found.weights],
            "missing": dict(found.missing),
            "page": None if page is None else str(page),
        }
    )


def _plain(value: Any) -> Any:
    """The same with null for what is no number, as JSON has none."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]  # pyright: ignore[reportUnknownVariableType]
    return None if isinstance(value, float) and not math.isfinite(value) else value
