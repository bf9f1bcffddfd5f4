"""`query_key_pull`, `token_row`, and figures as files."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from made_caches import ROWS, make
from ra_lens.errors import BadInput
from ra_lens.figures import images, query_key_pull, save_figure, token_row

EVIL = "<script>alert(1)</script>"


# ---- query and key ------------------------------------------------------------------------------


def test_lines_join_the_queries_and_keys_of_the_strongest_cells() -> None:
    ra = make()
    values = ra["ra", 2][0, 1]
    figure = query_key_pull(ra, (2, 1), k=4)
    order = values.abs().flatten().argsort(descending=True)[:4].tolist()
    cells = [divmod(i, values.shape[1]) for i in order]
    assert [(trace.y[0], trace.y[-1]) for trace in reversed(figure.data)] == cells
    widths = [trace.line.width for trace in reversed(figure.data)]
    assert widths == sorted(widths, reverse=True)
    for trace, (query, key) in zip(reversed(figure.data), cells, strict=True):
        pulled = values[query, key].item() < 0
        assert trace.line.color.startswith("rgba(208,58,60" if pulled else "rgba(52,126,198")
        assert ("pulled to" if pulled else "pushed from") in trace.hovertemplate
        assert trace.name.endswith(f"({key})")
        assert f"({query}) →" in trace.name


def test_positions_count_in_the_whole_prompt_where_it_was_cut() -> None:
    ra = make((tuple(f" w{i}" for i in range(30)),))
    figure = query_key_pull(ra, (0, 0), k=1, max_tokens=10)
    cut = ra["ra", 0][0, 0, 20:, 20:].abs()
    query, key = divmod(int(cut.argmax()), 10)
    assert figure.data[0].name == f"·w{query + 20} ({query + 20}) → ·w{key + 20} ({key + 20})"


def test_no_gradient_draws_no_line() -> None:
    assert len(query_key_pull(make(scale=0.0), (0, 0)).data) == 0


# ---- the prompt as text -------------------------------------------------------------------------


@pytest.mark.parametrize(("query", "row"), [(-1, 4), (2, 2)])
def test_tokens_are_shaded_by_the_row_of_the_query(query: int, row: int) -> None:
    ra = make()
    figure = token_row(ra, (0, 2), query=query)
    shown = np.asarray(figure.data[0].customdata, float)
    np.testing.assert_array_equal(shown[:, 0], np.arange(row + 1))
    np.testing.assert_allclose(shown[:, 1], -ra["ra", 0][0, 2, row, : row + 1], rtol=1e-6)
    np.testing.assert_allclose(shown[:, 2], ra["pattern", 0][0, 2, row, : row + 1], rtol=1e-6)
    boxes = figure.layout.shapes
    assert [box.name for box in boxes] == ["query" if i == row else "token" for i in range(5)]
    for i, box in enumerate(boxes):
        if i > row:
            assert box.fillcolor == "rgba(0,0,0,0)"
            continue
        red, _, blue = (float(c) for c in box.fillcolor[4:-1].split(","))
        value = float(shown[i, 1])
        assert (red > blue) == (value > 0) or abs(value) < 0.02 * np.abs(shown[:, 1]).max()
    most = np.abs(shown[:, 1]).max()
    assert (figure.data[0].marker.cmin, figure.data[0].marker.cmax) == pytest.approx((-most, most))


def test_forward_attention_and_the_gradient_itself_can_be_shown() -> None:
    ra = make()
    pattern = np.asarray(token_row(ra, (0, 0), kind="pattern").data[0].customdata, float)
    np.testing.assert_allclose(pattern[:, 1], ra["pattern", 0][0, 0, -1], rtol=1e-6)
    gradient = np.asarray(token_row(ra, (0, 0), sign="gradient").data[0].customdata, float)
    np.testing.assert_allclose(gradient[:, 1], ra["ra", 0][0, 0, -1], rtol=1e-6)


def test_lines_break_at_the_width_and_after_a_newline() -> None:
    figure = token_row(make(), (0, 0))
    lines = [note.y for note in figure.layout.annotations]
    assert lines == [0, 0, 0, 1, 1]  # ⏎ is the third token
    words = tuple(f" word{i}" for i in range(40))
    narrow, wide = (token_row(make((words,)), (0, 0), width=w) for w in (300, 900))
    assert narrow.layout.annotations[-1].y > wide.layout.annotations[-1].y > 0
    assert max(shape.x1 for shape in narrow.layout.shapes) <= 300
    boxes = sorted((s.y0, s.x0, s.x1) for s in narrow.layout.shapes)
    for (line, _, end), (other, start, _) in pairwise(boxes):
        assert other > line or start >= end  # none lies on another


def test_text_stays_text_in_both() -> None:
    rows = ((EVIL, *ROWS[0][1:]),)
    ra = make(rows)
    texts = [note.text for note in token_row(ra, (0, 0)).layout.annotations]
    texts += [note.text for note in query_key_pull(ra, (0, 0)).layout.annotations]
    assert not any("<script" in text for text in texts)
    assert texts[0] == "&lt;script&gt;alert(1)&lt;/script&gt;"


# ---- files --------------------------------------------------------------------------------------


def test_html_needs_nothing_else(tmp_path: Path) -> None:
    path = save_figure(go.Figure(go.Scatter(y=[1])), tmp_path / "figure.html")
    text = path.read_text(encoding="utf-8")
    assert "plotly.js v" in text
    assert "<script src=" not in text


def test_without_kaleido_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r'pip install "ra-lens\[images\]", or give .*\.html'):
        save_figure(go.Figure(), tmp_path / "figure.pdf")
    assert list(tmp_path.iterdir()) == []


def test_without_a_browser_it_says_how_to_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ChromeNotFoundError(Exception):
        pass

    def refuse(*args: object, **kwargs: object) -> bytes:
        raise ChromeNotFoundError("no browser\nhere")

    monkeypatch.setattr(images, "find_spec", lambda name: object())
    monkeypatch.setattr(go.Figure, "to_image", refuse)
    with pytest.raises(BadInput, match=r"no Chrome or Chromium \(no browser\).*BROWSER_PATH"):
        save_figure(go.Figure(), tmp_path / "figure.svg")


@pytest.mark.parametrize("name", ["figure", "figure.docx"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match=r"give one of \.png, \.svg, \.pdf"):
        save_figure(go.Figure(), tmp_path / name)


def test_images_are_written_where_kaleido_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chromium: str
) -> None:
    if importlib.util.find_spec("kaleido") is None:
        pytest.skip("kaleido is not installed (the images extra)")
    monkeypatch.setenv("BROWSER_PATH", chromium)
    path = save_figure(go.Figure(go.Scatter(y=[1, 2])), tmp_path / "figure.svg", width=300)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert 'width="300"' in text
