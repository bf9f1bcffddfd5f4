"""Head-only CPR and CMD: worked by hand, resampled by hand, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from ra_lens.errors import BadInput, RALensWarning
from ra_lens.experiments import MIB_SHARES, head_only_cpr_cmd
from refused import unchecked


def made(values, *, shares=(0.0, 0.25, 0.5, 1.0), metric="answer_diff", **about):
    """Curves by (method, direction): values [draw, share], or [draw, share, question]."""
    rows = []
    for (method, direction), curves in values.items():
        curves = np.asarray(curves, dtype=float)
        every = itertools.product(*map(range, curves.shape))
        for draw, point, *question in every:
            cell = {"model": "toy", "task": "a", "kind": "icl", "n_shots": 1, **about}
            row = {**cell, "method": method, "direction": direction, "draw": draw}
            row |= {"share": shares[point], metric: curves[(draw, point, *question)]}
            rows.append(row | ({"question": question[0]} if question else {}))
    return pd.DataFrame(rows)


def by_order(found):
    return found.set_index(["method", "direction"])


def test_by_hand():
    # m goes from 1 (no head) to 5 (all): f = 0, 1/2, 3/2, 1 at 0, 1/4, 1/2, 1.
    frame = made({("ra", "forward"): [[1, 3, 7, 5]]})
    [row] = head_only_cpr_cmd(frame).to_dict("records")
    cpr = 0.25 * (0 + 0.5) / 2 + 0.25 * (0.5 + 1.5) / 2 + 0.5 * (1.5 + 1) / 2
    cmd = 0.25 * (1 + 0.5) / 2 + 0.25 * (0.5 + 0.5) / 2 + 0.5 * (0.5 + 0) / 2
    assert row["cpr"] == pytest.approx(cpr) == pytest.approx(0.9375)
    assert row["cmd"] == pytest.approx(cmd) == pytest.approx(0.4375)
    assert (row["m_none"], row["m_all"]) == (1.0, 5.0)
    assert "cpr_low" not in row and "n_questions" not in row


def test_scale_and_offset_of_the_measure_do_not_matter():
    one = head_only_cpr_cmd(made({("ra", "forward"): [[1, 3, 7, 5]]}))
    other = head_only_cpr_cmd(made({("ra", "forward"): [[-30, -10, 30, 10]]}))
    assert other[["cpr", "cmd"]].to_numpy() == pytest.approx(one[["cpr", "cmd"]].to_numpy())


def test_ideal_and_idle_orders():
    ideal = made({("ra", "forward"): [[0, 1, 1, 1]], ("ra", "reversed"): [[0, 0, 0, 1]]})
    found = by_order(head_only_cpr_cmd(ideal))
    assert found.loc[("ra", "forward"), ["cpr", "cmd"]].tolist() == [0.875, 0.125]
    assert found.loc[("ra", "reversed"), ["cpr", "cmd"]].tolist() == [0.25, 0.75]


def test_random_orders_are_averaged_after_f_is_taken():
    # Draws at f = 0, 2, 0, 1 and 0, 0, 2, 1: their mean curve would have a smaller CMD.
    frame = made({("random", "none"): [[0, 2, 0, 1], [0, 0, 2, 1]]})
    [row] = head_only_cpr_cmd(frame).to_dict("records")
    first = 0.25 * (1 + 1) / 2 + 0.25 * (1 + 1) / 2 + 0.5 * (1 + 0) / 2
    second = 0.25 * (1 + 1) / 2 + 0.25 * (1 + 1) / 2 + 0.5 * (1 + 0) / 2
    assert row["cmd"] == pytest.approx((first + second) / 2)
    assert row["cpr"] == pytest.approx((0.25 * 1 + 0.25 * 1 + 0.25 + 0 + 0.25 * 1 + 0.5 * 1.5) / 2)


def curves_of_questions():
    """Curves [draw, share, question] by order."""
    rng = np.random.default_rng(3)
    none, every = rng.normal(0, 0.2, 12), rng.normal(3, 0.4, 12)
    curves = {
        (method, "forward"): [
            [none, none + gain * (every - none) + rng.normal(0, 0.3, 12), every - 0.1, every]
        ]
        for method, gain in (("good", 0.9), ("bad", 0.2))
    }
    curves["random", "none"] = [
        [none, rng.normal(1, 0.5, 12), rng.normal(2, 0.5, 12), every] for _ in range(3)
    ]
    return {order: np.array(values) for order, values in curves.items()}


def each_question():
    return made(curves_of_questions())


def by_trapezoids(questions):
    """CPR and CMD by order, of some questions, one of which may be there twice."""
    found = {}
    for order, curves in curves_of_questions().items():
        scores = []
        for m in curves[:, :, questions].mean(axis=2):
            f = [(value - m[0]) / (m[3] - m[0]) for value in m]
            away = [abs(1 - value) for value in f]
            areas = [
                0.25 * (y[0] + y[1]) / 2 + 0.25 * (y[1] + y[2]) / 2 + 0.5 * (y[2] + y[3]) / 2
                for y in (f, away)
            ]
            scores.append(areas)
        found[order] = np.mean(scores, axis=0)
    return found


def test_means_are_taken_before_f_and_intervals_are_those_of_resampled_questions():
    frame = each_question()
    found = by_order(head_only_cpr_cmd(frame, against="random", resamples=3000, seed=1))
    wanted = by_trapezoids(range(12))
    rng = np.random.default_rng(0)
    drawn = [by_trapezoids(rng.integers(0, 12, 12)) for _ in range(400)]
    for order, scores in wanted.items():
        row = found.loc[order]
        assert (row["cpr"], row["cmd"]) == pytest.approx(tuple(scores))
        assert row["n_questions"] == 12
        for i, name in enumerate(("cpr", "cmd")):
            less = wanted["random", "none"][i]
            assert row[f"{name}_more"] == pytest.approx(scores[i] - less, abs=1e-12)
            for column, values in (
                (name, [one[order][i] for one in drawn]),
                (f"{name}_more", [one[order][i] - one["random", "none"][i] for one in drawn]),
            ):
                low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
                stretch = (12 / 11) ** 0.5 * 1.7959 / 1.6449  # t of 11 degrees of freedom over z
                room = 0.25 * (high - low) + 1e-9
                ends = row[column] + stretch * np.array([low - middle, high - middle])
                assert row[f"{column}_low"] == pytest.approx(ends[0], abs=room)
                assert row[f"{column}_high"] == pytest.approx(ends[1], abs=room)
                assert row[f"{column}_low"] <= row[column] <= row[f"{column}_high"]
    assert found.loc[("good", "forward"), "cpr_more_low"] > 0
    assert (found.loc[("random", "none"), ["cpr_more_low", "cmd_more_high"]] == 0).all()


@pytest.mark.parametrize("together", [False, True])
def test_intervals_do_not_depend_on_the_order_of_rows(together):
    frame = pd.concat([each_question(), each_question().assign(task="b", n_shots=5)])
    options = {"against": "random", "resamples": 50, "together": together}
    numbers = ["cpr", "cpr_low", "cpr_high", "cmd_more_low", "cmd_more_high"]
    keys = ["task", "method"] if not together else ["method"]
    found = head_only_cpr_cmd(frame, **options).set_index(keys)
    mixed = frame[::-1].sample(frac=1, random_state=0)
    again = head_only_cpr_cmd(mixed, **options).set_index(keys).loc[found.index]
    np.testing.assert_allclose(again[numbers], found[numbers], rtol=1e-9, atol=1e-12)
    if not together:
        alone = head_only_cpr_cmd(frame[frame.task == "b"], **options).set_index(keys)
        assert alone[numbers].equals(found.loc[alone.index, numbers])
        # Their questions have the same values, and other draws.
        assert found.loc[("a", "bad"), "cpr_low"] != found.loc[("b", "bad"), "cpr_low"]


def test_a_table_of_means_and_one_of_questions_agree():
    frame = each_question()
    means = frame.groupby(
        [c for c in frame if c not in ("question", "answer_diff")], sort=False, as_index=False
    )["answer_diff"].mean()
    one, other = head_only_cpr_cmd(frame), head_only_cpr_cmd(means)
    columns = ["cpr", "cmd", "m_none", "m_all"]
    assert one[columns].to_numpy() == pytest.approx(other[columns].to_numpy())


def test_the_mean_over_tasks_counts_each_alike():
    # 12 questions and 4: CPR .9375 as by hand, and .4375 of the other.
    one = made({("ra", "forward"): np.repeat([[[1], [3], [7], [5]]], 12, axis=2)}, task="a")
    other = made({("ra", "forward"): np.repeat([[[0], [0], [1], [2]]], 4, axis=2)}, task="b")
    frame = pd.concat([one, other])
    [row] = head_only_cpr_cmd(frame, together=True).to_dict("records")
    of_other = 0.25 * 0.25 + 0.5 * 0.75
    assert row["cpr"] == pytest.approx((0.9375 + of_other) / 2)
    assert row["cpr_low"] == pytest.approx(row["cpr"]) == pytest.approx(row["cpr_high"])
    assert row["task"] == "mean of 2 tasks" and row["n_questions"] == 16
    assert len(head_only_cpr_cmd(frame)) == 2
    with pytest.raises(BadInput, match="different orders"):
        third = made({("fa", "forward"): [[0, 0, 1, 2]]}, task="c").assign(question=0)
        head_only_cpr_cmd(pd.concat([frame, third]), together=True)


def test_a_model_that_heads_do_nothing_for_is_refused_or_told():
    with pytest.raises(
        BadInput, match=r"answer_diff of task 'a' with 1 shot is 2 with all heads, 2"
    ):
        head_only_cpr_cmd(made({("ra", "forward"): [[2, 3, 1, 2]]}))
    with pytest.warns(RALensWarning, match="hardly above 0. Take a task that the model can do"):
        head_only_cpr_cmd(made({("ra", "forward"): [[2, 3, 1, 2.05]]}))
    with pytest.warns(RALensWarning, match="divide by the difference"):
        head_only_cpr_cmd(made({("ra", "forward"): [[2, 3, 1, 1]]}))
    # Half of the questions go up by 3, half down by 2.
    unsure = made({("ra", "forward"): [[[0, 0], [1, 1], [2, 2], [3, -2]]]})
    with pytest.warns(RALensWarning, match="divide by the difference"):
        head_only_cpr_cmd(unsure)


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda f: f.drop(columns="answer_diff"), {}, "others='resample'"),
        (lambda f: f.drop(columns="share"), {"metric": "top1"}, "without 'share'"),
        (lambda f: f[f.share > 0], {}, "once, from 0 to 1"),
        (lambda f: pd.concat([f, f]), {}, "once, from 0 to 1"),
        (lambda f: f[(f.question > 0) | (f.share < 0.5)], {}, "for every question"),
        (lambda f: f, {"metric": "accuracy"}, "metric='accuracy'; give one of"),
        (lambda f: f, {"against": "fa"}, "against='fa'.*good forward, bad forward, random none"),
        (lambda f: f, {"level": 2}, "level=2"),
    ],
)
def test_what_has_no_cpr_is_refused(change, options, said):
    with pytest.raises(BadInput, match=said):
        unchecked(head_only_cpr_cmd)(change(each_question()), **options)


def test_the_shares_of_mib():
    assert MIB_SHARES[0] == 0.001 and MIB_SHARES[-1] == 1 and len(MIB_SHARES) == 10
    assert list(MIB_SHARES) == sorted(MIB_SHARES)
