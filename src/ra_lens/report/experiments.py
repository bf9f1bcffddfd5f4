"""Figures of an experiment as one page, plotly.js included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from ra_lens.figures import (
    auc_table,
    knockout_curves,
    knockout_scatter,
    method_agreement,
    patching_ablations,
    patching_sweep_curve,
    perturbation_curves,
)
from ra_lens.figures.knockouts import By
from ra_lens.figures.style import metric_name
from ra_lens.files import PAGE, check_output, write_whole
from ra_lens.html import facts
from ra_lens.questions import Metric
from ra_lens.report.sections import Section, page
from ra_lens.text import shots_name

# Constant columns that say how results were made, with their names on the page.
_FACTS = {
    "model": "Model",
    "model_class": "TransformerLens class",
    "dtype": "Number format",
    "seed": "Seed",
    "split": "Split",
    "n_rank": "Questions ranked on",
    "n_mean": "Questions averaged",
    "n_test": "Test questions",
    "n_edges": "Edges of each layer and question",
    "n_sets": "Spans of each question",
    "accuracy": "Accuracy by",
    "answer_in_input": "Answer in the input",
    "value_biases_folded": "Value biases folded",
    "ra_lens": "ra_lens",
    "transformer_lens": "TransformerLens",
    "torch": "torch",
}


# Maps are drawn on grey, where a query cannot look; curves and tables are not.
_NO_GREY = ".js-plotly-plot .bglayer rect.bg { fill: none !important; }"


def write_perturbation_page(
    frame: pd.DataFrame, areas: pd.DataFrame, path: str | Path, *, metric: Metric
) -> Path:
    """Write the curves of a perturbation test and the table of their areas."""
    curves = Section(
        "Curves",
        paragraphs=(
            "All heads are zeroed, then unmasked in the order of a ranking, the most important "
            "first (solid) or last (dashed). A good order is high early.",
        ),
        figures=(("", (perturbation_curves(frame, metric=metric),)),),
    )
    table = Section(
        "Areas under the curves",
        figures=(("", (auc_table(areas),)),),
        notes=(
            f"Area under the curve of: {metric_name(frame, metric)}. Random: mean of the draws.",
        ),
    )
    return _write("Perturbation test", frame, [curves, table], path)


def write_sweep_page(frame: pd.DataFrame, path: str | Path, *, metric: Metric) -> Path:
    """Write the curves of a patching sweep."""
    curves = Section(
        "Accuracy by scale",
        paragraphs=(
            "The mean map of training questions, times a scale, is added to the attention of every "
            "head. RA is a gradient: negative scales are steps of descent.",
        ),
        figures=(("", (patching_sweep_curve(frame, metric=metric),)),),
    )
    return _write("Attention patching", frame, [curves], path)


def write_ablations_page(frame: pd.DataFrame, effects: pd.DataFrame, path: str | Path) -> Path:
    """Write what parts of a patch's map and other maps do, for each number of demonstrations."""
    figures: list[tuple[str, tuple[Any, ...]]] = []
    for n in sorted({int(n) for n in effects["n_shots"]}):
        part: Any = effects[effects["n_shots"] == n]
        figures.append((f"With {shots_name(n)}", (patching_ablations(part),)))
    section = Section(
        "What carries the effect",
        paragraphs=(
            "The mean map of training questions, times a scale, is added to the attention of every "
            "head; here parts of it, and other maps in its place.",
        ),
        figures=tuple(figures),
        notes=("Lines: unpatched, and the whole map, on the same tasks as the row beside them.",),
    )
    return _write("Ablations of attention patching", frame, [section], path)


def write_knockout_page(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write what was foretold of knockouts beside what was measured, for each kind of cut."""
    sections: list[Section] = []
    for cut in dict.fromkeys(frame["cut"].astype(str)):
        part: Any = frame[frame["cut"] == cut]
        name = "Renormalised cuts" if cut == "renormalised" else "Plain cuts"
        shown: list[tuple[str, str, By]] = [
            ("edge", "Single edges by layer", "layer"),
            ("edge", "Single edges by attention", "pattern"),
            ("set", "Sets by the number of layers", "window"),
        ]
        curves = [
            (title, (knockout_curves(part, by=by),))
            for what, title, by in shown
            if bool((part["what"] == what).any())
        ]
        sections.append(
            Section(
                name,
                paragraphs=(
                    "Edges of attention are cut, and the loss changes. One backward pass foretells "
                    "by how much, to first order; rivals say which edges matter.",
                ),
                figures=(("Foretold and measured", (knockout_scatter(part),)), *curves),
                notes=("Band: 90 % interval over the prompts. Dashed: more than one pass.",),
            )
        )
    return _write("Attention knockouts", frame, sections, path)


def write_methods_page(found: pd.DataFrame, path: str | Path) -> Path:
    """Write how well ranking methods foretell what taking one head away does."""
    section = Section(
        "What taking one head away does",
        paragraphs=(
            "Every head was really taken away, one at a time, and every method scored all heads on "
            "the same prompts. The further right a method, the better its scores order heads: by "
            "what the loss rises without them (left), or how much it changes either way (right).",
        ),
        figures=(("", (method_agreement(found),)),),
        notes=(
            "Filled: what the scores say of the prompts that they were taken on. Open: what the "
            "scores on one half of the prompts say of the effects on the other, that is of new "
            "prompts, from half as many. Dotted: what the effects on one half say of those on the "
            "other, beside which the open markers stand. Bar of a filled marker, where there is "
            "one cell only: 90 % interval over sets of as many prompts; else the small markers are "
            "the cells.",
        ),
    )
    return _write("Ranking methods", found, [section], path)


def _write(title: str, frame: pd.DataFrame, sections: list[Section], path: str | Path) -> Path:
    check_output(path, PAGE)  # before the work
    tasks = list(dict.fromkeys(frame["task"].astype(str)))
    known = [("Tasks", ", ".join(tasks))]
    for column, name in _FACTS.items():
        values: Any = frame[column].dropna().unique() if column in frame else []
        if len(values) == 1:
            known.append((name, str(values[0])))
        elif len(values) > 1:
            known.append((name, f"{min(values)} to {max(values)}"))
    heading = f"{title}: {frame['model'].iloc[0]}"
    return write_whole(path, page(heading, [facts(known), *sections], styles=[_NO_GREY]), PAGE)
