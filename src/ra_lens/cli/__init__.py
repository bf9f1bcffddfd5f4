"""The command line, a thin shell over the package: `run`, `head`, `demo`, `check` and more.

Results go to standard output, warnings and errors to standard error. Exit code 0: done; 2: the
input cannot be used, as one line `error: ...`; 3: `check` found a problem; 4: cells of a grid
failed or are missing; 1: anything unexpected. `--debug` adds tracebacks.

This module imports neither torch nor plotly, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from ra_lens.cli.circuits import circuits
from ra_lens.cli.command import Command, Commands, ManyValuesCommand, reported
from ra_lens.cli.commands import check, demo, run, trace
from ra_lens.cli.compare import compare
from ra_lens.cli.experiments import ablate_patch, knockout, patch, perturb, rank
from ra_lens.cli.grids import results
from ra_lens.cli.head import head
from ra_lens.cli.methods import compare_methods

app = typer.Typer(
    name="ra-lens",
    cls=Commands,
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


def _say_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"ra-lens {version('ra-lens')}")
        raise typer.Exit
    return wanted


@app.callback()
def about(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", is_eager=True, callback=_say_version
        ),
    ] = False,
) -> None:
    """Reversed Attention: what the backward pass wanted each attention head to do."""


for command in (run, head, demo, check):
    app.command(cls=Command)(command)
for command in (rank, perturb, patch, ablate_patch, knockout, circuits, compare_methods):
    app.command(cls=ManyValuesCommand)(command)
for command in (results, compare, trace):
    app.command(cls=Command)(command)
