"""The tables of docs/methods.md, from what results_methods.py has measured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from pages import interval, share
from ra_lens.experiments import (
    bootstrap_intervals,
    faithfulness,
    faithfulness_differences,
    head_only_cpr_cmd,
    question_areas,
)
from ra_lens.figures.style import method_styles
from ra_lens.heads import known, ranking_methods
from ra_lens.heads.agreement import EFFECT, SCORE, spearman

K = 20
RESAMPLES = 400
SIGNED = ("atp", "nap", "nap_ig", "zero", "resample")
"""Methods with a sign, of which orders by size are tested too."""
_TAKEN = {"zero": "zeroed", "resample": "resampled"}
KEYS = ["task", "n_shots", "question", "layer", "head"]


def label(method: str) -> str:
    """A method as its figures call it."""
    name = method.removesuffix(", measured")
    style = method_styles([name])[name].name
    style = style.replace("|", "\\|")  # which ends a cell of a table
    return f"{style}, exact" if method != name or name in ("zero", "resample") else style


def joined(effects: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Effects and scores of the same prompts in one table; what both have must be the same."""
    both = [name for name in others if str(name).startswith(SCORE) and name in effects]
    new = [
        name for name in others if str(name).startswith((SCORE, "seconds_")) and name not in effects
    ]
    one = effects.merge(others[[*KEYS, *new]], on=KEYS, validate="one_to_one")
    twice = effects.merge(others[[*KEYS, *both]], on=KEYS, suffixes=("", "_again"))
    for name in both:
        off = (twice[name] - twice[f"{name}_again"]).abs().max()
        if len(one) != len(effects) or off > 1e-5 * effects[name].abs().max():
            raise SystemExit(f"{name} is another in both tables: the prompts differ")
    return one


def agreement(found: pd.DataFrame, ablation: str) -> pd.DataFrame:
    """Rows methods, the best first; columns what was measured, means over tasks."""
    part: Any = found[found["ablation"] == ablation]
    shots = sorted(part["n_shots"].unique())
    means = part.groupby(["method", "n_shots"]).mean(numeric_only=True)
    order = part.groupby("method")["spearman_signed"].mean().sort_values(ascending=False).index
    kinds = (("signed", "signed"), ("abs", "size"))
    rows: dict[str, dict[str, str]] = {}
    for method in order:
        row: dict[str, str] = {}
        of_it = [means.loc[(method, n)] for n in shots]
        for kind, name in kinds:
            row[f"ρ {name}"] = _both(of_it, f"spearman_{kind}")
        for kind, name in kinds:
            row[f"other half, {name}"] = _both(of_it, f"cross_half_{kind}")
        for kind, name in kinds:
            values = [one[f"precision_{kind}_{K}"] for one in of_it]
            row[f"first {K}, {name}"] = share(sum(values) / len(values))
        stable = [one[f"jaccard_{K}"] for one in of_it]
        row["stable"] = "–" if any(v != v for v in stable) else share(sum(stable) / len(stable))
        row["passes"] = _passes(part[part["method"] == method].iloc[0])
        rows[label(method)] = row
    cells = part.groupby(["task", "n_shots"]).first(numeric_only=True)
    of_effects = [cells.xs(n, level="n_shots").mean() for n in shots]
    rows["*the effects themselves*"] = {
        f"other half, {name}": _both(of_effects, f"effects_split_half_{kind}")
        for kind, name in kinds
    }
    return pd.DataFrame(rows).T


def _both(of_it: Sequence[Any], column: str) -> str:
    """A measure for each number of examples."""
    return " · ".join(share(one[column]) for one in of_it)


def _passes(row: Any) -> str:
    """Passes of one prompt, forward and backward, for each prompt ranked on."""
    forwards, backwards = row["forwards"] / row["n_prompts"], row["backwards"] / row["n_prompts"]
    return f"{forwards:.0f} + {backwards:.0f}"


def by_task(found: pd.DataFrame, methods: Sequence[str], measure: str) -> pd.DataFrame:
    """Rows tasks and numbers of examples, columns methods: one measure of zero ablation."""
    part: Any = found[(found["ablation"] == "zero") & found["method"].isin(list(methods))]
    rows: dict[str, dict[str, str]] = {}
    for (task, n), of_cell in part.groupby(["task", "n_shots"], sort=False):
        of_cell = of_cell.set_index("method")
        rows[f"{task}, {n}"] = {
            label(method): interval(of_cell.loc[method], measure) for method in methods
        }
    return pd.DataFrame(rows).T


