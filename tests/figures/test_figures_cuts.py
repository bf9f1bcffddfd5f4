"""Figures of knockouts: what is drawn is what the table says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from made_frames import knockouts
from ra_lens.errors import BadInput
from ra_lens.experiments import knockout_agreement
from ra_lens.figures import knockout_curves, knockout_scatter


def panel(figure: Any, number: int) -> dict[str, Any]:
    axis = "x" if number == 1 else f"x{number}"
    return {t.name: t for t in figure.data if (t.xaxis or "x") == axis and t.fill is None}


def test_a_scatter_shows_every_cut_where_it_is():
    frame = knockouts(tasks=("antonym", "capitalize"))
    figure = knockout_scatter(frame)
    titles = [a.text for a in figure.layout.annotations][:4]
    assert [t.partition(",")[0] for t in titles] == [
        "Single edges", "Sets in 1 layer", "Sets in 3 layers", "Sets in 5 layers",
    ]  # fmt: skip
    edges = panel(figure, 1)
    assert set(edges) == {"as foretold", "drawn at random", "largest |R|"}
    part = frame[(frame.what == "edge") & (frame.drawn == "random")]
    points = edges["drawn at random"]
    np.testing.assert_array_equal(points.customdata, part[["predicted", "measured"]])
    np.testing.assert_allclose(points.x, np.arcsinh(part.predicted / 0.01))
    np.testing.assert_allclose(points.y, np.arcsinh(part.measured / 0.01))
    assert "&lt;b&gt;&amp;&#36;x&#36;" in points.text[0]
    shown = sum(len(t.x) for t in figure.data if t.mode == "markers")
    assert shown == len(frame)
    low, high = figure.layout.xaxis.range
    assert low == -high
    assert np.arcsinh(frame.measured.abs().max() / 0.01) < high
    assert f"{10} prompts · {len(frame)} cuts" in figure.layout.title.text
    # Of steps only the cuts are shown that have them.
    steps = knockout_scatter(frame, forecast="gauss_2")
    assert sum(len(t.x) for t in steps.data if t.mode == "markers") == (frame.what == "set").sum()


@pytest.mark.parametrize("measure", ["spearman", "pearson", "sign"])
def test_curves_are_the_agreement(measure: Any):
    frame = knockouts()
    figure = knockout_curves(frame, by="window", measure=measure)
    for number, drawn in enumerate(("span", "span and first", "first"), start=1):
        part = frame[(frame.what == "set") & (frame.drawn == drawn)]
        found = knockout_agreement(part, by="window")
        for method, label in (("predicted", "foretold"), ("gauss_2", "2 steps"), ("grad", "|G|")):
            rows = found[(found.method == method) & found[measure].notna()]
            if rows.empty:
                assert label not in panel(figure, number)
                continue
            line = panel(figure, number)[label]
            assert list(line.x) == rows.window.tolist()
            np.testing.assert_allclose(line.y, rows[measure])
            np.testing.assert_allclose(line.customdata[:, 0], rows[f"{measure}_low"])
    bands = [t for t in figure.data if t.fill == "toself"]
    assert len(bands) == 3
    assert len(bands[0].x) == 2 * len(panel(figure, 1)["foretold"].x)


def test_edges_by_layer_and_by_attention():
    frame = knockouts(n=12)
    edges = frame[frame.what == "edge"]
    by_layer = panel(knockout_curves(frame, by="layer"), 1)
    assert list(by_layer["foretold"].x) == [0, 1, 2]
    assert "2 steps" not in by_layer
    by_size = panel(knockout_curves(frame, by="pattern"), 1)["foretold"]
    classes = ["0–0.05", "0.05–0.2", "0.2–0.5", "0.5–0.8", "0.8–0.95", "0.95–1"]
    assert list(by_size.x) == [name for name in classes if name in by_size.x]
    part = edges[(edges.pattern > 0.2) & (edges.pattern <= 0.5)]
    assert by_size.customdata[list(by_size.x).index("0.2–0.5"), 2] == len(part)
    rho = part[["predicted", "measured"]].rank().corr().iloc[0, 1]
    assert math.isclose(by_size.y[list(by_size.x).index("0.2–0.5")], rho)


def test_what_is_no_knockout_test_of_one_kind_is_refused():
    frame = knockouts(n=2)
    both = knockouts(cuts=("renormalised", "plain"), n=2)
    for call, message in [
        (
            lambda: knockout_scatter(both),
            "2 kinds of cut .renormalised, plain.; a figure shows one",
        ),
        (lambda: knockout_scatter(frame.drop(columns="drawn")), "without 'drawn'; give the result"),
        (lambda: knockout_scatter(frame, forecast="ra"), "forecast='ra'"),
        (lambda: knockout_curves(frame, by="depth"), "by='depth'"),  # type: ignore[arg-type]
        (lambda: knockout_curves(frame[frame.what == "edge"]), r"a cut of sets. Run knockout_test"),
        (
            lambda: knockout_curves(pd.concat([frame, frame.assign(model="b")])),
            "2 models .tiny, b.; a figure shows one",
        ),
    ]:
        with pytest.raises(BadInput, match=message):
            call()
