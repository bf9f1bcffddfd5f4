"""What an experiment has done, on disk: a journal while it goes on, a table when it is finished.

An experiment is a list of units, each with a key. A unit's result is appended to a journal beside
the output file as soon as it is there, one JSON line each; a run that finds the journal of the same
settings takes results from it instead of computing them. Units do not depend on each other's
batches and numbers survive JSON unchanged, so the result is the same as that of a run in one piece.

The output file appears when all is done, and the journal goes. A journal or an output file of other
settings is refused, with the settings that differ.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, cast

import pandas as pd

from ra_lens.errors import BadFile, BadInput
from ra_lens.files import check_output, reason, user_path
from ra_lens.tables import MEASURES, TABLE, read_results

_FORMAT = 1
# What a run may go on with another value of: a unit's numbers do not depend on its batches.
_NOT_SETTINGS = frozenset({"batch_size"})
_LONG = 60  # characters of a value in a message
_NOTHING = "nothing"  # where a setting is not among those of a run


# ---- settings -----------------------------------------------------------------------------------


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Give a short text that differs where the settings of two experiments do."""
    for name, value in settings.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise BadInput(
                f"found {name}={_cut(repr(value))}, which cannot be written down ({error}). Give "
                "texts, numbers, True or False."
            ) from error
    text = json.dumps(compared(settings), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give the settings that must be the same where one run goes on with another."""
    return {name: value for name, value in settings.items() if name not in _NOT_SETTINGS}


def as_frame(rows: Iterable[Mapping[str, Any]], settings: Mapping[str, Any]) -> pd.DataFrame:
    """Make the table of an experiment: what it is and of which model, the rows, how it was made."""
    made = {name: value for name, value in settings.items() if not isinstance(value, list | dict)}
    first = {name: made.pop(name) for name in ("experiment", "model")}
    made["settings_hash"] = settings_hash(settings)
    # What a row says of itself counts: a setting may be an upper limit only (`n_test`).
    return pd.DataFrame(
        [{**first, **row, **{k: v for k, v in made.items() if k not in row}} for row in rows]
    )


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which settings differ and how: `seed: there 1, here 2`; nothing where none does."""
    found = list(_differing(was, now))
    return "; ".join(found[:5]) + f"; and {len(found) - 5} more" * (len(found) > 5)


def _differing(was: Mapping[str, Any], now: Mapping[str, Any], of: str = "") -> Iterator[str]:
    for name in {**was, **now}:
        there, here = was.get(name, _NOTHING), now.get(name, _NOTHING)
        theirs, ours = _named(there), _named(here)
        if theirs and list(theirs) == list(ours):  # of the same tasks, or methods
            for one in theirs:
                yield from _differing(theirs[one], ours[one], f" of {one}")
        elif there != here:
            yield f"{name}{of}: {_there_and_here(list(theirs) or there, list(ours) or here)}"


def _named(value: object) -> dict[str, dict[str, Any]]:
    """Parts of a setting by their names; nothing where it is no list of such."""
    parts = cast("list[Any]", value) if isinstance(value, list) else []
    by_name = {str(p["name"]): p for p in parts if isinstance(p, dict) and "name" in p}
    return by_name if len(by_name) == len(parts) else {}


def _there_and_here(was: object, now: object) -> str:
    """Two values, or of long ones where they differ."""
    there, here = (value if isinstance(value, str) else repr(value) for value in (was, now))
    if max(len(there), len(here)) <= _LONG:
        return f"there {there}, here {here}"
    if isinstance(was, list) and isinstance(now, list):
        theirs, ours = cast("list[object]", was), cast("list[object]", now)
        only_there = [value for value in theirs if value not in ours]
        only_here = [value for value in ours if value not in theirs]
        if only_there or only_here:
            return f"only there {_cut(repr(only_there))}, only here {_cut(repr(only_here))}"
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(there, here, strict=False))
    start = max(len(list(alike)) - 10, 0)
    there, here = (_cut("…" * (start > 0) + text[start:]) for text in (there, here))
    return f"there {there}, here {here}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[: _LONG - 1]}…"


# ---- unfinished ---------------------------------------------------------------------------------


def journal_path(out: str | Path) -> Path:
    """Say where the journal of an output file lies: beside it, hidden, under its name."""
    destination = user_path(out).resolve()
    return destination.with_name(f".{destination.name}.journal")


@dataclass
class Journal:
    """Results by key; on disk as well where there is a file."""

    done: dict[str, Any]
    file: IO[str] | None = None

    def unit(self, key: str, compute: Callable[[], Any]) -> Any:
        """Give the result of a unit; `compute` it, as JSON has it, where it is not there yet."""
        if key not in self.done:
            result = compute()
            if self.file is not None:
                line = json.dumps({"key": key, "result": result})
                # Through JSON also when it is fresh, so that a resumed run cannot differ.
                result = json.loads(line)["result"]
                _append(self.file, line)
            self.done[key] = result
        return self.done[key]


