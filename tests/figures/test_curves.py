"""Figures of experiments: the numbers drawn are those of the frame, named and coloured alike."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
import torch

from made_frames import METHODS, SCALES, TASKS, areas, curves, sweep
from ra_lens.errors import BadInput
from ra_lens.figures import auc_table, patching_sweep_curve, perturbation_curves, scale_curve
from ra_lens.figures.style import method_styles
from ra_lens.figures.sweep import position, spread, tick_scales
from ra_lens.scales import BestScale
from ra_lens.tables import best_of_rows, table_rows
from ra_lens.text import scale_name, short
from refused import unchecked
from tiny_models import every_model


def lines(figure: Any, panel: int = 1) -> dict[str, Any]:
    axis = "x" if panel == 1 else f"x{panel}"
    found = [t for t in figure.data if t.fill is None and (t.xaxis or "x") == axis]
    return {trace.name.partition("<br>")[0]: trace for trace in found}


# ---- perturbation curves ------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["top1", "top2", "top3", "logit_diff"])
def test_a_line_is_the_mean_over_tasks_of_its_metric(metric: Any) -> None:
    frame = curves()
    figure = perturbation_curves(frame, metric=metric)
    for panel, n in enumerate((0, 5), start=1):
        for method, direction, name in (
            ("ra", "forward", "RA"), ("ra", "reversed", "RA, reversed"),
            ("index", "reversed", "Index, reversed"), ("cm1", "forward", "CM1"),
        ):  # fmt: skip
            trace = lines(figure, panel)[name]
            expected = [
                np.mean([
                    row[metric] for row in frame.to_dict("records")
                    if (row["n_shots"], row["method"], row["direction"], row["share"])
                    == (n, method, direction, share)
                ])
                for share in (0.0, 0.5, 1.0)
            ]  # fmt: skip
            np.testing.assert_allclose(trace.y, expected)
            assert list(trace.x) == [0, 0.5, 1]
            assert "mean over 3 tasks" in trace.hovertemplate
    assert figure.layout.annotations[0].text == "0 shots"
    assert figure.layout.annotations[1].text == "5 shots"
    assert "mean over 3 tasks" in figure.layout.title.text
    assert "47 to 50 questions per task" in figure.layout.title.text


def test_random_is_the_mean_of_the_draws_in_a_band_of_all_of_them() -> None:
    frame = curves(shots=(5,))
    figure = perturbation_curves(frame)
    random = frame[frame.method == "random"]
    per_draw = [
        [random[(random.draw == d) & (random.share == s)].top1.mean() for s in (0.0, 0.5, 1.0)]
        for d in range(4)
    ]
    trace = lines(figure)["Random"]
    np.testing.assert_allclose(trace.y, np.mean(per_draw, axis=0))
    np.testing.assert_allclose(
        np.asarray(trace.customdata, float).T, [np.min(per_draw, axis=0), np.max(per_draw, axis=0)]
    )
    band = next(t for t in figure.data if t.name == "Random, band")
    np.testing.assert_allclose(band.y[:3], np.max(per_draw, axis=0))
    np.testing.assert_allclose(band.y[3:][::-1], np.min(per_draw, axis=0))
    assert (band.fill, band.mode) == ("toself", "lines")  # no markers, however few shares
    assert figure.data[0] is band or figure.data[0].name == band.name  # below the lines
    assert "mean of 4 draws" in trace.hovertemplate


def test_a_panel_per_task_averages_the_numbers_of_shots_and_says_so() -> None:
    frame = curves()
    figure = perturbation_curves(frame, facet="task")
    assert [a.text for a in figure.layout.annotations[:3]] == list(TASKS)
    of = frame[(frame.task == "next_item") & (frame.method == "fa")]
    expected = of[of.direction == "forward"].groupby("share").top1.mean()
    np.testing.assert_allclose(lines(figure, 2)["FA"].y, expected)
    assert "mean over 0 and 5 shots" in figure.layout.title.text
    alone = perturbation_curves(curves(shots=(1,)), facet="task").layout.title.text
    assert "1 shot" in alone
    assert "mean" not in alone


def test_a_method_has_one_colour_and_its_reverse_is_dashed() -> None:
    one, other = (
        lines(perturbation_curves(curves())),
        lines(perturbation_curves(curves().query("method in ['cm1', 'ra']"), facet="task"), 3),
    )
    for name in ("RA", "RA, reversed", "CM1"):
        assert one[name].line.color == other[name].line.color
        assert one[name].marker.symbol == other[name].marker.symbol
    assert one["RA"].line.color == one["RA, reversed"].line.color
    assert (one["RA"].line.dash, one["RA, reversed"].line.dash) == ("solid", "5px,4px")
    assert len({t.line.color for t in one.values()}) == len(METHODS)


def test_the_legend_lists_each_order_once() -> None:
    figure = perturbation_curves(curves())
    listed = [t.name.partition("<br>")[0] for t in figure.data if t.showlegend]
    assert listed == [
        "RA", "RA, reversed", "FA", "FA, reversed", "CM1", "CM1, reversed", "CM2",
        "CM2, reversed", "Index", "Index, reversed", "Random",
    ]  # fmt: skip
    names = " ".join(str(t.name) for t in figure.data)
    assert "(first layer first)" in names
    assert "(last layer first)" in names


def test_methods_of_the_users_own_are_told_apart() -> None:
    styles = method_styles(["zeta", "ra", "<b>", "alpha"])
    assert list(styles) == ["ra", "<b>", "alpha", "zeta"]
    assert styles["<b>"].name == "&lt;b&gt;"
    assert len({style.colour for style in styles.values()}) == 4
    assert styles == {**method_styles(["alpha", "zeta", "<b>", "ra"])}


@pytest.mark.parametrize("n", [1, 2, 4, *every_model(21)])
def test_any_number_of_tasks_has_its_panels(n: int) -> None:
    tasks = tuple(f"task-{i}" for i in range(n))
    figure = perturbation_curves(curves(tasks, (0,), draws=2), facet="task")
    assert [a.text for a in figure.layout.annotations[:n]] == list(tasks)
    assert len([t for t in figure.data if t.fill is None]) == 11 * n
    assert (
        f"mean over {n} tasks"
        in perturbation_curves(curves(tasks, (0,), draws=2)).layout.title.text
        or n == 1
    )


# ---- the sweep ----------------------------------------------------------------------------------


def test_the_sweep_draws_each_scale_where_its_label_says() -> None:
    frame = sweep()
    figure = patching_sweep_curve(frame)
    for i, n in enumerate((0, 1)):
        for name, kind in (("RA map", "ra"), ("FA map", "pattern")):
            axis = ("x", "x2")[i]
            trace = next(t for t in figure.data if t.name == name and (t.xaxis or "x") == axis)
            assert list(trace.customdata) == sorted(SCALES)
            assert list(trace.x) == [math.asinh(2 * s) for s in sorted(SCALES)]
            of = frame[(frame["map"] == kind) & (frame.n_shots == n)].sort_values("scale")
            np.testing.assert_allclose(trace.y, of.top1)
            paper = {"ra": -30.0, "pattern": 1.0}[kind]
            sizes = dict(zip(trace.customdata, trace.marker.size, strict=True))
            assert [s for s in sizes if sizes[s] == max(sizes.values())] == [paper]
            texts = dict(zip(trace.customdata, trace.text, strict=True))
            assert texts[paper] == f"{scale_name(paper)} (the paper's)"
            assert texts[-120] == "−120"
    axis = figure.layout.xaxis
    labels = dict(zip(axis.ticktext, axis.tickvals, strict=True))
    assert labels["−30"] == position(-30.0)
    assert {"−120", "0", "+1", "+3"} <= set(labels)
    assert sorted(axis.minor.tickvals) == sorted(position(s) for s in SCALES)


def test_lines_across_are_the_unpatched_model_at_each_number_of_shots() -> None:
    frame = sweep(("a", "b"), (0, 1, 5))
    figure = patching_sweep_curve(frame)
    unpatched = frame[frame["map"] == "none"].groupby("n_shots").top1.mean()
    for axis, own in (("x", 0), ("x2", 1), ("x3", 5)):
        found = {
            t.name: t for t in figure.data
            if t.name.startswith("unpatched") and (t.xaxis or "x") == axis
        }  # fmt: skip
        assert list(found) == ["unpatched, 0 shots", "unpatched, 1 shot", "unpatched, 5 shots"]
        for n, trace in zip((0, 1, 5), found.values(), strict=True):
            np.testing.assert_allclose(trace.y, [unpatched[n]] * 2)
            assert (trace.line.dash == "solid") == (n == own)
    said = figure.layout.title.text
    assert "mean over 2 tasks" in said
    assert "70 questions per task" in said
    bold = [a.text for a in figure.layout.annotations if a.text.startswith("<b>")]
    assert bold == ["<b>0 shots</b>", "<b>1 shot</b>", "<b>5 shots</b>"]


def test_tick_labels_stay_apart_whatever_the_scales() -> None:
    for scales in (SCALES, (-30.0, 0.0, 1.0), (0.0,), (-1.0, -0.9, -0.8, 5.0), (1e3, -1e3, 0.0)):
        ticks = tick_scales(scales)
        places = [position(s) for s in ticks]
        span = position(max(scales)) - position(min(scales)) or 1.0
        assert set(ticks) <= set(scales)
        assert all(b - a >= 0.085 * span for a, b in itertools.pairwise(places))


def test_labels_at_the_edge_are_spread_without_changing_their_order() -> None:
    assert spread([0.2, 0.8], 0.1, (0.0, 1.0)) == [0.2, 0.8]
    moved = spread([0.5, 0.51, 0.1, 0.505], 0.06, (0.0, 1.0))
    assert moved[2] == 0.1
    assert moved[0] < moved[3] < moved[1]
    assert moved[3] - moved[0] == pytest.approx(0.06, abs=1e-6)
    assert spread([1.0, 1.0], 0.1, (0.0, 1.0))[1] <= 1
    assert spread([], 0.1, (0.0, 1.0)) == []


# ---- the table ----------------------------------------------------------------------------------


def test_the_table_holds_every_area_and_the_means_of_the_rows() -> None:
    frame = areas()
    figure = auc_table(frame)
    assert [h.name for h in figure.data] == ["0 shots", "5 shots"]
    for heatmap, n in zip(figure.data, (0, 5), strict=True):
        assert list(heatmap.y) == [*TASKS, " ", "mean of 2 icl", "<b>mean of 3 tasks</b>"]
        assert list(heatmap.x) == [
            "RA", "RA reversed", "FA", "FA reversed", "CM1", "CM1 reversed", "CM2", "CM2 reversed",
            "Index", "Index reversed", "Random",
        ]  # fmt: skip
        z = np.asarray(heatmap.z, float)
        of = frame[frame.n_shots == n].set_index(["task", "method", "direction"]).auc
        expected = np.array([
            [of[t, "ra", "forward"], of[t, "cm1", "reversed"], of[t, "random", "none"]]
            for t in TASKS
        ])  # fmt: skip
        np.testing.assert_allclose(z[:3][:, [0, 5, 10]], expected)
        np.testing.assert_allclose(z[4][[0, 5, 10]], expected[:2].mean(axis=0))
        np.testing.assert_allclose(z[5][[0, 5, 10]], expected.mean(axis=0))
        assert np.isnan(z[3]).all()
        hover = heatmap.customdata[0][10]
        assert "antonym" in hover
        assert "mean of 12 draws" in hover


def test_the_largest_of_each_row_is_bold_and_framed() -> None:
    frame = areas(shots=(0,))
    figure = auc_table(frame)
    z = np.asarray(figure.data[0].z, float)
    framed = sorted(
        (round((s.y0 + s.y1) / 2), round((s.x0 + s.x1) / 2)) for s in figure.layout.shapes
    )
    rows = [0, 1, 2, 4, 5]
    assert framed == [(i, int(np.argmax(z[i]))) for i in rows]
    for i in rows:
        texts = figure.data[0].text[i]
        assert [j for j, t in enumerate(texts) if t.startswith("<b>")] == [int(np.argmax(z[i]))]
        assert texts[int(np.argmax(z[i]))] == f"<b>{short(z[i].max())}</b>"


def test_a_single_task_has_no_means_and_gaps_stay_empty() -> None:
    frame = areas(("antonym",), (0, 5))
    frame = frame[~((frame.n_shots == 5) & (frame.method == "fa"))]
    figure = auc_table(frame)
    assert list(figure.data[0].y) == ["antonym"]
    assert np.isnan(np.asarray(figure.data[1].z, float)[0, 2])
    assert figure.data[1].text[0][2] == ""


def test_table_helpers() -> None:
    assert [short(v) for v in (0.394, 1.0, 0.996, -0.05, 0.0, 12.34, math.nan)] == [
        ".39", "1.0", "1.0", "−.05", ".00", "12.3", "",
    ]  # fmt: skip
    best = best_of_rows(np.array([[0.1, 0.3, 0.3], [0.0, 0.0, 0.0], [math.nan] * 3]))
    assert best.tolist() == [[False, True, True], [False] * 3, [False] * 3]
    frame = pd.DataFrame({"task": ["n1", "i1", "n2", "i2"], "kind": ["natural", "icl"] * 2})
    assert list(table_rows(frame)) == [
        "i1", "i2", "n1", "n2", " ", "mean of 2 icl", "mean of 2 natural", "mean of 4 tasks",
    ]  # fmt: skip


# ---- manners ------------------------------------------------------------------------------------


def test_size_title_and_template_are_as_asked_and_nothing_changes() -> None:
    before = pio.templates.default
    for draw, frame in (
        (perturbation_curves, curves()), (patching_sweep_curve, sweep()), (auc_table, areas()),
    ):  # fmt: skip
        copy = frame.copy()
        figure = draw(frame, width=700, height=900, title="A title", template="plotly_dark")
        assert (figure.layout.width, figure.layout.height) == (700, 900)
        assert figure.layout.title.text.startswith("A title<br>")
        assert figure.layout.template == pio.templates["plotly_dark"]
        assert figure.layout.plot_bgcolor is None
        pd.testing.assert_frame_equal(frame, copy)
    assert pio.templates.default == before
    assert perturbation_curves(curves()).layout.width is None


# ---- the curve of one patch ---------------------------------------------------------------------


def a_curve(n: int = 2) -> BestScale:
    losses = torch.tensor([[9.0, 4.0, 1.0, 2.0, 3.0]] * n, dtype=torch.float64)
    losses = losses + torch.arange(n)[:, None]
    return BestScale((-300.0, -30.0, -0.5, 0.0, 2.0), losses, (-losses).exp())


@pytest.mark.parametrize("metric", ["loss", "probability"])
def test_the_curve_of_a_patch_marks_the_best_scale_and_the_papers(metric: Any) -> None:
    found = a_curve()
    figure = scale_curve(found, metric=metric)
    *thin, curve, paper, best = figure.data
    values = found.loss_per_prompt if metric == "loss" else found.probability
    assert [list(trace.y) for trace in thin] == values.tolist()
    np.testing.assert_allclose(curve.y, values.mean(dim=0))
    assert list(curve.customdata) == list(found.scales)
    places = [math.asinh(scale / 0.03) for scale in found.scales]
    np.testing.assert_allclose(curve.x, places)
    assert (paper.name, best.name) == ("the paper’s −30", "best, −0.5")
    np.testing.assert_allclose([paper.x[0], best.x[0]], [places[1], places[2]])
    np.testing.assert_allclose([paper.y[0], best.y[0]], [curve.y[1], curve.y[2]])
    assert figure.layout.shapes[0].y0 == pytest.approx(curve.y[3])  # unpatched
    labels = dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals, strict=True))
    assert labels["−30"] == pytest.approx(places[1])
    assert "RA added to the pattern of 2 prompts" in figure.layout.title.text


def test_a_curve_of_one_prompt_or_of_many_has_no_lines_behind_it() -> None:
    for n in (1, 51):
        assert len(scale_curve(a_curve(n)).data) == 3
    other = BestScale((0.0, 2.0), torch.ones(1, 2), torch.ones(1, 2), "pattern", "scores")
    figure = scale_curve(other, title="Mine", height=300)
    assert [trace.name for trace in figure.data] == ["loss", "best, 0"]
    assert "The pattern added to the scores of 1 prompt" in figure.layout.title.text
    assert figure.layout.height == 300
    with pytest.raises(BadInput, match="found metric='p'; give 'loss' or 'probability'"):
        unchecked(scale_curve)(other, metric="p")
