"""Which settings of two runs differ, in words.

What a long experiment has done so far, on disk, so that a killed run goes on where it stopped.

An experiment is a list of units, each with a key. A unit's result is appended to a journal beside
the output file as soon as it is there, one JSON line each; a run that finds the journal of the same
settings takes results from it instead of computing them. Units do not depend on each other's
batches and numbers survive JSON unchanged, so the result is the same as that of a run in one piece.

The output file appears when all is done, and the journal goes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from ra_lens.errors import BadFile, BadInput
from ra_lens.files import check_output, reason, user_path

_LONG = 60  # characters of a value in a message
_NOTHING = "nothing"  # where a setting is not among those of a run


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which settings differ and how: `seed: there 1, here 2`; nothing where none does."""
    found = [
        text
        for name in {**was, **now}
        for text in _differing(name, was.get(name, _NOTHING), now.get(name, _NOTHING))
    ]
    more = f"; and {len(found) - 5} more" * (len(found) > 5)
    return "; ".join(found[:5]) + more


def _differing(name: str, was: object, now: object) -> Iterator[str]:
    if was == now:
        return
    before, after = _named(was), _named(now)
    if before and list(before) == list(after):  # of the same tasks, or methods
        for one, facts in before.items():
            others = after[one]
            for fact in {**facts, **others}:
                values = facts.get(fact, _NOTHING), others.get(fact, _NOTHING)
                yield from _differing(f"{fact} of {one}", *values)
    else:
        yield f"{name}: {_there_and_here(list(before) or was, list(after) or now)}"


def _there_and_here(was: object, now: object) -> str:
    """Two values, or of long ones where they differ."""
    there, here = (value if isinstance(value, str) else repr(value) for value in (was, now))
    if max(len(there), len(here)) <= _LONG:
        return f"there {there}, here {here}"
    if isinstance(was, list) and isinstance(now, list):
        ours, theirs = cast("list[object]", now), cast("list[object]", was)
        only_there, only_here = (
            [value for value in one if value not in other]
            for one, other in ((theirs, ours), (ours, theirs))
        )
        if only_there or only_here:
            return f"only there {short(only_there)}, only here {short(only_here)}"
    letters = zip(there, here, strict=False)
    same = next((i for i, (a, b) in enumerate(letters) if a != b), min(len(there), len(here)))
    start = max(same - 10, 0)
    before, after = (f"{'…' * (start > 0)}{text[start:]}" for text in (there, here))
    return f"there {_cut(before)}, here {_cut(after)}"


def _named(value: object) -> dict[str, dict[str, Any]]:
    """Parts of a setting by their names; nothing where it is no list of such."""
    if not isinstance(value, list):
        return {}
    parts = cast("list[object]", value)
    named = [cast("dict[str, Any]", part) for part in parts if isinstance(part, dict)]
    by_name = {str(part["name"]): part for part in named if "name" in part}
    return by_name if len(by_name) == len(parts) else {}


def short(value: object) -> str:
    """Write a value in few characters."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


_FORMAT = 1

NOT_SETTINGS = frozenset({"batch_size"})
"""What a run may go on with another value of: a unit's numbers do not depend on its batches."""


def journal_path(out: str | Path) -> Path:
    """Where the journal of an output file lies: beside it, hidden, under its name."""
    destination = user_path(out).resolve()
    return destination.with_name(f".{destination.name}.journal")


