"""Running an experiment: which prompts it reads, how it goes on after a kill, and its table.

    protocol = Protocol.read(shots, split, seed, prepend_bos, batch_size, out, progress)
    with experiment("patching", lens, tasks, protocol, accuracy=accuracy, n_mean=25) as run:
        if run.finished is not None:  # an earlier call has written it
            return run.finished
        return run.frame("Patching", run.cells("n_mean"), rows, steps=len(steps))

A cell is one task with one number of demonstrations. `rows` gives the rows of a cell, one list per
step of the progress bar; what it computes with `cell.unit` is kept on disk (`journal`).
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, Literal, TypeVar, cast, get_args

import pandas as pd
from tqdm.auto import tqdm

from ra_lens.errors import BadInput, RALensWarning
from ra_lens.experiments.engines import Engine, RayEngine, read_engine
from ra_lens.experiments.facts import methods_facts, model_facts, task_facts, task_settings
from ra_lens.experiments.facts import prompts_hash as prompts_hash  # experiments take it from here
from ra_lens.experiments.grid import Grid, open_grid
from ra_lens.experiments.grid_run import frame_of_grid, need_source
from ra_lens.experiments.journal import Journal, as_frame, finished_results, open_journal
from ra_lens.files import names_a_folder
from ra_lens.heads import HeadScores, rank_heads
from ra_lens.heads.ablation import ABLATIONS
from ra_lens.heads.registry import Part, find_method, find_methods
from ra_lens.model import Lens, PrependBos
from ra_lens.numbers import BatchSize, Whole, Wholes, flag, read_batch_size, whole, wholes
from ra_lens.questions import Accuracy, FwdHooks, Marks, Questions, ask, marked, read_questions
from ra_lens.tables import write_results
from ra_lens.tasks import (
    Demonstrations,
    Prompt,
    Split,
    SplitRule,
    Task,
    load_task,
    task_names,
    with_corrupted,
)
from ra_lens.tasks.task import check_demonstrations
from ra_lens.text import short, shots_name

Tasks = str | Task | Iterable[str | Task]
Row = dict[str, Any]
Choice = TypeVar("Choice", bound=str)
T = TypeVar("T")

SHOTS = (0, 1, 5, 10)
"""Numbers of demonstrations of the paper's tables."""

_FEW = 0.3  # share of right answers of a whole model, below which there is little to measure

METHODS = ("ra", "fa", "cm1", "cm2", "index", "random")
"""The paper's methods."""


@dataclass(frozen=True)
class Protocol:
    """Arguments that the experiments share, read; `vars` of it are such arguments again."""

    shots: list[int]
    split: SplitRule
    seed: int
    prepend_bos: PrependBos
    batch_size: int | Literal["auto"]
    out: str | Path | None
    progress: bool
    demonstrations: Demonstrations = "own"
    engine: Engine = "local"
    part: str | None = None

    @classmethod
    def read(
        cls,
        shots: Wholes = SHOTS,
        split: SplitRule = "code",
        seed: Whole = 0,
        prepend_bos: PrependBos = None,
        batch_size: BatchSize = 64,
        out: str | Path | None = None,
        progress: bool = True,
        demonstrations: Demonstrations = "own",
        engine: Engine = "local",
        part: str | None = None,
    ) -> Protocol:
        """Read the arguments, or raise where they are no whole numbers, too small or unknown."""
        check_demonstrations(demonstrations)
        counts = wholes("shots", shots)
        if min(counts) < 0 or len(set(counts)) < len(counts):
            raise BadInput(
                f"found shots={counts}; give different numbers from 0, such as (0, 1, 5)."
            )
        seed, at_a_time = whole("seed", seed, least=0), read_batch_size(batch_size)
        shared = out, progress, demonstrations, engine, part
        read = cls(counts, split, seed, prepend_bos, at_a_time, *shared)
        _refuse_a_file(read)
        return read

    @property
    def ray(self) -> RayEngine | None:
        """The engine, where it is not this process."""
        return read_engine(self.engine)

    @property
    def share(self) -> tuple[int, int] | None:
        """Which part of the grid is computed, i of n."""
        return None if self.part is None else read_part(self.part)


