"""Files appear complete or not at all: written beside their destination, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ra_lens.errors import BadInput


def check_output(path: str | Path) -> Path:
    """Find out, before any expensive work, whether a file can be written at `path`.

    Returns:
        The destination, links followed.

    Raises:
        BadInput: it cannot; the message says why.
    """
    destination = Path(path).expanduser().resolve()
    if destination.is_dir():
        raise BadInput(f"cannot write {path}: it is a folder. Give the name of a file in it.")
    if destination.exists() and not destination.is_file():
        raise BadInput(f"cannot write {path}: it is not a regular file. Give another name.")
    if not destination.parent.is_dir():
        raise BadInput(f"cannot write {path}: there is no folder {destination.parent}. Make it.")
    if destination.exists() and not os.access(destination, os.W_OK):
        raise BadInput(f"cannot write {path}: the file there is read-only. Give another name.")
    try:
        with tempfile.TemporaryFile(dir=destination.parent):
            pass
    except OSError as error:
        raise BadInput(
            f"cannot write {path}: {error.strerror or error}. Give a path in a folder that can "
            "be written to."
        ) from error
    return destination


@contextmanager
def whole_file(path: str | Path) -> Generator[Path, None, None]:
    """Give a temporary path to write to, which takes the place of `path` when all went well.

    Raises:
        BadInput: the path cannot be written, or the disk is full.
    """
    destination = check_output(path)
    handle, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name[:80]}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(_mode(destination))
        temporary.replace(destination)
    except OSError as error:
        raise BadInput(
            f"cannot write {path}: {error.strerror or error}. Free some space or give another path."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> Path:
    """Write `text` to `path`, replacing what is there only when the file is complete.

    Returns:
        The file written, links followed.

    Raises:
        BadInput: the path cannot be written, or the disk is full.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path).expanduser().resolve()


def _mode(destination: Path) -> int:
    # As open() would give it: the mode of what is replaced, else what the umask leaves.
    if destination.exists():
        return destination.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
