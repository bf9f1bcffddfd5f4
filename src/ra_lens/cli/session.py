"""What the commands share before and around a model; imports torch.

Reads texts and layers, loads the model, and keeps what other libraries print out of the way and
local runs off the network. Each mistake is one sentence.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import typer
from torch import nn

from ra_lens.cli.options import ALL_GPUS, DEMO, Kind
from ra_lens.errors import BadInput
from ra_lens.files import is_folder
from ra_lens.model import PrependBos, as_lens, load_model
from ra_lens.model.gguf import gguf_file, is_kept
from ra_lens.model.hugging_face import no_loading_bars
from ra_lens.model.loading import load_demo_model
from ra_lens.tensors import why_unusable
from ra_lens.text import decoded

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
_MOST_LAYERS = 10_000  # more than any model has; a longer range is a slip of the keyboard


def prepare(model: str, device: str | None) -> None:
    """Keep Hugging Face libraries, not imported yet, off the network if the model is local.

    Raises:
        BadInput: the device does not exist, torch knows no such kind, or a local model is not
            there.
    """
    if model == DEMO or gguf_file(model) is not None or is_folder(model):
        os.environ["HF_HUB_OFFLINE"] = "1"
    if device is None:
        return
    if device == ALL_GPUS:
        if not torch.cuda.device_count():
            raise BadInput("found --device auto, and torch sees no GPU. Try --device cpu.")
        return
    reason = why_unusable(device)
    if reason:
        raise BadInput(f"cannot use --device {device}: {reason}. Try --device cpu.")


def load(
    name: str,
    kind: Kind | None,
    device: str | None,
    *,
    debug: bool,
    dtype: str = "float32",
    allow_pickle: bool = False,
) -> nn.Module:
    """Load the embedded model, a folder, a GGUF file, or a model TransformerLens knows."""
    options: dict[str, Any] = {"kind": kind, "device": device, "dtype": getattr(torch, dtype)}
    several: dict[str, Any] = {}
    if device == ALL_GPUS:
        options["device"], several = None, {"n_devices": torch.cuda.device_count()}
    file = gguf_file(name)
    if file is not None and not is_kept(file):
        warn("note", f"converting {file.name}, this once; it takes a minute or several.")
    with quiet(debug=debug):
        if name == DEMO:
            return load_demo_model(**options)
        return load_model(name, allow_pickle=allow_pickle, **options, **several)


@contextmanager
def quiet(*, debug: bool) -> Generator[None]:
    """Swallow other libraries' prints, log messages, warnings and progress bars of loading.

    Warnings of categories that ra_lens defines are shown at the end, each once. With `debug`
    nothing is swallowed, but prints go to standard error, so that standard output holds results
    only.
    """
    if debug:
        with redirect_stdout(sys.stderr):
            yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with no_loading_bars():
                yield
        own = (w for w in caught if w.category.__module__.startswith("ra_lens"))
        for text in dict.fromkeys(str(warning.message) for warning in own):
            warn("warning", text)
    finally:
        logging.disable(before)


def warn(label: str, text: str) -> None:
    """Print a line on standard error."""
    typer.echo(f"{label}: {text}", err=True)


def warn_of_unknown_words(model: nn.Module, prompt: str) -> None:
    """Say which words of a prompt the model does not know, if any."""
    words = as_lens(model).describe_unknown(prompt)
    if words:
        warn("warning", f"the model does not know {words}.")


def read_text(text: str, *, escapes: bool) -> str:
    """Read a prompt or target: `-` is standard input, and `\\n` a newline where escapes are on.

    Drops a byte order mark in front, which a file brings along.
    """
    if text == "-":
        text = _standard_input().removesuffix("\n")
    text = text.removeprefix("\ufeff")
    return unescaped(text) if escapes else text


def read_bos(bos: str | None, *, no_bos: bool) -> PrependBos:
    """Read what is to stand in front of text; None is the model's default."""
    if bos is not None and no_bos:
        raise BadInput(
            f"found --bos {bos} and --no-bos; give --bos with the token to put in front of text, "
            "or --no-bos for nothing."
        )
    return False if no_bos else None if bos is None else unescaped(bos)


def _standard_input() -> str:
    stream = sys.stdin
    if stream is None or stream.closed:  # pyright: ignore[reportUnnecessaryComparison]
        raise BadInput("found -, but standard input is closed. Give the text itself.")
    # Bytes, since the stream would read them with the encoding of the terminal.
    text = decoded("standard input", stream.buffer.read())
    return io.StringIO(text, newline=None).read()  # each end of a line is a newline


def unescaped(text: str) -> str:
    r"""Read \n and \t as whitespace, and \\ as one backslash."""
    return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match.group()], text)


def read_layers(text: str | None) -> list[int] | None:
    """Read a list of layers such as `0,5-8,-1`."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        several = range(int(first), int(last) + 1)
        # No match, a range that runs backwards, or one that no model has the layers for.
        if not several or len(layers) + len(several) > _MOST_LAYERS:
            raise BadInput(
                f"found --layers {text if len(text) <= 60 else text[:57] + '…'!r}; give numbers "
                "and rising ranges with commas between, such as 0,5-8,-1 (negative: from the end), "
                f"of at most {_MOST_LAYERS:,} layers."
            )
        layers += several
    return layers


def hints(prompt: str, target: str | None, *, escapes: bool) -> list[str]:
    """Say what looks like a slip of the shell, before anything runs."""
    found: list[str] = []
    if not escapes and (r"\n" in prompt or r"\n" in (target or "")):
        found.append(
            r"found a backslash and an n in the text; add -e to have \n read as a newline."
        )
    if target and target[0].isalnum() and prompt and not prompt[-1].isspace():
        found.append(
            f"the target {target!r} has no leading space, so it is read as going on from "
            f"{prompt[-12:]!r}; a new word is {' ' + target!r}."
        )
    return found
