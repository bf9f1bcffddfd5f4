"""Which prompts an experiment reads: tasks, their splits, and what is drawn from each part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from ra_lens.errors import BadInput
from ra_lens.experiments.results import prompts_hash
from ra_lens.tasks import Prompt, Split, Task, load_task, task_names

Tasks = str | Task | Iterable[str | Task]

SHOTS = (0, 1, 5, 10)
"""Numbers of demonstrations of the paper's tables."""


def read_tasks(task: Tasks) -> list[Task]:
    """Read what an experiment was told to run on.

    Args:
        task: A task or the name of a built-in one; `all`, `icl` or `natural` for the built-in
            tasks of that kind; or several of these.

    Raises:
        BadInput: none, an unknown name, or one name twice.
    """
    given = [task] if isinstance(task, str | Task) else list(task)
    tasks: list[Task] = []
    for one in given:
        if isinstance(one, Task):
            tasks.append(one)
        elif one in ("all", "icl", "natural"):
            names = task_names() if one == "all" else task_names(one)
            tasks += [load_task(name) for name in names]
        else:
            tasks.append(load_task(one))
    names = [one.name for one in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not tasks or twice:
        found = f"task {twice[0]!r} twice" if twice else "no task"
        raise BadInput(f"found {found}; give each task once, or 'all'.")
    return tasks


def read_shots(shots: int | Sequence[int]) -> list[int]:
    """Read the numbers of demonstrations.

    Raises:
        BadInput: none, a negative one, or one twice.
    """
    given = [shots] if isinstance(shots, int) else list(shots)
    if not given or min(given) < 0 or len(set(given)) < len(given):
        raise BadInput(f"found shots={shots!r}; give different numbers from 0, such as (0, 1, 5).")
    return given


def task_facts(task: Task) -> dict[str, Any]:
    """What a task is, as settings of an experiment: another format or list is another setting."""
    return {
        "name": task.name,
        "kind": task.kind,
        "source": task.source,
        "format": [task.opening, task.before_subject, task.after_subject, task.separator],
        "pairs": prompts_hash([Prompt(pair.input, pair.output) for pair in task.pairs]),
    }


def asked(split: Split, *, shots: int, n: int | None, seed: int) -> list[Prompt]:
    """Prompts to evaluate on: the test part, whole or its first `n`."""
    if n is not None and n > len(split.test):
        n = None
    return split.prompts("test", shots=shots, n=n, seed=seed)


def learned(
    split: Split, part: Literal["train", "valid"], *, shots: int, n: int, seed: int
) -> list[Prompt]:
    """Prompts to rank heads with, as the paper's code takes them.

    The first `n` training pairs in split order; or `n` validation pairs drawn with replacement,
    which is the part that causal mediation by mean activations uses.
    """
    if part == "train":
        return split.prompts("train", shots=shots, n=n, seed=seed)
    return split.prompts("valid", shots=shots, n=n, seed=seed, with_replacement=True)


def check_counts(**counts: int | None) -> None:
    """Refuse numbers below 1.

    Raises:
        BadInput: one of them is.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise BadInput(f"found {name}={count}; it must be at least 1.")
