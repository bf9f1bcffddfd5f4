"""`ra-lens` called in this process, or in one of its own that says what it imported."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import typer.main
import typer.testing

from ra_lens.cli import app

# What the options are is read from the functions' signatures, for every command, at every call:
# once is enough, and the parser keeps nothing of a call.
parser = cache(typer.main.get_command)
typer.testing._get_command = parser

WITHOUT = """\
import sys
from ra_lens.cli import main
try:
    main()
except SystemExit as done:
    assert not done.code
found = set({modules!r}) & set(sys.modules)
assert not found, found
"""
HEAVY = ("torch", "transformers", "transformer_lens", "plotly", "pandas", "numpy")


def call(*arguments: str, text: str | bytes | None = None) -> Any:
    return typer.testing.CliRunner().invoke(app, list(arguments), input=text)


def refused_line(*arguments: str, text: str | bytes | None = None) -> str:
    """What a command says that is refused: one line, and nothing on standard output."""
    result = call(*arguments, text=text)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def done_without(
    modules: tuple[str, ...], *arguments: str, before: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, which imports none of some modules and says nothing."""
    code = before + WITHOUT.format(modules=modules)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=False, **options,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done
