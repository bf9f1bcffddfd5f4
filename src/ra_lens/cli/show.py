"""Results in a terminal and as JSON. Tokens are data: nothing in them is read as markup."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version

import typer
from rich.cells import cell_len, set_cell_size
from rich.console import Console, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text
from torch import nn

from ra_lens.cache import RACache
from ra_lens.head_maps import HeadMaps, head_of_example
from ra_lens.knockouts.edges import Edge, Edges
from ra_lens.model import as_lens
from ra_lens.paths import TraceResult
from ra_lens.paths.result import spell_sinks
from ra_lens.report import PatchedPrompt, Predictions, Section
from ra_lens.report.edges import left_out, strongest_edges
from ra_lens.report.prompt_tokens import prompt_tokens
from ra_lens.scales import PAPER_SCALE
from ra_lens.text import isolated, label, scale_name, shorten, visible

_LABEL = 14
_EDGES = 5
_RED, _BLUE = (178, 24, 43), (33, 102, 172)


def as_json(
    ra: RACache,
    model: nn.Module,
    prompts: Sequence[str],
    *,
    top: int,
    patched: Sequence[PatchedPrompt] = (),
) -> dict[str, object]:
    """Give a run as plain data; `ra` is R itself, negative where descent wants more.

    `loss_if_blocked` is the foretold change of the loss, positive where the answer needs the edge.
    Of several prompts the norms are means, and each has an entry of its own in `prompts`. The
    number of heads is one number, or one for each layer where they differ.
    """
    info, counts = ra.info, ra.sites.n_heads
    facts: dict[str, object] = {
        "ra_lens": version("ra-lens"),
        "transformer_lens": version("transformer-lens"),
        "model": {
            "name": info.model_name,
            "kind": as_lens(model).kind,
            "layers": ra.layers,
            "n_heads": counts[0] if len(set(counts)) == 1 else list(counts),
        },
        "objective": info.objective,
        "loss_unit": ra.loss_unit,
        "prepended": info.prepended,
        "target_is_top_prediction": info.target_is_top_prediction,
        "top_heads": [
            {"layer": s.layer, "head": s.head, "label": s.label, "ra_norm": s.score}
            for s in ra.top_heads(top)
        ],
    }
    edges = _edges(ra)
    each = [_example_json(ra, prompt, i, edges[i], top=top) for i, prompt in enumerate(prompts)]
    for example, one in zip(each, patched, strict=bool(patched)):
        example["own_patch"] = _patched_json(one)
    return {**facts, **(each[0] if len(each) == 1 else {"prompts": each})}


def _example_json(
    ra: RACache, prompt: str, example: int, edges: Sequence[Edge], *, top: int
) -> dict[str, object]:
    maps = _strongest_head(ra, example)
    return {
        "prompt": prompt,
        "tokens": list(maps.tokens),
        "target": None if ra.info.targets is None else ra.info.targets[example],
        "loss": ra.loss_of(example),
        "strongest_cells": [
            {
                "layer": maps.layer,
                "head": maps.head,
                "query": cell.query,
                "key": cell.key,
                "query_token": maps.query_token(cell),
                "key_token": maps.key_token(cell),
                "ra": cell.ra,
                "pattern": cell.pattern,
                "descent_wants": cell.moves,
            }
            for cell in maps.strongest(top)
        ],
        "top_edges": [
            {
                "layer": edge.layer,
                "head": edge.head,
                "label": edge.label,
                "query": edge.query,
                "key": edge.key,
                "query_token": edge.query_token,
                "key_token": edge.key_token,
                "pattern": edge.pattern,
                "loss_if_blocked": edge.effect,
            }
            for edge in edges
        ],
    }


def _patched_json(one: PatchedPrompt) -> dict[str, object]:
    """Give a prompt's patch with its own maps; NaN, of a patched model, is null."""

    def side(found: Predictions) -> dict[str, object]:
        top = [{"token": text, "probability": chance} for text, chance in found.top]
        return {"probability": found.target, "rank": found.rank, "top": top}

    facts: dict[str, object] = {
        "scale": one.scale,
        "at": one.at,
        "before": side(one.before),
        "after": side(one.after),
    }
    if one.found is not None:
        losses, chances = one.found.loss_per_prompt[0], one.found.probability[0]
        rows = zip(one.found.scales, losses.tolist(), chances.tolist(), strict=True)
        facts["scales"] = [
            {
                "scale": scale,
                "loss": loss if math.isfinite(loss) else None,
                "probability": chance if math.isfinite(chance) else None,
            }
            for scale, loss, chance in rows
        ]
    return facts


def print_json(facts: Mapping[str, object]) -> None:
    """Print one JSON object."""
    typer.echo(json.dumps(facts, indent=2, allow_nan=False))


def new_console() -> Console:
    """Give a console that takes text as it is."""
    return Console(highlight=False, markup=False)


def new_table(*columns: str, right: Collection[str] = (), title: str | None = None) -> Table:
    """Make a table; the columns in `right`, which are numbers, stand to the right."""
    table = Table(
        title=None if title is None else Text(title),
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
    )
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left")
    return table


