"""What `ra-lens rank`, `perturb`, `patch` and `compare` do, in the order they do it; imports torch.

What can be wrong without a model is found before one is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import typer
from torch import nn

from ra_lens.cli import show_comparison, show_experiments, show_sweep
from ra_lens.cli.commands import DEMO, load
from ra_lens.cli.many_values import numbers, split_values, whole_numbers
from ra_lens.cli.quiet import offline, quiet
from ra_lens.cli.reading import check_device, unescaped
from ra_lens.errors import BadInput
from ra_lens.experiments import (
    PAPER_SCALES,
    area_under_curve,
    patching_sweep,
    perturbation_test,
    rank_tasks,
    read_results,
    write_results,
)
from ra_lens.experiments.paper import compare_with_paper, paper_tables
from ra_lens.experiments.perturbation import Rule
from ra_lens.experiments.runner import METHODS, SHOTS, Protocol, read_methods
from ra_lens.files import PAGE, check_output, is_folder, user_path
from ra_lens.model import ModelKind
from ra_lens.patching import Where
from ra_lens.questions import Accuracy, Metric
from ra_lens.tables import TABLE
from ra_lens.tasks import SplitRule, Task, load_task, task_names

_GROUPS: dict[str, Literal["icl", "natural"] | None] = {
    "all": None,
    "icl": "icl",
    "natural": "natural",
}


_ACCURACIES: dict[str, Accuracy] = {"first-token": "first token", "answer": "answer"}


@dataclass(frozen=True)
class Setup:
    """What the three experiments have in common, as typed."""

    model: str
    task: Sequence[str]
    source: str
    shots: Sequence[str] | None
    seed: int
    split: SplitRule
    separator: str | None
    natural: Literal["template", "qa"]
    bos: bool | None
    batch_size: int
    device: str | None
    dtype: Literal["float32", "bfloat16", "float16"]
    kind: ModelKind | None
    out: Path | None
    figure: Path | None
    as_json: bool
    quiet: bool
    debug: bool

    def prepared(self, methods: Sequence[str] | None = None) -> tuple[list[Task], Protocol]:
        """Check what was typed, before a model is loaded; give the tasks and what is shared."""
        if self.model == DEMO or is_folder(self.model):
            offline()
        if self.out is not None:
            check_output(self.out, TABLE)
        if self.figure is not None:
            check_output(self.figure, PAGE)
        check_device(self.device)
        read_methods(METHODS if methods is None else methods)
        shots = whole_numbers(self.shots, "--shots")
        protocol = Protocol.read(
            SHOTS if shots is None else shots,
            self.split,
            self.seed,
            self.bos,
            self.batch_size,
            self.out,
            not self.quiet,
        )
        return read_tasks(self), protocol

    def load(self) -> nn.Module:
        """Load the model."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return load(self.model, self.kind, self.device, debug=self.debug, dtype=dtype)


def read_tasks(setup: Setup) -> list[Task]:
    """Read the tasks and the way to ask them.

    Raises:
        BadInput: one is not there, or none is.
    """
    names: list[str] = []
    for name in split_values(setup.task, "--task"):
        if name in _GROUPS:
            found = task_names(_GROUPS[name], source=setup.source)
            if not found:
                raise BadInput(
                    f"found --task {name}, but there are no such tasks in --source {setup.source}; "
                    f"it has {', '.join(task_names(source=setup.source)) or 'none at all'}."
                )
            names += found
        else:
            names.append(name)
    return [_asked(load_task(name, source=setup.source), setup) for name in names]


def rank(
    setup: Setup,
    *,
    methods: Sequence[str] | None,
    n_rank: int,
    answer_in_input: bool,
    top: int,
) -> None:
    """`ra-lens rank`."""
    chosen = _methods(methods)
    tasks, protocol = setup.prepared(chosen)
    model = setup.load()
    with quiet(debug=setup.debug):
        frame = rank_tasks(
            model,
            tasks,
            methods=chosen,
            n_rank=n_rank,
            answer_in_input=answer_in_input,
            **vars(protocol),
        )
    if setup.as_json:
        show_experiments.print_ranking_json(frame, top=top, out=setup.out)
    else:
        show_experiments.print_ranking(frame, top=top, out=setup.out)


