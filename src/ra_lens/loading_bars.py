"""Transformers' progress bars, hidden while a model is loaded that takes no time to load."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def no_loading_bars() -> Generator[None]:
    """Hide the progress bars of transformers; afterwards they are as they were."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    with _settings_kept():
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            with _settings_kept():
                bars.enable_progress_bar()


@contextmanager
def _settings_kept() -> Generator[None]:
    # Where HF_HUB_DISABLE_PROGRESS_BARS decides, Hugging Face warns that it does.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Cannot (en|dis)able progress bars")
        yield
