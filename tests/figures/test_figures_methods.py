"""The figure of how well rankings foretell effects: its data, and what is refused."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from ra_lens.errors import BadInput
from ra_lens.figures import method_agreement

METHODS = {"atp": 0.8, "ra": 0.2, "mine": -0.1}


def table(tasks: tuple[str, ...] = ("antonym", "synonym")) -> pd.DataFrame:
    rows = [
        {
            "model": "tiny", "task": task, "n_shots": 1, "method": method, "ablation": ablation,
            "spearman_signed": value + 0.1 * i, "spearman_signed_low": value - 0.05,
            "spearman_signed_high": value + 0.05, "spearman_abs": -value, "n_prompts": 6,
            "effects_split_half_signed": 0.5 + i, "effects_split_half_abs": 0.4,
            "cross_half_signed": value / 2 - 0.2 * i, "cross_half_abs": -value / 4,
        }
        for i, task in enumerate(tasks)
        for ablation in ("zero", "resample")
        for method, value in METHODS.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def traces(figure: Any, name: str) -> list[Any]:
    return [trace for trace in figure.data if trace.name == name]


def test_each_panel_shows_the_cells_their_means_and_what_is_told_of_the_other_half():
    figure = method_agreement(table())
    assert [title.text for title in figure.layout.annotations] == [
        "head zeroed: ρ with the effect", "head zeroed: ρ with its size",
        "head resampled: ρ with the effect", "head resampled: ρ with its size",
    ]  # fmt: skip
    first = traces(figure, "mean")[0]
    assert list(first.text) == ["AtP", "RA", "mine"]
    assert list(first.x) == pytest.approx([0.85, 0.25, -0.05])
    assert first.error_x.array is None  # of several cells there is no one interval
    each = traces(figure, "each")[0]
    assert sorted(each.x) == pytest.approx([-0.1, 0.0, 0.2, 0.3, 0.8, 0.9])
    assert each.text[0] == "antonym, 1 shot"
    assert list(traces(figure, "split-half of the effects")[0].x) == [1.0, 1.0]
    assert list(traces(figure, "mean")[1].x) == pytest.approx([-0.8, -0.2, 0.1])
    other = traces(figure, "other half")
    assert list(other[0].x) == pytest.approx([0.3, 0.0, -0.15]) and list(other[0].y) == [0, 1, 2]
    assert list(other[3].x) == pytest.approx([-0.2, -0.05, 0.025])
    assert all(symbol.endswith("-open") for symbol in other[0].marker.symbol)
    assert "open: scores of one half, effects on the other" in figure.layout.title.text
    assert "2 cells (task and examples) of 6 prompts" in figure.layout.title.text


def test_of_one_cell_there_is_the_interval():
    figure = method_agreement(table(("antonym",)), measure="spearman_signed", title="Mine")
    assert len(figure.layout.annotations) == 2 and not traces(figure, "each")
    bars = traces(figure, "mean")[0].error_x
    assert list(bars.array) == pytest.approx([0.05] * 3)
    assert list(bars.arrayminus) == pytest.approx([0.05] * 3)
    assert figure.layout.title.text.startswith("Mine")


def test_a_frame_without_halves_is_drawn_without_them():
    frame = table().drop(columns=[c for c in table() if "half" in c])
    figure = method_agreement(frame)
    assert not traces(figure, "other half") and not traces(figure, "split-half of the effects")
    assert "half" not in figure.layout.title.text and len(traces(figure, "mean")) == 4


def test_what_is_no_comparison_is_refused():
    with pytest.raises(BadInput, match=r"give the result of faithfulness_test\(\)"):
        method_agreement(pd.DataFrame({"task": ["antonym"]}))
    with pytest.raises(BadInput, match="measure"):
        method_agreement(table(), measure="pearson")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="none is known"):
        method_agreement(table().query("ablation == 'zero'").assign(ablation="half"))
