"""Jobs of the scripts that measure: each writes one table, several processes share them.

A table that is there is not made again: a run that was stopped goes on, and one that has all
tables computes nothing.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from ra_lens import load_demo_model, load_model, load_task
from ra_lens.tables import read_results
from ra_lens.tasks import Task, task_names

IN_FRONT = "<|endoftext|>"  # what stood between documents in training; BOS is a chat token here

ResultsOption = Annotated[Path, typer.Option(help="Folder for the tables.")]
ModelOption = Annotated[str, typer.Option(help="SmolLM2-135M-Instruct, as load_model takes it.")]
SourceOption = Annotated[
    str, typer.Option(help="The in-context tasks: download, or a folder of such files.")
]
WorkersOption = Annotated[int, typer.Option(min=1, help="Processes, of one core each.")]
ImagesOption = Annotated[bool, typer.Option(help="Draw the figures too.")]


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """One part of the results, kept in one file.

    Attributes:
        results: Folder for the tables.
        loaded_from: What `load_model` is to be given for the real model.
        model: Which of the two models, as names of files have it.
        source: Where the tasks are from: download, or a folder of such files.
    """

    results: Path
    loaded_from: str
    model: str = "smollm2-135m"
    source: str = "builtin"

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the table in the folder, without its ending."""

    @abstractmethod
    def compute(self) -> None:
        """Compute the table and write it to `path`, whole or not at all."""

    @property
    def path(self) -> Path:
        """Where the table is, or will be."""
        return self.results / f"{self.name}.parquet"

    @property
    def in_front(self) -> str | None:
        """What stands in front of each prompt; None: the model's own."""
        return None if self.model == "demo" else IN_FRONT

    def load(self) -> torch.nn.Module:
        """Give the model, which each process loads once."""
        return _load(self.model if self.model == "demo" else self.loaded_from)

    def read_task(self, name: str) -> Task:
        """Read a task: ra_lens's own pairs of natural questions, and for the embedded model."""
        own = self.model == "demo" or name in task_names("natural")
        source = self.source if self.source in ("builtin", "download") else Path(self.source)
        return load_task(name, source="builtin" if own else source)


@cache
def _load(name: str) -> torch.nn.Module:
    torch.set_num_threads(1)  # two processes on two cores do more than two threads of one
    return load_demo_model(device="cpu") if name == "demo" else load_model(name, device="cpu")


def run_all(jobs: Iterable[Job], workers: int = 1) -> None:
    """Run the jobs whose tables are not there, in their order, and say each one that is done."""
    left = [job for job in jobs if not job.path.exists()]
    for i, (job, seconds) in enumerate(_done(left, workers), start=1):
        typer.echo(f"{job.name}: {seconds:.0f} s ({i} of {len(left)})")


def _done(jobs: list[Job], workers: int) -> Iterator[tuple[Job, float]]:
    if workers == 1:
        yield from ((job, _run(job)) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_run, job): job for job in jobs}
        for done in as_completed(running):
            yield running[done], done.result()


def _run(job: Job) -> float:
    """Run a job, unless another run has made its table since; give the seconds it took."""
    start = time.perf_counter()
    if not job.path.exists():
        job.path.parent.mkdir(parents=True, exist_ok=True)
        job.compute()
    return time.perf_counter() - start


def read_all(
    jobs: Iterable[Job], read: Callable[[Path], pd.DataFrame] = read_results
) -> pd.DataFrame:
    """Give the tables of several jobs as one."""
    return pd.concat([read(job.path) for job in jobs], ignore_index=True)
