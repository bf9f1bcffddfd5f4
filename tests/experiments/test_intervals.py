"""Intervals over questions: against means and quantiles known without resampling."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest

from ra_lens import load_demo_model
from ra_lens.errors import BadInput
from ra_lens.experiments import (
    area_under_curve,
    bootstrap_intervals,
    mean_over_questions,
    perturbation_test,
    question_areas,
)
from ra_lens.experiments.sweep import patching_sweep
from ra_lens.figures import patching_sweep_curve, perturbation_curves


def by_question(values, **cells):
    """A column `x` with a value for each question, of one cell."""
    index = pd.MultiIndex.from_product(
        [*([v] for v in cells.values()), range(len(values))], names=[*cells, "question"]
    )
    return pd.DataFrame({"x": values}, index=index)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_the_interval_of_shares_is_that_of_the_binomial(level):
    # 36 right of 100: a resampled share is binomial(100, .36)/100, whose quantiles are near
    # .36 ± z · .048.
    found = bootstrap_intervals(by_question([1] * 36 + [0] * 64), level=level, resamples=20_000)
    half = NormalDist().inv_cdf((1 + level) / 2) * (0.36 * 0.64 / 100) ** 0.5
    assert found["mean"].tolist() == [0.36]
    assert found["low"].item() == pytest.approx(0.36 - half, abs=0.011)
    assert found["high"].item() == pytest.approx(0.36 + half, abs=0.011)
    assert found["n_questions"].tolist() == [100]


def test_cells_count_alike_and_are_drawn_apart():
    # 4 questions all right, 400 all wrong: nothing varies within a cell.
    both = pd.concat([by_question([1.0] * 4, task="a"), by_question([0.0] * 400, task="b")])
    found = bootstrap_intervals(both).iloc[0]
    assert (found["mean"], found["low"], found["high"]) == (0.5, 0.5, 0.5)


def test_differences_are_paired():
    noise = np.random.default_rng(3).normal(size=60)
    wide = by_question(noise).assign(y=noise + 0.25)
    alone = bootstrap_intervals(wide)
    assert alone.loc["x", "high"] - alone.loc["x", "low"] > 0.3
    paired = bootstrap_intervals(wide.sub(wide["x"], axis=0)).loc["y"]
    assert paired[["mean", "low", "high"]].tolist() == pytest.approx([0.25] * 3)


def test_the_same_seed_gives_the_same_interval():
    values = by_question(list(range(30)))
    one, other, third = (bootstrap_intervals(values, seed=seed) for seed in (0, 0, 1))
    assert one.equals(other) and not one.equals(third)


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        (pd.DataFrame({"x": [1.0]}), {}, "one level of it must be called 'question'"),
        (by_question([1.0, np.nan]), {}, "every column needs a value for every question"),
        (by_question([]), {}, "found an empty table"),
        (by_question([1.0]), {"level": 1.0}, "give a share between 0 and 1"),
        (by_question([1.0]), {"resamples": 0}, "resamples=0"),
    ],
)
def test_what_cannot_be_resampled_is_refused(values, options, said):
    with pytest.raises(BadInput, match=said):
        bootstrap_intervals(values, **options)


def test_means_are_not_taken_for_questions():
    with pytest.raises(BadInput, match="each_question=True"):
        question_areas(pd.DataFrame({"model": ["m"]}))


@pytest.fixture(scope="module")
def demo_model():
    return load_demo_model()


@pytest.fixture(scope="module")
def curves(demo_model):
    options = {"methods": ["index", "random"], "shots": [0, 1], "step": 0.25, "n_rank": 2}
    options |= {"n_test": 6, "random_orders": 2, "progress": False}
    return [
        perturbation_test(demo_model, ["antonym", "next_item"], each_question=each, **options)
        for each in (False, True)
    ]


def test_questions_average_to_what_they_give_together(curves):
    means, each = curves
    assert len(each) == 6 * len(means) and each["question"].nunique() == 6
    assert set(each["top1"]) == {0.0, 1.0}  # one answer is right or wrong
    assert each.groupby("question")["logit_diff"].nunique().min() > 1
    averaged = mean_over_questions(each)
    measured = ["top1", "top2", "top3", "logit_diff"]
    cells = ["task", "n_shots", "method", "direction", "draw", "share", "heads_kept", "n_test"]
    assert averaged[cells].equals(means[cells])
    assert averaged[measured].to_numpy() == pytest.approx(means[measured].to_numpy(), abs=1e-5)
    assert mean_over_questions(means) is means


def test_areas_of_questions_average_to_the_area(curves):
    means, each = curves
    keys = ["task", "n_shots", "method", "direction"]
    areas = question_areas(each).groupby(keys)["auc"].mean()
    wanted = area_under_curve(means).set_index(keys)["auc"]
    assert areas.to_dict() == pytest.approx(wanted.to_dict())
    assert area_under_curve(each).set_index(keys)["auc"].to_dict() == pytest.approx(
        wanted.to_dict()
    )
    # By hand: trapezoids of a fourth of the heads each, of one question of one curve.
    one = each[(each.task == "antonym") & (each.n_shots == 1) & (each.method == "index")]
    one = one[(one.direction == "forward") & (one.question == 3)].sort_values("share")
    y = one["logit_diff"].tolist()
    by_hand = ((y[0] + y[4]) / 2 + y[1] + y[2] + y[3]) / 4
    found = question_areas(each, metric="logit_diff").set_index([*keys, "question"])["auc"]
    assert found["antonym", 1, "index", "forward", 3] == pytest.approx(by_hand)


def test_figures_draw_the_means(curves):
    means, each = curves
    one, other = (perturbation_curves(frame) for frame in (means, each))
    for a, b in zip(one.data, other.data, strict=True):
        assert np.asarray(a.y, float) == pytest.approx(np.asarray(b.y, float))


def test_a_sweep_keeps_its_questions_and_goes_on(demo_model, tmp_path):
    options = {"kinds": ["ra", "shuffled", "grad"], "scales": [-30.0], "shots": [0], "n_mean": 5}
    options |= {"n_test": 4, "progress": False}
    means = patching_sweep(demo_model, "antonym", **options)
    out = tmp_path / "sweep.parquet"
    each = patching_sweep(demo_model, "antonym", each_question=True, out=out, **options)
    again = patching_sweep(demo_model, "antonym", each_question=True, out=out, **options)
    pd.testing.assert_frame_equal(each, again)
    assert each["question"].tolist() == [0, 1, 2, 3] * 4
    averaged = mean_over_questions(each)
    assert averaged["map"].tolist() == means["map"].tolist() == ["none", "ra", "shuffled", "grad"]
    measured = ["top1", "logit_diff"]
    assert averaged[measured].to_numpy() == pytest.approx(means[measured].to_numpy(), abs=1e-5)
    names = {trace.name for trace in patching_sweep_curve(each).data}
    assert {"RA map", "RA map, rows shuffled", "G, as large as RA"} <= names
