"""What the commands do, in the order they do it; imports torch."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer
from torch import nn

from ra_lens.cache import RACache
from ra_lens.cli.quiet import offline, quiet
from ra_lens.cli.reading import check_device, hints, read_layers, read_text
from ra_lens.cli.tracing import traces_of_run
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.files import REPORT, check_output, is_folder
from ra_lens.model import ModelKind, as_lens
from ra_lens.prompts import PromptInput, read_prompts

if TYPE_CHECKING:
    from ra_lens.report import PatchedPrompt

DEMO = "demo"


@dataclass(frozen=True)
class Options:
    """Options of `ra-lens run`, as typed."""

    prompts: tuple[str, ...]
    model: str = DEMO
    targets: tuple[str, ...] = ()
    escapes: bool = False
    top: int = 10
    layers: str | None = None
    kind: ModelKind | None = None
    device: str | None = None
    as_json: bool = False
    output: Path | None = None
    debug: bool = False

    def command(self, prompts: Sequence[str], targets: Sequence[str]) -> str:
        """The command that would give the same again."""
        words = ["ra-lens", "run", "--model", self.model]
        words += [word for prompt in prompts for word in ("--prompt", prompt)]
        words += [word for target in targets for word in ("--target", target)]
        given = {"--layers": self.layers, "--kind": self.kind}
        for name, value in given.items():
            words += [] if value is None else [name, value]
        return shlex.join(words)


def run_prompt(options: Options) -> None:
    """`ra-lens run`."""
    if options.model == DEMO or is_folder(options.model):
        offline()
    prompts, targets = _read(options)
    layers = read_layers(options.layers)
    check_device(options.device)
    if options.output is not None:
        check_output(options.output, REPORT)
    each = [None] * len(prompts) if not targets else targets * (len(prompts) // len(targets))
    slips = [
        hint
        for prompt, target in zip(prompts, each, strict=True)
        for hint in hints(prompt, target, escapes=options.escapes)
    ]
    for hint in dict.fromkeys(slips):
        warn("note", hint)
    model = load(options.model, options.kind, options.device, debug=options.debug)
    warn_of_unknown_words(model, "\n".join(prompts))
    target = None if not targets else targets[0] if len(targets) == 1 else targets
    with quiet(debug=options.debug):
        from ra_lens.run import run_with_ra

        read = read_prompts(as_lens(model), prompts)
        _, ra = run_with_ra(model, read, target=target, layers=layers, progress=False)
    ra = ra.to("cpu")
    written = None
    if options.output is not None:
        from ra_lens.report import write_report

        refusal, patched = None, ()
        with quiet(debug=options.debug):
            try:
                patched = _patched(model, read, ra, target)
            except UnsupportedModel as error:  # its patterns can be read but not edited
                refusal = str(error)
        command = options.command(prompts, targets)
        alone = len(prompts) == 1  # paths are of one prompt
        written = write_report(
            ra,
            options.output,
            command=command,
            patched=patched,
            traces=traces_of_run(ra, model, read, debug=options.debug) if alone else (),
        )
        if refusal is not None:
            warn("warning", f"no patched prediction: {refusal}")
    _tell(ra, model, prompts, top=options.top, written=written, as_json=options.as_json)


def _read(options: Options) -> tuple[list[str], list[str]]:
    """Read prompts and targets.

    Raises:
        BadInput: standard input is asked for twice, or another number of targets than prompts.
    """
    texts = [*options.prompts, *options.targets]
    if texts.count("-") > 1:
        raise BadInput("found - more than once; standard input can be read only once.")
    n, given = len(options.prompts), len(options.targets)
    if given not in (0, 1, n):
        raise BadInput(f"found {given} targets for {n} prompts. Give one for all, or one for each.")
    read = [read_text(text, escapes=options.escapes) for text in texts]
    return read[:n], read[n:]


def run_demo(
    *, output: Path, kind: ModelKind | None, device: str | None, as_json: bool, debug: bool
) -> None:
    """`ra-lens demo`."""
    offline()
    check_device(device)
    check_output(output, REPORT)
    model = load(DEMO, kind, device, debug=debug)
    from ra_lens.cli import show
    from ra_lens.report import predictions, write_report
    from ra_lens.run import run_with_ra

    prompt = predictions.few_shot_prompt()
    patched, refusal = None, ""
    with quiet(debug=debug):
        _, ra = run_with_ra(model, prompt.text, target=prompt.answer, progress=False)
        try:
            patched = predictions.patched_prediction(model)
        except UnsupportedModel as error:  # a model whose patterns can be read but not edited
            refusal = str(error)
    ra = ra.to("cpu")
    sections = () if patched is None else (predictions.as_section(patched),)
    with quiet(debug=debug):
        own = () if patched is None else _patched(model, prompt.text, ra, prompt.answer)
    written = write_report(
        ra,
        output,
        command="ra-lens demo",
        sections=sections,
        patched=own,
        traces=traces_of_run(ra, model, prompt.text, debug=debug),
    )
    extra: dict[str, object] = {}
    if patched is not None:
        extra["patched"] = patched
    _tell(ra, model, [prompt.text], top=6, written=written, as_json=as_json, extra=extra)
    if patched is None:
        warn("warning", f"no patched prediction: {refusal}")
    elif not as_json:
        show.print_section(predictions.as_section(patched))


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
            from ra_lens.model.loading import load_demo_model

            return load_demo_model(kind=kind, device=device, dtype=dtype)
        from ra_lens.model import load_model

        return load_model(name, kind=kind, device=device, dtype=dtype)


def _patched(
    model: nn.Module, prompts: PromptInput, ra: RACache, target: str | Sequence[str] | None
) -> tuple[PatchedPrompt, ...]:
    from ra_lens.report import patched_predictions

    return patched_predictions(model, prompts, ra, target=target)


def _tell(
    ra: RACache,
    model: nn.Module,
    prompts: Sequence[str],
    *,
    top: int,
    written: Path | None,
    as_json: bool,
    extra: dict[str, object] | None = None,
) -> None:
    from ra_lens.cli import show

    if as_json:
        facts = {**show.as_json(ra, model, prompts, top=top), **(extra or {})}
        facts["report"] = None if written is None else str(written)
        show.print_json(facts)
        return
    show.print_run(ra, model, top=top)
    if written is not None:
        show.print_line(f"Report: {written}")


def warn_of_unknown_words(model: nn.Module, prompt: str) -> None:
    """Say which words of a prompt the model does not know, if any."""
    words = as_lens(model).describe_unknown(prompt)
    if words:
        warn("warning", f"the model does not know {words}.")


def warn(label: str, text: str) -> None:
    """Print a line on standard error."""
    typer.echo(f"{label}: {text}", err=True, color=sys.stderr.isatty())
