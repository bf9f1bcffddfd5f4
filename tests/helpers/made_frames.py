"""Results of experiments made of random numbers."""

from __future__ import annotations

import math

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