def perturb(
    setup: Setup,
    *,
    methods: Sequence[str] | None,
    n_rank: int,
    rank_shots: int | None,
    n_test: int | None,
    step: float,
    random_orders: int,
    accuracy: Literal["first-token", "answer"],
    metric: Metric,
    rule: Rule,
    answer_in_input: bool,
) -> None:
    """`ra-lens perturb`."""
    chosen = _methods(methods)
    tasks, protocol = setup.prepared(chosen)
    model = setup.load()
    with quiet(debug=setup.debug):
        frame = perturbation_test(
            model,
            tasks,
            methods=chosen,
            step=step,
            random_orders=random_orders,
            n_rank=n_rank,
            n_test=n_test,
            rank_shots=rank_shots,
            answer_in_input=answer_in_input,
            accuracy=_ACCURACIES[accuracy],
            **vars(protocol),
        )
    areas = area_under_curve(frame, metric=metric, rule=rule)

    def draw(path: Path) -> None:
        from ra_lens.report.experiments import write_perturbation_page

        write_perturbation_page(frame, areas, path, metric=metric)

    with _drawn(setup.figure, draw) as figure:
        if setup.as_json:
            show_experiments.print_areas_json(
                frame, areas, metric=metric, rule=rule, out=setup.out, figure=figure
            )
        else:
            show_experiments.print_areas(frame, areas, metric=metric, out=setup.out, figure=figure)


def patch(
    setup: Setup,
    *,
    scales: Sequence[str] | None,
    kinds: Sequence[str] | None,
    n_mean: int,
    n_test: int | None,
    length: int | None,
    at_least: int | None,
    answer_tokens: int,
    renormalise: bool,
    at: Where,
    accuracy: Literal["first-token", "answer"],
    metric: Metric,
) -> None:
    """`ra-lens patch`."""
    given = numbers(scales, "--scales")
    factors = list(PAPER_SCALES) if given is None else given
    maps: Any = ["ra", "pattern"] if kinds is None else split_values(kinds, "--kinds")
    unknown = [name for name in maps if name not in ("ra", "pattern")]
    if unknown:
        raise BadInput(f"found --kinds {unknown[0]}; give ra, pattern or both.")
    tasks, protocol = setup.prepared()
    model = setup.load()
    with quiet(debug=setup.debug):
        frame = patching_sweep(
            model,
            tasks,
            scales=factors,
            kinds=maps,
            n_mean=n_mean,
            n_test=n_test,
            length=length,
            at_least=at_least,
            answer_tokens=answer_tokens,
            renormalise=renormalise,
            at=at,
            accuracy=_ACCURACIES[accuracy],
            **vars(protocol),
        )

    def draw(path: Path) -> None:
        from ra_lens.report.experiments import write_sweep_page

        write_sweep_page(frame, path, metric=metric)

    with _drawn(setup.figure, draw) as figure:
        if setup.as_json:
            show_sweep.print_sweep_json(frame, metric=metric, out=setup.out, figure=figure)
        else:
            show_sweep.print_sweep(frame, metric=metric, out=setup.out, figure=figure)


def compare(
    results: Sequence[Path],
    paper: Path,
    *,
    as_model: str | None,
    metric: Metric,
    rule: Rule,
    every: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """`ra-lens compare`."""
    if out is not None:
        read = [*map(user_path, results), *paper_tables(paper)]
        check_output(out, TABLE, inputs=read)
    frames = [read_results(path, measures=[metric]) for path in results]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compared = compare_with_paper(frames, paper, as_model=as_model, metric=metric, rule=rule)
    for warning in caught:
        typer.echo(f"warning: {warning.message}", err=True)
    if out is not None:
        write_results(compared, out)
    if as_json:
        show_comparison.print_comparison_json(compared, out=out)
    else:
        show_comparison.print_comparison(compared, every=every, out=out)


@contextmanager
def _drawn(path: Path | None, draw: Callable[[Path], None]) -> Generator[Path | None, None, None]:
    """Draw a figure, if any; where that fails, raise only when the results are printed."""
    failed: BadInput | None = None
    if path is not None:
        try:
            draw(path)
        except BadInput as error:  # a disk that is full by now
            failed = error
    yield None if failed else path
    if failed is not None:
        raise failed


def _methods(methods: Sequence[str] | None) -> list[str]:
    return list(METHODS) if methods is None else split_values(methods, "--methods")


def _asked(task: Task, setup: Setup) -> Task:
    """Put a task into the format asked for."""
    if setup.separator is not None:
        task = task.with_format(separator=unescaped(setup.separator))
    if setup.natural == "qa" and task.kind == "natural":
        task = task.with_format(
            before_subject=f"Q: {task.before_subject}", after_subject=f"{task.after_subject}\nA:"
        )
    return task
