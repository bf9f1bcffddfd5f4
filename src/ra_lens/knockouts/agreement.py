"""How well what was foretold of knockouts agrees with what was measured, with intervals.

    Spearman's ρ    of ranks, those of equal values being their mean: is the order right
    Pearson's r     of the values themselves: is the size right
    sign            share of the cuts with |measured| > .01 whose direction was foretold

A method that has no sign (attention, |G|) is compared with the size of what was measured, and has
no `sign`.

Cuts of one prompt are not independent of each other, so the bootstrap draws prompts: with
replacement, as many as there are of each task and number of shots, with all their cuts. An interval
holds the middle share of what comes out (Efron's percentile interval). All groups and methods get
the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from ra_lens.errors import BadInput
from ra_lens.numbers import Real, Whole, real, whole
from ra_lens.tables import problem_of

_TELLING = 0.01  # nats; of smaller changes the sign is not asked
_PROMPT = ["task", "n_shots", "question"]
_NEEDED = ["task", "n_shots", "question", "what", "measured"]
_MEASURES = ("spearman", "pearson", "sign")


@dataclass(frozen=True)
class Forecast:
    """A column of a knockout table that says something of a cut before it is made.

    Attributes:
        column: Its name.
        label: What tables and figures call it.
        signed: Whether it says if the loss rises or falls; if not, it is compared with |measured|.
    """

    column: str
    label: str
    signed: bool = True


FORECASTS = (
    Forecast("predicted", "foretold"),
    Forecast("a_grad", "−A·G"),
    Forecast("minus_ra", "−R~"),
    Forecast("input_grad", "gradient × input"),
    Forecast("pattern", "A", signed=False),
    Forecast("grad", "|G|", signed=False),
    Forecast("value", "A·‖v W_O‖", signed=False),
    Forecast("end", "slope at the cut"),
    Forecast("trapezoid", "mean of both slopes"),
)
"""What is foretold of a cut, in the order of tables; steps (`gauss_2`, …) come after it."""


def forecasts_of(frame: pd.DataFrame) -> list[Forecast]:
    """Give those that a table has, in their order; columns that are empty throughout are not."""
    steps = [name for name in frame if str(name).startswith("gauss_")]
    several = {name: int(str(name).removeprefix("gauss_")) for name in steps}
    of_steps = [
        Forecast(str(name), f"{n} step{'s' * (n != 1)}")
        for name, n in sorted(several.items(), key=lambda pair: pair[1])
    ]
    return [
        one
        for one in (*FORECASTS, *of_steps)
        if one.column in frame and bool(frame[one.column].notna().any())
    ]


def knockout_agreement(
    frame: pd.DataFrame,
    *,
    by: str | Sequence[str] = ("cut", "what", "window"),
    level: Real = 0.9,
    resamples: Whole = 1000,
    seed: Whole = 0,
) -> pd.DataFrame:
    """Sum up a knockout test: how what was foretold agrees with what was measured.

        knockout_agreement(frame)
        knockout_agreement(frame[frame.what == "edge"], by="layer")

    Args:
        frame: From `knockout_test`, of one model; several may be concatenated, and rows left out.
        by: Columns that say which rows are taken together; `()`: all of them.
        level: Share of the resampled values that an interval holds.
        resamples: How often prompts are drawn.
        seed: Of the draws.

    Returns:
        A table with one row per group and method. Its columns are `by`, `method` (the column of
        the forecast) and `label`, `n` cuts of `n_prompts`, `spearman`, `pearson`, `sign` and
        `n_sign`, the number of cuts it is taken of; each with `_low` and `_high`. NaN where it is
        not defined: fewer than two cuts, values that are all the same, no cut with |measured| >
        .01. Cuts of which a method says nothing (steps of single edges) are left out for it.

    Raises:
        BadInput: not such a table, several models in it, or an option that cannot be used.
    """
    keys = [by] if isinstance(by, str) else list(by)
    level, resamples = real("level", level), whole("resamples", resamples, least=1)
    seed = whole("seed", seed, least=0)
    if not 0 < level < 1:
        raise BadInput(f"found level={level}; give a share between 0 and 1, such as 0.9.")
    problem = problem_of(frame, [*_NEEDED, *keys], rows=True)
    if problem is not None:
        raise BadInput(f"found a table {problem}; give the result of knockout_test().")
    models = list(dict.fromkeys(frame["model"].astype(str))) if "model" in frame else []
    if len(models) > 1:
        raise BadInput(
            f"found results of {len(models)} models ({', '.join(models)}). Give "
            f"frame[frame.model == {models[0]!r}]."
        )
    prompt, weights = _draws(frame, resamples, seed)
    groups = (
        [((), np.arange(len(frame)))]
        if not keys
        else [
            (key if isinstance(key, tuple) else (key,), np.asarray(places))
            for key, places in frame.groupby(keys, sort=True, observed=True).indices.items()
        ]
    )
    rows: list[dict[str, Any]] = []
    for key, places in groups:
        part = frame.iloc[places]
        measured = part["measured"].to_numpy(float)
        for one in forecasts_of(part):
            foretold = part[one.column].to_numpy(float)
            known = np.isfinite(foretold)
            whose = prompt[places[known]]
            found = _agreement(
                foretold[known], measured[known], weights[:, whose], signed=one.signed
            )
            about = {"method": one.column, "label": one.label}
            counts = {"n": int(known.sum()), "n_prompts": len(set(whose.tolist()))}
            row = {**dict(zip(keys, key, strict=True)), **about, **counts}
            for name, values in zip(_MEASURES, found, strict=True):
                row |= {name: values[0], **_interval(name, values[1:], level)}
            telling = int((np.abs(measured[known]) > _TELLING).sum()) if one.signed else 0
            rows.append({**row, "n_sign": telling})
    return pd.DataFrame(rows)


def _draws(
    frame: pd.DataFrame, resamples: int, seed: int
) -> tuple[Int[np.ndarray, "cut"], Float[np.ndarray, "draw prompt"]]:
    """The prompt of each row, and how often each draw has each prompt: the first, once each."""
    prompts: Any = frame[_PROMPT].drop_duplicates().reset_index(drop=True)
    number = {tuple(row): i for i, row in enumerate(prompts.itertuples(index=False))}
    of_row = np.array([number[tuple(row)] for row in frame[_PROMPT].itertuples(index=False)])
    generator = np.random.default_rng(seed)
    weights = np.ones((1 + resamples, len(prompts)))
    for _, part in prompts.groupby(["task", "n_shots"], sort=False):
        n = len(part)
        drawn = generator.multinomial(n, np.full(n, 1 / n), size=resamples)
        weights[1:, part.index.to_numpy()] = drawn
    return of_row, weights


def _interval(name: str, values: Float[np.ndarray, "draw"], level: float) -> dict[str, float]:
    known = values[np.isfinite(values)]
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(known, ends) if len(known) else (np.nan, np.nan)
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def _agreement(
    foretold: Float[np.ndarray, "cut"],
    measured: Float[np.ndarray, "cut"],
    weights: Float[np.ndarray, "draw cut"],
    *,
    signed: bool,
) -> list[Float[np.ndarray, "draw"]]:
    """ρ, r and the share of right signs, where each cut counts as often as its prompt is drawn."""
    target = measured if signed else np.abs(measured)
    spearman = _correlation(_ranks(foretold, weights), _ranks(target, weights), weights)
    pearson = _correlation(foretold[None], target[None], weights)
    if not signed:
        return [spearman, pearson, np.full(len(weights), np.nan)]
    telling = weights[:, np.abs(measured) > _TELLING]
    right = (np.sign(foretold) == np.sign(measured))[np.abs(measured) > _TELLING]
    counts = telling.sum(axis=1)
    sign = np.where(counts > 0, telling @ right / np.where(counts > 0, counts, 1), np.nan)
    return [spearman, pearson, sign]


def _ranks(
    values: Float[np.ndarray, "cut"], weights: Float[np.ndarray, "draw cut"]
) -> Float[np.ndarray, "draw cut"]:
    """Mean ranks of values, of which each is there as often as its weight says."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    held = np.add.reduceat(weights[:, order], starts, axis=1)
    below = np.cumsum(held, axis=1) - held
    return (below + (held + 1) / 2)[:, group]


def _correlation(
    x: Float[np.ndarray, "some cut"],
    y: Float[np.ndarray, "some cut"],
    weights: Float[np.ndarray, "draw cut"],
) -> Float[np.ndarray, "draw"]:
    """Pearson's correlation in each draw; NaN where one of both does not vary."""
    total = weights.sum(axis=1, keepdims=True)
    safe = np.where(total > 0, total, 1)
    x = x - (weights * x).sum(axis=1, keepdims=True) / safe
    y = y - (weights * y).sum(axis=1, keepdims=True) / safe
    xx, yy, xy = ((weights * a * b).sum(axis=1) for a, b in ((x, x), (y, y), (x, y)))
    scale = np.sqrt(xx * yy)
    # Of equal values rounding leaves a variance of next to nothing.
    least = len(weights[0]) * np.finfo(float).eps ** 2
    varies = (scale > 0) & (xx > least) & (yy > least)
    return np.where(varies, xy / np.where(varies, scale, 1), np.nan)
