"""What blocking attention would do, in pages: the third map, edges, layers × tokens."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from made_caches import LAYERS, ROWS, attending, knocked_out, lower, make
from pages import Page, blocked
from ra_lens.cache import RACache
from ra_lens.head_maps import head_of_example
from ra_lens.model import Site, Sites
from ra_lens.report import inline_report, write_report
from ra_lens.report.edges import strongest_edges
from ra_lens.run_info import RunInfo


def report(ra: RACache, folder: Path, **options: Any) -> Page:
    return Page(write_report(ra, folder / "r.html", **options).read_text(encoding="utf-8"))


def frame(ra: RACache, **options: Any) -> Page:
    ((_, attrs),) = (
        (tag, a) for tag, a in Page(inline_report(ra, **options)).tags if tag == "iframe"
    )
    return Page(str(attrs["srcdoc"]))


# ---- the third map ------------------------------------------------------------------------------


@pytest.mark.parametrize("sharp", [1.0, 8.0, 60.0])
def test_what_blocking_does_can_be_read_with_three_digits(sharp: float, tmp_path: Path) -> None:
    """Also where nearly all of a row lies on one key, and A in half precision is 1."""
    ra = attending(sharp=sharp)
    for page in (report(ra, tmp_path), frame(ra)):
        data, maps = page.data(), page.maps()
        scales = {one["layer"]: one["scale"] for one in data["layers"]}
        for example, row in enumerate(ROWS):
            n = len(row)
            for layer in LAYERS:
                wanted = knocked_out(ra, layer)
                for head in range(3):
                    facts = data["examples"][example]["maps"][f"{layer}.{head}"]
                    found = blocked(maps[f"{example}.{layer}.{head}"], facts, scales[layer])
                    own = lower(ra["knockout", layer][example, head, :n, :n])
                    done = lower(torch.from_numpy(wanted[example, head, :n, :n]))
                    most = np.nanmax(np.abs(own))
                    assert facts["blocked"] == pytest.approx(most or 1.0)
                    for one in (own, done):
                        np.testing.assert_allclose(found, one, rtol=2**-9, atol=1e-6 * most)


def test_a_saturated_row_takes_one_number_more(tmp_path: Path) -> None:
    ra = attending((tuple(f" w{i}" for i in range(9)),), sharp=40.0)
    page = report(ra, tmp_path)
    for layer in LAYERS:
        for head in range(3):
            a = head_of_example(ra, (layer, head)).pattern
            mostly = int((np.nan_to_num(a) > 0.5).sum())
            assert mostly > 3
            size = len(base64.b64decode(page.maps()[f"0.{layer}.{head}"]))
            assert size == 2 * (2 * 45 + mostly)
            assert mostly <= 9


# ---- edges --------------------------------------------------------------------------------------


def rows_of(page: Page) -> list[dict[str, str | None]]:
    return [attrs for _, attrs in page.tags if "data-edge" in attrs]


@pytest.mark.parametrize("write", [report, None])
def test_the_table_has_the_top_edges_of_each_prompt(write: Any, tmp_path: Path) -> None:
    ra = attending()
    page = frame(ra) if write is None else report(ra, tmp_path)
    edges = [edge for of_example in ra.top_edges(10).by_example() for edge in of_example]
    cells = [attrs["data-edge"] for attrs in rows_of(page)]
    assert cells == [f"{e.layer}.{e.head}.{e.query}.{e.key}" for e in edges]
    assert len(cells) == 20
    done = {layer: knocked_out(ra, layer) for layer in LAYERS}
    told = re.findall(r"(L\d+H\d) \S+ \((\d)\) → \S+ \((\d)\) (\d\.\d{3}) ([+−]\S+)", page.text)
    assert len(told) == len(edges)
    for (label, query, key, pattern, effect), edge in zip(told, edges, strict=True):
        assert (label, int(query), int(key)) == (edge.label, edge.query, edge.key)
        place = (edge.example, edge.head, edge.query, edge.key)
        wanted = done[edge.layer][place]
        assert float(effect.replace("−", "-")) == pytest.approx(wanted, rel=6e-3)
        assert float(pattern) == pytest.approx(ra["pattern", edge.layer][place].item(), abs=6e-4)
    assert "0" not in {edge.key for edge in edges}
    for said in (
        "Strongest edges: loss if one look were blocked", "one edge at a time, in nats",
        "Positive: the loss would rise, the answer needs this look",
        "Looks at “<|end|>” are left out", "Prompt 2",
    ):  # fmt: skip
        assert said in page.text


def test_the_table_is_as_long_as_asked_and_of_the_prompts_shown(tmp_path: Path) -> None:
    ra = attending()
    page = report(ra, tmp_path, examples=[1], top=3)
    edges = ra.top_edges(3).by_example()[1]
    cells = [attrs["data-edge"] for attrs in rows_of(page)]
    assert cells == [f"{e.layer}.{e.head}.{e.query}.{e.key}" for e in edges]
    alone = ra.apply_slice_to_batch_dim(1)
    assert rows_of(frame(alone, top=3)) == rows_of(page)


def test_without_a_token_in_front_nothing_is_left_out_nor_said(tmp_path: Path) -> None:
    ra = attending()
    ra.info = replace(ra.info, prepended="", objective="custom")
    page = report(ra, tmp_path)
    assert "left out" not in page.text
    assert any(str(attrs["data-edge"]).endswith(".0") for attrs in rows_of(page))
    assert "one edge at a time, in units of the loss" in page.text


def test_what_is_kept_has_its_edges() -> None:
    ra = attending()
    names = {ra.sites[2].map_name(kind) for kind in ("ra", "pattern")}
    part = replace(ra, _maps={name: t for name, t in ra.items() if name in names})
    found = rows_of(frame(part))
    assert {str(attrs["data-edge"])[0] for attrs in found} == {"2"}
    assert len(found) == 10 + 3 * 3  # of three tokens, the first in front
    bare = replace(ra, _maps={})
    assert strongest_edges(bare, [0, 1], 10) is None
    assert rows_of(frame(bare)) == []
    assert "Strongest edges" not in frame(bare).text


def test_a_gradient_of_zero_has_no_edges(tmp_path: Path) -> None:
    page = report(make(scale=0.0), tmp_path)
    assert rows_of(page) == []
    assert page.text.count("The gradient is 0 everywhere.") == 2
    assert page.data()["examples"][0]["flow"] is None


# ---- layers × tokens ----------------------------------------------------------------------------


def flow_of(page: Page, example: int) -> tuple[dict[str, Any], np.ndarray]:
    facts = page.data()["examples"][example]["flow"]
    numbers = np.frombuffer(base64.b64decode(facts["values"]), "<f2").astype(float)
    return facts, numbers.reshape(-1, facts["columns"][2]) * facts["limit"]


@pytest.mark.parametrize("answers", [None, (2, 1)])
def test_the_flow_is_that_into_the_token_before_the_answer(answers: Any, tmp_path: Path) -> None:
    ra = attending()
    ra.info = replace(ra.info, answer_lengths=answers)
    page = report(ra, tmp_path)
    for example, row in enumerate(ROWS):
        query = len(row) - 1 - (0 if answers is None else answers[example])
        facts, found = flow_of(page, example)
        assert facts["query"] == ["input", query]
        assert facts["columns"] == ["input", 0, len(row)]
        wanted = [knocked_out(ra, i)[example, :, query, : len(row)].sum(axis=0) for i in LAYERS]
        wanted = np.asarray(wanted)
        np.testing.assert_allclose(
            found[:, : query + 1], wanted[:, : query + 1], rtol=2**-10, atol=1e-6
        )
        assert np.isnan(found[:, query + 1 :]).all()
    assert "Where information enters" in page.text
    assert "flow" not in frame(ra).data()["examples"][0]


def test_between_texts_there_is_no_flow(tmp_path: Path) -> None:
    info = RunInfo(str_tokens=(tuple("abcde"),), decoder_tokens=(("x", "y", "z"),))
    own = Site(0, "decoder_blocks.0.self_attn", 2, 2, 0.5)
    cross = Site(1, "decoder_blocks.0.cross_attn", 2, 2, 0.5, cross=True)
    ra = RACache(sites=Sites({0: own, 1: cross}), info=info)
    for layer, shape in ((0, (1, 2, 3, 3)), (1, (1, 2, 3, 5))):
        a = torch.rand(shape).softmax(-1)
        ra._put(layer, "pattern", a)
        ra._put(layer, "ra", torch.randn(shape))
    page = report(ra, tmp_path)
    assert page.data()["examples"][0]["flow"] is None
    assert len(rows_of(page)) == 10
