"""`write_report`: a run as one HTML file, for one or several prompts.

Prompt and target, the grid of heads, the strongest edges, the three maps of every head at a click,
where information enters the last token, the leading heads, what a patch does to the prediction, and
how it was made. The file asks the network for nothing. Its size is about 5.3 bytes per cell that a
query can look at, per head and prompt: 1.7 MB for GPT-2 small on 64 tokens, 14 MB for GPT-2 XL.
Where the cache holds vectors, the first heads have their queries and keys in two dimensions too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, RALensError
from ra_lens.files import REPORT, check_output, write_whole
from ra_lens.head_maps import head_of_example
from ra_lens.html import Table, facts, resource
from ra_lens.numbers import Real, Whole, Wholes
from ra_lens.paths import TraceResult, trace_layers
from ra_lens.paths.result import Follow
from ra_lens.prompts import PromptInput
from ra_lens.report.explorer import Shown, choose, explorer
from ra_lens.report.latent_svg import latent_spaces
from ra_lens.report.predictions import PatchedPrompt
from ra_lens.report.sections import Section, how_it_was_made, page
from ra_lens.report.view import Sign, heading_of, how_to_read, read_view
from ra_lens.text import label


def write_report(
    ra: RACache,
    path: str | Path,
    *,
    top: Whole = 10,
    examples: Wholes | None = None,
    sign: Sign = "descent",
    title: str | None = None,
    command: str | None = None,
    traces: Sequence[TraceResult] = (),
    sections: Sequence[Section] = (),
    patched: Sequence[PatchedPrompt] = (),
    max_tokens: Whole = 256,
    max_megabytes: Real = 22.0,
) -> Path:
    """Write what a cache holds as one self-contained HTML file.

    Args:
        ra: A cache from `run_with_ra` with its maps.
        path: The file, whose name ends in `.html`; a page that is there is replaced, only when the
            new one is complete.
        top: So many heads are numbered in the grid and listed in a table, and so many edges of
            each prompt in another.
        examples: Which examples' prompts and maps. Default: all of them.
        sign: `"descent"` shows −R, where gradient descent moves attention; `"gradient"` shows R.
        title: Heading. Default: names the model.
        command: The command that made the run, to be told at the end.
        traces: Paths from `ra_lens.paths` to show, a tab each.
        sections: More parts, in plain text, put before the end.
        patched: What each example predicts before and after a patch, from `patched_predictions`.
        max_tokens: Of a longer prompt the maps show the last so many tokens.
        max_megabytes: So much of the file is for maps. Where all heads' take more, those with the
            largest norms have theirs, and the page says how many.

    Returns:
        The file written.

    Raises:
        BadInput: the path cannot be written or holds something else than a page, there is no such
            example, an option below 1, or `patched` of another number of prompts.
        NotStored: the maps were not kept.
    """
    check_output(path, REPORT)
    view = read_view(
        ra,
        examples=examples,
        sign=sign,
        top=top,
        max_tokens=max_tokens,
        max_megabytes=max_megabytes,
    )
    if patched and len(patched) != len(view.examples):
        raise BadInput(
            f"found patched predictions of {len(patched)} prompts for a report on "
            f"{len(view.examples)}. Give one per prompt shown."
        )
    in_base64 = int(3 / 4 * view.max_bytes)
    shown = choose(ra, view.examples, max_tokens=view.max_tokens, max_bytes=in_base64)
    spaces = latent_spaces(ra, shown, view.top)
    body = [
        facts(ra.model_facts()),
        explorer(
            ra,
            shown,
            sign=sign,
            top=view.top,
            patched=patched,
            flow=True,
            latent=spaces,
            note=_left_out(shown),
        ),
        _top_heads(ra, shown, view.top),
        *([_paths(traces)] if traces else []),
        *sections,
        Section("How to read the maps", how_to_read(sign)),
        how_it_was_made(command),
    ]
    heading = title or heading_of(ra)
    names = ["explorer", *["latent"] * bool(spaces)]
    styles, scripts = (
        [resource("ra_lens.report", f"{name}.{end}") for name in names] for end in ("css", "js")
    )
    return write_whole(path, page(heading, body, styles=styles, scripts=scripts), REPORT)


def traces_of_run(ra: RACache, model: nn.Module, prompt: PromptInput) -> list[TraceResult]:
    """Trace a run of one prompt for its report: by what heads write, and by the gradient.

    Skips what cannot be traced; if nothing can be, raises why.
    """
    found: list[TraceResult] = []
    reason: RALensError | None = None
    forward: tuple[Follow, ...] = ("value_norm", "pattern")
    for follow in forward:
        try:
            found.append(trace_layers(model, prompt, layers=ra.layers, follow=follow))
            break
        except RALensError as error:  # norms not shown, or one token, where nothing moves
            reason = error
    answer = 0 if ra.info.answer_lengths is None else ra.info.answer_lengths[0]
    last = len((ra.info.str_tokens or [()])[0]) - 1 - answer
    try:
        found.append(trace_layers(ra, follow="abs", target_pos=last))
    except RALensError as error:
        reason = error
    if reason is not None and not found:
        raise reason
    return found


def _left_out(shown: Shown) -> str:
    if not shown.cut:
        return ""
    return (
        f"This file holds the maps of the {len(shown.mapped)} heads with the largest norms; the "
        f"other {shown.cut} are shown by their norms only."
    )


def _top_heads(ra: RACache, shown: Shown, top: int) -> Section:
    total = sum(score.score for score in shown.heads) or 1.0
    rows: list[tuple[str, ...]] = []
    for rank, score in enumerate(shown.heads[:top], start=1):
        maps = head_of_example(ra, score, example=shown.examples[0], max_tokens=shown.max_tokens)
        moved = "nothing"
        for cell in maps.strongest(1):
            query, key = label(maps.query_token(cell), 24), label(maps.key_token(cell), 24)
            moved = f"{query} ({cell.query}) → {key} ({cell.key}): {cell.moves}"
        share = f"{score.score / total:.1%}"
        rows.append((str(rank), score.label, f"{score.score:.4g}", share, moved))
    columns = ("Rank", "Head", "‖R‖", "Share of all heads", "Strongest entry: from → to")
    notes: tuple[str, ...] = ()
    if ra.batch_size > 1:
        of = " of the first prompt" if len(shown.examples) > 1 else ""
        notes = (f"Norms are means over {ra.batch_size} prompts; the entries are those{of} shown.",)
    return Section("Top heads", table=Table(columns, tuple(rows)), notes=notes)


def _paths(traces: Sequence[TraceResult]) -> Section:
    text = (
        "Traced backwards, from the token after which the answer is read to where what it knows "
        "came from. Scores are sums of log weights: closer to 0, more weight."
    )
    return Section("Paths to the last token", (text,), traces=tuple(traces))
