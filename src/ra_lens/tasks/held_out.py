"""Which prompts the embedded model never saw in training, so that its accuracy can be measured.

A fact has to be seen to be known, so what is held out is never a fact but a prompt:

* list tasks (the input is three words): one set of three words in seven never occurs in training,
  in whatever order, in whichever of the list tasks, as demonstration or as query;
* all other tasks: of the ways in which a question may follow a demonstration, one in ten per task
  never occurs in training. A held-out prompt of one shot or more ends in such a step. A prompt
  without demonstrations cannot be held out: it is the fact itself.

The training script and the tests both ask the functions below, which depend on the words alone.
`Task.split` of a built-in task keeps to the same rule: the test part of a list task consists of
such triples, and test prompts with demonstrations end in such a step (`ra_lens.tasks.split`). A
same-length set counts as the task that it was taken from.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ra_lens.errors import BadInput
from ra_lens.numbers import Whole, whole
from ra_lens.tasks._stable import draw, pick, stable_int
from ra_lens.tasks.lists import LIST_TASKS, SEPARATOR
from ra_lens.tasks.task import Pair, Prompt, Task

_LIST_ONE_IN = 7
_ADJACENCY_ONE_IN = 10


def is_held_out_query(task: Task, query: Pair) -> bool:
    """Return whether no training sequence contains `query`; possible in list tasks only."""
    if task.base_name not in LIST_TASKS:
        return False
    words = sorted(query.input.split(SEPARATOR))
    return stable_int("held-out triple", *words) % _LIST_ONE_IN == 0


def is_held_out_adjacency(task: Task, demonstration: Pair, query: Pair) -> bool:
    """Return whether `query` never follows directly on `demonstration` in training."""
    if task.base_name in LIST_TASKS:
        return is_held_out_query(task, demonstration) or is_held_out_query(task, query)
    key = stable_int("held-out adjacency", task.base_name, demonstration.input, query.input)
    return key % _ADJACENCY_ONE_IN == 0


def held_out_prompts(task: Task, n: Whole, *, shots: Whole, seed: Whole = 0) -> list[Prompt]:
    """Return `n` seeded prompts that did not occur in training, as far as that is possible.

    Without demonstrations, the prompts of tasks other than the list tasks did occur (see above).

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
    is_list = task.base_name in LIST_TASKS
    queries = [pair for pair in task.pairs if is_held_out_query(task, pair) or not is_list]
    prompts: list[Prompt] = []
    order: list[Pair] = []
    for i in range(n):
        if not order:
            order = draw(
                random.Random(stable_int(task.name, seed, "order", i)), queries, len(queries)
            )
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
