"""`ra-lens run`, `demo`, `check` and `trace`.

What a command computes with is imported in its body, so that `--help` answers at once.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from inspect import signature
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ra_lens.cli import options as opt
from ra_lens.errors import BadInput, RALensError, UnsupportedModel
from ra_lens.files import PAGE, REPORT, check_output

if TYPE_CHECKING:
    from torch import nn

    from ra_lens.cache import RACache
    from ra_lens.paths import TraceResult
    from ra_lens.prompts import PromptInput
    from ra_lens.report import PatchedPrompt, Section


def run(
    prompt: Annotated[
        list[str],
        typer.Option(
            "--prompt", "-p", help="Text to run on; - reads standard input. Several: -p … -p …."
        ),
    ],
    model: opt.ModelOption = opt.DEMO,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            help="What the loss asks for, leading space included: ' Paris'; one for all prompts or "
            "one for each. Default: the model's own top prediction.",
        ),
    ] = None,
    escapes: opt.EscapesOption = False,
    top: Annotated[int, typer.Option(min=1, help="Number of heads to list.")] = 10,
    layers: Annotated[
        str | None, typer.Option(help="Only these layers, such as 0,5-8,-1. Default: all.")
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="What each prompt's own maps are multiplied by and added to its attention: best, "
            "which costs a forward pass at 32 scales; a number; or none, for no patch."
        ),
    ] = "best",
    at: Annotated[
        opt.Where, typer.Option(help="What maps are added to: the pattern, or the scores.")
    ] = "pattern",
    bos: opt.BosOption = None,
    no_bos: opt.NoBosOption = False,
    kind: opt.KindOption = None,
    device: opt.DeviceOption = None,
    allow_pickle: opt.PickleOption = False,
    as_json: opt.JsonOption = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also write a report: one self-contained HTML file."),
    ] = None,
    debug: opt.DebugOption = False,
) -> None:
    """Run prompts: the loss, the heads its gradient reaches, where it moves them, and a patch."""
    from ra_lens.cli import session
    from ra_lens.memory import offering
    from ra_lens.model import as_lens
    from ra_lens.prompts import read_prompts
    from ra_lens.run import run_with_ra

    session.prepare(model, device)
    prompts, targets = _read(prompt, target or [], escapes=escapes)
    chosen, factor = session.read_layers(layers), _read_scale(scale)
    front = session.read_bos(bos, no_bos=no_bos)
    if output is not None:
        check_output(output, REPORT)
    slips = [
        hint
        for text, one in zip(prompts, cycle(targets or [None]), strict=False)
        for hint in session.hints(text, one, escapes=escapes)
    ]
    for hint in dict.fromkeys(slips):
        session.warn("note", hint)
    loaded = session.load(model, kind, device, debug=debug, allow_pickle=allow_pickle)
    session.warn_of_unknown_words(loaded, "\n".join(prompts))
    wanted = None if not targets else targets[0] if len(targets) == 1 else targets
    with session.quiet(debug=debug):
        read = read_prompts(as_lens(loaded), prompts, prepend_bos=front)
        with offering("layers", typed=True):
            _, ra = run_with_ra(loaded, read, target=wanted, layers=chosen, progress=False)
    ra = ra.to("cpu")
    patched = _patched(loaded, read, ra, target=wanted, scale=factor, at=at, debug=debug)
    written = None
    if output is not None:
        given = [("--model", model)]
        given += [("--prompt", text) for text in prompts] + [("--target", text) for text in targets]
        chosen_ones = (("--layers", layers), ("--bos", bos), ("--kind", kind))
        given += [(name, value) for name, value in chosen_ones if value]
        given += [("--scale", scale)] * (scale != "best") + [("--at", at)] * (at != "pattern")
        words = [word for pair in given for word in pair] + ["--no-bos"] * no_bos
        command = shlex.join(["ra-lens", "run", *words])
        written = _report(loaded, read, ra, output, patched=patched, command=command, debug=debug)
    _tell(ra, loaded, prompts, top=top, patched=patched, written=written, as_json=as_json)


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write the report.")
    ] = Path("ra_report.html"),
    kind: opt.KindOption = None,
    device: opt.DeviceOption = None,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Show it all on the embedded model, offline: maps of a prompt, and a patched prediction."""
    from ra_lens.cli import session, show
    from ra_lens.report import predictions
    from ra_lens.run import run_with_ra

    session.prepare(opt.DEMO, device)
    check_output(output, REPORT)
    model = session.load(opt.DEMO, kind, device, debug=debug)
    with session.quiet(debug=debug):
        prompt = predictions.demo_prompt(model)
        _, ra = run_with_ra(model, prompt.text, target=prompt.answer, progress=False)
        try:
            facts = predictions.patched_prediction(model)
        except UnsupportedModel:  # `_patched` meets the same and prints it
            facts = None
    ra = ra.to("cpu")
    patched = _patched(model, prompt.text, ra, target=prompt.answer, debug=debug)
    sections = [predictions.why_this_prompt()]
    sections += [] if facts is None else [predictions.as_section(facts)]
    written = _report(
        model,
        prompt.text,
        ra,
        output,
        patched=patched,
        command="ra-lens demo",
        sections=sections,
        debug=debug,
    )
    extra: dict[str, object] = {} if facts is None else {"patched": facts}
    _tell(
        ra,
        model,
        [prompt.text],
        top=6,
        patched=patched,
        written=written,
        as_json=as_json,
        extra=extra,
    )
    for section in [] if as_json else sections:
        show.print_section(section)


