"""Agreement of forecasts: by hand, against ranks of pandas, and a bootstrap that copies rows."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from made_frames import knockouts
from ra_lens.errors import BadInput
from ra_lens.experiments import knockout_agreement


def frame_of(predicted, measured, question=None, **more):
    n = len(measured)
    rows = {
        "model": "tiny", "task": "t", "n_shots": 1, "question": question or list(range(n)),
        "what": "edge", "cut": "renormalised", "window": 1, "measured": measured,
        "predicted": predicted,
    }  # fmt: skip
    return pd.DataFrame({**rows, **more})


def test_by_hand():
    # Ranks 1 2 3 4 and 1 3 2 4: ρ = 1 − 6·2 / (4·15) = .8. Three changes are above .01, one of
    # them with the wrong sign.
    frame = frame_of([-1.0, 0.2, 0.5, 2.0], [-3.0, 0.05, -0.001, 7.0], pattern=[0.1, 0.2, 0.3, 0.4])
    found = knockout_agreement(frame, resamples=1).set_index("method")
    first = found.loc["predicted"]
    assert (first["n"], first["n_prompts"], first["n_sign"]) == (4, 4, 3)
    assert first["spearman"] == pytest.approx(0.8)
    assert first["sign"] == 1.0
    x, y = np.array([-1, 0.2, 0.5, 2]), np.array([-3, 0.05, -0.001, 7])
    assert first["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    # A has no sign: against 3, .05, .001, 7, ranks 3 2 1 4, so that ρ = 1 − 6·8/60 = .2.
    assert found.loc["pattern", "spearman"] == pytest.approx(0.2)
    assert math.isnan(found.loc["pattern", "sign"])
    assert found.loc["pattern", "n_sign"] == 0
    wrong = frame_of([1.0, 0.2, 0.5], [-3.0, 0.05, 0.3])
    assert knockout_agreement(wrong, resamples=1)["sign"].tolist() == [pytest.approx(2 / 3)]


def test_ties_have_mean_ranks_and_what_does_not_vary_has_no_agreement():
    frame = frame_of([0.1, 0.1, 0.1, 0.4, 0.4, 0.9], [0.2, 0.1, 0.2, 0.2, 0.8, 0.7])
    [row] = knockout_agreement(frame, resamples=1).to_dict("records")
    ranks = frame[["predicted", "measured"]].rank()
    assert row["spearman"] == pytest.approx(ranks.corr().iloc[0, 1])
    flat = frame_of([0.1, 0.1, 0.1], [0.001, 0.002, 0.003])
    [row] = knockout_agreement(flat, resamples=5).to_dict("records")
    assert all(math.isnan(row[name]) for name in ("spearman", "pearson", "sign", "sign_low"))
    alone = frame_of([0.3], [0.2])
    [row] = knockout_agreement(alone, resamples=5).to_dict("records")
    assert math.isnan(row["spearman"])
    assert row["sign"] == 1.0


def test_intervals_are_those_of_tables_with_the_prompts_drawn():
    frame = knockouts(tasks=("antonym", "capitalize"), n=4)
    found = knockout_agreement(frame, by=["what"], level=0.8, resamples=40, seed=7)
    row = found[(found.what == "edge") & (found.method == "predicted")].iloc[0]
    # The draws as the function says: of each task as many prompts as it has, with replacement.
    generator = np.random.default_rng(7)
    counts = [generator.multinomial(4, np.full(4, 0.25), size=40) for _ in range(2)]
    edges = frame[frame.what == "edge"]
    values: dict[str, list[float]] = {"spearman": [], "pearson": [], "sign": []}
    for i in range(40):
        copies = [
            edges[(edges.task == task) & (edges.question == question)]
            for task, of_task in zip(("antonym", "capitalize"), counts, strict=True)
            for question in range(4)
            for _ in range(of_task[i, question])
        ]
        table = pd.concat(copies)[["predicted", "measured"]]
        values["spearman"].append(table.rank().corr().iloc[0, 1])
        values["pearson"].append(table.corr().iloc[0, 1])
        telling = table[table.measured.abs() > 0.01]
        same = np.sign(telling.predicted) == np.sign(telling.measured)
        values["sign"].append(float(same.mean()))
    for name, drawn in values.items():
        low, high = np.quantile(drawn, [0.1, 0.9])
        assert row[f"{name}_low"] == pytest.approx(low)
        assert row[f"{name}_high"] == pytest.approx(high)
    assert row["spearman_low"] < row["spearman"] < row["spearman_high"]


def test_groups_methods_and_what_has_no_forecast():
    frame = knockouts()
    found = knockout_agreement(frame, resamples=2)
    groups = found[["what", "window"]].drop_duplicates().to_numpy().tolist()
    assert groups == [["edge", 1], ["set", 1], ["set", 3], ["set", 5]]
    of_sets = found[(found.what == "set") & (found.window == 3)].method.tolist()
    assert of_sets == ["predicted", "a_grad", "pattern", "grad", "gauss_2"]
    of_edges = found[found.what == "edge"].method.tolist()
    assert of_edges == ["predicted", "a_grad", "pattern", "grad"]
    assert found[found.method == "gauss_2"].label.unique().tolist() == ["2 steps"]
    whole = knockout_agreement(frame, by=(), resamples=2).set_index("method")
    assert whole.loc["predicted", "n"] == len(frame)
    assert whole.loc["gauss_2", "n"] == (frame.what == "set").sum()
    by_layer = knockout_agreement(frame, by="layer", resamples=2)
    [first] = by_layer[(by_layer.layer == 1) & (by_layer.method == "a_grad")].to_dict("records")
    part = frame[frame.layer == 1][["a_grad", "measured"]]
    assert first["spearman"] == pytest.approx(part.rank().corr().iloc[0, 1])


def test_what_is_no_knockout_test_is_refused():
    frame = knockouts(n=2)
    two = pd.concat([frame, frame.assign(model="other")])
    for wrong, options, message in [
        (frame.drop(columns="measured"), {}, "without 'measured'; give the result of knockout_te"),
        (frame.iloc[:0], {}, "found a table without rows"),
        (frame, {"by": "depth"}, "without 'depth'"),
        (two, {}, r"2 models \(tiny, other\). Give frame\[frame.model == 'tiny'\]"),
        (frame, {"level": 1.0}, "found level=1.0"),
        (frame, {"resamples": 0}, "resamples"),
    ]:
        with pytest.raises(BadInput, match=message):
            knockout_agreement(wrong, **options)
