"""Keeps what other libraries print out of the way, and the network out of local runs."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout

import typer

from ra_lens.model.loading import no_loading_bars


def offline() -> None:
    """Keep Hugging Face libraries off the network; call before they are first imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"


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
            typer.echo(f"warning: {text}", err=True)
    finally:
        logging.disable(before)
