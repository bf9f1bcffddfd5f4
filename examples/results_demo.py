"""The paper's experiments on the embedded model, all of them, in one command.

Runs the perturbation test (21 tasks, all methods, 0/1/5/10 examples) and the patching sweep (24
scales), and refreshes the tables and figures of docs/results-demo.md. What has been computed is
kept in the results folder: a run that was stopped goes on, and a second one only draws.

    python examples/results_demo.py --results results

Figures are written as PNG, for which plotly needs kaleido and a Chrome or Chromium.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from pages import draw, markdown, refresh
from ra_lens import load_demo_model
from ra_lens.experiments import area_under_curve, patching_sweep, perturbation_test
from ra_lens.figures import patching_sweep_curve, perturbation_curves

DOCUMENT = Path(__file__).parents[1] / "docs" / "results-demo.md"
ROWS = {
    ("ra", "forward"): "RA",
    ("ra", "reversed"): "RA reversed",
    ("fa", "forward"): "FA",
    ("fa", "reversed"): "FA reversed",
    ("cm1", "forward"): "CM1",
    ("cm1", "reversed"): "CM1 reversed",
    ("cm2", "forward"): "CM2",
    ("cm2", "reversed"): "CM2 reversed",
    ("index", "forward"): "first layer first",
    ("index", "reversed"): "last layer first",
    ("random", "none"): "random (mean of 20)",
}


def digits(value: Any) -> str:
    """A number with three digits; nothing where there is none."""
    return "" if pd.isna(value) else value if isinstance(value, str) else f"{value:.3f}"


def by_method(areas: pd.DataFrame) -> pd.DataFrame:
    """Mean over tasks: rows methods and directions, columns numbers of examples."""
    table = areas.groupby(["method", "direction", "n_shots"]).auc.mean().unstack("n_shots")
    return table.loc[list(ROWS)].set_axis(list(ROWS.values()), axis=0)


def wins(areas: pd.DataFrame) -> pd.DataFrame:
    """In how many cells (task and number of examples) one order beats another."""
    wide = areas.set_index(["task", "n_shots", "method", "direction"]).auc.unstack(
        ["method", "direction"]
    )
    pairs = [
        (("ra", "forward"), ("ra", "reversed")),
        (("ra", "forward"), ("random", "none")),
        (("ra", "forward"), ("fa", "forward")),
        (("ra", "forward"), ("cm1", "forward")),
        (("ra", "forward"), ("cm2", "forward")),
        (("fa", "forward"), ("fa", "reversed")),
        (("cm1", "forward"), ("cm1", "reversed")),
        (("cm2", "forward"), ("cm2", "reversed")),
        (("index", "forward"), ("index", "reversed")),
    ]
    found: dict[str, dict[str, str]] = {}
    for one, other in pairs:
        row: dict[str, str] = {}
        for shots, cells in wide.groupby("n_shots"):
            row[str(shots)] = f"{int((cells[one] > cells[other]).sum())} of {len(cells)}"
        found[f"{ROWS[one]} above {ROWS[other]}"] = row
    return pd.DataFrame(found).T


def patched(sweep: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracy over tasks: unpatched, at the paper's scales, and at the best scale of all."""
    rows: dict[str, Any] = {}
    of = {name: sweep[sweep["map"] == name] for name in ("none", "ra", "pattern")}
    rows["unpatched"] = of["none"].groupby("n_shots").top1.mean()
    for name, title, scale in (("ra", "RA × −30", -30.0), ("pattern", "FA × 1", 1.0)):
        chosen = of[name][of[name].scale == scale]
        rows[title] = chosen.groupby("n_shots").top1.mean()
    for name, title in (("ra", "RA"), ("pattern", "FA")):
        means = of[name].groupby(["n_shots", "scale"]).top1.mean().unstack("scale")
        best = [f"{row.max():.3f} (× {row.idxmax():g})" for _, row in means.iterrows()]
        rows[f"{title}, best of 24 scales"] = pd.Series(best, index=means.index)
    return pd.DataFrame(rows).T


def main(
    results: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("results"),
    images: Annotated[bool, typer.Option(help="Draw the figures too.")] = True,
) -> None:
    """Run the experiments and refresh the document."""
    results.mkdir(parents=True, exist_ok=True)
    model = load_demo_model(device="cpu")
    start = time.perf_counter()
    curves = perturbation_test(model, "all", out=results / "perturbation.parquet")
    middle = time.perf_counter()
    sweep = patching_sweep(model, "all", out=results / "patching.parquet")
    end = time.perf_counter()
    typer.echo(f"perturbation test {middle - start:.0f} s, patching sweep {end - middle:.0f} s")
    areas = area_under_curve(curves)
    icl = areas[areas.kind == "icl"]
    full = curves[(curves.share == 1) & (curves.method == "ra") & (curves.direction == "forward")]
    accuracy = full.pivot_table(index="kind", columns="n_shots", values="top1")
    accuracy.index = ["15 in-context tasks", "6 natural questions"]
    refresh(
        DOCUMENT,
        {
            "accuracy": markdown(accuracy.map(digits)),
            "auc": markdown(by_method(areas).map(digits)),
            "wins": markdown(wins(icl)),
            "patching": markdown(patched(sweep[sweep.kind == "icl"]).map(digits)),
        },
    )
    if images:
        figures = {
            "demo-perturbation": perturbation_curves(curves, width=1100),
            "demo-patching": patching_sweep_curve(sweep, width=1100),
        }
        draw(DOCUMENT, figures)


if __name__ == "__main__":
    typer.run(main)
