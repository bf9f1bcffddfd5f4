"""Areas under perturbation curves, by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ra_lens.errors import BadInput
from ra_lens.experiments import area_under_curve


def curves(values, shares=None, **other):
    """A frame of one curve per list of values; draws count up."""
    rows = []
    for draw, ys in enumerate(values):
        xs = shares or [i / (len(ys) - 1) for i in range(len(ys))]
        for x, y in zip(xs, ys, strict=True):
            row = {"model": "m", "task": "t", "kind": "icl", "n_shots": 0, "method": "ra"}
            row |= {"direction": "forward", "draw": draw, "share": x, "top1": y, "top2": 1.0}
            rows.append(row | other)
    return pd.DataFrame(rows)


def test_an_area_by_hand():
    # (0 + 1/2)/2 · 1/2 + (1/2 + 1)/2 · 1/2 = 1/8 + 3/8
    assert area_under_curve(curves([[0, 0.5, 1]]))["auc"].tolist() == [0.5]
    # The last of ten trapezoids alone: 1/10 · 1/2. The mean of the eleven points would be 1/11.
    floor = curves([[0] * 10 + [1]])
    assert area_under_curve(floor)["auc"][0] == pytest.approx(0.05)
    assert area_under_curve(floor, rule="mean")["auc"][0] == pytest.approx(1 / 11)
    assert area_under_curve(floor, metric="top2")["auc"][0] == pytest.approx(1.0)
    # Unequal steps: (0 + 1)/2 · 0.2 + 1 · 0.8
    assert area_under_curve(curves([[0, 1, 1]], [0.0, 0.2, 1.0]))["auc"][0] == pytest.approx(0.9)


def test_draws_become_a_mean_and_a_band():
    found = area_under_curve(curves([[0, 0, 1], [0, 1, 1], [0, 0.5, 1]])).iloc[0]
    assert found["auc"] == pytest.approx(0.5)
    assert (found["auc_low"], found["auc_high"]) == (pytest.approx(0.25), pytest.approx(0.75))
    assert found["draws"] == 3


def test_the_order_of_rows_does_not_matter_and_groups_stay_apart():
    both = pd.concat([curves([[0, 1, 1]]), curves([[0, 0, 1]], method="fa")])
    shuffled = area_under_curve(both.sample(frac=1.0, random_state=1))
    assert dict(zip(shuffled["method"], shuffled["auc"], strict=True)) == {"ra": 0.75, "fa": 0.25}


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
@settings(deadline=None)  # a busy machine is no failure
def test_the_area_is_that_of_the_line_through_the_points(values):
    xs = np.linspace(0, 1, len(values))
    fine = np.interp(np.linspace(0, 1, 55441), xs, values)  # 55440 = 2·(1·2·…·11 without repeats)
    area = float((fine[1:] + fine[:-1]).sum() / 2 / 55440)
    assert area_under_curve(curves([values]))["auc"][0] == pytest.approx(area, abs=1e-9)


def test_curves_that_are_none_are_refused():
    with pytest.raises(BadInput, match="without 'method'; give the result of perturbation_test"):
        area_under_curve(curves([[0, 1]]).drop(columns="method"))
    wrong = curves([[0, 1]]).astype({"top1": object})
    wrong.loc[1, "top1"] = "all"
    with pytest.raises(BadInput, match=r"the text 'all' for top1 in row 2.*perturbation_test"):
        area_under_curve(wrong)
    with pytest.raises(BadInput, match="found a table in which 'top1' is empty"):
        area_under_curve(curves([[0, 1]]).assign(top1=np.nan))
    with pytest.raises(BadInput, match="found a table without a value for draw in row 2"):
        area_under_curve(curves([[0, 1]]).assign(draw=[0, np.nan]))
    with pytest.raises(BadInput, match="from 0 to 1"):
        area_under_curve(curves([[0, 1, 1]], [0.0, 0.5, 0.9]))
    twice = pd.concat([curves([[0, 1]]), curves([[0, 1]])])
    with pytest.raises(BadInput, match="each has to be there once"):
        area_under_curve(twice)
