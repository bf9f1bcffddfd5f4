"""Which prompts an experiment reads: tasks, their splits, and what is drawn from each part."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal, get_args

from ra_lens.errors import BadInput, RALensWarning
from ra_lens.experiments.journal import settings_hash
from ra_lens.experiments.results import prompts_hash
from ra_lens.model import Lens
from ra_lens.numbers import Wholes, wholes
from ra_lens.questions import Accuracy, Questions
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
        BadInput: none, an unknown name, one name twice, or something that is no task.
    """
    if isinstance(task, bytes | Mapping | Set) or not isinstance(task, Task | Iterable):
        raise BadInput(
            f"found a {type(task).__name__} as task. Give a Task, the name of one, or a list of "
            "these; of the sets of same_length_sets list(sets.values())."
        )
    given = [task] if isinstance(task, str | Task) else list(task)
    tasks: list[Task] = []
    for one in given:
        if isinstance(one, Task):
            tasks.append(one)
        elif not isinstance(one, str):
            raise BadInput(
                f"found a {type(one).__name__} among the tasks. Give Tasks, or names of tasks."
            )
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


def read_shots(shots: Wholes) -> list[int]:
    """Read the numbers of demonstrations.

    Raises:
        BadInput: none, a negative one, one twice, or something that is no whole number.
    """
    given = wholes("shots", shots)
    if min(given) < 0 or len(set(given)) < len(given):
        raise BadInput(f"found shots={given}; give different numbers from 0, such as (0, 1, 5).")
    return given


def task_facts(task: Task) -> dict[str, str]:
    """What a task is: another list or format is another task, whatever its name."""
    form = [task.opening, task.before_subject, task.after_subject, task.separator]
    return {
        "source": task.source,
        "format": json.dumps(form, ensure_ascii=False),
        "pairs_hash": prompts_hash([Prompt(pair.input, pair.output) for pair in task.pairs]),
    }


def task_settings(lens: Lens, task: Task, prepend_bos: bool | None) -> dict[str, Any]:
    """What a task is to a model, as settings of an experiment: the tokens read are among them."""
    first = [task.prompt(pair) + task.answer(pair) for pair in task.pairs[:8]]
    tokens = [lens.encode(text, prepend_bos=prepend_bos) for text in first]
    return {"name": task.name, **task_facts(task), "tokens": settings_hash({"ids": tokens})}


def asked(split: Split, *, shots: int, n: int | None, seed: int) -> list[Prompt]:
    """Prompts to evaluate on: the test part, whole or its first `n`."""
    if n is not None and n > len(split.test):
        n = None
    return split.prompts("test", shots=shots, n=n, seed=seed)


def learned(
    split: Split, part: Literal["train", "valid"], *, shots: int, n: int, seed: int, count: str
) -> list[Prompt]:
    """Prompts to rank heads with, as the paper's code takes them.

    The first `n` training pairs in split order; or `n` validation pairs drawn with replacement,
    which is the part that causal mediation by mean activations uses.

    Raises:
        BadInput: fewer training pairs than `n`, which the message calls by the name `count`.
    """
    if part == "train":
        if n > len(split.train):
            raise BadInput(
                f"found {count}={n}, but task {split.task.name!r} has {len(split.train)} training "
                f"pairs. Give {count}={len(split.train)} or less."
            )
        return split.prompts("train", shots=shots, n=n, seed=seed)
    return split.prompts("valid", shots=shots, n=n, seed=seed, with_replacement=True)


def accuracy_settings(accuracy: Accuracy) -> dict[str, str]:
    """The setting that says what counts as right; none for the paper's, which came first.

    Raises:
        BadInput: something else is asked for.
    """
    if accuracy not in get_args(Accuracy):
        raise BadInput(f"found accuracy={accuracy!r}; give 'first token' or 'answer'.")
    return {} if accuracy == "first token" else {"accuracy": accuracy}


def answer_facts(questions: Questions, accuracy: Accuracy) -> dict[str, Any]:
    """What is marked, and how many first tokens the answers have: of one only, nothing is told."""
    firsts = {answer[0] for answer in questions.answers}
    return {"accuracy": accuracy, "n_first_tokens": len(firsts)}


def warn_of_first_tokens(
    lens: Lens,
    asked: Iterable[tuple[Task, Questions]],
    *,
    accuracy: Accuracy | None,
    by_first: Sequence[str] = (),
) -> None:
    """Warn of each task whose answers begin with one token, where that token alone is measured.

    Args:
        lens: The model.
        asked: Tasks with their questions; a task may come several times.
        accuracy: What is marked; None: nothing is.
        by_first: Names of the ranking methods that go by the probability of the first token.
    """
    warned: set[str] = set()
    for task, questions in asked:
        firsts = {answer[0] for answer in questions.answers}
        if len(firsts) > 1 or len(set(questions.prompts.ids)) < 2 or task.name in warned:
            continue
        so: list[str] = []
        if len(set(questions.answers)) == 1:
            so.append("they are all the same; take a task with several answers")
        elif accuracy == "first token":
            so.append(
                "accuracy by the first token is 1.0 for a model that begins so and guesses the "
                "rest; give accuracy='answer' (--accuracy answer), which takes whole answers"
            )
        if by_first:
            so.append(f"{' and '.join(by_first)} rank heads by the probability of that token alone")
        if so:
            warned.add(task.name)
            warnings.warn(
                f"all {len(questions)} answers asked for in task {task.name!r} begin with the "
                f"token {lens.decode(*firsts)!r} of {lens.name}: {', and '.join(so)}.",
                RALensWarning,
                stacklevel=3,
            )


def refuse_hooks(lens: Lens, out: object) -> None:
    """Refuse to write results of a model with hooks on it: another run could not tell them apart.

    Raises:
        BadInput: there are hooks, and an output file.
    """
    hooked = sorted(
        name for name, point in lens.hook_points.items() if getattr(point, "fwd_hooks", None)
    )
    if hooked and out is not None:
        raise BadInput(
            f"found hooks on the model ({', '.join(hooked[:3])}{', …' * (len(hooked) > 3)}) and "
            "out=: what they do is not among the settings that results are found again by. Leave "
            "out= away and write the table with write_results, or remove the hooks."
        )
