"""The published word pairs, downloaded once and kept: the files of "Function Vectors".

The pairs that Katz & Wolf, "Reversed Attention", use in context are those of Todd et al., "Function
Vectors in Large Language Models" (2024), MIT licence, Copyright (c) 2023 Eric Todd. They are
downloaded file by file from that project's repository, at one commit, and each file has to have the
SHA-256 that ``published.tsv`` says: after the download, and whenever it is read again.

A file is kept in ``tasks`` and the commit's name under ``RA_LENS_CACHE``, where that is set, or
else in ``ra_lens`` under the user's cache folder (``XDG_CACHE_HOME``, ``~/.cache``, or
``%LOCALAPPDATA%``). It appears there complete or not at all.

``RA_LENS_TASKS_URL`` may name a mirror: the address of a folder with the folders ``abstractive``
and ``extractive``.

Cost: one request per task and user, of 8 to 340 kB.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from ra_lens.errors import BadFile, BadInput, DownloadFailed
from ra_lens.files import reason, user_path, whole_file
from ra_lens.tasks.folder import read_task
from ra_lens.tasks.task import Task, no_task, read_table

COMMIT = "fb9eac7b6dc707ea1475a717379916007fe448d5"
URL = f"https://raw.githubusercontent.com/ericwtodd/function_vectors/{COMMIT}/dataset_files"

TIMEOUT = 30.0  # seconds without an answer
_TRIES = 3
_CHUNK = 1 << 16


FILES = {name: (folder, sha256) for name, folder, sha256 in read_table("published.tsv")}
"""Of each task, the file's folder in the repository and the SHA-256 of what it holds."""


def load_published(name: str) -> Task:
    """Return a published task, downloaded the first time and read from the cache afterwards.

    Its name may have ``icl/`` in front.
    """
    kind, _, bare = name.rpartition("/")
    if bare not in FILES or kind not in ("", "icl"):
        there = f"To be downloaded are: {', '.join(FILES)}. "
        instead = "Natural questions are built in, or read from a folder."
        raise no_task(f"published file for a task {name!r}", name, FILES, there + instead)
    folder, sha256 = FILES[bare]
    destination = cache_folder() / "tasks" / COMMIT[:12] / f"{bare}.json"
    base = os.environ.get("RA_LENS_TASKS_URL") or URL
    fetch(f"{base.rstrip('/')}/{folder}/{bare}.json", sha256, destination)
    return read_task(destination, bare, "icl", source=f"download:{COMMIT}")


def cache_folder() -> Path:
    """Return the folder for what is downloaded; see the module."""
    own = os.environ.get("RA_LENS_CACHE")
    if own:
        return user_path(own)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(base) / "ra_lens"


def fetch(url: str, sha256: str, destination: Path, *, timeout: float = TIMEOUT) -> Path:
    """Make sure that `destination` holds the file with this SHA-256; download it if it does not.

    `timeout` is how long to wait for the server, in seconds.
    """
    try:
        if _digest(destination.read_bytes()) == sha256:
            return destination
    except OSError:
        pass  # it is not there, or cannot be read: another one takes its place
    if not url.startswith(("https://", "http://")):
        raise BadInput(
            f"{url} cannot be downloaded from; RA_LENS_TASKS_URL has to begin with https:// or "
            "http://."
        )
    data = _download(url, timeout)
    if _digest(data) != sha256:
        raise BadFile(
            f"{url}: found {len(data):,} bytes with SHA-256 {_digest(data)}, but needed is the "
            f"published file, with SHA-256 {sha256}. Nothing was kept. {_ELSEWHERE}"
        )
    _write(destination, data)
    return destination


_ELSEWHERE = (
    "Without the download, load_task(name, source=FOLDER) reads the same files from a folder (such "
    "as dataset_files of a clone of ericwtodd/function_vectors), and load_task(name) has a list of "
    "its own."
)


def _download(url: str, timeout: float, tries: int = _TRIES) -> bytes:
    """Download a file whole; where the connection breaks off, from the start again."""
    # Late: built-in tasks load without what talks to the network.
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    request = Request(url, headers={"User-Agent": "ra_lens", "Accept-Encoding": "identity"})
    data = bytearray()
    try:
        with urlopen(request, timeout=timeout) as response:
            # read1 gives what is there, so that the message can say how much came.
            while chunk := response.read1(_CHUNK):
                data += chunk
            announced = response.headers.get("Content-Length", "")
        if announced.isdecimal() and len(data) < int(announced):
            raise ConnectionError(f"{int(announced):,} bytes were announced")
    except HTTPError as error:
        error.close()
        raise _failed(url, f"the server answered HTTP {error.code} {error.reason}") from error
    except URLError as error:
        raise _failed(url, f"it cannot be reached ({error.reason})") from error
    except (OSError, HTTPException) as error:
        if tries > 1:
            return _download(url, timeout, tries - 1)
        after = f"after {len(data):,} bytes ({error or 'no answer'})"
        raise _failed(url, f"the connection broke off {after}") from error
    return bytes(data)


def _failed(url: str, what: str) -> DownloadFailed:
    return DownloadFailed(f"Could not download {url}: {what}. {_ELSEWHERE}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(
            f"cannot make the folder {path.parent}: {reason(error)}. Set RA_LENS_CACHE "
            "to a folder that can be written to."
        ) from error
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(content)
    except BadInput as error:
        raise BadInput(f"{error} Set RA_LENS_CACHE to a folder that can be written to.") from error