def print_run(
    ra: RACache, model: nn.Module, *, top: int, patched: Sequence[PatchedPrompt] = ()
) -> None:
    """Print the facts of a run, its top heads, each prompt's strongest edges, map and patch."""
    console, edges = new_console(), _edges(ra)
    several = ra.batch_size > 1
    facts = [facts_table(ra, model, i) for i in range(ra.batch_size)]
    parts: list[RenderableType] = [part for table in facts for part in (table, "")]
    parts += [_heads(ra, top), ""]
    for i in range(ra.batch_size):
        parts += [Text(f"Prompt {i + 1}", style="bold")] if several else []
        parts += [*_edges_table(ra, edges[i], console.width), ""]
        parts += _map(_strongest_head(ra, i), console.width)
        parts += ["", *_patch(patched[i])] if patched else []
        parts += [""] * several
    for part in parts:
        console.print(part)


def print_section(section: Section) -> None:
    """Print a section of the report."""
    console = new_console()
    console.print(Text(f"\n{section.title}", style="bold"))
    for paragraph in section.paragraphs:
        console.print(paragraph)
    if section.table is not None:
        table = new_table(*section.table.columns)
        for row in section.table.rows:
            table.add_row(*map(Text, row))
        console.print(table)
    for note in section.notes:
        console.print(Text(note, style="dim"))


def print_paths(found: TraceResult) -> None:
    """Print paths of attention, and the heads on them."""
    console = new_console()
    where = "all layers" if found.is_layered else f"layer {found.layer}"
    first = f"Paths to position {found.target_pos} of {found.seq_len}, {where}, {found.follow}"
    console.print(Text(first, style="bold"))
    for i, text in enumerate(found.paths_text, start=1):
        console.print(Text(f"{i:>3}  {text}"))
    if found.is_layered:
        labels = ", ".join(f"L{layer}H{head}" for layer, head in found.heads(len(found.beams)))
        console.print(Text(f"Heads on these paths: {labels}"))
    if found.sinks:
        named = spell_sinks(found.tokens, found.sinks)
        console.print(Text(f"Left out: {named}; --sinks goes there.", style="dim"))


def _strongest_head(ra: RACache, example: int) -> HeadMaps:
    norms = ra.norms()[example] if ra.has_batch_dim else ra.norms()
    strongest = int(norms[ra.sites.places].argmax())
    return head_of_example(ra, ra.sites.heads[strongest], example=example)


