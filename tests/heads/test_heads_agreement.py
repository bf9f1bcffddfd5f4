"""How well scores agree with effects: worked by hand on four heads and two prompts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from ra_lens.errors import BadInput
from ra_lens.experiments import faithfulness, faithfulness_differences
from ra_lens.heads.agreement import spearman, top
from refused import unchecked

# [prompt, head]; means of the effects 3, 4, 1, −2, of their sizes 3, 4, 3, 4.
EFFECTS = [[2.0, 5.0, 4.0, 2.0], [4.0, 3.0, -2.0, -6.0]]
SCORES = {
    "atp": [[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]],  # the same on every prompt
    "ra": [[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 1.0, 0.0]],  # means 2, 3, 2, 2
    "mine": [[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 1.0, 0.0]],
}


def made(scores=SCORES, effects=EFFECTS, task="toy", **more):
    rows = [
        {"experiment": "head effects", "model": "tiny", "task": task, "kind": "icl", "n_shots": 1}
        | {"question": i, "layer": j // 2, "head": j % 2, "label": f"L{j // 2}H{j % 2}"}
        | {"loss": 1.0, "seconds_ra": 0.5, "seconds_zero": 7.0, "seed": 0, **more}
        | {f"score_{name}": values[i][j] for name, values in scores.items()}
        | {"effect_zero": effects[i][j]}
        for i in range(len(effects))
        for j in range(len(effects[0]))
    ]
    return pd.DataFrame(rows)


def row_of(table, method):
    [row] = table[table.method == method].to_dict("records")
    return row


def test_ranks_of_equal_values_are_their_mean():
    one = np.array([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    other = np.array([[3.0, 4.0, 1.0, 2.0], [4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    found = spearman(one, other)
    # 1 − 6·4/60; ranks 3.5, 3.5, 1.5, 1.5 against 4, 3, 2, 1: 4/(2·√5); nothing varies.
    assert found[:2] == pytest.approx([0.6, 4 / (2 * 5**0.5)])
    assert np.isnan(found[2])
    assert top(np.array([[1.0, 2.0, 1.0, 0.0]]), 2).tolist() == [[True, True, False, False]]


def test_measures_are_those_on_paper():
    found = faithfulness(made(), ks=(1, 2), splits=5, resamples=2000)
    assert list(found.method) == ["atp", "ra", "mine"]
    atp, ra = row_of(found, "atp"), row_of(found, "ra")
    # Means of the effects 3, 4, 1, −2: ranks 3, 4, 2, 1; of their sizes 3, 4, 3, 4.
    assert atp["spearman_signed"] == pytest.approx(1 - 6 * 2 / 60)
    # 4, 3, 2, 1 against 1.5, 3.5, 1.5, 3.5.
    assert atp["spearman_abs"] == pytest.approx(-2 / (5**0.5 * 2))
    # The second of the model has the largest effect; in size it ties with the last and comes first.
    assert (atp["precision_signed_1"], atp["precision_signed_2"]) == (0.0, 1.0)
    assert (atp["precision_abs_1"], atp["precision_abs_2"]) == (0.0, 0.5)
    assert (ra["precision_signed_1"], ra["precision_abs_1"]) == (1.0, 1.0)
    # Halves are the prompts themselves: ranks 1, 2, 3, 4 and 3, 4, 2, 1.
    assert ra["split_half"] == pytest.approx(1 - 6 * (4 + 4 + 1 + 9) / 60)
    assert (ra["jaccard_1"], ra["jaccard_2"]) == (0.0, 0.0)
    assert np.isnan(atp["split_half"]) and np.isnan(atp["jaccard_1"])
    # Effects of one prompt have ranks 1.5, 4, 3, 1.5, of the other 4, 3, 2, 1.
    assert ra["effects_split_half_signed"] == pytest.approx(0.5 / (4.5**0.5 * 5**0.5))
    # Sizes 2, 5, 4, 2 and 4, 3, 2, 6: ranks 1.5, 4, 3, 1.5 and 3, 2, 1, 4.
    assert ra["effects_split_half_abs"] == pytest.approx(-3.5 / (4.5**0.5 * 5**0.5))
    assert (ra["n_prompts"], ra["n_heads"], ra["label"]) == (2, 4, "RA")
    assert (ra["forwards"], ra["backwards"], ra["seconds"]) == (2, 2, 0.5)
    mine = row_of(found, "mine")
    assert mine["label"] == "mine" and np.isnan(mine["forwards"]) and np.isnan(mine["seconds"])
    assert (atp["model"], atp["seed"], atp["experiment"]) == ("tiny", 0, "faithfulness")


# Four prompts of three heads, without ties in what is used below.
FOUR_EFFECTS = [[-6.0, 5.0, -3.0], [3.0, -5.0, 4.0], [-5.0, 0.0, 0.0], [-6.0, -3.0, -1.0]]
FOUR_SCORES = [[0.0, 2.0, 6.0], [7.0, 8.0, 2.0], [1.0, 5.0, 8.0], [5.0, 0.0, 5.0]]


@pytest.mark.parametrize("splits", [3, 100])
def test_what_scores_tell_of_the_other_half_is_that_on_paper(splits):
    """All three splits, of sums: 1 − Σd²/4 is ρ of three heads.

    half   scores         effects        sizes
    0, 1    7, 10,  8     -3,  0,  1      9, 10,  7
    2, 3    6,  5, 13    -11, -3, -1     11,  3,  1
    0, 2    1,  7, 14    -11,  5, -3     11,  5,  3
    1, 3   12,  8,  7     -3, -8,  3      9,  8,  5
    0, 3    5,  2, 11    -12,  2, -4     12,  8,  4
    1, 2    8, 13, 10     -2, -5,  4      8,  5,  4
    """
    frame = made({"ra": FOUR_SCORES}, FOUR_EFFECTS)
    found = row_of(faithfulness(frame, ks=1, resamples=20, splits=splits), "ra")
    # Scores with the effects of the half in the other row, one way and the other.
    across = [0.5, 0.5, 0.5, -0.5, 1.0, 1.0]
    assert found["cross_half_signed"] == pytest.approx(sum(across) / 6)
    of_sizes = [-0.5, -1.0, -1.0, 1.0, -0.5, -0.5]
    assert found["cross_half_abs"] == pytest.approx(sum(of_sizes) / 6)
    assert found["effects_split_half_signed"] == pytest.approx((1.0 - 0.5 - 0.5) / 3)
    assert found["effects_split_half_abs"] == pytest.approx((0.5 + 1.0 + 1.0) / 3)
    assert found["split_half"] == pytest.approx((-0.5 - 1.0 - 0.5) / 3)
    # All four: scores 13, 15, 21, effects -14, -3, 0. What halves of the effects say is no bound.
    assert found["spearman_signed"] == pytest.approx(1.0)


def test_one_prompt_tells_nothing_of_others():
    found = row_of(faithfulness(made({"ra": SCORES["ra"][:1]}, EFFECTS[:1]), ks=1), "ra")
    unknown = ["cross_half_signed", "effects_split_half_abs", "split_half", "jaccard_1"]
    assert np.isnan([found[name] for name in (*unknown, "spearman_abs_low")]).all()
    assert np.isfinite(found["spearman_abs"])


def test_scores_that_do_not_vary_tell_nothing():
    flat = [[1.0] * 4, [2.0] * 4]
    found = row_of(faithfulness(made({"mine": flat}), ks=1, resamples=20), "mine")
    assert np.isnan([found[n] for n in ("spearman_abs", "split_half", "cross_half_abs")]).all()


def test_intervals_are_those_of_the_prompts_drawn():
    """Of two prompts a draw has the first twice, the second twice, or both, which is the middle."""
    frame, options = made(), {"ks": 1, "resamples": 2000, "level": 0.6}
    found = row_of(faithfulness(frame, **options), "atp")
    score = np.array([[4.0, 3.0, 2.0, 1.0]])
    [low] = spearman(score, np.array(EFFECTS[:1]))
    [high] = spearman(score, np.array(EFFECTS[1:]))
    assert (low, high) == (pytest.approx(0.5 / (4.5**0.5 * 5**0.5)), pytest.approx(1))
    # √(n/(n−1)); t of one degree of freedom, tan(.6 · 90°); z of four fifths.
    stretch = 2**0.5 * np.tan(0.3 * np.pi) / 0.8416212
    assert found["spearman_signed_low"] == pytest.approx(0.8 - stretch * (0.8 - low))
    assert 0.8 + stretch * (high - 0.8) > 1 == found["spearman_signed_high"]
    again = row_of(faithfulness(frame, seed=1, **options), "atp")
    assert again["spearman_signed"] == found["spearman_signed"]


def test_intervals_hold_their_value():
    generator = np.random.default_rng(4)
    effects = generator.standard_t(2, (6, 12))
    scores = {
        # The noise of its prompts moves the draws of one up, of the other down.
        "nap": effects + generator.normal(0, 0.5, 12),
        "michel": np.abs(effects) + generator.normal(0, 0.5, (6, 12)),
    }
    frame = made(scores, effects)
    found = faithfulness(frame, ks=(1, 3), resamples=200)
    less = faithfulness_differences(frame, minus="nap", resamples=200)
    for table in (found, less):
        ends = [str(name) for name in table if str(name).endswith("_low")]
        assert len(ends) == (6 if table is found else 2)
        for low in ends:
            name = low.removesuffix("_low")
            assert (table[low] <= table[name]).all()
            assert (table[name] <= table[f"{name}_high"]).all()


def test_a_method_against_itself_is_perfect():
    frame = made({"zero": EFFECTS})
    found = row_of(faithfulness(frame, ks=(1, 3), resamples=50), "zero")
    names = ["spearman_signed", "precision_signed_1", "precision_signed_3"]
    for name in names:
        assert [found[name], found[f"{name}_low"], found[f"{name}_high"]] == [1.0, 1.0, 1.0]
    assert found["split_half"] == found["effects_split_half_signed"] == found["cross_half_signed"]


def test_differences_are_paired():
    frame = pd.concat([made(), made({**SCORES, "atp": EFFECTS}, task="other")])
    found = faithfulness_differences(frame, minus="ra", resamples=300)
    assert list(zip(found.task, found.method, strict=True)) == [
        *(("toy", name) for name in ("atp", "mine")),
        *(("other", name) for name in ("atp", "mine")),
    ]
    same = found[found.method == "mine"]
    for end in ("", "_low", "_high"):  # the same scores on the same draws
        assert (same[f"spearman_signed{end}"] == 0).all()
        assert (same[f"spearman_abs{end}"] == 0).all()
    each = faithfulness(frame, ks=1, resamples=1, splits=1).set_index(["task", "method"])
    rho = each["spearman_signed"]
    assert found.spearman_signed.iloc[0] == rho["toy", "atp"] - rho["toy", "ra"]
    both = faithfulness_differences(frame, minus="ra", methods="atp", together=True, resamples=300)
    assert len(both) == 1 and both.n_cells.item() == 2
    of_both = found[found.method == "atp"]["spearman_signed"]
    assert both.spearman_signed.item() == pytest.approx(of_both.mean())


def test_prompts_of_one_task_are_drawn_whatever_those_of_another_are():
    frame = pd.concat([made(), made(task="other")])
    options = {"minus": "ra", "methods": "atp", "resamples": 2000, "level": 0.4}
    one = faithfulness_differences(frame, **options)
    alone = faithfulness_differences(made(), **options)
    shuffled = faithfulness_differences(frame.sample(frac=1, random_state=0), **options)
    assert alone.equals(one[one.task == "toy"])
    assert shuffled.sort_values("task", ascending=False, ignore_index=True).equals(one)
    both = faithfulness_differences(frame, together=True, **options)
    # Half of the draws of a task have .0254, a quarter .2 and a quarter .2108: of both tasks a
    # quarter is .0254, a quarter (.0254 + .2) / 2, a quarter (.0254 + .2108) / 2.
    first, second, third = (
        spearman(np.array(SCORES["atp"][:1]), effects)[0] - spearman(of, effects)[0]
        for of, effects in (
            (np.array([[2.0, 3.0, 2.0, 2.0]]), np.array([[3.0, 4.0, 1.0, -2.0]])),
            *((np.array([SCORES["ra"][i]]), np.array([EFFECTS[i]])) for i in (1, 0)),
        )
    )
    assert (first, second, third) == pytest.approx((0.02540333, 0.2, 0.21081851))
    # t of one and of two degrees of freedom; both have z of .7.
    stretch = np.sqrt(2) / 0.5244005 * np.array([np.tan(0.2 * np.pi), 0.4 * (2 / 0.84) ** 0.5])
    of_one = one.spearman_signed_high - one.spearman_signed_low
    assert of_one.tolist() == pytest.approx([stretch[0] * (second - first)] * 2)
    of_both = (both.spearman_signed_high - both.spearman_signed_low).item()
    assert of_both == pytest.approx(stretch[1] * (third - second) / 2, rel=0.01)


def test_scores_of_minus_infinity_come_last():
    low = [[4.0, 3.0, 2.0, -np.inf], [4.0, 3.0, 2.0, -np.inf]]
    found = faithfulness(made({"atp": SCORES["atp"], "mine": low}), ks=1, resamples=20)
    atp, mine = (row_of(found, name) for name in ("atp", "mine"))
    assert mine["spearman_signed"] == atp["spearman_signed"]
    assert mine["spearman_signed_low"] == atp["spearman_signed_low"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda f: f.drop(columns="question"), "a table without 'question'; give the result of"),
        (lambda f: f.iloc[:0], "a table without rows"),
        (lambda f: f.drop(columns="effect_zero"), "without scores of a method, or without effects"),
        (lambda f: f.assign(effect_zero=[np.nan, *f.effect_zero[1:]]), "value for effect_zero in"),
        (lambda f: f.assign(score_ra="x"), "with the text 'x' for score_ra in row 1, not a number"),
        (lambda f: [f], "a table that is a list, not a DataFrame; give the result of head_eff"),
        (lambda f: f.iloc[1:], "7 rows for 2 prompts and 4 heads of task 'toy'"),
        (lambda f: pd.concat([f, f.assign(model="two")]), r"results of 2 models \(tiny, two\)"),
    ],
)
def test_other_tables_are_refused(change, found):
    with pytest.raises(BadInput, match=found):
        unchecked(faithfulness)(change(made()), ks=1)


def test_options_that_cannot_be_used_say_what_is_needed():
    frame = made()
    with pytest.raises(BadInput, match=r"level=1.0; give a share between 0 and 1"):
        faithfulness(frame, ks=1, level=1.0)
    with pytest.raises(BadInput, match=r"ks=\[1, 5\] for a model of 4 heads"):
        faithfulness(frame, ks=(1, 5))
    with pytest.raises(BadInput, match=r"ks=\[4\] for a model of 4 heads"):
        faithfulness(frame, ks=4)
    with pytest.raises(BadInput, match=r"methods=\['ra', 'ra'\] to compare with 'atp'.*each once"):
        faithfulness_differences(frame, minus="atp", methods=["ra", "ra"])
    with pytest.raises(BadInput, match=r"methods=\[\] to compare with 'atp'.*at least one"):
        faithfulness_differences(frame, minus="atp", methods=[])
    with pytest.raises(BadInput, match=r"method 'cm1'; the table has scores of 'atp', 'ra', 'mine"):
        faithfulness_differences(frame, minus="cm1")
