"""A grid of cells in a folder: a file for each cell that is finished, written whole.

    _grid.json            how the grid is made, and its cells in the order of the table
    HASH.parquet          the rows of a finished cell, as they stand in the table
    _failed-HASH.json     what a cell said that failed, until it is finished

A cell is one task with one number of demonstrations, or a piece of that where an experiment has
pieces, such as a method. Its hash is that of all settings and of which cell it is, so that every
process that is given the same experiment has the same cells, and several may share a folder: on
this machine, on a share of several, or at any address that fsspec reads. What is finished stays
finished; a folder of other settings is refused.

The table is made of the files in the order of the cells and does not depend on who computed them.
`pandas.read_parquet` reads the folder too, in the order of the hashes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd

from ra_lens.errors import BadFile, BadInput
from ra_lens.experiments.journal import as_frame, compared, differences, settings_hash
from ra_lens.files import is_address, reason, user_path
from ra_lens.text import shots_name

_FORMAT = 1
_MANIFEST = "_grid.json"
_FAILED = "_failed-"
_TABLE = ".parquet"


@dataclass(frozen=True)
class Folder:
    """A folder at a path or an address."""

    given: str
    fs: Any  # of fsspec, which has no types
    path: str

    @classmethod
    def at(cls, out: str | Path) -> Folder:
        """Give the folder at a path or address; BadInput if there can be none."""
        from fsspec.core import url_to_fs

        where = str(out) if is_address(out) else str(user_path(out).resolve())
        try:
            fs, path = url_to_fs(where)
        except (ImportError, ValueError, OSError) as error:
            raise BadInput(
                f"cannot use the address {out}: {error} Give a folder, or an address that fsspec "
                "reads, with the package that it names installed."
            ) from error
        return cls(str(out), fs, str(path))

    def names(self) -> list[str]:
        """Names of the files in it; none where there is no folder."""
        try:
            self.fs.invalidate_cache()
            found = self.fs.ls(self.path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise BadFile(f"{self.given} cannot be read: {reason(error)}.") from error
        return [str(one).rstrip("/").rpartition("/")[2] for one in found]

    def refuse_others(self) -> None:
        """Raise BadInput where it holds something else than a grid."""
        others = sorted(name for name in self.names() if not name.startswith("."))
        if others and _MANIFEST not in others:
            raise BadInput(
                f"cannot write cells to {self.given}: it holds other files "
                f"({', '.join(others[:3])}{', …' * (len(others) > 3)}). Give a new folder."
            )

    def read(self, name: str) -> bytes:
        """Read a file."""
        try:
            return self.fs.cat_file(f"{self.path}/{name}")
        except OSError as error:
            raise BadFile(f"{self.given}/{name} cannot be read: {reason(error)}.") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole, in the place of what is there."""
        temporary = f"{self.path}/.{uuid4().hex}"
        try:
            self.fs.makedirs(self.path, exist_ok=True)
            self.fs.pipe_file(temporary, data)
            self.fs.mv(temporary, f"{self.path}/{name}")
        except OSError as error:
            raise BadInput(
                f"cannot write {self.given}/{name}: {reason(error)}. Give a folder that can be "
                "written to. What is finished is kept: the same call goes on from there."
            ) from error

    def create(self, name: str, data: bytes) -> None:
        """Write a file whole; one that another process has written by now stays as it is."""
        with suppress(OSError):
            self.fs.makedirs(self.path, exist_ok=True)
        for way in (self._link, self._put):
            try:
                way(f"{self.path}/{name}", data)
            except FileExistsError:
                return
            except (OSError, AttributeError, TypeError, ValueError, NotImplementedError):
                continue  # there is no such way here
            return
        self.write(name, data)

    def _link(self, path: str, data: bytes) -> None:
        """Of a disk: what is linked is there whole, and takes no other's place."""
        temporary = f"{self.path}/.{uuid4().hex}"
        self.fs.pipe_file(temporary, data)
        try:
            self.fs.link(temporary, path)
        finally:
            self.fs.rm_file(temporary)

    def _put(self, path: str, data: bytes) -> None:
        """Of an address, where what is put is there whole."""
        self.fs.pipe_file(path, data, mode="create")

    def remove(self, name: str) -> None:
        """Remove a file that is there."""
        try:
            self.fs.rm_file(f"{self.path}/{name}")
        except FileNotFoundError:  # another process was quicker
            return


@dataclass(frozen=True)
class GridCell:
    """Which cell of a grid it is."""

    task: str
    shots: int
    piece: str
    hash: str

    @property
    def name(self) -> str:
        """What messages call it."""
        return ", ".join(filter(None, (self.task, shots_name(self.shots), self.piece)))


@dataclass(frozen=True)
class Failure:
    """Why a cell failed."""

    error: str
    traceback: str = ""