def by_prompts(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows ablations and methods, columns numbers of prompts scored: ρ with effects on others.

    Of the cells with most prompts, whose effects are those of half of them, drawn a hundred times.
    """
    counts = frame.groupby(["task", "n_shots"])["question"].nunique()
    cells = [key for key, n in counts.items() if n == counts.max()]
    half = int(counts.max()) // 2
    scored = [k for k in (1, 2, 3, 6, 12) if k <= half]
    drawn = np.array([np.random.default_rng([0, i]).permutation(2 * half) for i in range(100)])
    rows: dict[str, dict[str, str]] = {}
    for ablation, methods in (("zero", ("zero", "atp", "grad_sam")), ("resample", ("nap",))):
        for method in dict.fromkeys((ablation, *methods)):
            found = {k: list[float]() for k in scored}
            for task, n in cells:
                of_cell = frame[(frame["task"] == task) & (frame["n_shots"] == n)]
                score, effect = (
                    of_cell.pivot(
                        index="question", columns=["layer", "head"], values=name
                    ).to_numpy()[drawn]
                    for name in (SCORE + method, EFFECT + ablation)
                )
                others = effect[:, half:].mean(axis=1)
                for k in scored:
                    found[k].append(float(spearman(score[:, :k].mean(axis=1), others).mean()))
            name = "exact" if method == ablation else label(method)
            rows[f"{_TAKEN[ablation]}, {name}"] = {
                f"{k} prompt{'s' * (k > 1)}": share(sum(rhos) / len(rhos))
                for k, rhos in found.items()
            }
    return pd.DataFrame(rows).T


def minus_ra(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows methods: ρ less that of RA on the same draws of prompts, over all tasks."""
    rows: dict[str, dict[str, str]] = {}
    found = faithfulness_differences(frame, minus="ra", together=True, resamples=RESAMPLES)
    for (method, ablation), row in found.set_index(["method", "ablation"]).iterrows():
        if method in ("random", "index", ablation):
            continue
        for measure, name in (("spearman_signed", "signed"), ("spearman_abs", "size")):
            cell = interval(row, measure)
            rows.setdefault(label(str(method)), {})[f"{ablation}, {name}"] = cell
    return pd.DataFrame(rows).T


def orders(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep the orders that differ: by size only of methods that have a sign."""
    plain = frame["method"].map(lambda name: str(name).removesuffix(", measured"))
    keep = (frame["direction"] != "absolute") | plain.isin(SIGNED)
    return frame[keep]


def order_label(method: str, direction: str) -> str:
    """An order as the tables call it."""
    return f"{label(method)}, by size" if direction == "absolute" else label(method)


def areas(curves: pd.DataFrame) -> pd.DataFrame:
    """Rows orders, columns numbers of examples and metrics: area with its interval, less RA's."""
    found: dict[tuple[int, str], pd.DataFrame] = {}
    for metric in ("top1", "logit_diff"):
        each = question_areas(orders(curves), metric=metric)
        for n, part in each.groupby("n_shots"):
            wide = part.pivot(
                index=["task", "n_shots", "question"], columns=["method", "direction"], values="auc"
            )
            found[int(n), metric] = wide
    rows: dict[str, dict[str, str]] = {}
    first = found[min(found)]
    ranked = first.mean().sort_values(ascending=False).index
    for (n, metric), wide in found.items():
        name = f"{'accuracy' if metric == 'top1' else 'logit difference'}, {n}"
        values = bootstrap_intervals(wide)
        less = bootstrap_intervals(wide.sub(wide["ra", "forward"], axis=0))
        for key in ranked:
            row, other = values.loc[key], less.loc[key]
            mark = "" if key[0] == "ra" else _against_ra(other)
            rows.setdefault(order_label(*key), {})[name] = interval(row) + mark
    return pd.DataFrame(rows).T


def _against_ra(row: Any) -> str:
    """A mark where a difference from RA does not include 0."""
    return " ▲" if row["low"] > 0 else " ▼" if row["high"] < 0 else ""


def head_only(curves: pd.DataFrame) -> pd.DataFrame:
    """Rows orders, columns CPR and CMD by number of examples, with intervals, against RA's."""
    rows: dict[str, dict[str, str]] = {}
    for n, part in orders(curves).groupby("n_shots"):
        found = head_only_cpr_cmd(part, against="ra", together=True)
        for row in found.sort_values("cpr", ascending=False).to_dict("records"):
            name = order_label(row["method"], row["direction"])
            for what, better in (("cpr", 1), ("cmd", -1)):
                low, high = row[f"{what}_more_low"] * better, row[f"{what}_more_high"] * better
                mark = "" if row["method"] == "ra" else _mark(min(low, high), max(low, high))
                cells = rows.setdefault(name, {})
                cells[f"{what.upper()}, {n}"] = interval(row, what) + mark
    return pd.DataFrame(rows).T


def _mark(low: float, high: float) -> str:
    return " ▲" if low > 0 else " ▼" if high < 0 else ""


def circuits(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows methods, columns circuits: AUROC and average precision, random orders as their mean."""
    rows: dict[str, dict[str, str]] = {}
    kept: Any = frame[(frame["order"] == "signed") | frame["method"].isin(list(SIGNED))]
    for (circuit, method, order), part in kept.groupby(["circuit", "method", "order"], sort=False):
        name = f"{label(method)}, by size" if order == "absolute" else label(method)
        first = part.iloc[0]
        head = f"{circuit}: {int(first['n_true'])} heads"
        text = f"{share(part['auroc'].mean())} ({share(part['average_precision'].mean())})"
        rows.setdefault(name, {})[head] = text
    table = pd.DataFrame(rows).T
    return table.loc[table.iloc[:, 0].sort_values(ascending=False).index]


def about_circuits(frame: pd.DataFrame) -> str:
    """Which heads were found, and how the model answers."""
    lines: list[str] = []
    for circuit, part in frame.groupby("circuit", sort=False):
        first = part.iloc[0]
        lines.append(
            f"* `{circuit}`: {first['true_heads']}; {share(first['top1'])} of "
            f"{int(first['n_rank'])} ranking prompts answered right."
        )
    return "\n".join(lines)


def sanity(frame: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """What must hold, and what was seen."""
    rows: dict[str, str] = {}
    for ablation in ("zero", "resample"):
        part: Any = found[found["ablation"] == ablation]
        means = part.groupby("method")["spearman_signed"].mean()
        rest = means.drop(ablation)
        rows[f"exact {ablation} at least as good as every other on its own effect"] = (
            f"{share(means[ablation])} against {share(rest.max())} ({label(str(rest.idxmax()))})"
        )
    aurocs = [
        known.localisation_scores(_scores(part, "random"), _largest(part)).auroc
        for _, part in frame.groupby(["task", "n_shots"])
    ]
    rows[f"AUROC of one random order for the {K} heads of largest effect"] = share(
        sum(aurocs) / len(aurocs)
    )
    names = [str(name).removeprefix(SCORE) for name in frame if str(name).startswith(SCORE)]
    means = frame.groupby(["task", "n_shots", "layer", "head"])[[SCORE + n for n in names]].mean()
    ranks = means.groupby(level=["task", "n_shots"]).rank()
    most = max(
        (float(ranks[SCORE + a].corr(ranks[SCORE + b])), a, b) for a, b in combinations(names, 2)
    )
    rows["the two methods most alike, ρ of their scores"] = (
        f"{share(most[0])} ({label(most[1])} and {label(most[2])})"
    )
    return pd.DataFrame({"seen": rows})


def _scores(part: Any, method: str) -> Any:
    import torch

    from ra_lens.heads import HeadScores

    means = part.groupby(["layer", "head"])[SCORE + method].mean().unstack("head")
    return HeadScores(
        method=method,
        title=ranking_methods()[method].title,
        scores=torch.tensor(means.to_numpy()),
        layers=tuple(int(layer) for layer in means.index),
        heads=(len(means.columns),) * len(means),
        n_examples=part["question"].nunique(),
        model_name="",
        seed=0,
        draw=0,
    )


def _largest(part: Any) -> list[tuple[int, int]]:
    means = part.groupby(["layer", "head"])[EFFECT + "zero"].mean().abs()
    return [(int(layer), int(head)) for layer, head in means.nlargest(K).index]


def measured(frame: pd.DataFrame) -> pd.DataFrame:
    """How well each method foretells the effects; see `ra_lens.heads.agreement`."""
    return faithfulness(frame, ks=(10, K), resamples=RESAMPLES)
