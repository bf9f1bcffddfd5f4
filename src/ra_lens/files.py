"""Files appear complete or not at all, and never in the place of something else.

What is written is written beside its destination, then renamed. A file that is there is replaced
only by one of its own kind, as its first bytes tell, and never where it is what was read.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ra_lens.errors import BadFile, BadInput

if TYPE_CHECKING:
    from torch import Tensor

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk, or a share of one, that takes no more."""


def begins_with(*starts: bytes) -> Callable[[Path], bool]:
    """Give what tells whether a file begins so, blanks and a byte order mark aside."""

    def tell(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(starts)

    return tell


@dataclass(frozen=True)
class FileKind:
    """What is written to a file."""

    name: str
    is_one: Callable[[Path], bool]  # tells whether a file that is there is one
    endings: tuple[str, ...] = ()  # of its name; empty: any


def _holds_tensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return _HEADER in (file.metadata() or {})
    except SafetensorError:
        return False


_HEADER = "ra_lens"  # under this name a header holds the description
CACHE = FileKind("a cache of ra_lens", _holds_tensors)
PAGE = FileKind("a page", begins_with(b"<"), (".html", ".htm"))
REPORT = replace(PAGE, name="a report")


def user_path(path: str | Path) -> Path:
    """Give a path with `~` written out; BadInput if there is no home folder for it."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise BadInput(
            f"found the path {path}, and no home folder for its ~. Write the folder out."
        ) from error


def is_folder(path: str | Path) -> bool:
    """Whether there is a folder; what cannot be looked at is none."""
    return os.path.isdir(user_path(path))


def is_address(out: str | Path) -> bool:
    """Whether it is an address such as `s3://bucket/folder`, which fsspec reads."""
    return "://" in str(out)


def names_a_folder(out: str | Path | None) -> bool:
    """Whether an output is a folder: one that is there, an address, or a name without an ending."""
    if out is None:
        return False
    if is_address(out) or str(out).endswith(("/", "\\")):
        return True
    path = user_path(out)
    return is_folder(path) or not (path.suffix or path.is_file())


def check_input(path: Path, advice: str, *, folder: bool = False) -> None:
    """Raise BadFile, with `advice`, if a file, or a folder, is not there or cannot be read."""
    what = "folder" if folder else "file"
    try:
        mode = path.stat().st_mode
        fits = stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)
        if fits and folder:
            os.scandir(path).close()
        elif fits:
            path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadFile(f"there is no {what} {path}. {advice}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadFile(f"{path} cannot be read: {reason(error)}. {advice}") from error
    if not fits:
        found = "a folder" if stat.S_ISDIR(mode) else "no folder" if folder else "no regular file"
        raise BadFile(f"{path} is {found}; a {what} is needed. {advice}")


def check_output(
    path: str | Path, kind: FileKind | None = None, *, inputs: Iterable[Path] = ()
) -> Path:
    """Raise BadInput, before any expensive work, if a file cannot be written at `path`.

    A file of no `kind` replaces anything, but none of the `inputs`. Gives the destination, links
    followed.
    """
    given = user_path(path)
    try:
        destination = given.resolve()
        mode = _mode_there(destination)
    except (OSError, RuntimeError, ValueError) as error:  # too long; a link to itself; a NUL
        raise _cannot_write(path, error) from error
    if mode is not None and stat.S_ISDIR(mode):
        raise BadInput(f"cannot write {path}: it is a folder. Give the name of a file in it.")
    if kind is not None and kind.endings and given.suffix.lower() not in kind.endings:
        raise BadInput(
            f"cannot write {path}: {kind.name} is a file whose name must end in "
            f"{' or '.join(kind.endings)}. Give such a name."
        )
    if mode is not None and not stat.S_ISREG(mode):
        raise BadInput(f"cannot write {path}: it is not a regular file. Give another name.")
    if not is_folder(destination.parent):
        raise BadInput(f"cannot write {path}: there is no folder {destination.parent}. Make it.")
    try:
        if mode is not None:
            _check_replaced(path, destination, kind, inputs)
        with tempfile.TemporaryFile(dir=destination.parent):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error
    return destination


@contextmanager
def whole_file(path: str | Path, kind: FileKind | None = None) -> Generator[Path, None, None]:
    """Give a temporary path to write to, which takes the place of `path` when all went well.

    Raises BadInput if `path` cannot be written or holds another kind of file, or the disk is full.
    """
    destination = check_output(path, kind)
    temporary: Path | None = None
    try:
        # Few letters of the name: with more, a long one would be too long.
        handle, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name[:20]}.")
        temporary = Path(name)
        os.close(handle)
        yield temporary
        temporary.chmod(_mode(destination))
        temporary.replace(destination)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str, kind: FileKind | None = None) -> Path:
    """Write `text` to a `whole_file`; gives the file written, links followed."""
    with whole_file(path, kind) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return user_path(path).resolve()


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write a safetensors file with a JSON description in its header, in place of another only."""
    from safetensors.torch import save_file

    with whole_file(path, CACHE) as temporary:
        own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        with tensors_written():
            save_file(own, temporary, metadata={_HEADER: json.dumps(description)})


@contextmanager
def tensors_written() -> Generator[None, None, None]:
    """Raise OSError where safetensors has an error of its own for what the system says."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:  # "... (os error 28)"
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


@contextmanager
def read_tensors(path: str | Path) -> Generator[tuple[Path, dict[str, Tensor], Any], None, None]:
    """Give the path, tensors and description of a file that `write_tensors` wrote.

    Raises BadFile if it is missing or of something else, or if whoever reads the description finds
    it damaged.
    """
    from safetensors import SafetensorError, safe_open

    source = user_path(path)
    check_input(source, "Give a path written by RACache.save.")
    try:
        with safe_open(source, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise BadFile(
            f"{source} is damaged or not a safetensors file ({error}). "
            "Give a file written by RACache.save, or make it again."
        ) from error
    if _HEADER not in header:
        raise BadFile(
            f"{source} is a safetensors file, but not one written by RACache.save (it has no "
            "ra_lens description)."
        )
    try:
        yield source, tensors, json.loads(header[_HEADER])
    except BadFile:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(
            f"the description in {source} is damaged ({type(error).__name__}: {error}). Make the "
            "cache again."
        ) from error


def reason(error: Exception) -> str:
    """Why something cannot be read or written, in the system's words where there are any."""
    return getattr(error, "strerror", None) or str(error)


def _check_replaced(
    path: str | Path, destination: Path, kind: FileKind | None, inputs: Iterable[Path]
) -> None:
    """Raise if the file that is at `destination` must stay."""
    for read in inputs:
        if read.exists() and read.samefile(destination):  # also by a link of either kind
            raise BadInput(
                f"cannot write {path}: it is the input {read}, which stays. Give another name."
            )
    if not os.access(destination, os.W_OK):
        raise BadInput(f"cannot write {path}: the file there is read-only. Give another name.")
    empty = destination.stat().st_size == 0
    if kind is not None and not empty and not kind.is_one(destination):
        raise BadInput(
            f"cannot write {path}: the file there is not {kind.name}. Give another name, or delete "
            "it first."
        )


def _cannot_write(path: str | Path, error: Exception) -> BadInput:
    number = getattr(error, "errno", None)
    advice = "Give a path in a folder that can be written to."
    if number in FULL:
        advice = "Free some space or give another path."
    elif number == errno.ENAMETOOLONG:
        advice = "Give a shorter name."
    return BadInput(f"cannot write {path}: {reason(error)}. {advice}")


def _mode_there(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _mode(destination: Path) -> int:
    # As open() would give it: the mode of what is replaced, else what the umask leaves.
    if destination.exists():
        return destination.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
