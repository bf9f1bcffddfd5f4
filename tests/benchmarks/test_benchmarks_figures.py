"""The figures of the page show the numbers that are kept; read from traces, not from pixels."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path

import plotly.graph_objects as go
import pytest

from benchmarks import figures
from benchmarks.models import HUGGING_FACE
from benchmarks.timing import low_high

# Drawing images takes seconds.
pytestmark = pytest.mark.every_model

DOCS = Path(__file__).parents[2] / "docs"
TABLES = json.loads((DOCS / "performance.json").read_text(encoding="utf-8"))
BARS = {
    "engine": "over the forward pass",
    "peers": "over Hugging Face's forward pass",
    "memory": "over the bare pass",
}


def panel(row):
    words = [
        row[name] for name in ("shape", "model") if row.get(name, "GPT-2 small") != "GPT-2 small"
    ]
    size = row["batch × tokens"]
    return ", ".join([*words, size if "shape" in row else f"{size} tokens"])


def shown(name):
    """The rows that a figure shows: Hugging Face's own are for the table only."""
    rows = figures.records(TABLES[name])
    return [row for row in rows if row.get("model") != HUGGING_FACE]


def bars(figure):
    """The value of each bar, by panel and route."""
    return {
        (trace.name, route): value
        for trace in figure.data
        if isinstance(trace, go.Bar)
        for route, value in zip(trace.customdata, trace.x, strict=True)
    }


def named(figure, suffix):
    """Other traces, by panel."""
    return {
        trace.name.removesuffix(suffix): trace
        for trace in figure.data
        if trace.name.endswith(suffix)
    }


def routes(figure):
    """The routes along the axis, as they are kept: what is wrapped there is a line here."""
    return [text.replace("<br>", " ") for text in figure.layout.yaxis.ticktext]


def with_spread(name, value):
    """A table of bars where every row has that spread, in a column of its own at the end."""
    table = copy.deepcopy(TABLES[name])
    if "spread" in table["columns"]:
        at = table["columns"].index("spread")
        for row in (table["columns"], *table["rows"]):
            del row[at]
    table["columns"].append("spread")
    for row in table["rows"]:
        row.append(value)
    return table


@pytest.mark.parametrize("name", BARS)
def test_bars_are_the_numbers_kept(name):
    figure = figures.FIGURES[name](TABLES[name])
    rows = shown(name)
    kept = {(panel(row), row["route"]): row[BARS[name]] for row in rows}
    assert bars(figure) == {key: value for key, value in kept.items() if value is not None}


@pytest.mark.parametrize("name", BARS)
def test_a_bar_stands_beside_the_name_of_its_route_and_says_its_number(name):
    figure = figures.FIGURES[name](TABLES[name])
    said = [note for note in figure.layout.annotations if note.text.startswith("<b>")]
    values = list(bars(figure).values())
    assert [float(re.match("<b>(.*?)</b>", note.text)[1]) for note in said] == pytest.approx(
        values, abs=0.005
    )
    for trace in figure.data:
        if isinstance(trace, go.Bar):
            assert [routes(figure)[place] for place in trace.y] == list(trace.customdata)


def test_memory_says_the_megabytes_of_each_bar():
    rows = [row for row in figures.records(TABLES["memory"]) if row[BARS["memory"]] is not None]
    figure = figures.memory(TABLES["memory"])
    said = [note.text for note in figure.layout.annotations if note.text.startswith("<b>")]
    for row, text in zip(rows, said, strict=True):
        number = float(text.split("  ")[1].removesuffix(" MB").replace(",", ""))
        assert number == pytest.approx(row["peak, MB"], rel=0.01)


def test_whiskers_are_the_spreads_kept():
    figure = figures.engine(TABLES["engine"])
    rows = {(panel(row), row["route"]): row for row in shown("engine")}
    found = {}
    for name, trace in named(figure, ", spread").items():
        ends = trace.error_x
        for x, y, more, less in zip(trace.x, trace.y, ends.array, ends.arrayminus, strict=True):
            found[name, routes(figure)[int(y)]] = (x - less, x + more)
    spreads = {key: low_high(row["spread"]) for key, row in rows.items()}
    wide = {key: ends for key, ends in spreads.items() if ends is not None and ends[0] < ends[1]}
    assert set(found) == set(wide)
    for key, (low, high) in wide.items():
        value = rows[key]["over the forward pass"]
        assert found[key] == pytest.approx((min(low, value), max(high, value)))


