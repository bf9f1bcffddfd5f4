"""How sure the numbers of an experiment are: bootstrap intervals over its questions.

Another draw of test questions would have given other numbers. The bootstrap draws from the
questions at hand, with replacement and as many as there are, takes the mean again, and does so
often; the interval holds the middle share of these means (Efron's percentile interval). Questions
are drawn within each task and number of demonstrations, and all columns get the same draws, so that
the interval of a difference between two columns is that of a paired comparison.

    frame = perturbation_test(model, tasks, each_question=True)
    areas = question_areas(frame)
    wide = areas.pivot(
        index=["task", "n_shots", "question"], columns=["method", "direction"], values="auc"
    )
    bootstrap_intervals(wide)
    bootstrap_intervals(wide.sub(wide["fa", "forward"], axis=0))  # each order minus FA
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ra_lens.errors import BadInput
from ra_lens.experiments.perturbation import CURVE, Rule, areas_of_curves
from ra_lens.numbers import Real, Whole, real, whole
from ra_lens.questions import Metric


def question_areas(
    frame: pd.DataFrame, *, metric: Metric = "top1", rule: Rule = "trapezoid"
) -> pd.DataFrame:
    """Take the area under the curve of each question of a perturbation test.

    Args:
        frame: From `perturbation_test` with `each_question=True`.
        metric: Which column to integrate.
        rule: As in `area_under_curve`, which gives the means of these areas.

    Returns:
        One row per model, task, number of shots, method, direction and `question`, with `auc`, for
        random orders the mean over draws.

    Raises:
        BadInput: not such a frame.
    """
    if "question" not in frame:
        raise BadInput(
            "found a table of means, which tell nothing of single questions. Run "
            "perturbation_test(..., each_question=True)."
        )
    areas = areas_of_curves(frame, [*CURVE, "draw", "question"], metric=metric, rule=rule)
    means: Any = areas.groupby([*CURVE, "question"], sort=False)["auc"].mean()
    return means.reset_index()


def bootstrap_intervals(
    values: pd.DataFrame, *, level: Real = 0.9, resamples: Whole = 2000, seed: Whole = 0
) -> pd.DataFrame:
    """Give means over questions, with the intervals that the choice of questions leaves.

    Args:
        values: A row per question and a column per thing measured of all of them. One level of the
            index is called `question`; the others, such as task and number of shots, say which
            questions belong together: those count by their mean, however many they are.
        level: Share of the resampled means that an interval holds.
        resamples: How often questions are drawn.
        seed: Of the draws.

    Returns:
        One row per column of `values`, with `mean`, `low`, `high` and `n_questions`.

    Raises:
        BadInput: no level `question`, a value that is missing, or an option that cannot be used.
    """
    level, resamples, seed = read_bootstrap(level, resamples, seed)
    if "question" not in values.index.names:
        raise BadInput(
            f"found a table whose index is {list(values.index.names)}; one level of it must be "
            "called 'question'. Pivot the questions into the index."
        )
    if values.empty or bool(values.isna().to_numpy().any()):
        found = "an empty table" if values.empty else "a table with missing values"
        raise BadInput(f"found {found}; every column needs a value for every question.")
    cells = [name for name in values.index.names if name != "question"]
    groups = [values] if not cells else [part for _, part in values.groupby(level=cells)]
    generator = np.random.default_rng(seed)
    means = np.zeros(values.shape[1])
    drawn = np.zeros((resamples, values.shape[1]))
    for part in groups:
        of_cell = part.to_numpy(dtype=float)
        weights = draw_weights(len(of_cell), resamples, generator)
        means += of_cell.mean(axis=0) / len(groups)
        drawn += weights @ of_cell / len(groups)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    columns = {"mean": means, "low": low, "high": high, "n_questions": len(values)}
    return pd.DataFrame(columns, index=values.columns)


def read_bootstrap(level: Real, resamples: Whole, seed: Whole) -> tuple[float, int, int]:
    """Read the options of a bootstrap."""
    level, resamples = real("level", level), whole("resamples", resamples, least=1)
    if not 0 < level < 1:
        raise BadInput(f"found level={level}; give a share between 0 and 1, such as 0.9.")
    return level, resamples, whole("seed", seed, least=0)


def draw_weights(
    n: int, resamples: int, generator: np.random.Generator
) -> Float[np.ndarray, "resample question"]:
    """How often each of `n` questions is drawn, over how many there are: weights of a mean."""
    return generator.multinomial(n, np.full(n, 1 / n), size=resamples) / n
