"""Area under a perturbation curve: one number for how good an order of the heads is.

    AUC = Σ (m_i + m_{i+1}) / 2 · (p_{i+1} − p_i)        p: share of the heads unmasked, 0 to 1

the trapezoid, for accuracy or any other column m. No rule is published with the paper's numbers;
the trapezoid fits them: rows whose full model is nearly perfect have a floor of .05, which is what
the last trapezoid of 11 points alone gives. The mean of the points would give .09.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd

from ra_lens.errors import BadInput
from ra_lens.tables import problem_of

Rule = Literal["trapezoid", "mean"]
Measure = Literal["top1", "top2", "top3", "logit_diff"]

_CURVE = ["model", "task", "kind", "n_shots", "method", "direction"]


def area_under_curve(
    frame: pd.DataFrame, *, metric: Measure = "top1", rule: Rule = "trapezoid"
) -> pd.DataFrame:
    """Take the area under each curve of a perturbation test.

    Args:
        frame: From `perturbation_test`; several may be concatenated.
        metric: Which column to integrate: accuracy `top1`, `top2`, `top3`, or `logit_diff`.
        rule: `"trapezoid"`, or the plain `"mean"` of the points.

    Returns:
        One row per model, task, number of shots, method and direction, with `auc` (the mean over
        draws for random orders), `auc_low` and `auc_high` (smallest and largest draw), `draws`.

    Raises:
        BadInput: not a frame of perturbation curves, an unknown rule, or a curve that does not
            reach from 0 to 1.
    """
    problem = problem_of(frame, [*_CURVE, "draw", "share", metric])
    if problem is not None:
        raise BadInput(f"found a table {problem}; give the result of perturbation_test().")
    if rule not in ("trapezoid", "mean"):
        raise BadInput(f"found rule={rule!r}; give 'trapezoid' or 'mean'.")
    areas: list[dict[str, Any]] = []
    for key, curve in frame.groupby([*_CURVE, "draw"], sort=False):
        names = curve.iloc[0][[*_CURVE, "draw"]].to_dict()
        areas.append({**names, "auc": _area(curve, metric, rule, key)})
    grouped = pd.DataFrame(areas, columns=[*_CURVE, "draw", "auc"]).groupby(_CURVE, sort=False)
    return grouped.agg(
        auc=("auc", "mean"), auc_low=("auc", "min"), auc_high=("auc", "max"), draws=("auc", "size")
    ).reset_index()


def _area(curve: pd.DataFrame, metric: str, rule: Rule, key: object) -> float:
    ordered = curve.sort_values("share")
    shares = ordered["share"].to_numpy(dtype=float)
    values = ordered[metric].to_numpy(dtype=float)
    if len(shares) < 2 or shares[0] != 0 or shares[-1] != 1 or bool((np.diff(shares) <= 0).any()):
        raise BadInput(
            f"the curve of {key} has shares {shares.tolist()}; each has to be there once, from 0 "
            "to 1. Give the results of one run; take the areas of several seeds one by one."
        )
    if rule == "mean":
        return float(values.mean())
    return float(((values[1:] + values[:-1]) / 2 * np.diff(shares)).sum())
