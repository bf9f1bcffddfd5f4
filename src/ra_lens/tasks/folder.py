"""Tasks from files: the lists of pairs of "Function Vectors", and questions with a template.

Two formats are read. A list of pairs is an ``icl`` task:

    [{"input": "France", "output": "Paris"}, ...]

An object with a template and a list of such pairs is a ``natural`` task. The text around the
subject is given by ``template``, by ``before_subject`` and ``after_subject``, or by both, in
agreement; other entries are left unread:

    {"template": "The capital city of {} is", "samples": [{"input": ..., "output": ...}, ...]}

An input or output may be a list of strings, whose first one counts (others are alternatives). Texts
are taken as they are, and repeated inputs stay.

In a folder, lists are looked for in ``icl``, in ``abstractive`` and ``extractive`` (the folders of
the function_vectors repository) and in the folder itself; questions in ``natural`` and in the
folder itself. The name of a task is that of its file, without ``.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from ra_lens.errors import BadFile, BadInput
from ra_lens.files import check_input, is_folder, user_path
from ra_lens.tasks.task import Pair, Task, TaskKind, no_task
from ra_lens.text import decoded, whole_text

ICL_BEFORE, ICL_AFTER = "Q: ", "\nA:"

# Where files of each kind are looked for, in this order; "" is the folder itself.
_PLACES: Mapping[TaskKind, tuple[str, ...]] = {
    "icl": ("icl", "abstractive", "extractive", ""),
    "natural": ("natural", ""),
}


def folder_names(folder: str | Path, kind: TaskKind | None = None) -> tuple[str, ...]:
    """Return the names of the tasks of a folder, ICL tasks first.

    A natural task that shares its name with an ICL one is called ``natural/name``. Files in the
    folder itself that hold no task are passed over.
    """
    root = _check(folder)
    icl = sorted({path.stem for path in _files(root, "icl")})
    natural = sorted({path.stem for path in _files(root, "natural")})
    natural = [f"natural/{name}" if name in icl else name for name in natural]
    return tuple((icl if kind != "natural" else []) + (natural if kind != "icl" else []))


def load_from_folder(name: str, folder: str | Path) -> Task:
    """Return a task of a folder, by the name of its file without ``.json``.

    With ``icl/`` or ``natural/`` in front where both kinds have that name; the bare name is the ICL
    task.
    """
    root = _check(folder)
    wanted, _, bare = name.rpartition("/")
    for kind in _PLACES:
        if wanted not in ("", kind):
            continue
        for path in _files(root, kind, bare):
            shared = any(_files(root, "icl", bare))
            unique = f"natural/{bare}" if kind == "natural" and shared else bare
            return read_task(path, unique, kind, source=str(folder))
    # A file of this name that holds neither kind deserves to be told what is wrong with it.
    for path in _json_files(root):
        if path.stem == bare and wanted in ("", *_PLACES) and _kind_in(path) is None:
            return read_task(path, bare, None, source=str(folder))
    names = folder_names(root)
    held = ", ".join(names) if names else "no tasks (files icl/NAME.json, natural/NAME.json)"
    raise no_task(f"task {name!r} in the folder {folder}", name, names, f"It has {held}.")


def read_task(path: Path, name: str, kind: TaskKind | None, *, source: str) -> Task:
    """Return the task that a file holds, called `name`; `kind` None: it looks like neither."""
    data = _parse(path)
    if kind != "natural":
        if not isinstance(data, list):
            raise BadFile(
                f'{path}: found {_what(data)}; needed is a list of {{"input": …, "output": …}}, '
                "or an object with a template and samples for a natural question."
            )
        return Task(name, "icl", _pairs(path, data, ""), ICL_BEFORE, ICL_AFTER, source=source)
    if not isinstance(data, dict):
        raise BadFile(
            f"{path}: found {_what(data)}; needed for a natural question is an object with "
            '"template" (or "before_subject" and "after_subject") and "samples".'
        )
    fields = cast("dict[str, Any]", data)
    before, after = _frame(path, fields)
    samples = fields.get("samples")
    if not isinstance(samples, list):
        raise BadFile(
            f'{path}: found {_what(samples)} as "samples"; needed is a list of '
            '{"input": …, "output": …}.'
        )
    return Task(name, "natural", _pairs(path, samples, "samples, "), before, after, source=source)


def _check(folder: str | Path) -> Path:
    needed = "source is 'builtin', 'download', or a folder with the files of tasks."
    root = user_path(folder)
    if not is_folder(root):
        raise BadInput(f"There is no folder {str(folder)!r}. {needed}")
    for places in _PLACES.values():
        for place in places:
            if is_folder(root / place):
                check_input(root / place, needed, folder=True)
    return root


def _files(root: Path, kind: TaskKind, name: str | None = None) -> Iterator[Path]:
    """Give the files of one kind, or those of them that are called `name`, in order."""
    for place in _PLACES[kind]:
        for path in _json_files(root / place):
            if name in (None, path.stem) and (place or _kind_in(path) == kind):
                yield path


def _json_files(folder: Path) -> list[Path]:
    # Names are looked up in this list, so that none of them leads out of the folder.
    found = (path for path in folder.glob("*.json") if not path.name.startswith("."))
    return sorted(path for path in found if os.path.isfile(path))


def _kind_in(path: Path) -> TaskKind | None:
    """Say what a file looks like, right or not; None where it looks like no task."""
    try:
        data = _parse(path)
    except BadFile:
        return None
    if isinstance(data, list):
        return "icl" if data and isinstance(data[0], dict) and "input" in data[0] else None
    return "natural" if isinstance(data, dict) and "samples" in data else None


def _parse(path: Path) -> Any:
    try:
        return json.loads(decoded(str(path), path.read_bytes(), error=BadFile))
    except json.JSONDecodeError as error:
        raise BadFile(f"{path}: found text that is not JSON ({error}).") from error
    except RecursionError as error:
        raise BadFile(f"{path}: found JSON that is nested too deeply for a task.") from error
    except OSError as error:
        raise BadFile(f"{path}: cannot be read ({error.strerror or error}).") from error


def _frame(path: Path, fields: Mapping[str, Any]) -> tuple[str, str]:
    """Return the text before and after the subject."""
    given = {
        key: fields[key] for key in ("template", "before_subject", "after_subject") if key in fields
    }
    for key, value in given.items():
        if not isinstance(value, str):
            raise BadFile(f'{path}: found {_what(value)} as "{key}"; needed is a text.')
        whole_text(f'{path}: "{key}"', value, error=BadFile)
    template = given.get("template")
    if template is not None and template.count("{}") != 1:
        raise BadFile(
            f'{path}: found the template {template!r}; needed is one "{{}}" where the subject goes.'
        )
    if "before_subject" not in given or "after_subject" not in given:
        if template is None:
            raise BadFile(
                f"{path}: found no template; needed is "
                '"template" or both "before_subject" and "after_subject".'
            )
        before, _, after = template.partition("{}")
        given = {"before_subject": before, "after_subject": after} | given
    before, after = given["before_subject"], given["after_subject"]
    if template not in (None, f"{before}{{}}{after}"):
        raise BadFile(
            f"{path}: found the template {template!r}, but {before!r} before the subject and "
            f"{after!r} after it; needed are texts that agree, or one of the two."
        )
    return before, after


def _pairs(path: Path, entries: list[Any], where: str) -> tuple[Pair, ...]:
    if not entries:
        raise BadFile(f"{path}: found no pairs; needed is at least one.")
    pairs: list[Pair] = []
    for i, entry in enumerate(entries):
        place = f"{path}: {where}entry {i} (counted from 0)"
        if not isinstance(entry, dict):
            raise BadFile(f'{place}: found {_what(entry)}; needed is {{"input": …, "output": …}}.')
        texts = [_text(place, cast("dict[str, Any]", entry), key) for key in ("input", "output")]
        pairs.append(Pair(*texts))
    return tuple(pairs)


def _text(place: str, entry: Mapping[str, Any], key: str) -> str:
    if key not in entry:
        has = ", ".join(repr(name) for name in entry) or "nothing"
        raise BadFile(f'{place}: found no "{key}" (it has {has}); needed is a text.')
    value = entry[key]
    text = value[0] if isinstance(value, list) and value else value
    if not isinstance(text, str) or not text:
        raise BadFile(
            f'{place}: found {_what(value)} as "{key}"; needed is a text, or a list of texts '
            "whose first one counts."
        )
    return whole_text(f'{place}: "{key}"', text, error=BadFile)


def _what(value: Any) -> str:
    """Say what a value of a JSON file is, shortened."""
    names = {dict: "an object", list: "a list", type(None): "nothing", str: "the text"}
    name = names.get(type(value), "the value")
    if isinstance(value, dict | list):
        return f"{name} of {len(value)}" if value else f"{name} without entries"
    if value is None:
        return name
    return f"{name} {json.dumps(value, ensure_ascii=False)[:60]}"
