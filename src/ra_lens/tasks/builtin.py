"""The built-in tasks: fifteen learnt in context, six asked in a sentence.

The names are those of Katz & Wolf, "Reversed Attention"; the pairs are ra_lens's own and live as
tables in the folder ``words``. Every word is a single word, and most words serve several tasks, so
that without demonstrations an ``icl`` task cannot be told from the others.

Two natural tasks share a name with an ``icl`` one: they are ``natural/country-capital`` and
``natural/present-past``, and the bare name is the ``icl`` task. Any task may also be called by its
kind and name, as in ``icl/antonym``.

Four tasks pick one word out of three; they are generated from pools of words, not listed. The pools
overlap on purpose. A triple of one adjective and two verbs may come from ``adjective_v_verb_3``
(pick the adjective), ``choose_middle_of_3`` or ``alphabetically_first_3``, so a triple alone does
not say what is asked; only solved demonstrations do. There are far more triples than a task lists,
so that a model can be trained on many of them.

Some prompts the embedded model never saw in training, so that its accuracy can be measured. A fact
has to be seen to be known, so what is held out is never a fact but a prompt:

* list tasks (the input is three words): one set of three words in seven never occurs in training,
  in whatever order, in whichever of the list tasks, as demonstration or as query;
* all other tasks: of the ways in which a question may follow a demonstration, one in ten per task
  never occurs in training. A held-out prompt of one shot or more ends in such a step. A prompt
  without demonstrations cannot be held out: it is the fact itself.

The training script and the tests both ask the functions below, which depend on the words alone;
`Task.split` of a built-in task and its prompts keep to the same rule. A same-length set counts as
the task that it was taken from.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ra_lens.errors import BadInput
from ra_lens.numbers import Whole, whole
from ra_lens.tasks.download import FILES, load_published
from ra_lens.tasks.folder import ICL_AFTER, ICL_BEFORE, folder_names, load_from_folder
from ra_lens.tasks.task import (
    Pair,
    Prompt,
    Task,
    TaskKind,
    Unseen,
    draw,
    no_task,
    pick,
    read_table,
    stable_int,
)

SEPARATOR = ", "
_LIST_TASK_SIZE = 300
_LIST_ONE_IN = 7
_ADJACENCY_ONE_IN = 10

# Of the triples of the two tasks that do not look at what a word means, these shares have the
# form that the two other tasks ask about; what remains mixes all pools.
_ADJECTIVE_VERB_SHARE = 0.45
_ANIMAL_OBJECT_SHARE = 0.45

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


Pools = Mapping[str, tuple[str, ...]]
Triple = tuple[str, str, str]

# What each task picks out of three words.
_RULES: Mapping[str, Callable[[Triple, Pools], str]] = {
    "adjective_v_verb_3": lambda words, pools: _one_of(words, pools["adjective"]),
    "alphabetically_first_3": lambda words, _: min(words),
    "animal_v_object_3": lambda words, pools: _one_of(words, pools["animal"]),
    "choose_middle_of_3": lambda words, _: words[1],
}
LIST_TASKS = tuple(_RULES)


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
        return load_published(name)
    return load_from_folder(name, source)


@functools.cache
def _built_in(name: str) -> Task:
    kind, _, bare = name.rpartition("/")
    if bare in _ICL_NAMES and kind in ("", "icl"):
        unseen = Unseen(functools.partial(_is_unseen_step, bare))
        if bare in LIST_TASKS:
            unseen = Unseen(_is_step_of_unseen_triples, _is_unseen_triple)
        pairs = _icl_pairs(bare)
        return Task(bare, "icl", pairs, ICL_BEFORE, ICL_AFTER, source="builtin", unseen=unseen)
    if bare in _NATURAL and kind in ("", "natural"):
        table, before, after = _NATURAL[bare]
        unique = f"natural/{bare}" if bare in _ICL_NAMES else bare
        unseen = Unseen(functools.partial(_is_unseen_step, unique))
        pairs = _read_pairs(table)
        return Task(unique, "natural", pairs, before, after, source="builtin", unseen=unseen)
    names = task_names()
    lists = f"ra_lens.tasks.task_names() lists the {len(names)} built-in tasks."
    raise no_task(f"task {name!r}", name, names, lists)


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
    for kind, text in read_table("words/sequences.tsv"):
        words = text.split(" ")
        # After December comes January; after the last number of the list comes nothing.
        followers = words[1:] + (words[:1] if kind == "cycle" else [])
        pairs += [Pair(word, follower) for word, follower in zip(words, followers, strict=False)]
    return tuple(pairs)


def _read_pairs(table: str) -> tuple[Pair, ...]:
    return tuple(Pair(*row) for row in read_table(f"words/{table}.tsv"))


# ---- one word of three --------------------------------------------------------------------------


def word_pools() -> dict[str, tuple[str, ...]]:
    """Return the words that the list tasks draw from, by pool."""
    pools: dict[str, tuple[str, ...]] = {}
    for word, pool in read_table("words/pools.tsv"):
        pools[pool] = (*pools.get(pool, ()), word)
    return pools


def list_pairs(name: str, pools: Pools, n: int, seed: int = 0) -> tuple[Pair, ...]:
    """Return `n` different triples of a list task, each with its answer.

    The first pairs do not depend on `n`; another seed gives other triples.
    """
    rng = random.Random(stable_int("list task", name, seed))
    pairs: dict[str, Pair] = {}
    while len(pairs) < n:
        words = _draw_triple(name, pools, rng)
        text = SEPARATOR.join(words)
        pairs[text] = Pair(text, _RULES[name](words, pools))
    return tuple(pairs.values())


def _one_of(words: Triple, pool: Sequence[str]) -> str:
    return next(word for word in words if word in pool)


def _draw_triple(name: str, pools: Pools, rng: random.Random) -> Triple:
    form = rng.random()
    if name == "adjective_v_verb_3":
        form = 0.0
    elif name == "animal_v_object_3":
        form = _ADJECTIVE_VERB_SHARE
    if form < _ADJECTIVE_VERB_SHARE:
        words = [pick(rng, pools["adjective"]), *draw(rng, pools["verb"], 2)]
    elif form < _ADJECTIVE_VERB_SHARE + _ANIMAL_OBJECT_SHARE:
        words = [pick(rng, pools["animal"]), *draw(rng, pools["object"], 2)]
    else:
        words = draw(rng, [word for pool in pools.values() for word in pool], 3)
    a, b, c = draw(rng, words, 3)
    return a, b, c


# ---- what the embedded model never saw ----------------------------------------------------------


def _is_unseen_triple(query: Pair) -> bool:
    words = sorted(query.input.split(SEPARATOR))
    return stable_int("held-out triple", *words) % _LIST_ONE_IN == 0


def _is_step_of_unseen_triples(demonstration: Pair, query: Pair) -> bool:
    return _is_unseen_triple(demonstration) or _is_unseen_triple(query)


def _is_unseen_step(name: str, demonstration: Pair, query: Pair) -> bool:
    key = stable_int("held-out adjacency", name, demonstration.input, query.input)
    return key % _ADJACENCY_ONE_IN == 0


def is_held_out_query(task: Task, query: Pair) -> bool:
    """Return whether no training sequence contains `query`; possible in list tasks only.

    These are the tasks that pick one word out of three. Of their sets of three words one in seven
    is held out, in whatever order, as demonstration or as query.
    """
    unseen = task.unseen
    return unseen is not None and unseen.query is not None and unseen.query(query)


def is_held_out_adjacency(task: Task, demonstration: Pair, query: Pair) -> bool:
    """Return whether `query` never follows directly on `demonstration` in training.

    That is one step in ten of a built-in task; in list tasks those from or to a held-out query.
    """
    return task.unseen is not None and task.unseen.step(demonstration, query)


def held_out_prompts(task: Task, n: Whole, *, shots: Whole, seed: Whole = 0) -> list[Prompt]:
    """Return `n` seeded prompts that did not occur in training, as far as that is possible.

    Without demonstrations only those of list tasks can be: another prompt is the fact itself.

    Args:
        task: a built-in task.
        n: how many prompts, at least 1; queries repeat once every possible one was asked.
        shots: how many demonstrations in front of each question.
        seed: another seed gives other prompts.

    Raises:
        BadInput: `n` or `shots` is out of range for this task, or a number is no whole one.
    """
    n, shots, seed = whole("n", n), whole("shots", shots), whole("seed", seed)
    if n < 1 or not 0 <= shots < len(task.pairs):
        raise BadInput(
            f"n={n} and shots={shots}; task {task.name!r} with its {len(task.pairs)} pairs needs "
            f"n of at least 1 and shots from 0 to {len(task.pairs) - 1}."
        )
    queries = list(task.pairs)
    if task.unseen is not None and task.unseen.query is not None:
        queries = list(filter(task.unseen.query, queries))
    prompts: list[Prompt] = []
    order: list[Pair] = []
    for i in range(n):
        if not order:
            rng = random.Random(stable_int(task.name, seed, "order", i))
            order = draw(rng, queries, len(queries))
        query = order.pop()
        rng = random.Random(stable_int(task.name, seed, shots, i))
        prompts.append(task.build(query, _demonstrations(task, query, shots, rng)))
    return prompts


def _demonstrations(task: Task, query: Pair, shots: int, rng: random.Random) -> Sequence[Pair]:
    others = [pair for pair in task.pairs if pair.input != query.input]
    if shots == 0:
        return []
    last_ones = [pair for pair in others if is_held_out_adjacency(task, pair, query)]
    if not last_ones:
        raise BadInput(
            f"Task {task.name!r} has no held-out demonstration for {query.input!r}. "
            "Use Task.sample() for tasks that are not built in."
        )
    last = pick(rng, last_ones)
    return [*draw(rng, [pair for pair in others if pair != last], shots - 1), last]