def facts_table(ra: RACache, model: nn.Module, example: int) -> Table:
    """Tell prompt, model, target and loss."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    styles = {"": "", "special": "dim", "target": "bold red", "target next": "bold red"}
    prompt = Text()
    for i, (text, kind) in enumerate(prompt_tokens(ra, example)):
        after_line = i > 0 and prompt.plain.endswith("⏎")
        prompt.append(("\n" if after_line else "") + text, style=styles[kind])
    grid.add_row(f"Prompt {example + 1}" if ra.batch_size > 1 else "Prompt", prompt)
    of_model = ra.model_facts() if example == 0 else []
    for name, value in [*of_model, *ra.facts(example)]:
        shown = f"{value} ({as_lens(model).kind})" if name == "Model" else value
        grid.add_row(name, Text(shown))
    return grid


def _heads(ra: RACache, top: int) -> Table:
    of = f", mean of {ra.batch_size} prompts" if ra.batch_size > 1 else ""
    title = f"Top heads: norm of the Reversed Attention{of}"
    table = new_table("rank", "head", "‖R‖", "", right=("rank", "‖R‖"), title=title)
    scores = ra.top_heads(top)
    for rank, score in enumerate(scores, start=1):
        bar = "█" * math.ceil(20 * score.score / (scores[0].score or 1.0))
        table.add_row(str(rank), score.label, f"{score.score:.4g}", bar)
    return table


def _edges(ra: RACache) -> list[Edges]:
    """The strongest edges of each prompt; a run keeps all maps."""
    found = strongest_edges(ra, range(ra.batch_size), _EDGES)
    return [Edges((), "knockout")] * ra.batch_size if found is None else found


def _edges_table(ra: RACache, edges: Edges, width: int) -> list[RenderableType]:
    title = "Strongest edges: what the loss would do if this look were blocked"
    if not edges:
        return [Text(title, style="bold"), Text("The gradient is 0 in every cell.")]
    loss = f"loss ({ra.loss_unit})"
    right = ("attention", loss)
    table = new_table(
        "head", "from (query)", "", "to (key)", "attention", loss, "this look",
        right=right, title=title,
    )  # fmt: skip
    room = max(4, min(24, (width - 56 - len(loss)) // 2))
    for edge in edges:
        query = f"{label(edge.query_token, room)} ({edge.query})"
        key = f"{label(edge.key_token, room)} ({edge.key})"
        needs = edge.effect > 0
        says = Text("is needed" if needs else "is in the way", style="green" if needs else "yellow")
        table.add_row(
            edge.label, Text(query), "→", Text(key), f"{edge.pattern:.3f}", f"{edge.effect:+.3g}",
            says,
        )  # fmt: skip
    rests = left_out([edges])
    but = f"; looks at {rests}, where heads rest, are left out" if rests else ""
    return [table, Text(f"Foretold to first order, one edge at a time{but}.", style="dim")]


def _map(maps: HeadMaps, width: int) -> list[RenderableType]:
    title = f"Strongest map, {maps.label}: where gradient descent moves attention (−R)"
    cells = maps.strongest(10)
    if not cells:
        return [Text(title, style="bold"), Text("The gradient is 0 in every cell.")]
    columns = ("from (query)", "", "to (key)", "−R", "attention", "descent wants")
    table = new_table(*columns, right=("−R", "attention"), title=title)
    # The other columns take 44. What a table too wide cut off would end with a token's direction.
    room = max(4, min(24, (width - 44) // 2))
    for cell in cells:
        query = f"{label(maps.query_token(cell), room)} ({cell.query})"
        key = f"{label(maps.key_token(cell), room)} ({cell.key})"
        wants = Text(cell.moves, style="red" if cell.moves == "more" else "blue")
        table.add_row(Text(query), "→", Text(key), f"{-cell.ra:+.3g}", f"{cell.pattern:.3f}", wants)
    grid = _grid(maps, width)
    return [table] if grid is None else [table, "", grid]


def _patch(one: PatchedPrompt) -> list[RenderableType]:
    """Tell what comes next before and after a patch, with the paper's scale beside the best."""
    place = "pattern" if one.at == "pattern" else "attention scores"
    title = f"Patched: R times {scale_name(one.scale)} added to the {place} of every head"
    numbers = ("scale", "p(target)", "its rank")
    table = new_table(*numbers, "what comes next", right=numbers, title=title)
    rows: list[tuple[float, float | None, int | None, str]] = []
    for scale, side in ((0.0, one.before), (one.scale, one.after)):
        top = " · ".join(f"“{label(text)}” {chance:.3f}" for text, chance in side.top[:2])
        rows.append((scale, side.target, side.rank, top))
    found, paper = one.found, PAPER_SCALE["ra"]
    if found is not None and paper in found.scales and one.scale != paper:
        rows.append((paper, found.probability_at(paper), None, ""))
    for scale, chance, rank, top in rows:
        table.add_row(
            Text(scale_name(scale)),
            "" if chance is None else f"{chance:.3g}",
            "" if rank is None else str(rank),
            Text(top),
        )
    if found is None:
        return [table]
    beyond = ", the last tried" * found.at_the_end
    note = (
        f"{scale_name(one.scale)}: the smallest loss of {len(found.scales)} scales{beyond}, found "
        f"with the target at hand; {scale_name(paper)}: the paper's, for a mean over prompts."
    )
    return [table, Text(note, style="dim")]


def _grid(maps: HeadMaps, width: int) -> Text | None:
    """Draw the whole map, one row per query; None if the terminal is too narrow.

    A cell's digit is |R| in tenths of the largest, X being that, with `+` where descent wants more
    attention and `-` where it wants less.
    """
    names = [label(token, _LABEL) for token in maps.tokens]
    heads = [shorten(visible(token), _LABEL) for token in maps.key_tokens]
    n, left = len(heads), max(map(cell_len, names)) + 5
    if left + 3 * n > width:
        return None
    column = min(max(map(cell_len, heads)) + 1, (width - left) // n)
    wide = column > 4  # room for tokens above the columns, not only their positions
    text = Text("Rows: from (query). Columns: to (key). |R| in tenths of the largest (X).\n")
    heads = heads if wide else [str(i % 100) for i in range(n)]
    head = "".join(_right(isolated(shorten(name, column - 1)), column) for name in heads)
    text.append(" " * left + head + "\n", style="dim")
    largest = max(abs(cell.ra) for cell in maps.strongest(1))
    for i, name in enumerate(names):
        text.append(set_cell_size(f"{i:>3} {name}", left), style="dim")
        for j in range(i + 1 if maps.causal else n):
            share = -float(maps.ra[i, j]) / largest
            tenths = round(10 * abs(share))
            digit = "X" if tenths == 10 else str(tenths)
            mark = "·" if tenths == 0 else f"{'+' if share > 0 else '-'}{digit}"
            text.append(_right(mark, column), style=_shade(share))
        text.append("\n")
    text.rstrip()
    return text


def _shade(share: float) -> Style:
    weight = abs(share)
    if weight < 0.05:
        return Style(dim=True)
    goal = _RED if share > 0 else _BLUE
    red, green, blue = (round(255 - (255 - c) * weight) for c in goal)
    ink = "white" if weight > 0.5 else "black"
    return Style(color=ink, bgcolor=f"rgb({red},{green},{blue})")


def _right(text: str, width: int) -> str:
    return " " * max(0, width - cell_len(text)) + text
