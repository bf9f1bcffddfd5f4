"""What `ra-lens trace` does, and the traces that a report shows; imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import typer
from rich.console import Console
from rich.text import Text
from torch import nn

from ra_lens.cache import RACache
from ra_lens.cli.quiet import offline, quiet
from ra_lens.cli.reading import check_device, hints, read_text
from ra_lens.errors import BadInput, RALensError
from ra_lens.files import PAGE, check_output, is_folder
from ra_lens.model import ModelKind
from ra_lens.paths import TraceResult, trace_layers, trace_paths
from ra_lens.paths.page import MOST_PATHS
from ra_lens.paths.result import Follow
from ra_lens.paths.trace import read_agg
from ra_lens.prompts import PromptInput

_OF_ONE_LAYER = {
    "search": "exact",
    "top_k": None,
    "min_attn": 0.0,
    "agg_heads": "mean",
    "length_norm": "none",
}


@dataclass(frozen=True)
class Options:
    """Options of `ra-lens trace`, as typed."""

    prompt: str
    model: str
    target_pos: int
    layer: str
    follow: Follow | None
    target: str | None
    top: int
    search: Literal["exact", "beam"]
    top_k: int | None
    min_attn: float
    agg_heads: str
    length_norm: str
    residual: float | None
    escapes: bool
    kind: ModelKind | None
    device: str | None
    as_json: bool
    output: Path | None
    debug: bool


def run_trace(options: Options) -> None:
    """`ra-lens trace`."""
    from ra_lens.cli import show
    from ra_lens.cli.commands import DEMO, load, warn, warn_of_unknown_words

    if options.model == DEMO or is_folder(options.model):
        offline()
    prompt = read_text(options.prompt, escapes=options.escapes)
    target = options.target
    target = None if target is None else read_text(target, escapes=options.escapes)
    how = _how(options)
    check_device(options.device)
    if options.output is not None:
        check_output(options.output, PAGE)
    if options.top > MOST_PATHS:
        warn(
            "note",
            f"found --top {options.top}; these are the {MOST_PATHS} best paths, as many as a page "
            "can show. In Python, top_beam of trace_paths and trace_layers gives more.",
        )
    for hint in hints(prompt, target, escapes=options.escapes):
        warn("note", hint)
    model = load(options.model, options.kind, options.device, debug=options.debug)
    warn_of_unknown_words(model, prompt)
    with quiet(debug=options.debug):
        function = trace_layers if options.layer == "all" else trace_paths
        found = function(
            model,
            prompt,
            target_pos=options.target_pos,
            target=target,
            top_beam=min(options.top, MOST_PATHS),
            **how,
        )
    written = None if options.output is None else found.save_html(options.output)
    if options.as_json:
        show.print_line(found.to_json())
        return
    _tell(found)
    if written is not None:
        show.print_line(f"Paths: {written}")


def _how(options: Options) -> dict[str, Any]:
    """Options of `trace_layers`, or those of `trace_paths`."""
    if options.layer == "all":
        for name, default in _OF_ONE_LAYER.items():
            if getattr(options, name) != default:
                flag = name.replace("_", "-")
                raise BadInput(f"found --{flag}, which is for one layer. Add --layer -1, say.")
        return {"follow": options.follow or "value_norm", "residual": options.residual}
    if options.residual is not None:
        raise BadInput("found --residual with one layer; it is for --layer all.")
    try:
        layer = int(options.layer)
    except ValueError:
        raise BadInput(f"found --layer {options.layer}; give a number or all.") from None
    agg: Any = options.agg_heads
    how = {name: getattr(options, name) for name in _OF_ONE_LAYER}
    how["agg_heads"] = int(agg) if agg.lstrip("-").isdigit() else agg
    try:
        read_agg(how["agg_heads"])
    except BadInput:
        raise BadInput(
            f"found --agg-heads {agg}; give mean, max, the index of a head, or a head: L2H3."
        ) from None
    if options.follow == "value_norm":
        raise BadInput("found --follow value_norm with one layer; it is for --layer all.")
    return {**how, "layer": layer, "follow": options.follow or "pattern"}


def _tell(found: TraceResult) -> None:
    console = Console(highlight=False, markup=False)
    where = "all layers" if found.is_layered else f"layer {found.layer}"
    first = f"Paths to position {found.target_pos} of {found.seq_len}, {where}, {found.follow}"
    console.print(Text(first, style="bold"))
    for i, text in enumerate(found.paths_text, start=1):
        console.print(Text(f"{i:>3}  {text}"))
    if found.is_layered:
        labels = ", ".join(f"L{layer}H{head}" for layer, head in found.heads(len(found.beams)))
        console.print(Text(f"Heads on these paths: {labels}"))


def traces_of_run(
    ra: RACache, model: nn.Module, prompt: PromptInput, *, debug: bool
) -> list[TraceResult]:
    """Traces that the report of a run shows: by norm of what is written, and by the gradient.

    What cannot be traced is left out, and said on standard error where that is everything.
    """
    found: list[TraceResult] = []
    reason = ""
    layers = ra.layers
    with quiet(debug=debug):
        for follow in ("value_norm", "pattern"):
            try:
                one = trace_layers(model, prompt, layers=layers, follow=cast(Follow, follow))
            except RALensError as error:  # norms not shown, or one token, where nothing moves
                reason = str(error)
                continue
            found.append(one)
            break
        try:
            last = len((ra.info.str_tokens or [()])[0]) - 1 - _answer(ra)
            found.append(trace_layers(ra, follow="abs", target_pos=last))
        except RALensError as error:
            reason = str(error)
    if not found:
        typer.echo(f"note: the report shows no paths: {reason}", err=True)
    return found


def _answer(ra: RACache) -> int:
    return 0 if ra.info.answer_lengths is None else ra.info.answer_lengths[0]
