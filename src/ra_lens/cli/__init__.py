"""The command line, a thin shell over the package: `run`, `demo`, `check`, `trace` and more.

Results go to standard output, warnings and errors to standard error. Exit code 0: done; 2: the
input cannot be used, as one line `error: ...`; 3: `check` found a problem; 1: anything unexpected.
`--debug` adds tracebacks.

This module imports neither torch nor plotly, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ra_lens.cli.command import Command
from ra_lens.cli.experiments import register
from ra_lens.cli.options import (
    DebugOption,
    DeviceOption,
    JsonOption,
    KindOption,
    ModelOption,
    check_words,
    reported,
)
from ra_lens.cli.trace import trace


class _Commands(TyperGroup):
    """The commands, behind a look at what was typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with reported(debug=False):
            check_words(args)
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="ra-lens",
    cls=_Commands,
    help="Reversed Attention: what the backward pass wanted each attention head to do.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):  # a token may not exist in the terminal's encoding
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with reported(debug=False):  # what is printed outside of a command, as help
            app(prog_name="ra-lens")
    except typer.Exit as done:
        sys.exit(done.exit_code)


@app.callback()
def about(
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the version and exit.",
            is_eager=True,
            callback=lambda v: _say(v),
        ),
    ] = False,
) -> None:
    """Reversed Attention: what the backward pass wanted each attention head to do."""


@app.command(cls=Command)
def run(
    prompt: Annotated[
        list[str],
        typer.Option(
            "--prompt", "-p", help="Text to run on; - reads standard input. Several: -p … -p …."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="demo (the embedded model), a name TransformerLens knows, or a local folder.",
        ),
    ] = "demo",
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            help="What the loss asks for, leading space included: ' Paris'; one for all prompts or "
            "one for each. Default: the model's own top prediction.",
        ),
    ] = None,
    escapes: Annotated[
        bool,
        typer.Option("--escapes", "-e", help=r"Read \n and \t in prompt and target as whitespace."),
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="Number of heads to list.")] = 10,
    layers: Annotated[
        str | None, typer.Option(help="Only these layers, such as 0,5-8,-1. Default: all.")
    ] = None,
    kind: KindOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also write a report: one self-contained HTML file."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Run prompts; show the loss, the heads its gradient reaches most, and where it moves them."""
    with reported(debug=debug):
        from ra_lens.cli.commands import Options, run_prompt

        run_prompt(
            Options(
                prompts=tuple(prompt),
                model=model,
                targets=tuple(target or ()),
                escapes=escapes,
                top=top,
                layers=layers,
                kind=None if kind is None else kind.value,
                device=device,
                as_json=as_json,
                output=output,
                debug=debug,
            )
        )


@app.command(cls=Command)
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write the report.")
    ] = Path("ra_report.html"),
    kind: KindOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show it all on the embedded model, offline: maps of a prompt, and a patched prediction."""
    with reported(debug=debug):
        from ra_lens.cli.commands import run_demo

        run_demo(
            output=output,
            kind=None if kind is None else kind.value,
            device=device,
            as_json=as_json,
            debug=debug,
        )


@app.command(cls=Command)
def check(
    model: ModelOption = "demo",
    kind: KindOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find out what ra_lens can do with a model: layers, hooks, scales, patches; exit 3: beware."""
    with reported(debug=debug):
        from ra_lens.cli.checking import check as check_model

        fine = check_model(
            model,
            kind=None if kind is None else kind.value,
            device=device,
            as_json=as_json,
            debug=debug,
        )
        if not fine:
            raise typer.Exit(3)


def _say(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"ra-lens {version('ra-lens')}")
        raise typer.Exit
    return wanted


register(app)
app.command(cls=Command)(trace)
