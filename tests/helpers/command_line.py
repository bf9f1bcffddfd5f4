"""`ra-lens` called in this process, or in one of its own that says what it imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import typer.main
import typer.testing

from ra_lens.cli import app, session

# What the options are is read from the functions' signatures, for every command, at every call:
# once is enough, and the parser keeps nothing of a call.
parser = cache(typer.main.get_command)
typer.testing._get_command = parser

# Commands leave a model as it was, and to load it takes longer than most of them do.
session.load_demo_model = cache(session.load_demo_model)

BETWEEN = "\f"
WITHOUT = """\
import sys
from ra_lens.cli import main
for words in {calls!r}:
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as done:
        assert not done.code
    found = set({modules!r}) & set(sys.modules)
    assert not found, (words, found)
    print(end={between!r})
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


def printed_without(
    modules: tuple[str, ...], *calls: Sequence[str], before: str = "", **options: Any
) -> list[str]:
    """What commands print in a process of their own, in which none imports some modules.

    They run one after the other, and say nothing on standard error.
    """
    words = [list(arguments) for arguments in calls]
    code = before + WITHOUT.format(modules=modules, calls=words, between=BETWEEN)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )
    assert (done.returncode, done.stderr) == (0, "")
    printed = done.stdout.split(BETWEEN)
    assert len(printed) == len(calls) + 1
    assert printed.pop() == ""
    return printed
