"""Options that several commands share, and how a command's mistakes are told.

This module imports neither torch nor plotly, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ra_lens.errors import BadInput, RALensError
from ra_lens.files import FULL, user_path

# What the system says of a file that only the user can do something about.
_OF_THE_SYSTEM = (*FULL, errno.EACCES, errno.ENAMETOOLONG, errno.EPERM, errno.EROFS)
_LONGEST = 2000  # characters of an error: some lines of a terminal


class Kind(str, Enum):
    """TransformerLens classes, as choices of `--kind`."""

    HOOKED_TRANSFORMER = "HookedTransformer"
    TRANSFORMER_BRIDGE = "TransformerBridge"


class Split(str, Enum):
    """How the pairs of a task are divided, as choices of `--split`."""

    CODE = "code"
    TEXT = "text"


class Natural(str, Enum):
    """How natural questions are asked, as choices of `--natural`."""

    TEMPLATE = "template"
    QA = "qa"


class Where(str, Enum):
    """What maps are added to, as choices of `--at`."""

    PATTERN = "pattern"
    SCORES = "scores"


class DType(str, Enum):
    """Number formats of weights, as choices of `--dtype`."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Metric(str, Enum):
    """What is measured, as choices of `--metric`."""

    TOP1 = "top1"
    TOP2 = "top2"
    TOP3 = "top3"
    LOGIT_DIFF = "logit_diff"


class Accuracy(str, Enum):
    """What counts as right, as choices of `--accuracy`."""

    FIRST_TOKEN = "first-token"
    ANSWER = "answer"


class AucRule(str, Enum):
    """How the area under a curve is taken, as choices of `--auc-rule`."""

    TRAPEZOID = "trapezoid"
    MEAN = "mean"


KindOption = Annotated[
    Kind | None,
    typer.Option(
        help="TransformerLens class. Default: the one installed; HookedTransformer first."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps. Default: a GPU if any.")
]
DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks and what other libraries print.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="demo (the embedded model), a name TransformerLens knows, or a local folder.",
    ),
]
TaskOption = Annotated[
    list[str],
    typer.Option(
        "--task", "-t", help="Tasks, one or many: antonym country-capital; or all, icl, natural."
    ),
]
SourceOption = Annotated[
    str,
    typer.Option(help="Where the tasks are from: builtin, download, or a folder with their files."),
]
ShotsOption = Annotated[
    list[str] | None,
    typer.Option(help="Solved examples per question, one number or many. Default: 0 1 5 10."),
]
MethodsOption = Annotated[
    list[str] | None,
    typer.Option(help="Ways to rank heads. Default: ra fa cm1 cm2 index random."),
]
SeedOption = Annotated[
    int, typer.Option(help="Seed of the solved examples and of the random orders.")
]
SplitOption = Annotated[
    Split,
    typer.Option(
        help="Parts of a task: code (70 % train, 9 % valid, 21 % test) or text (a third test)."
    ),
]
NTestOption = Annotated[
    int | None, typer.Option(min=1, help="Test questions at most. Default: the whole test part.")
]
NRankOption = Annotated[int, typer.Option(min=1, help="Questions that heads are ranked on.")]
AnswerOption = Annotated[
    bool,
    typer.Option(
        "--answer-in-input/--prompt-only",
        help="What RA and FA rankings read: the prompt with its answer, or the prompt alone.",
    ),
]
BosOption = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos", help="Put a beginning-of-text token in front. Default: the model's own."
    ),
]
SeparatorOption = Annotated[
    str | None,
    typer.Option(help=r"Text between solved examples, \n being a line break. Default: \n\n."),
]
NaturalOption = Annotated[
    Natural,
    typer.Option(help="Ask natural questions as their template alone, or as qa: Q: …, newline, A:"),
]
BatchOption = Annotated[int, typer.Option(min=1, help="Rows per forward pass.")]
DTypeOption = Annotated[DType, typer.Option(help="Number format of the weights.")]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o",
        help="Results file, .parquet or .csv. The same command goes on where it was killed.",
    ),
]  # fmt: skip
FigureOption = Annotated[
    Path | None, typer.Option(help="Also draw the results: one self-contained HTML file.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
AccuracyOption = Annotated[
    Accuracy,
    typer.Option(
        help="What counts as right: the answer's first token, or the whole answer, greedily."
    ),
]
MetricOption = Annotated[Metric, typer.Option(help="What is shown, and what areas are taken of.")]
AucRuleOption = Annotated[AucRule, typer.Option(help="How the area under a curve is taken.")]


def check_words(words: Sequence[str]) -> None:
    """Refuse words of the command line whose bytes are no text, whatever they are meant as.

    Python puts a lone surrogate in the place of each such byte.

    Raises:
        BadInput: there is one; the message names its option.
    """
    option = "an argument"
    for word in words:
        option = (
            word.split("=")[0] if word.startswith("--") else word[:2] if word[:1] == "-" else option
        )
        odd = re.search("[\ud800-\udfff]", word)
        if odd:
            byte = f"byte {ord(odd[0]) - 0xDC00:#04x}" if odd[0] >= "\udc80" else "half a character"
            raise BadInput(
                f"found text that is not UTF-8 as {option} ({byte} at place {odd.start()} of "
                f"{ascii(word)[:60]}). Give it in UTF-8."
            )


@contextmanager
def reported(*, debug: bool) -> Generator[None]:
    """Turn exceptions into one line and an exit code."""
    try:
        yield
        if sys.stdout is not None:  # what is still to be written may find the disk full
            sys.stdout.flush()
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = " ".join(str(error).split())
        expected = isinstance(error, RALensError)
        if isinstance(error, OSError) and not expected:
            if error.filename and error.errno in _OF_THE_SYSTEM:
                expected, text = True, f"{error.filename} cannot be used: {error.strerror}."
            elif error.errno in FULL:  # of what was open already, and files have their own errors
                expected, text = True, f"cannot write what is printed: {error.strerror}."
                _drop_what_is_printed()
        if not expected:
            text = f"{type(error).__name__}: {text} (unexpected; --debug shows where)"
        if len(text) > _LONGEST:  # what is needed stands at the end
            text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
        with suppress(OSError):
            typer.echo(f"error: {text}", err=True)
        raise typer.Exit(2 if expected else 1) from None


def written_to(path: Path | None) -> Path | None:
    """Give the path of an option with `~` written out, as it is printed and as it is used."""
    return None if path is None else user_path(path)


def _drop_what_is_printed() -> None:
    # What could not be written would be tried again at the end, with an exit code of its own.
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