@contextmanager
def open_journal(
    out: str | Path | None, settings: Mapping[str, Any]
) -> Generator[Journal, None, None]:
    """Open the journal of an output file, or one in memory where there is no output file.

    When the context is left without an exception, the journal on disk is removed: write the output
    file before.
    """
    if out is None:
        yield Journal({})
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
    done: dict[str, Any] | None = None
    finished = False
    try:
        _lock(file, path)
        done = _read(path, settings)
        if os.fstat(file.fileno()).st_size == 0:
            _append(file, json.dumps({"ra_lens_journal": _FORMAT, "settings": settings}))
        yield Journal(done, file)
        finished = True
    except BadInput as error:  # a disk that is full, say
        if not done:
            raise
        raise BadInput(
            f"{error} What is done is kept: the same call with the same output file goes on from "
            "there."
        ) from error
    finally:
        with suppress(OSError):  # what could not be written was told; the rest of it goes
            file.close()
        # Without a unit there is nothing to go on from, and the settings were perhaps a slip.
        if finished or done == {}:
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


def _read(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read what is done, after taking away half a line that a killed run left."""
    try:
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
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
        known, was = facts["ra_lens_journal"], compared(facts["settings"])
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
    now = compared(json.loads(json.dumps(settings)))
    if was != now:
        raise BadInput(
            f"{path} holds an unfinished run with other settings ({differences(was, now)}). Repeat "
            "that run to finish it, give another output file, or delete the journal."
        )
    return done


# ---- finished -----------------------------------------------------------------------------------


def finished_results(out: str | Path | None, settings: Mapping[str, Any]) -> pd.DataFrame | None:
    """Give the results that an earlier run with the same settings has written to `out`, if any."""
    wanted = settings_hash(settings)
    if out is None or not check_output(out, TABLE).exists():
        return None
    try:
        frame = read_results(out, measures=MEASURES)
    except BadFile as error:
        raise BadInput(f"{out} exists and is something else: {error} Give another name.") from error
    if "settings_hash" not in frame or set(frame["settings_hash"]) != {wanted}:
        raise BadInput(
            f"{out} holds the results of a run with other settings ("
            f"{_differences_shown(frame, settings)}). Give another name, or delete it first."
        )
    journal_path(out).unlink(missing_ok=True)  # of a run killed just after it had written
    return frame


# Columns of a table that show settings which are lists, and what a task is.
_COLUMNS = {
    "shots": "n_shots", "methods": "method", "directions": "direction", "kinds": "map",
    "scales": "scale",
}  # fmt: skip
_OF_TASKS = {"task": "name", "source": "source", "format": "format", "pairs_hash": "pairs_hash"}


def _differences_shown(frame: pd.DataFrame, settings: Mapping[str, Any]) -> str:
    """Say which settings differ from those that a table shows, or what it does not show."""
    there: dict[str, Any] = {}
    here: dict[str, Any] = {}
    unseen: list[str] = []
    for name, value in compared(settings).items():
        shown = _values(frame, _COLUMNS.get(name, name))
        if name == "tasks" and set(_OF_TASKS) <= set(frame):
            rows: Any = frame[list(_OF_TASKS)].drop_duplicates()
            there[name] = rows.set_axis(_OF_TASKS.values(), axis=1).to_dict("records")
            here[name] = [{fact: task[fact] for fact in _OF_TASKS.values()} for task in value]
            unseen.append("how the model's tokenizer reads the tasks")
        elif name == "methods" and "method" in frame:
            there[name], here[name] = shown, [method["name"] for method in value]
            unseen.append("what the methods do")
        elif name in _COLUMNS and shown:
            there[name], here[name] = shown, value
        elif name not in frame:
            unseen.append(f"{name}, here {value}")
        elif name != "n_test":
            there[name], here[name] = next(iter(shown), None), value
        elif value is not None and max(shown) > value:  # shown is the number asked, not the limit
            there[name], here[name] = int(max(shown)), value
        else:
            unseen.append(f"n_test, here {value}, there at least {int(max(shown))}")
    return differences(there, here) or f"in what the table does not show: {'; '.join(unseen)}"


def _values(frame: pd.DataFrame, column: str) -> list[Any]:
    """Give the values of a column, in order, without those that say that there is none."""
    if column not in frame:
        return []
    values: Any = frame[column].dropna()
    return [value for value in dict.fromkeys(values.tolist()) if value != "none"]