def settings_hash(settings: dict[str, Any]) -> str:
    """A short text that differs where the settings of two experiments do.

    Raises:
        BadInput: a setting that JSON does not have, so that no run could be told from it.
    """
    try:
        text = json.dumps(_compared(settings), sort_keys=True)
    except TypeError as error:
        name = next((name for name, value in settings.items() if not _is_json(value)), "a setting")
        raise BadInput(
            f"found {name}={short(settings.get(name))}, which cannot be written down ({error}). "
            "Give texts, numbers, True or False."
        ) from error
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Journal:
    """Results by key; on disk as well where a file was given."""

    def __init__(self, done: dict[str, Any], file: IO[str] | None) -> None:
        """Start from what is done; use `open_journal`."""
        self._done = done
        self._file = file

    def __contains__(self, key: str) -> bool:
        """Tell whether a unit is done."""
        return key in self._done

    def __len__(self) -> int:
        """Give the number of units done."""
        return len(self._done)

    def unit(self, key: str, compute: Callable[[], Any]) -> Any:
        """Give the result of a unit, computing it if it is not there yet.

        Args:
            key: Names the unit within the experiment.
            compute: Gives its result, as JSON has it: dicts, lists, texts, numbers.

        Raises:
            BadInput: the result cannot be written, as on a full disk. Those of before are kept.
        """
        if key not in self._done:
            result = compute()
            if self._file is not None:
                line = json.dumps({"key": key, "result": result})
                # Through JSON also when it is fresh, so that a resumed run cannot differ.
                result = json.loads(line)["result"]
                _append(self._file, line)
            self._done[key] = result
        return self._done[key]


@contextmanager
def open_journal(
    out: str | Path | None, settings: dict[str, Any]
) -> Generator[Journal, None, None]:
    """Open the journal of an output file, or one in memory where there is no output file.

    When the context is left without an exception, the journal on disk is removed: write the output
    file before.

    Args:
        out: Where the results will be written; None: nowhere.
        settings: Everything that the results depend on, as JSON has it.

    Raises:
        BadInput: `out` or its journal cannot be written, or the journal belongs to other settings.
        BadFile: the journal is not one, or cannot be read.
    """
    if out is None:
        yield Journal({}, None)
        return
    check_output(out)
    path = journal_path(out)
    try:
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        raise BadInput(
            f"cannot write {path}, which keeps what is done: {reason(error)}. Give another output "
            "file."
        ) from error
    journal: Journal | None = None
    finished = False
    try:
        _lock(file, path)
        journal = Journal(_read(path, settings), file)
        if os.fstat(file.fileno()).st_size == 0:
            _append(file, json.dumps({"ra_lens_journal": _FORMAT, "settings": settings}))
        yield journal
        finished = True
    except BadInput as error:  # a disk that is full, say
        if journal:
            raise BadInput(
                f"{error} What is done is kept: the same call with the same output file goes on "
                "from there."
            ) from error
        raise
    finally:
        with suppress(OSError):  # what could not be written was told; the rest of it goes
            file.close()
        # Without a unit there is nothing to go on from, and the settings were perhaps a slip.
        if finished or (journal is not None and not journal):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _append(file: IO[str], line: str) -> None:
    try:
        file.write(line + "\n")
        file.flush()
    except OSError as error:
        raise BadInput(
            f"cannot write {file.name}, which keeps what is done: {reason(error)}. Free some space."
        ) from error


def _lock(file: IO[str], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadInput(
            f"another run is writing {path} at this moment. Wait for it, or give another output "
            "file."
        ) from error
    except OSError:  # a file system without locks
        return


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in NOT_SETTINGS}


def _read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):  # the run was killed in the middle of a line
            with path.open("r+b") as file:
                file.truncate(end)
    except OSError as error:
        raise BadFile(
            f"{path} cannot be read: {reason(error)}. Give another output file."
        ) from error
    if end == 0:
        return {}
    try:
        head, *rest = data[:end].decode("utf-8").splitlines()
        facts = json.loads(head)
        known, was = facts["ra_lens_journal"], _compared(facts["settings"])
        entries = [json.loads(line) for line in rest]
        done = {entry["key"]: entry["result"] for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(
            f"{path} is not the journal of an experiment ({error}). Delete it to start afresh."
        ) from error
    if known != _FORMAT:
        raise BadInput(
            f"{path} is a journal of format {known}; this ra_lens writes {_FORMAT}. Give another "
            "output file, or delete the journal."
        )
    now = _compared(json.loads(json.dumps(settings)))
    if was != now:
        raise BadInput(
            f"{path} holds an unfinished run with other settings ({differences(was, now)}). Repeat "
            "that run to finish it, give another output file, or delete the journal."
        )
    return done


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
