"""`write_report`: a run as one HTML file, for one or several prompts.

Prompt and target, the grid of heads, the two maps of every head at a click, the leading heads, what
a patch does to the prediction, and how it was made. The file asks the network for nothing. Its size
is about 5.3 bytes per cell that a query can look at, per head and prompt: 1.7 MB for GPT-2 small on
64 tokens, 14 MB for GPT-2 XL.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from torch import nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, RALensError
from ra_lens.files import REPORT, check_output, write_whole
from ra_lens.head_maps import head_of_example, read_example
from ra_lens.head_names import HeadScore
from ra_lens.numbers import Real, Whole, Wholes, real, whole, wholes
from ra_lens.paths import TraceResult, trace_layers
from ra_lens.paths.result import Follow
from ra_lens.prompts import PromptInput
from ra_lens.report import page
from ra_lens.report.explorer import Shown, choose, explorer
from ra_lens.report.page import Section, Table
from ra_lens.report.predictions import PatchedPrompt
from ra_lens.report.run_facts import model_facts
from ra_lens.text import label

Sign = Literal["descent", "gradient"]

_READ = {
    "descent": (
        "The maps show −R: where one step of gradient descent on this loss would move attention. "
        "Red cells would get more attention, blue ones less."
    ),
    "gradient": (
        "The maps show R, the gradient itself: descent would lower attention at red cells and "
        "raise it at blue ones."
    ),
}
_ALWAYS = (
    "Rows are the tokens that attend (queries), columns the tokens attended to (keys). The entries "
    "of a row of R add up to 0: attention is moved, not made. R is 0 wherever A is."
)


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
        top: So many heads are numbered in the grid and listed in a table.
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
    every = range(ra.batch_size)
    asked = every if examples is None else wholes("examples", examples, none_at_all=True)
    chosen = [read_example(ra, example) for example in asked]
    if not chosen:
        raise BadInput("found examples=[]; give at least one, or leave it out for all.")
    if sign not in _READ:
        raise BadInput(f"found sign={sign!r}; give 'descent' (shows −R) or 'gradient' (shows R).")
    top, max_tokens = whole("top", top), whole("max_tokens", max_tokens)
    max_megabytes = real("max_megabytes", max_megabytes)
    if top < 1:
        raise BadInput(f"found top={top}; give the number of heads to show, at least 1.")
    if max_tokens < 1 or max_megabytes <= 0:
        raise BadInput(
            f"found max_tokens={max_tokens}, max_megabytes={max_megabytes}; give positive numbers."
        )
    if patched and len(patched) != len(chosen):
        raise BadInput(
            f"found patched predictions of {len(patched)} prompts for a report on {len(chosen)}. "
            "Give one per prompt shown."
        )
    in_base64 = 3 / 4 * max_megabytes * 1e6
    shown = choose(ra, chosen, max_tokens=max_tokens, max_bytes=int(in_base64))
    body = [
        page.facts(model_facts(ra)),
        explorer(ra, shown, sign=sign, top=top, patched=patched),
        _table(ra, shown.heads[:top], shown),
        *map(page.section, [*_paths(traces), *sections]),
        page.section(Section("How to read the maps", (_READ[sign], _ALWAYS))),
        page.section(_made(command)),
    ]
    heading = title or f"Reversed Attention of {ra.info.model_name}"
    return write_whole(path, page.page(heading, body, script=page.resource("report.js")), REPORT)


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


def _table(ra: RACache, heads: Sequence[HeadScore], shown: Shown) -> str:
    total = sum(score.score for score in ra.top_heads(len(ra.layers) * ra.n_heads)) or 1.0
    rows: list[tuple[str, ...]] = []
    for rank, score in enumerate(heads, start=1):
        maps = head_of_example(ra, score, example=shown.examples[0], max_tokens=shown.max_tokens)
        cells = maps.strongest(1)
        moved = "nothing"
        if cells:
            cell = cells[0]
            query, key = label(maps.query_token(cell), 24), label(maps.key_token(cell), 24)
            moved = f"{query} ({cell.query}) → {key} ({cell.key}): {cell.moves}"
        share = f"{score.score / total:.1%}"
        rows.append((str(rank), score.label, f"{score.score:.4g}", share, moved))
    columns = ("Rank", "Head", "‖R‖", "Share of all heads", "Strongest entry: from → to")
    notes: tuple[str, ...] = ()
    if ra.batch_size > 1:
        of = " of the first prompt" if len(shown.examples) > 1 else ""
        notes = (f"Norms are means over {ra.batch_size} prompts; the entries are those{of} shown.",)
    return page.section(Section("Top heads", table=Table(columns, tuple(rows)), notes=notes))


def _paths(traces: Sequence[TraceResult]) -> list[Section]:
    if not traces:
        return []
    return [
        Section(
            "Paths to the last token",
            (
                "Traced backwards, from the token after which the answer is read to where what it "
                "knows came from. Scores are sums of log weights: closer to 0, more weight.",
            ),
            traces=tuple(traces),
        )
    ]


def _made(command: str | None) -> Section:
    rows = [] if command is None else [("Command", command)]
    for name in ("ra-lens", "transformer-lens", "torch"):
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "unknown version"))
    rows.append(("Python", platform.python_version()))
    return Section("How this was made", table=Table(("", ""), tuple(rows)))