def check(
    model: opt.ModelOption = opt.DEMO,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Text to check with. Default: a few of its tokens."),
    ] = None,
    escapes: opt.EscapesOption = False,
    bos: opt.BosOption = None,
    no_bos: opt.NoBosOption = False,
    kind: opt.KindOption = None,
    device: opt.DeviceOption = None,
    allow_pickle: opt.PickleOption = False,
    as_json: opt.JsonOption = False,
    debug: opt.DebugOption = False,
) -> None:
    """Find out what ra_lens can do with a model: layers, hooks, scales, patches; exit 3: beware."""
    from ra_lens.check import check_model
    from ra_lens.cli import session, show

    session.prepare(model, device)
    front = session.read_bos(bos, no_bos=no_bos)
    if prompt is None and front is not None:
        raise BadInput(
            f"found {'--no-bos' if no_bos else '--bos'} without a text for it. Add --prompt 'some "
            "text'; what stands in front by default is told without."
        )
    text = None if prompt is None else session.read_text(prompt, escapes=escapes)
    loaded = session.load(model, kind, device, debug=debug, allow_pickle=allow_pickle)
    with session.quiet(debug=debug):
        report = check_model(loaded, prompt=text, prepend_bos=front)
    if as_json:
        made = {name: version(name) for name in ("ra-lens", "transformer-lens", "transformers")}
        show.print_json({**asdict(report), "ok": report.ok, "versions": made})
    else:
        typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(3)


def trace(
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to run on; - reads standard input.")
    ],
    model: opt.ModelOption = opt.DEMO,
    target_pos: Annotated[
        int, typer.Option(help="Position to begin at; negative: from the end.")
    ] = -1,
    layer: Annotated[
        str, typer.Option(help="One layer (negative: from the end), or all: through all layers.")
    ] = "all",
    follow: Annotated[
        opt.Follow | None,
        typer.Option(
            help="pattern: attention; value_norm: times the norm of what heads write; more, less, "
            "abs: where descent wants more or less attention, or both; knockout: edges that the "
            "loss would miss. "
            "Default: value_norm through all layers, pattern in one."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "-t", help="For more, less, abs and knockout: what the loss asks for."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of paths.")] = 5,
    search: Annotated[
        Literal["exact", "beam"],
        typer.Option(help="exact: the best there are; beam: what beam search finds."),
    ] = "exact",
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Only so many steps from each token. One layer.")
    ] = None,
    min_attn: Annotated[
        float, typer.Option(help="Only steps of at least this weight. One layer.")
    ] = 0.0,
    agg_heads: Annotated[
        str, typer.Option(help="Heads by mean, by max, or one: 3 or L2H3. One layer.")
    ] = "mean",
    length_norm: Annotated[
        str, typer.Option(help="none, avg_logprob, sqrt or pow:0.7. One layer.")
    ] = "none",
    sinks: Annotated[
        bool,
        typer.Option(
            "--sinks", help="Also go to attention sinks, where heads look that have nothing to say."
        ),
    ] = False,
    residual: Annotated[
        float | None,
        typer.Option(help="Share of the residual connection. All layers. Default: measured."),
    ] = None,
    escapes: opt.EscapesOption = False,
    bos: opt.BosOption = None,
    no_bos: opt.NoBosOption = False,
    kind: opt.KindOption = None,
    device: opt.DeviceOption = None,
    allow_pickle: opt.PickleOption = False,
    as_json: opt.JsonOption = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also draw the paths: one self-contained HTML file."),
    ] = None,
    debug: opt.DebugOption = False,
) -> None:
    """Trace where a token got what it has: the best paths of attention, backwards."""
    from ra_lens.cli import session, show
    from ra_lens.memory import offering
    from ra_lens.paths import trace_layers, trace_paths
    from ra_lens.paths.page import MOST_PATHS

    session.prepare(model, device)
    prompt = session.read_text(prompt, escapes=escapes)
    target = None if target is None else session.read_text(target, escapes=escapes)
    of_one_layer: dict[str, Any] = {
        "search": search,
        "top_k": top_k,
        "min_attn": min_attn,
        "agg_heads": agg_heads,
        "length_norm": length_norm,
    }
    front = session.read_bos(bos, no_bos=no_bos)
    trace_function = trace_layers if layer == "all" else trace_paths
    how = _how(layer, of_one_layer, follow=follow, residual=residual)
    if output is not None:
        check_output(output, PAGE)
    if top > MOST_PATHS:
        session.warn(
            "note",
            f"found --top {top}; these are the {MOST_PATHS} best paths, as many as a page can "
            "show. In Python, top_beam of trace_paths and trace_layers gives more.",
        )
    for hint in session.hints(prompt, target, escapes=escapes):
        session.warn("note", hint)
    loaded = session.load(model, kind, device, debug=debug, allow_pickle=allow_pickle)
    session.warn_of_unknown_words(loaded, prompt)
    how |= {"target_pos": target_pos, "target": target, "top_beam": min(top, MOST_PATHS)}
    how |= {"prepend_bos": front, "sinks": sinks}
    with session.quiet(debug=debug), offering():
        found = trace_function(loaded, prompt, **how)
    written = None if output is None else found.save_html(output)
    if as_json:
        typer.echo(found.to_json())
        return
    show.print_paths(found)
    if written is not None:
        typer.echo(f"Paths: {written}")


