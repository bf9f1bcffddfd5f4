"""Computing the cells of an experiment one by one, here or on Ray, into the folder of a grid.

What a worker is given is a cell without its model: it loads the model itself, as it was loaded
here, and makes sure that it is the same. It sends rows back, and this process writes them, so that
machines need not share a disk. In a worker, units of a cell are kept for its other pieces.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
import torch
from tqdm.auto import tqdm

from ra_lens.errors import BadInput, RALensWarning, UnfinishedGrid
from ra_lens.experiments.engines import (
    Finished,
    RayEngine,
    Request,
    compute_here,
    compute_on_ray,
)
from ra_lens.experiments.facts import model_facts
from ra_lens.experiments.grid import Failure, Grid, GridCell
from ra_lens.experiments.journal import Journal, differences
from ra_lens.heads.registry import RankingMethod, find_method, use_method
from ra_lens.memory import worker_memory
from ra_lens.model import Lens, as_lens
from ra_lens.model.source import ModelSource, source_of
from ra_lens.text import short, shots_name

if TYPE_CHECKING:
    from ra_lens.experiments.runner import Cell, Row, Run

    Rows = Callable[[Cell], Iterator[list[Row]]]
    Whole = Callable[[Cell], list[Row]]

_TOLD = 3  # failed cells in a message


@dataclass(frozen=True)
class _Job:
    """A piece of a cell to compute; `whole` gives the rows of the whole model, if it is to tell."""

    cell: Cell
    rows: Rows
    whole: Whole | None


@dataclass(frozen=True)
class _Answer:
    """The rows of a piece, the accuracy of the whole model, and what was warned of."""

    rows: list[Row]
    accuracy: float | None
    warned: list[str]


def need_source(lens: Lens) -> ModelSource:
    """Say how a model was loaded, for workers to load it; BadInput where that is not known."""
    source = source_of(lens.module)
    if source is None:
        raise BadInput(
            "found engine='ray' and a model that ra_lens did not load by a name or from a folder "
            "or file, so that workers cannot load it. Load it with ra_lens.load_model(name); one "
            "of your own: save it with save_pretrained(folder) and load_model(folder)."
        )
    return source


def frame_of_grid(
    run: Run,
    grid: Grid,
    title: str,
    cells: Sequence[Cell],
    rows: Rows,
    *,
    pieces: Sequence[str],
    whole: Whole | None,
) -> tuple[pd.DataFrame, list[tuple[Cell, float]]]:
    """Compute what is not finished of a grid, or of a part of it.

    Gives the table, and the accuracy of the whole model in the cells that were begun now.

    Raises:
        UnfinishedGrid: some cells failed; all others are finished by then.
    """
    every = [(cell, piece) for cell in cells for piece in (pieces or [""])]
    grid = replace(grid, parts=[(cell.task.name, cell.shots, piece) for cell, piece in every])
    grid.begin()
    share = run.protocol.share
    mine = grid.cells if share is None else grid.share(share)
    done = grid.done()
    left = {one.hash: one for one in mine if one.hash not in done}
    of_hash = {one.hash: cell for one, (cell, _) in zip(grid.cells, every, strict=True)}
    jobs = {
        key: _Job(
            _without_model(of_hash[key], one.piece, progress=False),
            rows,
            whole if one.piece in ("", *pieces[:1]) else None,
        )
        for key, one in left.items()
    }
    failed: dict[GridCell, Failure] = {}
    accuracies: list[tuple[Cell, float]] = []
    warned: dict[str, None] = {}
    n_done = len(mine) - len(left)
    shown = run.protocol.progress
    with tqdm(total=len(mine), initial=n_done, desc=title, unit="cell", disable=not shown) as bar:

        def tell(running: int) -> None:
            text = f"running: {running}, failed: {len(failed)}"
            if text != getattr(bar, "postfix", text):  # a bar that is hidden has none
                bar.set_postfix_str(text)

        for key, outcome in _finished(run, cells, jobs, tell):
            one = left[key]
            if outcome.failure is None:
                answer: _Answer = outcome.result
                grid.finish(one, answer.rows)
                bar.update()
                warned |= dict.fromkeys(answer.warned)
                if answer.accuracy is not None:
                    accuracies.append((of_hash[key], answer.accuracy))
                    said = f"{short(answer.accuracy)} with {shots_name(one.shots)}"
                    _say(bar, f"Whole model, {one.task}: accuracy {said}", shown)
            else:
                grid.fail(one, outcome.failure)
                failed[one] = outcome.failure
                _say(bar, f"Failed: {one.name}: {outcome.failure.error}", shown)
        tell(0)
    for text in warned:
        warnings.warn(text, RALensWarning, stacklevel=5)
    if failed:
        raise UnfinishedGrid(_failures(failed, len(mine), run.protocol.out))
    return grid.frame(mine), accuracies


def _say(bar: Any, text: str, shown: bool) -> None:
    if shown:
        bar.write(text, file=sys.stderr)


def _failures(failed: Mapping[GridCell, Failure], n: int, out: object) -> str:
    some = [f"{cell.name}: {failure.error}" for cell, failure in list(failed.items())[:_TOLD]]
    more = f"; and {len(failed) - _TOLD} more" if len(failed) > _TOLD else ""
    rest = (
        "What the others gave is lost; with out=FOLDER it is kept."
        if out is None
        else f"The others are in {out}, and the same call tries these again. ra-lens results {out} "
        "lists them; with --partial --merge FILE it makes the table without them."
    )
    return f"{len(failed)} of {n} cells failed ({'; '.join(some)}{more}). {rest}"


# ---- who computes -------------------------------------------------------------------------------


def _finished(
    run: Run, cells: Sequence[Cell], jobs: Mapping[str, _Job], tell: Callable[[int], None]
) -> Finished:
    """Compute jobs with the engine of a run."""
    engine = run.protocol.ray
    if engine is None or not jobs:
        tell(min(1, len(jobs)))
        return compute_here(jobs, (run.lens, run.journal), _compute)
    facts = {name: run.settings[name] for name in model_facts(run.lens)}
    own = [find_method(name) for name in run.methods]
    return compute_on_ray(
        jobs,
        partial(_load, need_source(run.lens), facts, own, engine.cpus),
        _compute,
        engine=engine,
        request=_request(run, cells, engine, facts["device"]),
        running=tell,
    )


def _request(run: Run, cells: Sequence[Cell], engine: RayEngine, device: str) -> Request:
    """What a worker needs, by the longest prompts of all."""
    groups = [prompts for cell in cells for prompts in (cell.asked, *cell.learned.values())]
    longest = [max(prompts, key=lambda one: len(one.text)) for prompts in groups if prompts]
    prompts = run.read(longest).prompts
    gpus, batch_size = gpus_of_worker(run.lens, engine, device), run.protocol.batch_size
    if batch_size == "auto":
        if gpus < 1:
            raise BadInput(
                "found batch_size='auto' with engine='ray' and workers that share a machine's "
                "memory or a GPU, all of which each would take for itself. Give a number, or each "
                "worker a GPU (RayEngine(gpus=1))."
            )
        batch_size = 1  # what has to be there; a worker then takes what is
    memory = worker_memory(run.lens, prompts, batch_size=batch_size)
    return Request(engine.cpus, gpus, memory)


def gpus_of_worker(lens: Lens, engine: RayEngine, device: str) -> float:
    """GPUs of a worker that puts its model on this kind of device."""
    if engine.gpus is not None:
        return engine.gpus
    return 0 if device == "cpu" else len(set(lens.layer_devices.values()))


def _without_model(cell: Cell, piece: str, *, progress: bool) -> Cell:
    """Give a piece of a cell as it travels: small, and without what a worker has of its own."""
    run = replace(
        cell.run,
        lens=cast("Lens", None),
        tasks=[cell.task],
        protocol=replace(cell.run.protocol, progress=progress),
        journal=Journal({}),
        grid=None,
    )
    return replace(cell, run=run, piece=piece or None)


def _load(
    source: ModelSource, facts: Mapping[str, Any], methods: Sequence[RankingMethod], threads: int
) -> tuple[Lens, Journal]:
    """Load the model in a worker, and refuse another one than that of the run."""
    torch.set_num_threads(threads)
    for method in methods:
        use_method(method)
    lens = as_lens(source.load(facts["device"]))
    differing = differences(facts, model_facts(lens))
    if differing:
        raise BadInput(f"found another model, or another version, than the run's ({differing}).")
    return lens, Journal({})


def _compute(state: tuple[Lens, Journal], job: _Job) -> _Answer:
    """Compute a piece of a cell with the model of this process."""
    lens, journal = state
    cell = replace(job.cell, run=replace(job.cell.run, lens=lens, journal=journal))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RALensWarning)
        rows = [row for some in job.rows(cell) for row in some]
        accuracy = None if job.whole is None else fmean(row["top1"] for row in job.whole(cell))
    warned: list[str] = []
    for one in caught:
        if issubclass(one.category, RALensWarning):
            warned.append(str(one.message))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return _Answer(rows, accuracy, warned)
