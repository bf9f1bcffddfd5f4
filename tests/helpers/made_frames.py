"""Results of experiments made of random numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

SCALES = (
    3.0, 2.0, 1.0, 0.5, 0.0, -0.1, 0.25, -0.5, -1.0, -2.0, -4.0, -6.0, -8.0, -10.0, -15.0, -20.0,
    -25.0, -30.0, -35.0, -40.0, -60.0, -80.0, -100.0, -120.0,
)  # fmt: skip
METHODS = ("ra", "fa", "cm1", "cm2", "index", "random")
TASKS = ("antonym", "next_item", "company-hq")


def curves(
    tasks: tuple[str, ...] = TASKS, shots: tuple[int, ...] = (0, 5), draws: int = 4
) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        {
            "experiment": "perturbation", "model": "tiny", "task": task,
            "kind": "natural" if task == "company-hq" else "icl", "n_shots": n, "method": method,
            "direction": direction, "draw": draw, "share": share, "heads_kept": int(share * 20),
            "top1": rng.random(), "top2": rng.random(), "top3": rng.random(),
            "logit_diff": rng.normal(), "n_test": 40 + len(task),
        }
        for task in tasks
        for n in shots
        for method in METHODS
        for direction in (("none",) if method == "random" else ("forward", "reversed"))
        for draw in range(draws if method == "random" else 1)
        for share in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def sweep(tasks: tuple[str, ...] = ("antonym",), shots: tuple[int, ...] = (0, 1)) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    rows = [
        {
            "experiment": "patching", "model": "tiny", "task": task, "kind": "icl", "n_shots": n,
            "map": kind, "scale": scale, "top1": rng.random(), "logit_diff": rng.normal(),
            "n_test": 70,
        }
        for task in tasks
        for n in shots
        for kind in ("none", "ra", "pattern")
        for scale in ((math.nan,) if kind == "none" else SCALES)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def areas(tasks: tuple[str, ...] = TASKS, shots: tuple[int, ...] = (0, 5)) -> pd.DataFrame:
    cell = ["model", "task", "kind", "n_shots", "method", "direction"]
    grouped = curves(tasks, shots).groupby(cell, sort=False)["top1"]
    return grouped.agg(auc="mean", auc_low="min", auc_high="max", draws="size").reset_index()


def knockouts(
    tasks: tuple[str, ...] = ("antonym",), cuts: tuple[str, ...] = ("renormalised",), n: int = 5
) -> pd.DataFrame:
    """Edges and sets of `n` questions: what is foretold is right but for noise."""
    rng = np.random.default_rng(2)
    rows: list[dict[str, object]] = []
    for task in tasks:
        for question in range(n):
            for cut in cuts:
                for i in range(20):
                    is_edge = i < 8
                    window = 1 if is_edge else (1, 3, 5)[i % 3]
                    measured = rng.normal() * 10.0 ** rng.integers(-3, 1)
                    drawn = ("random", "strongest")[i % 2] if is_edge else (
                        "span", "span and first", "first")[i % 4 % 3]  # fmt: skip
                    rows.append(
                        {
                            "experiment": "knockout", "model": "tiny", "task": task, "kind": "icl",
                            "n_shots": 1, "cut": cut, "question": question,
                            "what": "edge" if is_edge else "set", "drawn": drawn, "layer": i % 3,
                            "window": window, "head": i % 4 if is_edge else -1, "query": 6,
                            "key": 3 if is_edge else -1, "keys": "3" if is_edge else "1 2",
                            "query_token": " <b>&$x$", "key_tokens": " a", "first": False,
                            "pattern": rng.random(), "loss": 1.0, "measured": measured,
                            "predicted": measured + 0.02 * rng.normal(),
                            "a_grad": measured + rng.normal(),
                            "grad": abs(measured) + rng.random(),
                            "gauss_2": math.nan if is_edge else measured + 0.001 * rng.normal(),
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)


def effects(shots: tuple[int, ...] = (0,), scales: tuple[str, ...] = ("paper", "best")) -> Any:
    """Ablations of patching, summed up: a few variants, one of them of another task's maps."""
    rng = np.random.default_rng(3)
    variants = [
        ("whole", "whole map", "ra"), ("heads", "RA: first 10 %", "ra"),
        ("heads", "<b>&$x$: all but first 10 %", "ra"), ("transfer", "maps of antonym", "ra"),
        ("controls", "G", "grad"), ("controls", "FA", "pattern"),
    ]  # fmt: skip
    rows: list[dict[str, object]] = []
    for n in shots:
        for way in scales:
            for ablation, variant, kind in variants:
                value, few = rng.random(), ablation == "transfer"
                rows.append(
                    {
                        "n_shots": n, "ablation": ablation, "variant": variant, "map": kind,
                        "scale_from": way, "value": value, "low": 0.9 * value,
                        "high": value + 0.05, "unpatched": 0.3 if few else 0.1,
                        "whole": 0.7 if few else 0.5, "kl": rng.random(), "top1_same": 0.5,
                        "scale_low": -30.0, "scale_high": -30.0 if way == "paper" else -4.0,
                        "n_tasks": 1 if few else 3, "n_questions": 30, "metric": "top1",
                        "level": 0.9, "model": "tiny",
                    }
                )  # fmt: skip
        rows.append(
            {**rows[0], "n_shots": n, "ablation": "none", "variant": "unpatched", "map": "none",
             "scale_from": "none", "value": 0.1, "scale_low": math.nan, "scale_high": math.nan}
        )  # fmt: skip
    return pd.DataFrame(rows)
