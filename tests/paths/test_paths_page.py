"""The interactive page of paths, in a real browser, and what it is made of."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from browser import Seen, opening
from ra_lens import load_demo_model, run_with_ra, trace_paths
from ra_lens.errors import BadInput
from ra_lens.paths import TraceResult, trace_layers
from ra_lens.paths.page import paths_fragment, paths_page
from ra_lens.paths.result import page_data
from ra_lens.report import write_report
from ra_lens.text import visible

PROMPT = "Q: France\nA: Paris\n\nQ: Italy\nA:"
EVIL = "</script><script>document.title='hit'</script>"
HOSTILE = [EVIL, "<img src=x onerror=alert(1)>", "<!--", "\u202eabc", "\n", "&lt;", "'\"`", "🙂"]


@pytest.fixture(scope="module")
def layered() -> TraceResult:
    return trace_layers(load_demo_model(), PROMPT)


@pytest.fixture(scope="module")
def signed() -> TraceResult:
    return trace_layers(load_demo_model(), PROMPT, follow="abs", target=" Rome", top_beam=8)


def wide() -> TraceResult:
    """Five paths that visit 30 tokens between them."""
    n = 30
    generator = torch.Generator().manual_seed(3)
    scores = 0.3 * torch.randn(n, n, generator=generator)
    near = torch.ones(n, n).tril(-1) * torch.ones(n, n).triu(-1)
    maps = (scores + 9 * near).masked_fill(torch.ones(n, n).triu(0).bool(), -1e9)
    maps[0, 0] = 0
    return trace_paths(maps.softmax(dim=-1), length_norm="avg_logprob")


def many(n: int = 600) -> TraceResult:
    """So many of the 1024 paths from the last of 12 tokens."""
    maps = torch.rand(12, 12, generator=torch.Generator().manual_seed(5)) + 0.1
    return trace_paths(maps, top_beam=n)


@pytest.fixture
def see(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Seen]]:
    with opening(browser) as get:

        def open_page(text: str, **context: Any) -> Seen:
            (tmp_path / "page.html").write_text(text, encoding="utf-8")
            return get(tmp_path / "page.html", **context)

        yield open_page


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/ra-paths\+json">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


# ---- without a browser --------------------------------------------------------------------------


def test_a_page_shows_as_many_paths_as_it_can() -> None:
    trace = many()
    assert len(trace.beams) == len(trace.paths_text) == len(json.loads(trace.to_json())["beams"])
    assert len(trace.beams) == 600
    for n, told in ((600, "The 500 best of 600 paths to"), (500, "The 500 best paths to")):
        one = replace(trace, beams=trace.beams[:n])
        data = data_of(one.to_html())[0]
        assert data["about"].startswith(told)
        texts = [text.rpartition(" (score")[0] for text in one.paths_text[:500]]
        assert [beam["text"] for beam in data["beams"]] == texts
        shown = {id for beam in data["beams"] for id in beam["nodes"]}
        assert shown == {node["id"] for node in data["nodes"]}


def test_the_page_holds_the_paths_and_asks_for_nothing(layered: TraceResult) -> None:
    text = layered.to_html()
    (trace,) = data_of(text)
    assert trace["layered"]
    assert len(trace["beams"]) == 5
    for beam, path in zip(trace["beams"], layered.beams, strict=True):
        assert [step["weight"] for step in beam["steps"]] == list(path.edge_attns)
        assert beam["nodes"][0] == trace["target"] == "L4_P10"
        assert beam["nodes"][-1] == f"L0_P{path.positions[-1]}"
    assert not re.search(r"(src|href)=", text)
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'; script-src 'sha256-" in text
    assert text.count("unsafe") == text.count("; style-src 'unsafe-inline'") == 1


def test_the_data_cannot_end_itself(layered: TraceResult) -> None:
    tokens = tuple((HOSTILE * 2)[: layered.seq_len])
    page = replace(layered, tokens=tokens, model_name=EVIL).to_html()
    assert page.count("</script>") == 2  # the data's and the script's own
    (trace,) = data_of(page)
    assert trace["tokens"] == [visible(token) for token in tokens]


def test_nothing_to_show_is_said_so() -> None:
    with pytest.raises(BadInput, match="found no traces to show"):
        paths_fragment([])


def test_a_file_is_written_whole(layered: TraceResult, tmp_path: Path) -> None:
    path = layered.save_html(tmp_path / "paths.html")
    assert path.read_text(encoding="utf-8") == layered.to_html()
    with pytest.raises(BadInput, match="no folder"):
        layered.save_html(tmp_path / "nowhere" / "paths.html")


# ---- in a browser -------------------------------------------------------------------------------


def boxes(seen: Seen) -> list[Any]:
    return [node.bounding_box() for node in seen.page.locator(".node").all()]


@pytest.mark.every_model
@pytest.mark.parametrize("what", ["wide", "layered", "signed"])
def test_no_two_tokens_lie_on_each_other(
    what: str, layered: TraceResult, signed: TraceResult, see: Callable[..., Seen]
) -> None:
    result = {"wide": wide(), "layered": layered, "signed": signed}[what]
    if what == "wide":
        assert len({p for beam in result.beams for p in beam.positions}) == 30
    seen = see(result.to_html())
    seen.page.get_by_role("button", name="Show everything").click()
    places = boxes(seen)
    frame = seen.page.locator("svg").bounding_box()
    for i, one in enumerate(places):
        assert frame["x"] <= one["x"] <= one["x"] + one["width"] <= frame["x"] + frame["width"]
        assert frame["y"] <= one["y"] <= one["y"] + one["height"] <= frame["y"] + frame["height"]
        for other in places[:i]:
            apart_x = abs(one["x"] - other["x"]) >= min(one["width"], other["width"])
            apart_y = abs(one["y"] - other["y"]) >= min(one["height"], other["height"])
            assert apart_x or apart_y


def test_a_click_tells_position_token_and_weights(
    layered: TraceResult, see: Callable[..., Seen]
) -> None:
    seen = see(layered.to_html())
    detail = seen.page.locator(".detail")
    assert detail.inner_text() == "Choose a token, a link or a path."
    last = layered.beams[0].steps[-1]
    seen.page.locator(f'.node[data-id="L{last.layer}_P{last.key}"]').click()
    text = detail.inner_text()
    assert f"Position {last.key}" in text
    assert visible(layered.tokens[last.key]) in text
    assert f"layer {last.layer} head {last.head} moved" in text
    assert f"weight {last.weight:.4f}" in text
    assert seen.page.locator(".link.dim").count() > 0
    pressed = seen.page.locator('.beams button[aria-pressed="true"]').count()
    assert pressed == sum(beam.positions[-1] == last.key for beam in layered.beams)
    seen.page.get_by_role("button", name="Clear the selection").click()
    assert seen.page.locator(".dim").count() == 0


@pytest.mark.every_model
def test_a_path_can_be_chosen_and_shown_alone(
    layered: TraceResult, see: Callable[..., Seen]
) -> None:
    seen = see(layered.to_html())
    seen.page.locator(".beams button").nth(1).click()
    lit = seen.page.locator(".link:not(.dim)")
    assert {link.get_attribute("data-beam") for link in lit.all()} == {"1"}
    text = seen.page.locator(".detail").inner_text()
    for step in layered.beams[1].steps:
        assert f"weight {step.weight:.4f}" in text
    seen.page.get_by_label("Show paths").select_option("2")
    shown = seen.page.locator(".link:not(.hidden)")
    assert {link.get_attribute("data-beam") for link in shown.all()} == {"2"}
    assert seen.page.locator(".beams li:not(.hidden)").count() == 1
    visited = len({step.key for step in layered.beams[2].steps}) - 1
    assert seen.page.locator(".node:not(.hidden)").count() == len(layered.layers) + 1 >= visited


@pytest.mark.every_model
def test_paths_have_colours_of_their_own_and_signs_two(
    layered: TraceResult, signed: TraceResult, see: Callable[..., Seen]
) -> None:
    def strokes(seen: Seen, where: str) -> set[str]:
        return {
            link.evaluate("e => getComputedStyle(e).stroke")
            for link in seen.page.locator(where).all()
        }

    seen = see(layered.to_html())
    for i in range(5):
        assert len(strokes(seen, f'.link[data-beam="{i}"]')) == 1
    assert len(strokes(seen, ".link")) == 5
    seen = see(signed.to_html())
    values = [step.value for beam in signed.beams for step in beam.steps if step.kind == "head"]
    assert min(values) < 0 < max(values)
    assert strokes(seen, ".link.head.less") == {"rgb(33, 102, 172)"}
    assert strokes(seen, ".link.head:not(.less)") == {"rgb(178, 24, 43)"}
    assert seen.page.locator(".link.less").count() == sum(value < 0 for value in values)
    assert "descent wants less" in seen.page.locator(".key").inner_text()
    seen.page.get_by_role("button", name="Change what colours mean").click()
    assert len(strokes(seen, ".link")) == 8


@pytest.mark.every_model
def test_zoom_pan_and_the_keyboard(layered: TraceResult, see: Callable[..., Seen]) -> None:
    seen = see(layered.to_html())

    def view() -> list[float]:
        return [float(x) for x in seen.page.locator("svg").get_attribute("viewBox").split()]

    first = view()
    frame = seen.page.locator("svg").bounding_box()
    seen.page.mouse.move(frame["x"] + 30, frame["y"] + 30)
    seen.page.mouse.wheel(0, -300)
    seen.page.wait_for_function(f"document.querySelector('svg').viewBox.baseVal.width < {first[2]}")
    zoomed = view()
    seen.page.mouse.down()
    seen.page.mouse.move(frame["x"] + 90, frame["y"] + 30)
    seen.page.mouse.up()
    moved = view()
    assert moved[0] < zoomed[0]
    assert moved[2:] == zoomed[2:]
    svg = seen.page.locator("svg")
    svg.focus()
    seen.page.keyboard.press("ArrowRight")
    assert view()[0] > moved[0]
    seen.page.keyboard.press("0")
    assert view() == first
    node = seen.page.locator(".node").last
    node.focus()
    seen.page.keyboard.press("Enter")
    assert "Position" in seen.page.locator(".detail").inner_text()
    seen.page.keyboard.press("Escape")
    assert seen.page.locator(".detail").inner_text().startswith("Choose")


@pytest.mark.every_model
def test_hostile_tokens_are_text(layered: TraceResult, see: Callable[..., Seen]) -> None:
    tokens = tuple((HOSTILE * 2)[: layered.seq_len])
    seen = see(replace(layered, tokens=tokens, model_name=EVIL).to_html())
    for i in range(seen.page.locator(".node").count()):
        seen.page.locator(".node").nth(i).click()
    assert seen.page.title() == f"Attention paths of {EVIL}"
    assert seen.page.locator("img").count() == 0
    shown = {visible(tokens[p]) for p in layered.beams[0].positions}
    seen.page.locator(".beams button").first.click()
    assert all(text in seen.page.locator(".detail").inner_text() for text in shown)


@pytest.mark.every_model
def test_dark_mode_and_phones(layered: TraceResult, see: Callable[..., Seen]) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        seen = see(layered.to_html(), color_scheme=scheme, viewport={"width": 360, "height": 740})
        style = "e => getComputedStyle(e).backgroundColor"
        backgrounds.append(seen.page.locator(".ra-paths").evaluate(style))
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360
        ink = seen.page.locator("svg text").first.evaluate("e => getComputedStyle(e).fill")
        assert ink != backgrounds[-1]
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(27, 31, 37)"]


@pytest.mark.every_model
def test_tabs_change_what_is_shown(
    layered: TraceResult, signed: TraceResult, see: Callable[..., Seen]
) -> None:
    seen = see(paths_page("Paths", [page_data(layered), page_data(signed)]))
    tabs = seen.page.get_by_role("tab")
    assert [tab.inner_text() for tab in tabs.all()] == [
        "All layers: attention × norm of what is written",
        "All layers: where descent changes attention (|R|)",
    ]
    assert seen.page.locator(".beams li").count() == 5
    tabs.first.focus()
    seen.page.keyboard.press("ArrowRight")
    assert tabs.nth(1).get_attribute("aria-selected") == "true"
    assert seen.page.locator(".beams li").count() == 8


@pytest.mark.every_model
def test_a_report_shows_paths_beside_its_maps(
    layered: TraceResult, signed: TraceResult, see: Callable[..., Seen], tmp_path: Path
) -> None:
    _, ra = run_with_ra(load_demo_model(), PROMPT, target=" Rome")
    path = write_report(ra, tmp_path / "report.html", top=1, traces=[layered, signed])
    seen = see(path.read_text(encoding="utf-8"))
    assert seen.page.get_by_role("heading", name="Paths to the last token").count() == 1
    assert seen.page.locator(".ra-paths .node").count() > 5
    assert seen.page.locator("canvas").count() >= 2
    plain = write_report(ra, tmp_path / "plain.html", top=1)
    assert "ra-paths" not in plain.read_text(encoding="utf-8")
