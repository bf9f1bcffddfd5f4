"""What the benchmarks compare does the same thing, and the page holds what was measured."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks import (
    engine,
    growth,
    long_prompts,
    memory,
    models,
    overhead,
    page,
    peers,
    recompute,
    startup,
    timing,
    vectors,
)
from benchmarks.__main__ import NAMES
from ra_lens.collect import reversed_attention
from tiny_models import KINDS, relative

keeps_mark = pytest.mark.skipif(
    not memory.RESET.exists(), reason="this system keeps no mark of the highest memory"
)

SHAPE = {"n_layer": 2, "n_head": 4, "width": 24, "n_vocab": 200}
TOKENS = torch.randint(0, 199, (2, 7), generator=torch.Generator().manual_seed(0))
DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("kind", KINDS)
def test_every_route_gives_the_same_maps(kind):
    model, inside = (models.gpt2_small(k, **SHAPE) for k in (kind, models.HUGGING_FACE))
    ours = engine.routes(model, TOKENS)[engine.OURS]().stack()
    authors = torch.stack(peers.authors_way(inside, TOKENS))
    retained = torch.stack(peers.retain_grad(inside, TOKENS))
    kept = engine.transformer_lens_alone(model, TOKENS)
    alone = torch.stack(
        [
            reversed_attention(
                kept[f"blocks.{i}.attn.hook_pattern"],
                kept[f"blocks.{i}.attn.hook_pattern_grad"],
                6**-0.5,
            )
            for i in range(2)
        ]
    )
    assert float(ours.norm()) > 0
    for other in (authors, retained, alone):
        assert relative(other, ours) < 1e-5


@keeps_mark
@pytest.mark.every_model
@pytest.mark.parametrize("route", list(memory.ROUTES))
def test_memory_of_every_route_is_measured(route):
    found = memory.one(KINDS[0], 16, route, {**SHAPE, "batch": 2})
    assert found["seconds"] > 0
    assert (found["estimate"] > 0) == (route in memory.OPTIONS)


@keeps_mark
def test_a_peak_is_that_of_what_is_allocated():
    peak, seconds = memory._peak(lambda: torch.ones(50_000_000).sum())
    assert 1.9e8 < peak < 3e8
    assert seconds > 0


def test_exponents_and_medians():
    assert growth._exponent(2, 8, 3.0, 48.0) == pytest.approx(2.0)
    assert growth._exponent(2, 8, 3.0, 0.0) is None
    ran = []
    routes = {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}
    times = timing.interleaved(routes, rounds=3)
    assert ran == ["a", "b"] * 4
    assert [len(t.seconds) for t in times.values()] == [3, 3]
    assert timing.Times([3.0, 1.0, 2.0]).median == 2.0


def test_a_spread_is_that_of_single_rounds():
    assert timing.ratio_spread([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == "1.00 to 3.00"
    assert timing.difference_spread([1.0, 2.5], [1.001, 1.0]) == "0.00 to 1.50"
    assert timing.difference_spread([1.0, 2.5], [3.0, 1.0]) == "-2.00 to 1.50"
    assert timing.low_high("-2.00 to 1.50") == (-2.0, 1.5)


def test_one_round_has_no_spread():
    assert timing.ratio_spread([2.0], [1.0]) is None
    assert timing.low_high(None) is None


@pytest.mark.every_model
def test_overhead_runs():
    table = overhead.measure(rounds=2, quick=True)
    assert [row[0] for row in table["rows"]] == list(KINDS)
    for row, (low, high) in zip(table["rows"], spreads(table, "spread, ms"), strict=True):
        # The median of two rounds is their mean, as is the difference.
        assert low - 0.006 < row[table["columns"].index("difference, ms")] < high + 0.006


def spreads(table, column="spread"):
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    return [timing.low_high(row[table["columns"].index(column)]) for row in table["rows"]]


@pytest.mark.every_model
@pytest.mark.parametrize(
    ("module", "over", "base"),
    [
        (engine, "over the forward pass", engine.FORWARD),
        (peers, "over Hugging Face's forward pass", peers.HF_FORWARD),
    ],
)
def test_ratios_have_the_spread_of_their_rounds(module, over, base, monkeypatch):
    narrow = partial(models.gpt2_small, width=24, n_head=4)
    monkeypatch.setattr(module, "gpt2_small", narrow)
    table = module.measure(rounds=2, quick=True)
    route, ratio = (table["columns"].index(name) for name in ("route", over))
    for row, (low, high) in zip(table["rows"], spreads(table), strict=True):
        if row[route] == base:
            assert row[ratio] == low == high == 1
        else:
            # The medians of two rounds are their means, whose ratio lies between the two.
            assert low - 0.006 < row[ratio] < high + 0.006


@pytest.mark.every_model
@pytest.mark.parametrize("module", [recompute, vectors])
def test_what_an_option_costs_has_the_spread_of_its_rounds(module, monkeypatch):
    narrow = partial(models.gpt2_small, width=24, n_head=4)
    monkeypatch.setattr(module, "gpt2_small", narrow)
    table = module.measure(rounds=2, quick=True)
    for row, (low, high) in zip(table["rows"], spreads(table), strict=True):
        assert low - 0.006 < row[table["columns"].index("ratio")] < high + 0.006


def test_peaks_have_the_spread_of_their_rounds(monkeypatch):
    peaks = count(1)
    ran = []

    def apart(kind, tokens, route, **shape):
        ran.append(route)
        return {"peak": 1e6 * next(peaks), "seconds": 1.0, "estimate": 0}

    monkeypatch.setattr(memory, "apart", apart)
    table = memory.measure(rounds=2, quick=True)
    assert ran == [*memory.ROUTES, *memory.ROUTES]
    n, bare = len(memory.ROUTES), list(memory.ROUTES).index(memory.BARE) + 1
    for i, found in enumerate(spreads(table), start=1):
        assert found == pytest.approx(sorted((i / bare, (i + n) / (bare + n))), abs=0.006)


def test_each_length_runs_with_whole_maps_and_in_blocks(monkeypatch):
    ran = []

    def apart(kind, tokens, route, **shape):
        ran.append((tokens, route))
        return {"peak": 2e6, "seconds": 1.0, "estimate": 1e6}

    monkeypatch.setattr(long_prompts, "apart", apart)
    table = long_prompts.measure(rounds=1, quick=True)
    assert ran == [(tokens, route) for tokens in (32, 64) for route in memory.LONG]
    assert [row[1:] for row in table["rows"]] == [[*of, 2.0, 1.0, 1.0] for of in ran]


@keeps_mark
@pytest.mark.every_model
def test_a_long_prompt_takes_less_memory_in_blocks():
    shape = {"n_layer": 2, "n_head": 4, "width": 24, "n_vocab": 50, "rotary": True, "n_ctx": 1024}
    kind = KINDS[0]
    peaks = [memory.apart(kind, 1024, name, **shape)["peak"] for name in list(memory.LONG)[:2]]
    assert peaks[0] > 4 * 1024**2 * 4  # a whole map
    assert peaks[1] < peaks[0] / 2


def test_starts_have_the_spread_of_their_rounds(monkeypatch):
    def interleaved(routes, *, rounds):
        return {name: timing.Times([1.0 + i, 3.0 + 2 * i]) for i, name in enumerate(routes)}

    monkeypatch.setattr(startup, "interleaved", interleaved)
    table = startup.measure(rounds=2)
    assert [row[2] for row in table["rows"]] == [1.5 * i for i in range(5)]
    assert spreads(table, "spread, s") == [(i, 2 * i) for i in range(5)]


def test_the_page_gets_the_tables_between_its_marks(tmp_path):
    shown = tmp_path / "performance.md"
    shown.write_text(
        "before\n<!-- begin engine -->\nold\n<!-- end engine -->\nafter\n"
        "<!-- begin machine -->\n<!-- end machine -->\n"
    )
    table = {"title": "T", "how": "H.", "columns": ["a", "b"], "rows": [["x", 1.234], ["y", None]]}
    page.write({"machine": {"how": "M"}, "engine": table}, shown)
    text = shown.read_text()
    assert text.startswith("before\n<!-- begin engine -->\n## T\n\nH.\n\n| a | b |\n|---|---|\n")
    assert "| x | 1.23 |\n| y | – |\n<!-- end engine -->\nafter" in text
    assert "old" not in text
    assert "Measured with M." in text


def test_the_page_shown_is_that_of_the_numbers_kept(tmp_path):
    tables = json.loads((DOCS / "performance.json").read_text(encoding="utf-8"))
    assert set(tables) == {"machine", *NAMES}
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    copy = tmp_path / "performance.md"
    copy.write_text(re.sub(r"(<!-- begin \w+ -->\n).*?(<!-- end)", r"\1\2", text, flags=re.S))
    page.write(tables, copy)
    assert copy.read_text(encoding="utf-8") == text
