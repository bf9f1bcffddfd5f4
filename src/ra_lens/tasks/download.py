"""The published word pairs, downloaded once and kept: the files of "Function Vectors".

The pairs that Katz & Wolf, "Reversed Attention", use in context are those of Todd et al., "Function
Vectors in Large Language Models" (2024), MIT licence, Copyright (c) 2023 Eric Todd. They are
downloaded file by file from that project's repository, at one commit, and each file has to have the
SHA-256 that is written here: after the download, and whenever it is read again.

A file is kept in ``tasks`` and the commit's name under ``RA_LENS_CACHE``, where that is set, or
else in ``ra_lens`` under the user's cache folder (``XDG_CACHE_HOME``, ``~/.cache``, or
``%LOCALAPPDATA%``). It appears there complete or not at all: what came of a download that broke
off is kept beside it as ``.part``, to go on from there.

``RA_LENS_TASKS_URL`` may name a mirror: the address of a folder with the folders ``abstractive``
and ``extractive``.

Cost: one request per task and user, of 8 to 340 kB.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import sys
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from ra_lens.errors import BadFile, BadInput, DownloadFailed
from ra_lens.files import reason, user_path, whole_file
from ra_lens.tasks.folder import read_task
from ra_lens.tasks.task import Task

COMMIT = "fb9eac7b6dc707ea1475a717379916007fe448d5"
URL = f"https://raw.githubusercontent.com/ericwtodd/function_vectors/{COMMIT}/dataset_files"

TIMEOUT = 30.0  # seconds without an answer
_TRIES = 3
_CHUNK = 1 << 16


class PublishedFile(NamedTuple):
    """A file of the repository: its folder, and the SHA-256 of what it holds."""

    folder: str
    sha256: str


FILES = {
    "adjective_v_verb_3": PublishedFile(
        "extractive",
        "b7c676d946642de384ea12631c961721c34b0473a0bc47071606ec4298ee4246",
    ),
    "alphabetically_first_3": PublishedFile(
        "extractive",
        "eba190c3f246b3b449248d58be67cafd7cac42cdb01d058adc2ceb54081323ca",
    ),
    "animal_v_object_3": PublishedFile(
        "extractive",
        "c32ba2dde930efcbd2176da93a4a53785645b79967897bf0418ecb84226e3bd7",
    ),
    "antonym": PublishedFile(
        "abstractive",
        "ba66e8e399944b557251b11a37b11f9ba7a50f0a57286f7021a8a7b26b469e8d",
    ),
    "capitalize": PublishedFile(
        "abstractive",
        "9aad849c761de2f0c6195eb73496a0cfe7e600751b0d61a3c82709b1a3dcd53f",
    ),
    "capitalize_first_letter": PublishedFile(
        "abstractive",
        "147c3a091f000c21b2512ab8461029881ef05600414a0633078b460da7b9f5b3",
    ),
    "choose_middle_of_3": PublishedFile(
        "extractive",
        "6b1c579a8b3963a58865e124c09153a33a2d9bd9db55834e04ea11072a158968",
    ),
    "country-capital": PublishedFile(
        "abstractive",
        "5748cbfb789c2d671f8a88bf8eaa8a800ead77299e34e1d0cafae11b0409782b",
    ),
    "english-french": PublishedFile(
        "abstractive",
        "766fa28cc696f37b1009f36372372797be03444045c58bc554759f3e177638cc",
    ),
    "landmark-country": PublishedFile(
        "abstractive",
        "c96fb4514a4b93426150ec499064bcc5988ac11b440af88bde2196a7b474e240",
    ),
    "next_capital_letter": PublishedFile(
        "abstractive",
        "d99606de4d277354aba0d99cd407f0bcc46dc1eaef5f0f8345975a0686b02677",
    ),
    "next_item": PublishedFile(
        "abstractive",
        "fbef21cf40e1c6f4b12100812b09daa8e079f79b84ea3fea0e99637ea70f8873",
    ),
    "person-sport": PublishedFile(
        "abstractive",
        "4c9bef3f97a77a05171070a09132f7104768affe4a39d17fd4ca338f89dcca6f",
    ),
    "present-past": PublishedFile(
        "abstractive",
        "bd6f7d484a967646aa5854740c70803568225f47a5630e1555c39e827ba9c78b",
    ),
    "prev_item": PublishedFile(
        "abstractive",
        "ca59f4f8c82695903f7266c5ded68f731e52739e991ccf0f5389c36c950cb179",
    ),
    "singular-plural": PublishedFile(
        "abstractive",
        "beac51d02481a63115f0f7879e0dfc8d70244aeaea4d0a8d5193a5b2dfc07b9b",
    ),
    "synonym": PublishedFile(
        "abstractive",
        "dc0c79f94b70999236ec962465b21ab416074ea2969a980eafa85e9cb2702685",
    ),
}


def load_published(name: str) -> Task:
    """Return a published task, downloaded the first time and read from the cache afterwards.

    Args:
        name: one of `FILES`, with or without ``icl/`` in front.

    Raises:
        BadInput: there is no such task, or the cache cannot be written.
        DownloadFailed: the file cannot be had now.
        BadFile: what was downloaded is not the published file.
    """
    kind, _, bare = name.rpartition("/")
    if bare not in FILES or kind not in ("", "icl"):
        close = difflib.get_close_matches(name.lower().replace(" ", "-"), FILES, n=3, cutoff=0.5)
        hint = f"Close names: {', '.join(close)}. " if close else ""
        raise BadInput(
            f"There is no published file for a task {name!r}. {hint}To be downloaded are: "
            f"{', '.join(FILES)}. Natural questions are built in, or read from a folder."
        )
    file = FILES[bare]
    destination = cache_folder() / "tasks" / COMMIT[:12] / f"{bare}.json"
    base = os.environ.get("RA_LENS_TASKS_URL") or URL
    fetch(f"{base.rstrip('/')}/{file.folder}/{bare}.json", file.sha256, destination)
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

    Args:
        url: where to download from.
        sha256: of what the file has to hold, in hexadecimal digits.
        destination: where the file is kept; its folder is made.
        timeout: how long to wait for the server, in seconds.

    Returns:
        `destination`.

    Raises:
        BadInput: the file cannot be written there, or the address is not one of a web server.
        DownloadFailed: the server cannot be reached, does not have the file, or broke off.
        BadFile: the server gave another file.
    """
    if _digest(_content(destination)) == sha256:
        return destination
    if not url.startswith(("https://", "http://")):
        raise BadInput(
            f"{url} cannot be downloaded from; RA_LENS_TASKS_URL has to begin with https:// or "
            "http://."
        )
    part = destination.with_name(f"{destination.name}.part")
    data = bytearray(_content(part))
    resumed = bool(data)
    tries = 0
    while _digest(data) != sha256:
        tries += 1
        try:
            _receive(url, data, part, timeout)
        except HTTPError as error:
            error.close()
            raise _failed(url, f"the server answered HTTP {error.code} {error.reason}") from error
        except URLError as error:
            raise _failed(url, f"it cannot be reached ({error.reason})") from error
        except (OSError, HTTPException) as error:
            if tries < _TRIES:
                continue
            raise _failed(url, _broken_off(len(data), error)) from error
        found = _digest(data)
        if found == sha256:
            break
        part.unlink(missing_ok=True)
        if not resumed:
            raise BadFile(
                f"{url}: found {len(data):,} bytes with SHA-256 {found}, but needed is the "
                f"published file, with SHA-256 {sha256}. Nothing was kept. {_ELSEWHERE}"
            )
        data.clear()  # what was kept from before may be to blame: once more, from the start
        resumed, tries = False, 0
    _write(destination, data)
    part.unlink(missing_ok=True)
    return destination