def read_part(part: str) -> tuple[int, int]:
    """Read which part of a grid is computed: `3/8`."""
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", str(part))
    if found is None or int(found[1]) > int(found[2]):
        raise BadInput(f"found part={part!r}; give which of how many, such as '1/8' to '8/8'.")
    return int(found[1]), int(found[2])


def _refuse_a_file(protocol: Protocol) -> None:
    """Refuse a part, or Ray, where finished cells have no folder to go to."""
    ray, share, out = protocol.ray, protocol.share, protocol.out
    if ray is not None and share is not None:
        raise BadInput("found part= and engine='ray', which splits a grid itself. Leave out one.")
    folder = names_a_folder(out)
    if (share is not None and not folder) or (ray is not None and not folder and out is not None):
        what = "engine='ray'" if share is None else f"part={protocol.part!r}"
        raise BadInput(
            f"found {what} and out={None if out is None else str(out)!r}, which is no folder. Give "
            "out= a folder, for a file of each finished cell; ra-lens results FOLDER --merge FILE "
            "makes one table of them."
        )


def read_tasks(task: Tasks) -> list[Task]:
    """Read tasks, names of built-in ones, or `all`, `icl`, `natural` for all of that kind."""
    if isinstance(task, bytes | Mapping | Set) or not isinstance(task, Task | Iterable):
        raise BadInput(
            f"found a {type(task).__name__} as task. Give a Task, the name of one, or a list of "
            "these; of the sets of same_length_sets list(sets.values())."
        )
    tasks: list[Task] = []
    for one in [task] if isinstance(task, str | Task) else task:
        if isinstance(one, Task):
            tasks.append(one)
        elif not isinstance(one, str):
            raise BadInput(
                f"found a {type(one).__name__} among the tasks. Give Tasks, or names of tasks."
            )
        elif one in ("all", "icl", "natural"):
            names = task_names() if one == "all" else task_names(one)
            tasks += map(load_task, names)
        else:
            tasks.append(load_task(one))
    names = [one.name for one in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not tasks or twice:
        found = f"task {twice[0]!r} twice" if twice else "no task"
        raise BadInput(f"found {found}; give each task once, or 'all'.")
    return tasks


def read_methods(methods: object) -> list[str]:
    """Read names of ranking methods."""
    return [method.name for method in find_methods(methods)]


def read_some(
    name: str, given: Choice | Iterable[Choice], choices: tuple[Choice, ...]
) -> list[Choice]:
    """Read one or several of some choices."""
    alone = isinstance(given, str) or not isinstance(given, Iterable)
    some = cast("list[Choice]", [given] if alone else list(given))
    if not some or any(one not in choices for one in some) or len(set(some)) < len(some):
        *others, last = map(repr, choices)
        several = "both" if len(others) == 1 else "several"
        raise BadInput(f"found {name}={given!r}; give {', '.join(others)}, {last} or {several}.")
    return some


def read_accuracy(accuracy: Accuracy) -> Accuracy:
    """Read what counts as right."""
    if accuracy not in get_args(Accuracy):
        raise BadInput(f"found accuracy={accuracy!r}; give 'first token' or 'answer'.")
    return accuracy


# ---- running ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Run:
    """An experiment that has begun; `finished` is its table, where an earlier call wrote it."""

    lens: Lens
    tasks: Sequence[Task]
    protocol: Protocol
    methods: Sequence[str]
    answer_in_input: bool
    accuracy: Accuracy | None
    settings: Mapping[str, Any]
    journal: Journal
    finished: pd.DataFrame | None
    grid: Grid | None = None  # where cells are kept one by one

    def cells(
        self,
        count: str | None,
        *,
        part: Part | None = None,
        also: Sequence[Part] = (),
        twins: bool = False,
    ) -> list[Cell]:
        """Make all prompts before anything is computed, so that every mistake shows at once.

        The setting called `count` says how many prompts heads are ranked with, or maps taken of;
        they have `rank_shots` demonstrations, if that is set, or as many as the cell. None: the
        experiment has no such prompts. `part` is that of the task which all of them are from; None:
        those that methods are for, and `also` others. Those of the train part have corrupted twins,
        where a method needs them, or `twins` are asked for. Test prompts are read if answers are
        marked, `n_test` of them if that is set.
        """
        cells: list[Cell] = []
        chosen = list(map(find_method, self.methods))
        parts: list[Part] = [*also, *(one.split for one in chosen)] or ["train"]
        twins = twins or any(one.twins for one in chosen)
        for task in self.tasks:
            split = task.split(self.protocol.split)
            for k in self.protocol.shots:
                asked: list[Prompt] = []
                if self.accuracy is not None:
                    n = self.settings["n_test"]
                    n = None if n is None else min(n, len(split.test))
                    asked = split.prompts("test", shots=k, n=n, **self._drawn)
                    if self.settings.get("others") == "resample":
                        asked = self._with_twins(task, asked)
                shots = self.settings.get("rank_shots")
                learned: dict[Part, list[Prompt]] = {}
                if count is not None:
                    n_shots = k if shots is None else shots
                    for of in dict.fromkeys(parts):
                        learned[of] = self.learned(split, part or of, n_shots, count, twins=twins)
                cells.append(Cell(self, task, k, learned, asked))
        if count is not None:
            self._warn_of_first_tokens(cells)
        return cells

    def _with_twins(self, task: Task, asked: list[Prompt]) -> list[Prompt]:
        """Give questions their corrupted twins; those that have none are left out, and told."""
        found = [twin for twin in map(self._with_twin, asked) if twin is not None]
        why = "no other pair of the task makes one of as many tokens with another answer"
        if not found:
            raise BadInput(
                f"none of the {len(asked)} questions of task {task.name!r} has a corrupted twin: "
                f"{why}. Take pairs of one length (same_length_sets), or others='mean'."
            )
        if len(found) < len(asked):
            warnings.warn(
                f"{len(asked) - len(found)} of {len(asked)} questions of task {task.name!r} are "
                f"left out, since {why}.",
                RALensWarning,
                stacklevel=5,
            )
        return found

    def _with_twin(self, prompt: Prompt) -> Prompt | None:
        """Give a prompt its corrupted twin; None where no other is as long."""
        encode = partial(self.lens.encode, prepend_bos=self.protocol.prepend_bos)
        try:
            return with_corrupted([prompt], encode, seed=self.protocol.seed)[0]
        except BadInput:
            return None

    def learned(
        self, split: Split, part: Part, shots: int, count: str, *, twins: bool = False
    ) -> list[Prompt]:
        """Take the first training pairs, or draw from the validation part with replacement.

        With `twins` the first training pairs that have one.
        """
        n = self.settings[count]
        if part == "train" and n > len(split.train):
            raise BadInput(
                f"found {count}={n}, but task {split.task.name!r} has {len(split.train)} training "
                f"pairs. Give {count}={len(split.train)} or less."
            )
        if part == "train" and twins:
            return self._paired(split, shots, count)
        drawn = part == "valid"
        return split.prompts(part, shots=shots, n=n, with_replacement=drawn, **self._drawn)

    def _paired(self, split: Split, shots: int, count: str) -> list[Prompt]:
        """Take the first training pairs that have a corrupted twin, with it."""
        n, there = self.settings[count], len(split.train)
        known: dict[Prompt, Prompt | None] = {}

        def paired(prompt: Prompt) -> Prompt | None:
            if prompt not in known:
                known[prompt] = self._with_twin(prompt)
            return known[prompt]

        found: list[Prompt] = []
        # Shared demonstrations are none of those asked: how many are asked decides on them.
        most = there if self.protocol.demonstrations == "own" else there - shots
        for asked in range(n, max(n, most) + 1):  # of fewer the first raises, and says why
            prompts = split.prompts("train", shots=shots, n=asked, **self._drawn)
            found = [twin for twin in map(paired, prompts) if twin is not None]
            if len(found) >= n:
                return found[:n]
        raise BadInput(
            f"found {count}={n}, but of {max(most, 0)} training prompts of task "
            f"{split.task.name!r} {len(found)} have a corrupted twin: another pair as long in "
            f"tokens, with another answer. Give a smaller {count}, or leave out what needs twins: "
            "'resample', 'nap', 'nap_ig'."
        )

    @property
    def _drawn(self) -> dict[str, Any]:
        """How demonstrations are drawn."""
        return {"seed": self.protocol.seed, "demonstrations": self.protocol.demonstrations}

    def read(self, prompts: Sequence[Prompt]) -> Questions:
        """Tokenise prompts and their answers."""
        return read_questions(self.lens, prompts, prepend_bos=self.protocol.prepend_bos)

    def _warn_of_first_tokens(self, cells: Iterable[Cell]) -> None:
        """Warn of tasks whose answers begin with one token, where that token alone is measured."""
        by_first = [
            name
            for name in self.methods
            if name in ("cm1", "cm1_last", "cm2")
            or (_reads_answers(name) and not self.answer_in_input)
        ]
        read = (
            [(cell.task, cell.questions) for cell in cells]
            if self.accuracy
            else [(cell.task, self.read(cell.given(m))) for cell in cells for m in by_first]
        )
        warned: set[str] = set()
        for task, questions in read:
            firsts = {answer[0] for answer in questions.answers}
            if len(firsts) > 1 or len(set(questions.prompts.ids)) < 2 or task.name in warned:
                continue
            so: list[str] = []
            if len(set(questions.answers)) == 1:
                so.append("they are all the same; take a task with several answers")
            elif self.accuracy == "first token":
                so.append(
                    "accuracy by the first token is 1.0 for a model that begins so and guesses the "
                    "rest; give accuracy='answer' (--accuracy answer), which takes whole answers"
                )
            if by_first:
                methods = " and ".join(by_first)
                so.append(f"{methods} rank heads by the probability of that token alone")
            if so:
                warned.add(task.name)
                token = self.lens.decode(*firsts)
                warnings.warn(
                    f"all {len(questions)} answers asked for in task {task.name!r} begin with the "
                    f"token {token!r} of {self.lens.name}: {', and '.join(so)}.",
                    RALensWarning,
                    stacklevel=4,
                )

    def frame(
        self,
        title: str,
        cells: Sequence[Cell],
        rows: Callable[[Cell], Iterator[list[Row]]],
        *,
        steps: int,
        pieces: Sequence[str] = (),
        whole: Callable[[Cell], list[Row]] | None = None,
        so: str = "",
    ) -> pd.DataFrame:
        """Compute the rows of every cell, which come in some steps, and write the table of them.

        A grid may compute `pieces` of cells one by one, anywhere: `rows` of a cell with the name of
        one in `cell.piece` are those of that piece, and those of all pieces, in order, are the
        cell's. `rows` then reads the cell it is given and nothing else.

        Where answers are marked, `whole` gives those of the whole model as it is, which are told
        before all else; a warning of cells where few are right says `so`.
        """
        if self.grid is not None:
            frame, accuracies = frame_of_grid(
                self, self.grid, title, cells, rows, pieces=pieces, whole=whole
            )
            warn_of_few(accuracies, so)
            return frame
        found: list[Row] = []
        total = len(cells) * steps
        with tqdm(total=total, desc=title, disable=not self.protocol.progress) as bar:
            if whole is not None:
                self._tell_accuracy(cells, whole, bar, so)
            for cell in cells:
                bar.set_postfix_str(f"{cell.task.name}, shots: {cell.shots}")
                for some in rows(cell):
                    found += some
                    bar.update()
        frame = as_frame(found, self.settings)
        if self.protocol.out is not None:
            write_results(frame, self.protocol.out)
        return frame

    def _tell_accuracy(
        self, cells: Sequence[Cell], whole: Callable[[Cell], list[Row]], bar: Any, so: str
    ) -> None:
        """Say how the whole model answers, a line for each task, and warn where few are right."""
        found: list[tuple[Cell, float]] = []
        for task, of_task in groupby(cells, key=lambda cell: cell.task.name):
            told: list[str] = []
            for cell in of_task:
                bar.set_postfix_str(f"whole model: {task}, shots: {cell.shots}")
                found.append((cell, fmean(row["top1"] for row in whole(cell))))
                told.append(f"{short(found[-1][1])} with {shots_name(cell.shots)}")
            if self.protocol.progress:
                bar.write(f"Whole model, {task}: accuracy {', '.join(told)}", file=sys.stderr)
        warn_of_few(found, so)


def warn_of_few(accuracies: Iterable[tuple[Cell, float]], so: str) -> None:
    """Warn of the cells where the whole model, of this accuracy, answers few questions right."""
    poor: dict[str, list[str]] = {}
    for cell, accuracy in accuracies:
        if accuracy < _FEW:
            said = f"{short(accuracy)} with {shots_name(cell.shots)}"
            poor.setdefault(cell.task.name, []).append(said)
    if poor:
        few = "; ".join(f"{task} ({', '.join(said)})" for task, said in poor.items())
        warnings.warn(
            f"the whole model answers less than {short(_FEW)} of the questions right: {few}. {so} "
            "Take tasks that the model can do, more examples (shots), or another token in front "
            "(prepend_bos=, --bos).",
            RALensWarning,
            stacklevel=5,
        )


@dataclass(frozen=True, eq=False)
class Cell:
    """One task with one number of demonstrations.

    Heads are ranked with the prompts `learned`, or maps taken of them; the others are asked.
    """

    run: Run
    task: Task
    shots: int
    learned: dict[Part, list[Prompt]]
    asked: list[Prompt]
    piece: str | None = None  # of the cell, which alone is asked for; None: all
    _together: dict[Part, dict[str, HeadScores]] = field(
        default_factory=dict[Part, dict[str, HeadScores]], init=False
    )
    _kept: dict[str, Any] = field(default_factory=dict[str, Any], init=False)
    _seconds: dict[tuple[str, int], float] = field(
        default_factory=dict[tuple[str, int], float], init=False
    )

    @cached_property
    def questions(self) -> Questions:
        """The prompts asked, as tokens."""
        return self.run.read(self.asked)

    def unit(self, key: str, compute: Callable[[], Any]) -> Any:
        """Give a result that is in the journal, or is computed and goes there."""
        return self.run.journal.unit(f"{self.task.name}|{self.shots}|{key}", compute)

    def kept(self, name: str, compute: Callable[[], T]) -> T:
        """Give what is computed the first time and kept while the cell is, not in the journal."""
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

    def costs(self, method: str, draw: int = 0) -> Row:
        """Say what ranking by a method takes: passes of one prompt, and seconds.

        It is ranked for that where the ranking is in the journal, but not its time.
        """
        passes, n = find_method(method).passes, len(self.given(method))
        n_heads = sum(self.run.lens.sites.n_heads)
        if (method, draw) not in self._seconds:
            self.ranked(method, draw)
        return {
            "forwards": None if passes is None else n * passes.forwards(n_heads),
            "backwards": None if passes is None else n * passes.backward,
            "seconds": round(self._seconds[method, draw], 3),
        }

    def given(self, method: str) -> list[Prompt]:
        """Give the prompts that a method ranks heads with."""
        return self.learned[find_method(method).split]

    def ranked(self, method: str, draw: int = 0) -> HeadScores:
        """Rank the heads by a method, the first time; those that share a run in one."""
        chosen = find_method(method)
        if chosen.needs is None:
            name = f"ranked|{method}|{draw}"
            return self.kept(name, lambda: self._ranked([method], draw)[method])
        if chosen.split not in self._together:
            every = map(find_method, self.run.methods)
            sharing = [m.name for m in every if m.needs is not None and m.split == chosen.split]
            self._together[chosen.split] = self._ranked(sharing)
        return self._together[chosen.split][method]

    def _ranked(self, methods: list[str], draw: int = 0) -> dict[str, HeadScores]:
        """Rank the heads by methods of one part of the task."""
        protocol, began = self.run.protocol, perf_counter()
        ranked = rank_heads(
            self.run.lens.module,
            self.given(methods[0]),
            methods=methods,
            seed=protocol.seed,
            draw=draw,
            answer_in_input=self.run.answer_in_input,
            prepend_bos=protocol.prepend_bos,
            batch_size=protocol.batch_size,
            progress=protocol.progress,
        )
        seconds = perf_counter() - began
        self._seconds.update(dict.fromkeys(((name, draw) for name in methods), seconds))
        return ranked

    def marked(
        self,
        questions: Questions,
        hooks_of: Callable[[list[int]], FwdHooks],
        *,
        variants: Sequence[int] | None = None,
    ) -> Marks:
        """Ask questions, with the hooks of each batch, and mark the answers.

        Questions of one variant have the same hooks (None: all have); shared demonstrations run
        once for each.
        """
        shared = self.run.protocol.demonstrations == "shared"
        variants = [0] * len(questions) if variants is None else variants
        return ask(
            self.run.lens,
            questions,
            hooks_of,
            accuracy=self.run.accuracy or "first token",
            batch_size=self.run.protocol.batch_size,
            variants=variants if shared else None,
        )

    def scored(self, marks: Marks) -> list[Row]:
        """Give what is measured of some answers: the mean, or a row for each if that was asked."""
        if not self.run.settings.get("each_question"):
            return [marked(marks)]
        each = (marks.part(slice(i, i + 1)) for i in range(len(marks)))
        return [{"question": i, **marked(one)} for i, one in enumerate(each)]

    def rows(self, values: Iterable[Row], **made: Any) -> list[Row]:
        """Make rows of a table: of which cell, the values, what is marked, how they were made."""
        cell = {"task": self.task.name, "kind": self.task.kind, "n_shots": self.shots}
        facts = {**task_facts(self.task), **made}
        if self.run.accuracy is not None:
            # Where all answers begin with one token, its accuracy tells nothing.
            n_first_tokens = len({answer[0] for answer in self.questions.answers})
            facts = {"accuracy": self.run.accuracy, "n_first_tokens": n_first_tokens, **facts}
        return [{**cell, **row, **facts} for row in values]


@contextmanager
def experiment(
    name: str,
    lens: Lens,
    tasks: Sequence[Task],
    protocol: Protocol,
    *,
    methods: Sequence[str] = (),
    answer_in_input: object = True,
    accuracy: Accuracy | None = None,
    **settings: Any,
) -> Generator[Run, None, None]:
    """Begin an experiment, or go on with it; its journal goes when nothing was raised in it.

    It refuses dropout, hooks on the model where there is an output file, and an output file or
    journal that cannot be written or holds something else.
    """
    answer_in_input = flag("answer_in_input", answer_in_input)
    lens.refuse_dropout()
    refuse_hooks(lens, protocol.out)
    ray = protocol.ray
    if ray is not None:
        need_source(lens)
        hooked = hooked_points(lens)
        if hooked:
            raise BadInput(
                f"found hooks on the model ({', '.join(hooked[:3])}{', …' * (len(hooked) > 3)}), "
                "which workers of Ray do not have. Remove them, or leave engine= out."
            )
    where = {} if ray is None or ray.device is None else {"device": ray.device.split(":")[0]}
    settings = {
        "experiment": name,
        **model_facts(lens),
        **where,
        **({"methods": methods_facts(methods, protocol.out)} if methods else {}),
        **settings,
        "split": protocol.split,
        **({"answer_in_input": answer_in_input} if methods else {}),
        "seed": protocol.seed,
        "prepend_bos": protocol.prepend_bos,
        "batch_size": protocol.batch_size,
        # They came later: without them the results of before are found.
        **({"accuracy": accuracy} if accuracy == "answer" else {}),
        **({"demonstrations": "shared"} if protocol.demonstrations == "shared" else {}),
        "tasks": [task_settings(lens, task, protocol.prepend_bos) for task in tasks],
        "shots": protocol.shots,
    }
    about = lens, tasks, protocol, methods, answer_in_input, accuracy, settings
    out = protocol.out
    if names_a_folder(out) or ray is not None:
        # Without out= what Ray gives is kept until the table is made of it.
        with TemporaryDirectory(prefix="ra_lens_") as temporary:
            grid = open_grid(temporary if out is None else out, settings)
            yield Run(*about, Journal({}), None, grid)
        return
    finished = finished_results(out, settings)
    with open_journal(out if finished is None else None, settings) as journal:
        yield Run(*about, journal, finished)


def hooked_points(lens: Lens) -> list[str]:
    """Give the names of the hook points with a hook of the user's."""
    return sorted(at for at, point in lens.hook_points.items() if getattr(point, "fwd_hooks", 0))


def refuse_hooks(lens: Lens, out: str | Path | None) -> None:
    """Refuse hooks on a model whose results are to be found again."""
    hooked = hooked_points(lens)
    if hooked and out is not None:
        raise BadInput(
            f"found hooks on the model ({', '.join(hooked[:3])}{', …' * (len(hooked) > 3)}) and "
            "out=: what they do is not among the settings that results are found again by. Leave "
            "out= away and write the table with write_results, or remove the hooks."
        )


def _reads_answers(name: str) -> bool:
    """Whether a method's loss is that of the whole answer, where it is in the input."""
    return find_method(name).needs is not None or name in ABLATIONS