@dataclass(frozen=True, eq=False)
class Grid:
    """The cells of an experiment and the folder of those that are finished."""

    folder: Folder
    settings: Mapping[str, Any]
    parts: Sequence[tuple[str, int, str]]  # task, demonstrations and piece of each cell

    @cached_property
    def cells(self) -> list[GridCell]:
        """The cells, in the order of the table."""
        of_all = settings_hash(self.settings)
        return [
            GridCell(*one, blake2b(json.dumps([of_all, *one]).encode(), digest_size=8).hexdigest())
            for one in self.parts
        ]

    def share(self, part: tuple[int, int]) -> list[GridCell]:
        """Give part i of n, counted from 1: every n-th cell by its hash, in the table's order."""
        i, n = part
        chosen = set(sorted(cell.hash for cell in self.cells)[i - 1 :: n])
        return [cell for cell in self.cells if cell.hash in chosen]

    def begin(self) -> None:
        """Write down what the grid is, or raise BadInput where another run was quicker."""
        what = {"ra_lens_grid": _FORMAT, "settings": self.settings, "cells": self.parts}
        if _MANIFEST not in self.folder.names():
            self.folder.create(_MANIFEST, json.dumps(what, indent=1).encode())
        _refuse_other_settings(self.folder, self.settings)

    def done(self) -> set[str]:
        """Hashes of the cells that are finished."""
        there = set(self.folder.names())
        return {cell.hash for cell in self.cells if cell.hash + _TABLE in there}

    def failures(self) -> dict[GridCell, Failure]:
        """Give the cells that failed and are not finished, and why."""
        there = set(self.folder.names())
        found: dict[GridCell, Failure] = {}
        for cell in self.cells:
            name = f"{_FAILED}{cell.hash}.json"
            if name in there and cell.hash + _TABLE not in there:
                facts = json.loads(self.folder.read(name))
                found[cell] = Failure(facts["error"], facts["traceback"])
        return found

    def finish(self, cell: GridCell, rows: Iterable[dict[str, Any]]) -> None:
        """Write the rows of a cell."""
        buffer = BytesIO()
        as_frame(rows, self.settings).to_parquet(buffer, index=False)
        self.folder.write(cell.hash + _TABLE, buffer.getvalue())
        self.folder.remove(f"{_FAILED}{cell.hash}.json")

    def fail(self, cell: GridCell, failure: Failure) -> None:
        """Write down why a cell failed."""
        facts = {"cell": cell.name, "error": failure.error, "traceback": failure.traceback}
        self.folder.write(f"{_FAILED}{cell.hash}.json", json.dumps(facts, indent=1).encode())

    def frame(self, cells: Iterable[GridCell]) -> pd.DataFrame:
        """Make the table of some cells, which are finished: as if they had been computed now."""
        rows: list[dict[str, Any]] = []
        for cell in cells:
            name = cell.hash + _TABLE
            try:
                rows += pd.read_parquet(BytesIO(self.folder.read(name))).to_dict("records")
            except (ValueError, OSError) as error:  # pyarrow's errors are among them
                raise BadFile(
                    f"{self.folder.given}/{name} cannot be read as a table: {error} Delete it: the "
                    "same call computes it again."
                ) from error
        return as_frame(rows, self.settings)


def open_grid(
    out: str | Path, settings: Mapping[str, Any], parts: Sequence[tuple[str, int, str]] = ()
) -> Grid:
    """Open the grid of an experiment in a folder, which may be new; refuse one of other settings.

    Raises:
        BadInput: the folder is that of other settings or holds something else, or cannot be used.
        BadFile: what is in it is damaged.
    """
    folder = Folder.at(out)
    folder.refuse_others()
    if _MANIFEST in folder.names():
        _refuse_other_settings(folder, settings)
    return Grid(folder, settings, parts)


def read_grid(out: str | Path) -> Grid:
    """Read what a folder is the grid of.

    Raises:
        BadFile: there is no grid in it, or it is damaged.
    """
    folder = Folder.at(out)
    if _MANIFEST not in folder.names():
        raise BadFile(
            f"{out} holds no grid (it has no {_MANIFEST}). Give a folder that an experiment wrote "
            "its cells to (--out FOLDER)."
        )
    facts = _manifest(folder)
    return Grid(folder, facts["settings"], [(task, n, piece) for task, n, piece in facts["cells"]])


def _refuse_other_settings(folder: Folder, settings: Mapping[str, Any]) -> None:
    was, now = compared(_manifest(folder)["settings"]), compared(json.loads(_text(settings)))
    if was != now:
        raise BadInput(
            f"{folder.given} holds the cells of a run with other settings "
            f"({differences(was, now)}). Repeat that run to go on with it, or give another folder."
        )


def _manifest(folder: Folder) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(folder.read(_MANIFEST))
        known, _, _ = facts["ra_lens_grid"], facts["settings"]["experiment"], facts["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadFile(
            f"{folder.given}/{_MANIFEST} is not that of a grid ({error}). Give another folder."
        ) from error
    if known != _FORMAT:
        raise BadFile(
            f"{folder.given} is a grid of format {known}; this ra_lens writes {_FORMAT}. Give "
            "another folder."
        )
    return facts


def _text(settings: Mapping[str, Any]) -> str:
    settings_hash(settings)  # which names a setting that cannot be written down
    return json.dumps(settings)
