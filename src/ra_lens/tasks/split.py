"""How the pairs of a task are divided into train, valid and test, and which prompts that gives.

The pairs are shuffled, and each part is a slice of the shuffled list:

* rule "code", what the code of Katz & Wolf, "Reversed Attention" does: scikit-learn's
  ``train_test_split`` with ``test_size=0.3`` and one seed, twice. Of n pairs, the first ⌈0.3 n⌉ are
  set aside and the others are `train`; of those set aside, shuffled again, the first 30 % (rounded
  up) are `valid` and the others are `test`. That is 70 %, 9 % and 21 %.
* rule "text", what the paper says: the first ⌈n / 3⌉ of the same first shuffle are `test`. The text
  does not say how the rest was divided; here the next ⌈0.09 n⌉ are `valid`, the share that they
  have in the code, and the others are `train`.

The shuffle is ``numpy.random.RandomState(seed).permutation``, which numpy keeps as it is for good,
so the parts are the published ones on every machine.

A list task that is built in (`ra_lens.tasks.lists.LIST_TASKS`) has parts of the same sizes at most,
made so that the embedded model is measured on what it never saw: `test` takes only triples held out
from its training, in the order of the first shuffle, and is smaller where there are too few; the
next ones that are not held out are `valid`, and all others are `train`. In the other built-in tasks
no fact is held out, but steps from a demonstration to a query are: test prompts with demonstrations
end in such a step wherever `train` has one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import get_args

from ra_lens.errors import BadInput
from ra_lens.tasks._stable import draw, pick, stable_int
from ra_lens.tasks.held_out import is_held_out_adjacency, is_held_out_query
from ra_lens.tasks.lists import LIST_TASKS
from ra_lens.tasks.task import Pair, Part, Prompt, Split, SplitRule, Task

Pairs = tuple[Pair, ...]


def divide(task: Task, rule: SplitRule, seed: int) -> tuple[Pairs, Pairs, Pairs]:
    """Return the train, valid and test pairs of a task; see the module.

    Raises:
        BadInput: too few pairs for three parts, or no such rule or seed.
    """
    if rule not in get_args(SplitRule):
        raise BadInput(
            f"rule={rule!r}; needed is 'code' (70/9/21, as published) or 'text' (a third test)."
        )
    if not 0 <= seed < 2**32:
        raise BadInput(f"seed={seed}; the seed of a split is a number from 0 to {2**32 - 1}.")
    pairs = task.pairs
    n_train, n_valid, n_test = _sizes(rule, len(pairs))
    if min(n_train, n_valid, n_test) < 1:
        raise BadInput(
            f"Task {task.name!r} has {len(pairs)} pairs; a train, a valid and a test part by the "
            f"rule {rule!r} need at least {4 if rule == 'code' else 3}."
        )
    order = [pairs[i] for i in _permutation(len(pairs), seed)]
    if task.source == "builtin" and task.base_name in LIST_TASKS:
        return _divide_lists(task, order, n_valid, n_test)
    if rule == "text":
        return _slices(order, n_test, n_valid)
    rest = order[: n_valid + n_test]
    rest = [rest[i] for i in _permutation(len(rest), seed)]
    return tuple(order[len(rest) :]), tuple(rest[:n_valid]), tuple(rest[n_valid:])


def ask(
    split: Split, part: Part, shots: int, n: int | None, seed: int, with_replacement: bool
) -> list[Prompt]:
    """Return the prompts of `Split.prompts`.

    Raises:
        BadInput: there is no such part, or `n` or `shots` is out of range.
    """
    queries = _queries(split, part, n, seed, with_replacement)
    if shots < 0:
        raise BadInput(f"shots={shots}; the number of demonstrations is 0 or more.")
    task = split.task
    # Test triples of a list task are held out themselves, and so is every step to them.
    choose_last = part == "test" and task.source == "builtin" and task.base_name not in LIST_TASKS
    prompts: list[Prompt] = []
    for i, query in enumerate(queries):
        others = [pair for pair in split.train if pair.input != query.input]
        if shots > len(others):
            raise BadInput(
                f"shots={shots}, but the train part of task {task.name!r} has {len(others)} pairs "
                f"beside the query {query.input!r}. Ask for at most {len(others)} shots."
            )
        rng = random.Random(stable_int(task.name, part, seed, shots, i))
        shown = _demonstrations(task, query, others, shots, rng, choose_last)
        prompts.append(task.build(query, shown))
    return prompts


def _queries(
    split: Split, part: Part, n: int | None, seed: int, with_replacement: bool
) -> Sequence[Pair]:
    parts = {"train": split.train, "valid": split.valid, "test": split.test}
    if part not in parts:
        raise BadInput(f"part={part!r}; needed is 'train', 'valid' or 'test'.")
    pairs, name = parts[part], split.task.name
    if not pairs:
        raise BadInput(f"The {part} part of task {name!r} is empty; it cannot be asked for.")
    count = len(pairs) if n is None else n
    if count < 1:
        raise BadInput(f"n={n} prompts were asked for; at least 1 is needed.")
    if with_replacement:
        rng = random.Random(stable_int(name, part, seed, "queries"))
        return [pick(rng, pairs) for _ in range(count)]
    if count > len(pairs):
        raise BadInput(
            f"n={n} prompts were asked for, but the {part} part of task {name!r} has "
            f"{len(pairs)} pairs. Ask for at most {len(pairs)}, leave n out for all of them, or "
            "draw them with_replacement=True."
        )
    return pairs[:count]


def _demonstrations(
    task: Task,
    query: Pair,
    others: Sequence[Pair],
    shots: int,
    rng: random.Random,
    choose_last: bool,
) -> list[Pair]:
    if shots == 0:
        return []
    last_ones: list[int] = []
    if choose_last:
        last_ones = [i for i, pair in enumerate(others) if is_held_out_adjacency(task, pair, query)]
    if not last_ones:
        return draw(rng, others, shots)
    last = pick(rng, last_ones)
    return [*draw(rng, [*others[:last], *others[last + 1 :]], shots - 1), others[last]]


def _sizes(rule: SplitRule, n: int) -> tuple[int, int, int]:
    if rule == "text":
        test, valid = math.ceil(n / 3), math.ceil(9 * n / 100)
        return n - test - valid, valid, test
    # In floating point, as scikit-learn does it: 0.3 n is not always what it is on paper.
    rest = math.ceil(0.3 * n)
    valid = math.ceil(0.3 * rest)
    return n - rest, valid, rest - valid


def _permutation(n: int, seed: int) -> list[int]:
    from numpy.random import RandomState  # late: tasks can be loaded without numpy

    return RandomState(seed).permutation(n).tolist()


def _slices(order: Sequence[Pair], n_test: int, n_valid: int) -> tuple[Pairs, Pairs, Pairs]:
    end = n_test + n_valid
    return tuple(order[end:]), tuple(order[n_test:end]), tuple(order[:n_test])


def _divide_lists(
    task: Task, order: Sequence[Pair], n_valid: int, n_test: int
) -> tuple[Pairs, Pairs, Pairs]:
    held = [pair for pair in order if is_held_out_query(task, pair)]
    seen = [pair for pair in order if not is_held_out_query(task, pair)]
    test, spare = held[:n_test], held[n_test:]
    if not test or len(seen) <= n_valid:
        raise BadInput(
            f"Task {task.name!r} has {len(held)} pairs that the embedded model never saw and "
            f"{len(seen)} others; its split needs at least 1 and {n_valid + 1}. Take more pairs."
        )
    return (*seen[n_valid:], *spare), tuple(seen[:n_valid]), tuple(test)
