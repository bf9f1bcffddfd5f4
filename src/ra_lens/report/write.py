"""`write_report`: a run as one HTML file.

Prompt and target, loss, the grid of heads, the leading heads with their maps, and how it was made.
The file holds plotly.js itself (about 5 MB) and asks the network for nothing.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ra_lens.cache import HeadScore, RACache
from ra_lens.errors import BadInput
from ra_lens.figures import Sign, head_grid, head_map
from ra_lens.figures.example import check_example, head_of_example
from ra_lens.figures.maps import largest
from ra_lens.figures.tokens import shorten, visible
from ra_lens.files import check_output, write_whole
from ra_lens.paths import TraceResult
from ra_lens.report import page
from ra_lens.report.page import Section, Table

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
_LOSSES = {
    "answer_nll": "−log p of the target",
    "top_prediction": "−log p of the target",
    "sequence_nll": "mean of −log p over the target's tokens",
    "logit_diff": "logit of the wrong answer − logit of the right one",
    "custom": "a metric of the user's own",
}
_MAX_TOKENS = 128


def write_report(
    ra: RACache,
    path: str | Path,
    *,
    top: int = 6,
    example: int = 0,
    sign: Sign = "descent",
    title: str | None = None,
    command: str | None = None,
    traces: Sequence[TraceResult] = (),
    sections: Sequence[Section] = (),
) -> Path:
    """Write what a cache holds as one self-contained HTML file.

    Args:
        ra: A cache from `run_with_ra` with its maps.
        path: The file; replaced only when the new one is complete.
        top: Number of heads whose maps are shown.
        example: Which example's prompt and maps; the grid averages over all.
        sign: `"descent"` shows −R, where gradient descent moves attention; `"gradient"` shows R.
        title: Heading. Default: names the model.
        command: The command that made the run, to be told at the end.
        traces: Paths from `ra_lens.paths` to show, a tab each.
        sections: More parts, in plain text, put before the end.

    Returns:
        The file written.

    Raises:
        BadInput: the path cannot be written, there is no such example, or `top` is below 1.
        NotStored: the maps were not kept.
    """
    destination = check_output(path)
    check_example(ra, example)
    if top < 1:
        raise BadInput(f"found top={top}; give the number of heads to show, at least 1.")
    heads = ra.top_heads(top)
    parts = [_grid(ra, top=max(top, 10)), _table(ra, heads, example)]
    parts += [_maps(ra, heads, example, sign), *_paths(traces), *sections, _made(command)]
    body = [page.prompt(prompt_tokens(ra, example)), page.facts(run_facts(ra, example))]
    body += [page.section(part) for part in parts]
    return write_whole(
        destination,
        page.page(title or f"Reversed Attention of {ra.info.model_name}", body),
    )


def prompt_tokens(ra: RACache, example: int) -> list[tuple[str, str]]:
    """Tokens of an example as shown, each `''`, `special` or `target`; the target comes last."""
    info = ra.info
    tokens = [] if info.str_tokens is None else list(info.str_tokens[example])
    target = None if info.targets is None else info.targets[example]
    answer = 0 if info.answer_lengths is None else info.answer_lengths[example]
    shown = [(visible(token), "") for token in tokens[: len(tokens) - answer]]
    if shown and info.bos_prepended:
        shown[0] = (shown[0][0], "special")
    return shown if target is None else [*shown, (visible(target), "target")]


def run_facts(ra: RACache, example: int) -> list[tuple[str, str]]:
    """What was run, on what, and what came out, as names and values."""
    info = ra.info
    first, last = ra.layers[0], ra.layers[-1]
    whole = len(ra.layers) > 1 and ra.layers == list(range(first, last + 1))
    layers = f"{first} to {last}" if whole else ", ".join(map(str, ra.layers))
    rows = [
        ("Model", info.model_name),
        ("Layers", f"{layers}; {ra.n_heads} heads each"),
    ]
    if info.str_tokens is not None:
        bos = ", BOS prepended" if info.bos_prepended else ""
        rows.append(("Tokens", f"{len(info.str_tokens[example])}{bos}"))
    if info.targets is not None:
        own = " (the model's own top prediction; no target was given)"
        target = f"“{visible(info.targets[example])}”"
        rows.append(("Target", target + own * info.target_is_top_prediction))
    if ra.loss.numel():
        losses = ra.loss.detach().flatten().tolist()
        loss = losses[example] if len(losses) > example else losses[0]
        known = info.objective in ("answer_nll", "top_prediction")
        chance = f"; p(target) = {math.exp(-loss):.3g}" if known else ""
        what = _LOSSES.get(info.objective, info.objective)
        rows.append(("Loss", f"{loss:.4f}, {what}{chance}"))
    if ra.batch_size > 1:
        rows.append(("Examples", f"{ra.batch_size}; this page shows number {example}"))
    return rows


def _grid(ra: RACache, *, top: int) -> Section:
    over = f", averaged over {ra.batch_size} examples" if ra.batch_size > 1 else ""
    return Section(
        "Which heads the gradient reaches",
        (
            f"Frobenius norm of each head's Reversed Attention{over}. "
            f"The {min(top, len(ra.layers) * ra.n_heads)} largest are framed and numbered.",
        ),
        figures=(("", (head_grid(ra, top=top),)),),
    )


def _table(ra: RACache, heads: Sequence[HeadScore], example: int) -> Section:
    total = sum(score.score for score in ra.top_heads(len(ra.layers) * ra.n_heads)) or 1.0
    rows: list[tuple[str, ...]] = []
    for rank, score in enumerate(heads, start=1):
        maps = head_of_example(ra, score, example=example)
        cells = maps.strongest(1)
        moved = "nothing"
        if cells:
            names = [shorten(visible(maps.tokens[i]), 24) for i in (cells[0].query, cells[0].key)]
            moved = f"{names[0]} ({cells[0].query}) → {names[1]} ({cells[0].key}): {cells[0].moves}"
        share = f"{score.score / total:.1%}"
        rows.append((str(rank), score.label, f"{score.score:.4g}", share, moved))
    columns = ("Rank", "Head", "‖R‖", "Share of all heads", "Strongest entry: from → to")
    return Section("Top heads", table=Table(columns, tuple(rows)))


def _maps(ra: RACache, heads: Sequence[HeadScore], example: int, sign: Sign) -> Section:
    limit = largest(ra, heads, example=example, max_tokens=_MAX_TOKENS)
    figures = tuple(
        (
            f"{score.label}: attention, and where descent moves it",
            (
                head_map(ra, score, kind="pattern", example=example, max_tokens=_MAX_TOKENS),
                head_map(
                    ra, score, example=example, sign=sign, limit=limit, max_tokens=_MAX_TOKENS
                ),
            ),
        )
        for score in heads
    )
    length = 0 if ra.info.str_tokens is None else len(ra.info.str_tokens[example])
    cut = (f"The maps show the last {_MAX_TOKENS} of {length} tokens.",)
    return Section(
        "Maps of the top heads",
        (
            f"{_READ[sign]} Rows are the tokens that attend, columns the tokens attended to. "
            "Grey: a token cannot attend there. All heads share one colour scale.",
        ),
        figures=figures,
        notes=cut if length > _MAX_TOKENS else (),
    )


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
    for name in ("ra-lens", "transformer-lens", "torch", "plotly"):
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "unknown version"))
    rows.append(("Python", platform.python_version()))
    return Section("How this was made", table=Table(("", ""), tuple(rows)))
