"""A disk that is full, and folders of other users."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def disk_of(n_bytes: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: the system says so as it does of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def folder_of_others(mode: int = 0o555) -> Iterator[Path]:
    """A folder, with a file in it, as a user meets it who may not do what `mode` does not say."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "file").write_text("theirs")
        os.chmod(name, mode)
        if user == 0:  # who may do everything
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(user)
            os.chmod(name, 0o755)