@pytest.mark.parametrize("name", BARS)
def test_no_spread_is_no_whisker(name):
    figure = figures.FIGURES[name](with_spread(name, None))
    assert named(figure, ", spread") == {}
    assert not any("whiskers" in note.text for note in figure.layout.annotations)
    figure = figures.FIGURES[name](with_spread(name, "0.01 to 9.00"))
    assert set(named(figure, ", spread")) == {key for key, _ in bars(figure)}
    assert any("whiskers" in note.text for note in figure.layout.annotations)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_columns_are_read_by_name(name):
    table = TABLES[name]
    turned = {
        **table,
        "columns": table["columns"][::-1],
        "rows": [row[::-1] for row in table["rows"]],
    }
    assert figures.FIGURES[name](turned) == figures.FIGURES[name](table)


def test_limits_cross_the_bar_of_run_with_ra():
    figure = figures.engine(TABLES["engine"])
    limits = named(figure, ", limit")
    assert {name: trace.x for name, trace in limits.items()} == {
        f"{model}, {shape}": (limit, limit) for (model, shape), limit in figures.LIMITS.items()
    }
    for trace in limits.values():
        assert routes(figure)[int(sum(trace.y) / 2)] == "run_with_ra"
    said = [note.text for note in figure.layout.annotations if "limit" in note.text]
    assert [text.split("limit ")[1][:4] for text in said] == ["1.30", "1.35", "1.40", "1.65"]


def test_growth_is_the_numbers_kept():
    rows = figures.records(TABLES["growth"])
    lines = named(figures.growth(TABLES["growth"]), "")
    for axis in figures.distinct(rows, "axis"):
        for column in ("s", "peak, MB"):
            line = lines[f"{axis}, {column}"]
            kept = [(row["value"], row[column]) for row in rows if row["axis"] == axis]
            assert list(zip(line.x, line.y, strict=True)) == kept


def test_guides_have_their_slope_and_end_in_the_last_point():
    traces = figures.growth(TABLES["growth"]).data
    guides = [trace for trace in traces if trace.name.startswith("slope")]
    lines = {(t.xaxis, t.yaxis): t for t in traces if not t.name.startswith("slope")}
    assert len(lines) == 8
    assert [trace.name for trace in guides].count("slope 2") == 2
    for guide in guides:
        line = lines[guide.xaxis, guide.yaxis]
        assert (guide.x[-1], guide.y[-1]) == (line.x[-1], line.y[-1])
        (x0, _, x1), (y0, _, y1) = guide.x, guide.y
        slope = math.log(y1 / y0) / math.log(x1 / x0)
        assert f"slope {slope:.0f}" == guide.name
        assert slope == pytest.approx(round(slope))


def test_what_was_not_measured_is_left_out():
    table = copy.deepcopy(TABLES["growth"])
    at = table["columns"].index("s")
    for row in table["rows"][1:3]:
        row[at] = None
    line = named(figures.growth(table), "")["tokens, s"]
    assert line.x == (64, 512, 1024, 2048)
    for row in table["rows"]:
        row[at] = None
    lines = named(figures.growth(table), "")
    assert lines["tokens, s"].x == ()
    assert len(lines["tokens, peak, MB"].x) == 6


def test_the_page_shows_every_figure():
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[(.+?)\]\((.+?)\)", text)
    files = [figures.file_name(name) for name in figures.FIGURES]
    assert [path for _, path in shown] == files
    assert all(len(alternative) > 80 for alternative, _ in shown)
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.glob("figures/performance-*")} == (
        set(files)
    )
    for name, path in zip(figures.FIGURES, files, strict=True):
        after = text.index(path) - text.index(f"<!-- end {name} -->")
        assert 0 < after < 400
    assert "python -m benchmarks.figures" in text


def test_the_command_draws_the_tables_that_have_rows(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        figures, "save_figure", lambda figure, path, **_: drawn.update({path: figure}) or path
    )
    tables = {**TABLES, "peers": {**TABLES["peers"], "rows": []}}
    (tmp_path / "performance.json").write_text(json.dumps(tables), encoding="utf-8")
    figures.main(folder=tmp_path)
    names = ["engine", "memory", "growth"]
    assert list(drawn) == [tmp_path / figures.file_name(name) for name in names]
    assert list(drawn.values()) == [figures.FIGURES[name](TABLES[name]) for name in names]
    assert (tmp_path / "figures").is_dir()
