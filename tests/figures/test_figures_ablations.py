"""The figure of ablations of patching: a dot for each variant, where the table has it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from made_frames import effects
from ra_lens.figures import patching_ablations
from refused import refused


def traces(figure: Any, panel: int) -> dict[str, Any]:
    axis = "x" if panel == 1 else f"x{panel}"
    return {trace.name: trace for trace in figure.data if (trace.xaxis or "x") == axis}


def test_a_dot_and_its_interval_are_those_of_the_table() -> None:
    frame = effects()
    figure = patching_ablations(frame)
    titles = [note.text for note in figure.layout.annotations[:2]]
    assert titles == ["at the paper's scales", "at the best scale of each"]
    axis = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    for panel, way in ((1, "paper"), (2, "best")):
        part = frame[frame.scale_from == way]
        found = traces(figure, panel)
        for name, kind in (("RA map", "ra"), ("G, as large as RA", "grad"), ("FA map", "pattern")):
            dots, rows = found[name], part[part["map"] == kind]
            np.testing.assert_allclose(dots.x, rows.value)
            np.testing.assert_allclose(dots.x + dots.error_x.array, rows.high)
            np.testing.assert_allclose(dots.x - dots.error_x.arrayminus, rows.low)
            # Each stands in the row that its name labels.
            assert [axis[y] for y in dots.y] == list(dots.text)
            assert [row[2] for row in dots.customdata] == [
                "−30" if way == "paper" else "−30 to −4"
            ] * len(rows)
        # Beside each row lies what the model does without, and with the whole map, on its tasks.
        for name, column in (("unpatched", "unpatched"), ("whole map", "whole")):
            line = found[name]
            at = {y: x for x, y in zip(line.x, line.y, strict=True) if x is not None}
            for variant, wanted in zip(part.variant, part[column], strict=True):
                labels = [v.replace("<b>&$x$", "&lt;b&gt;&amp;&#36;x&#36;") for v in [variant]]
                [y] = [y for y, text in axis.items() if text == labels[0]]
                assert at[y - 0.6] == wanted
                assert at[y + 0.6] == wanted
            assert None in line.x
    assert "mean over 3 tasks · 30 questions · 90 % intervals" in figure.layout.title.text
    assert "accuracy (answer ranked first)" in [note.text for note in figure.layout.annotations]


def test_rows_are_grouped_and_the_groups_named() -> None:
    figure = patching_ablations(effects(scales=("best",)), title="Parts", width=700)
    headings = {note.text: note.y for note in figure.layout.annotations if "<b>" in note.text}
    assert list(headings) == [
        "<b>Some heads of it</b>", "<b>Maps of another task</b>", "<b>Another map in its place</b>",
    ]  # fmt: skip
    assert list(headings.values()) == sorted(headings.values())
    heights = list(figure.layout.yaxis.tickvals)
    assert heights == sorted(heights)
    assert len(heights) == 6
    assert figure.layout.yaxis.range[0] > heights[-1] > heights[0] > figure.layout.yaxis.range[1]
    assert figure.layout.title.text.startswith("Parts")


def test_without_single_questions_there_are_dots_alone() -> None:
    nothing = dict.fromkeys(["low", "high"], float("nan"))
    figure = patching_ablations(effects().assign(**nothing))
    dots = traces(figure, 1)["RA map"]
    assert not np.any(dots.error_x.array)
    assert "no single questions, so no intervals" in figure.layout.title.text


def test_a_table_that_cannot_be_drawn_is_refused() -> None:
    frame = effects(shots=(0, 1))
    for table, message in [
        (
            frame,
            r"with 0 and 1 demonstrations; a figure shows one number. Give frame\[frame.n_shots",
        ),
        (
            frame.drop(columns="kl"),
            r"a table without 'kl'; give the result of ablation_effects\(\)",
        ),
        (frame.iloc[:0], "a table without rows"),
    ]:
        refused(partial(patching_ablations, table), {}, message)
