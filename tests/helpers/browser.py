"""A browser for tests, where there is one: pages are opened from disk, with no network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def need_chromium() -> str:
    """Path of a Chrome or Chromium, or a skip that says what is missing."""
    found = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chrome or Chromium on this machine (Debian: apt install chromium)")
    return found


@contextmanager
def browser() -> Generator[Any, None, None]:
    """A browser; close what you open."""
    executable = need_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox needs rights that containers rarely give.
        running = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            yield running
        finally:
            running.close()


class Seen:
    """A page opened from disk, with all it logged and asked for."""

    def __init__(self, running: Any, path: Path, **context: Any) -> None:
        self._context = running.new_context(offline=True, **context)
        self.page = self._context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("dialog", lambda dialog: (self.errors.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def close(self) -> None:
        self._context.close()


@contextmanager
def opening(
    running: Any, kind: type[Seen] = Seen, *, quiet: bool = True
) -> Generator[Callable[..., Any], None, None]:
    """Gives what opens pages, which are closed at the end; with `quiet` none may have complained,
    nor asked for anything but its own file."""
    opened: list[Seen] = []

    def get(path: Path, **context: Any) -> Seen:
        opened.append(kind(running, path, **context))
        return opened[-1]

    yield get
    for seen in opened:
        if quiet:
            assert seen.errors == []
            assert len(seen.requests) == 1, seen.requests
        seen.close()
