"""What the commands do, in the order they do it; imports torch."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from torch import nn

from ra_lens.cache import RACache
from ra_lens.cli.quiet import offline, quiet
from ra_lens.cli.reading import check_device, hints, read_layers, read_text, unknown_words
from ra_lens.cli.tracing import traces_of_run
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.sites import ModelKind, as_lens

DEMO = "demo"


@dataclass(frozen=True)
class Options:
    """Options of `ra-lens run`, as typed."""

    prompt: str
    model: str = DEMO
    target: str | None = None
    escapes: bool = False
    top: int = 10
    layers: str | None = None
    kind: ModelKind | None = None
    device: str | None = None
    as_json: bool = False
    output: Path | None = None
    debug: bool = False

    def command(self, prompt: str, target: str | None) -> str:
        """The command that would give the same again."""
        words = ["ra-lens", "run", "--model", self.model, "--prompt", prompt]
        given = {"--target": target, "--layers": self.layers, "--kind": self.kind}
        for name, value in given.items():
            words += [] if value is None else [name, value]
        return shlex.join(words)


def run_prompt(options: Options) -> None:
    """`ra-lens run`."""
    if options.model == DEMO or Path(options.model).is_dir():
        offline()
    prompt = read_text(options.prompt, escapes=options.escapes)
    target = options.target
    target = None if target is None else read_text(target, escapes=options.escapes)
    layers = read_layers(options.layers)
    check_device(options.device)
    _check_output(options.output)
    for hint in hints(prompt, target, escapes=options.escapes):
        warn("note", hint)
    model = load(options.model, options.kind, options.device, debug=options.debug)
    _warn_of_unknown_words(model, prompt)
    with quiet(debug=options.debug):
        from ra_lens.run import run_with_ra

        _, ra = run_with_ra(model, prompt, target=target, layers=layers, progress=False)
    ra = ra.to("cpu")
    written = None
    if options.output is not None:
        from ra_lens.report import write_report

        written = write_report(
            ra,
            options.output,
            top=min(options.top, 6),
            command=options.command(prompt, target),
            traces=traces_of_run(ra, model, prompt, debug=options.debug),
        )
    _tell(ra, model, prompt, top=options.top, written=written, as_json=options.as_json)


def run_demo(
    *, output: Path, kind: ModelKind | None, device: str | None, as_json: bool, debug: bool
) -> None:
    """`ra-lens demo`."""
    offline()
    check_device(device)
    _check_output(output)
    model = load(DEMO, kind, device, debug=debug)
    from ra_lens.cli import show
    from ra_lens.demo import showcase
    from ra_lens.report import write_report
    from ra_lens.run import run_with_ra

    prompt = showcase.few_shot_prompt()
    patched, refusal = None, ""
    with quiet(debug=debug):
        _, ra = run_with_ra(model, prompt.text, target=prompt.answer, progress=False)
        try:
            patched = showcase.patched_prediction(model)
        except UnsupportedModel as error:  # a model whose patterns can be read but not edited
            refusal = str(error)
    ra = ra.to("cpu")
    sections = () if patched is None else (showcase.as_section(patched),)
    traces = traces_of_run(ra, model, prompt.text, debug=debug)
    written = write_report(ra, output, command="ra-lens demo", traces=traces, sections=sections)
    extra: dict[str, object] = {}
    if patched is not None:
        extra["patched"] = showcase.as_json(patched)
    _tell(ra, model, prompt.text, top=6, written=written, as_json=as_json, extra=extra)
    if patched is None:
        warn("warning", f"no patched prediction: {refusal}")
    elif not as_json:
        show.print_section(showcase.as_section(patched))


def load(
    name: str,
    kind: ModelKind | None,
    device: str | None,
    *,
    debug: bool,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Load the embedded model, a folder, or a model TransformerLens knows.

    Raises:
        BadInput: there is none of that name.
    """
    with quiet(debug=debug):
        if name == DEMO:
            from ra_lens.demo import load_demo_model

            return load_demo_model(kind=kind, device=device, dtype=dtype)
        from ra_lens.sites import load_model

        return load_model(name, kind=kind, device=device, dtype=dtype)


def _tell(
    ra: RACache,
    model: nn.Module,
    prompt: str,
    *,
    top: int,
    written: Path | None,
    as_json: bool,
    extra: dict[str, object] | None = None,
) -> None:
    from ra_lens.cli import show

    if as_json:
        facts = {**show.as_json(ra, model, prompt, top=top), **(extra or {})}
        facts["report"] = None if written is None else str(written)
        show.print_json(facts)
        return
    show.print_run(ra, model, top=top)
    if written is not None:
        show.print_line(f"Report: {written}")


def _check_output(path: Path | None) -> None:
    if path is None:
        return
    if str(path) == "-":
        raise BadInput("found -o -; a report is a file. Give a name such as report.html.")
    from ra_lens.files import check_output

    check_output(path)


def _warn_of_unknown_words(model: nn.Module, prompt: str) -> None:
    words = unknown_words(model, prompt)
    if words:
        named = ", ".join(map(repr, words[:8])) + (f" and {len(words) - 8} more" * (len(words) > 8))
        unknown = as_lens(model).tokenizer.unk_token
        it = "them" if len(words) > 1 else "it"
        warn("warning", f"the model does not know {named}; its tokenizer reads {it} as {unknown}.")


def warn(label: str, text: str) -> None:
    """Print a line on standard error."""
    typer.echo(f"{label}: {text}", err=True, color=sys.stderr.isatty())