def _read(
    prompts: Sequence[str], targets: Sequence[str], *, escapes: bool
) -> tuple[list[str], list[str]]:
    """Read the prompts and targets of a run; at most one of them is standard input."""
    from ra_lens.cli.session import read_text

    texts = [*prompts, *targets]
    if texts.count("-") > 1:
        raise BadInput("found - more than once; standard input can be read only once.")
    n, given = len(prompts), len(targets)
    if given not in (0, 1, n):
        raise BadInput(f"found {given} targets for {n} prompts. Give one for all, or one for each.")
    read = [read_text(text, escapes=escapes) for text in texts]
    return read[:n], read[n:]


def _read_scale(text: str) -> float | Literal["best"] | None:
    """Read `--scale`; None for no patch."""
    if text == "best":
        return "best"
    if text == "none":
        return None
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise BadInput(f"found --scale {text}; give best, a number such as -30, or none.")
    return scale


def _patched(
    model: nn.Module,
    prompts: PromptInput,
    ra: RACache,
    *,
    target: str | list[str] | None,
    scale: float | Literal["best"] | None = "best",
    at: opt.Where = "pattern",
    debug: bool,
) -> tuple[PatchedPrompt, ...]:
    """Patch each prompt with its own maps; print to standard error where that cannot be."""
    from ra_lens.cli.session import quiet, warn
    from ra_lens.report import patched_predictions

    if scale is None:
        return ()
    try:
        with quiet(debug=debug):
            return patched_predictions(model, prompts, ra, target=target, scale=scale, at=at)
    except UnsupportedModel as error:  # its patterns can be read but not edited
        warn("warning", f"no patched prediction: {error}")
        return ()


def _report(
    model: nn.Module,
    prompts: PromptInput,
    ra: RACache,
    path: Path,
    *,
    patched: Sequence[PatchedPrompt],
    command: str,
    sections: Sequence[Section] = (),
    debug: bool,
) -> Path:
    """Write the report of a run; print to standard error what it has to leave out."""
    from ra_lens.cli.session import quiet, warn
    from ra_lens.report import write_report
    from ra_lens.report.write import traces_of_run

    traces: list[TraceResult] = []
    with quiet(debug=debug):
        try:
            if ra.batch_size == 1:  # paths are of one prompt
                traces = traces_of_run(ra, model, prompts)
        except RALensError as error:
            warn("note", f"the report shows no paths: {error}")
    return write_report(
        ra, path, command=command, sections=sections, patched=patched, traces=traces
    )


def _tell(
    ra: RACache,
    model: nn.Module,
    prompts: Sequence[str],
    *,
    top: int,
    patched: Sequence[PatchedPrompt],
    written: Path | None,
    as_json: bool,
    extra: dict[str, Any] | None = None,
) -> None:
    """Print a run."""
    from ra_lens.cli import show

    if as_json:
        facts = {**show.as_json(ra, model, prompts, top=top, patched=patched), **(extra or {})}
        show.print_json({**facts, "report": None if written is None else str(written)})
        return
    show.print_run(ra, model, top=top, patched=patched)
    if written is not None:
        typer.echo(f"Report: {written}")


def _how(
    layer: str, of_one_layer: dict[str, Any], *, follow: opt.Follow | None, residual: float | None
) -> dict[str, Any]:
    """Give the options of `trace_layers`, or those of `trace_paths`."""
    from ra_lens.paths.trace import read_agg

    if layer == "all":
        for name, value in of_one_layer.items():
            if value != signature(trace).parameters[name].default:
                flag = name.replace("_", "-")
                raise BadInput(f"found --{flag}, which is for one layer. Add --layer -1, say.")
        return {"follow": follow or "value_norm", "residual": residual}
    if residual is not None:
        raise BadInput("found --residual with one layer; it is for --layer all.")
    try:
        index = int(layer)
    except ValueError:
        raise BadInput(f"found --layer {layer}; give a number or all.") from None
    agg = of_one_layer["agg_heads"]
    head = int(agg) if agg.lstrip("-").isdigit() else agg
    try:
        read_agg(head)
    except BadInput:
        raise BadInput(
            f"found --agg-heads {agg}; give mean, max, the index of a head, or a head: L2H3."
        ) from None
    if follow == "value_norm":
        raise BadInput("found --follow value_norm with one layer; it is for --layer all.")
    return {**of_one_layer, "agg_heads": head, "layer": index, "follow": follow or "pattern"}
