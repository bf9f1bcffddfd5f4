"""Tasks by name: from the package, from a folder, or downloaded.

Built in are fifteen tasks learnt in context and six asked in a sentence.

The names are those of Katz & Wolf, "Reversed Attention"; the pairs are ra_lens's own and live as
tables in the folder ``words``. Every word is a single word, and most words serve several tasks, so
that without demonstrations an ``icl`` task cannot be told from the others.

Two natural tasks share a name with an ``icl`` one: they are ``natural/country-capital`` and
``natural/present-past``, and the bare name is the ``icl`` task. Any task may also be called by its
kind and name, as in ``icl/antonym``.
"""

from __future__ import annotations

import difflib
import functools
from importlib import resources
from pathlib import Path

from ra_lens.errors import BadInput
from ra_lens.tasks.folder import ICL_AFTER, ICL_BEFORE, folder_names, load_from_folder
from ra_lens.tasks.lists import LIST_TASKS, list_pairs
from ra_lens.tasks.task import Pair, Task, TaskKind

_LIST_TASK_SIZE = 300

_ICL_NAMES = (
    "adjective_v_verb_3",
    "alphabetically_first_3",
    "animal_v_object_3",
    "antonym",
    "capitalize",
    "capitalize_first_letter",
    "choose_middle_of_3",
    "country-capital",
    "english-french",
    "next_item",
    "person-sport",
    "present-past",
    "prev_item",
    "singular-plural",
    "synonym",
)

# name: (table of pairs, text before the subject, text after it)
_NATURAL = {
    "company-hq": ("company-hq", "", " is headquartered in the city of"),
    "country-capital": ("country-capital", "The capital city of ", " is"),
    "landmark-in-country": ("landmark-in-country", "", " is in the country of"),
    "person-plays-pro-sport": ("person-sport", "", " plays the sport of"),
    "present-past": ("present-past", "The past tense of ", " is"),
    "product-by-company": ("product-by-company", "", " was created by"),
}


def task_names(kind: TaskKind | None = None, source: str | Path = "builtin") -> tuple[str, ...]:
    """Return the names that `load_task` takes, the tasks of `kind` only where it is given.

    Args:
        kind: "icl", "natural" or None for both.
        source: as for `load_task`.

    Raises:
        BadInput: there is no such kind or folder.
    """
    if kind not in ("icl", "natural", None):
        raise BadInput(f"kind={kind!r}; needed is 'icl', 'natural' or None for both.")
    if source == "download":
        from ra_lens.tasks.download import FILES

        return () if kind == "natural" else tuple(FILES)
    if source != "builtin":
        return folder_names(source, kind)
    natural = tuple(f"natural/{name}" if name in _ICL_NAMES else name for name in _NATURAL)
    by_kind: dict[TaskKind | None, tuple[str, ...]] = {
        None: _ICL_NAMES + natural,
        "icl": _ICL_NAMES,
        "natural": natural,
    }
    return by_kind[kind]


def load_task(name: str, source: str | Path = "builtin") -> Task:
    """Return a task.

    Args:
        name: one of `task_names`, or its kind and name as in ``icl/antonym``.
        source: "builtin" for ra_lens's own lists, on which the embedded model was trained;
            "download" for the pairs of Todd et al. as the paper uses them (see
            `ra_lens.tasks.download`); or a folder with files of pairs (see
            `ra_lens.tasks.folder`). A folder of one of these two names is ``Path("download")``.

    Raises:
        BadInput: there is no such task or folder; the message names close ones.
        BadFile: the file of the task is not as it has to be.
        DownloadFailed: the file cannot be downloaded; the message says what to do instead.
    """
    if source == "builtin":
        return _built_in(name)
    if source == "download":
        from ra_lens.tasks.download import load_published  # late: loads what talks to the network

        return load_published(name)
    return load_from_folder(name, source)


def word_pools() -> dict[str, tuple[str, ...]]:
    """Return the words that the list tasks draw from, by pool."""
    pools: dict[str, tuple[str, ...]] = {}
    for word, pool in _read_table("pools"):
        pools[pool] = (*pools.get(pool, ()), word)
    return pools


@functools.cache
def _built_in(name: str) -> Task:
    kind, _, bare = name.rpartition("/")
    if bare in _ICL_NAMES and kind in ("", "icl"):
        return Task(bare, "icl", _icl_pairs(bare), ICL_BEFORE, ICL_AFTER, source="builtin")
    if bare in _NATURAL and kind in ("", "natural"):
        table, before, after = _NATURAL[bare]
        unique = f"natural/{bare}" if bare in _ICL_NAMES else bare
        return Task(unique, "natural", _read_pairs(table), before, after, source="builtin")
    names = task_names()
    close = difflib.get_close_matches(name.lower().replace(" ", "-"), names, n=3, cutoff=0.5)
    hint = f"Close names: {', '.join(close)}. " if close else ""
    raise BadInput(
        f"There is no task {name!r}. {hint}"
        f"ra_lens.tasks.task_names() lists the {len(names)} built-in tasks."
    )


def _icl_pairs(name: str) -> tuple[Pair, ...]:
    if name in LIST_TASKS:
        return list_pairs(name, word_pools(), _LIST_TASK_SIZE)
    if name == "next_item":
        return _next_items()
    if name == "prev_item":
        return tuple(Pair(pair.output, pair.input) for pair in _next_items())
    return _read_pairs(name)


def _next_items() -> tuple[Pair, ...]:
    pairs: list[Pair] = []
    for kind, text in _read_table("sequences"):
        words = text.split(" ")
        # After December comes January; after the last number of the list comes nothing.
        followers = words[1:] + (words[:1] if kind == "cycle" else [])
        pairs += [Pair(word, follower) for word, follower in zip(words, followers, strict=False)]
    return tuple(pairs)


def _read_pairs(table: str) -> tuple[Pair, ...]:
    return tuple(Pair(first, second) for first, second in _read_table(table))


def _read_table(name: str) -> list[tuple[str, str]]:
    """Return the rows of a two-column table of the folder ``words``, without its heading."""
    file = resources.files("ra_lens.tasks") / "words" / f"{name}.tsv"
    rows: list[tuple[str, str]] = []
    for line in file.read_text(encoding="utf-8").splitlines()[1:]:
        first, second = line.split("\t")
        rows.append((first, second))
    return rows