_ELSEWHERE = (
    "Without the download, load_task(name, source=FOLDER) reads the same files from a folder (such "
    "as dataset_files of a clone of ericwtodd/function_vectors), and load_task(name) has a list of "
    "its own."
)


def _failed(url: str, what: str) -> DownloadFailed:
    return DownloadFailed(f"Could not download {url}: {what}. {_ELSEWHERE}")


def _broken_off(length: int, error: Exception) -> str:
    kept = "; they are kept, and the next call goes on from there" if length else ""
    return f"the connection broke off after {length:,} bytes ({error or 'no answer'}){kept}"


def _receive(url: str, data: bytearray, part: Path, timeout: float) -> None:
    """Append to `data` what is missing, keeping `part` up to date; start over where need be.

    Raises:
        OSError: as urllib does, and `ConnectionError` where less came than was announced.
    """
    headers = {"User-Agent": "ra_lens", "Accept-Encoding": "identity"}
    if data:
        headers["Range"] = f"bytes={len(data)}-"
    try:
        response = urlopen(Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        if error.code != 416 or not data:
            raise
        error.close()
        data.clear()  # the part is at least as long as the file, and not the file
        return _receive(url, data, part, timeout)
    with response:
        if data and not _goes_on(response, len(data)):
            data.clear()
            if response.status == 206:
                return _receive(url, data, part, timeout)
        announced = response.headers.get("Content-Length", "")
        end = len(data) + int(announced) if announced.isdecimal() else None
        # read1 gives what is there, so that a connection that stalls loses nothing.
        while chunk := response.read1(_CHUNK):
            data += chunk
            _write(part, data)
    if end is not None and len(data) < end:
        raise ConnectionError(f"{end:,} bytes were announced")
    return None


def _goes_on(response: Any, start: int) -> bool:
    """Whether the server's answer is the rest of the file, from byte `start`."""
    span = response.headers.get("Content-Range", "")
    return response.status == 206 and span.startswith(f"bytes {start}-")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _digest(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, content: bytes | bytearray) -> None:
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
