"""What blocking attention would do, in a browser: the third view, edges and layers at a click."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browser import opening
from explorer_cells import value
from made_caches import LAYERS, attending, knocked_out
from ra_lens.report import inline_report, write_report

# A browser takes seconds to start; what the page holds is tested in test_report_knockouts.py.
pytestmark = pytest.mark.every_model

READ = r"from .*\((\d+)\) to .*\((\d+)\): "


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    with opening(browser) as get:

        def opened(path: Path, **context: Any) -> Any:
            page = get(path, **context).page
            page.wait_for_selector("#ra-grid [aria-selected=true]")
            return page

        yield opened


def readout(page: Any) -> str:
    return str(page.text_content("#ra-readout"))


def told_loss(text: str) -> float:
    """Read the change of the loss that is told in words."""
    if "the loss would stay" in text:
        return 0.0
    found = re.search(r"loss would (rise|fall) by (\S+) nats \((.*?)\)", text)
    assert found is not None, text
    wanted = {"rise": "the answer needs", "fall": "in the way"}[found[1]]
    assert wanted in found[3]
    return value(found[2]) * (1 if found[1] == "rise" else -1)


@pytest.mark.parametrize("sign", ["descent", "gradient"])
def test_the_third_view_tells_what_blocking_each_edge_does(
    open_page: Callable[..., Any], tmp_path: Path, sign: Any
) -> None:
    ra = attending((("<s>", " a", " b", " c"),), sharp=6.0)
    page = open_page(write_report(ra, tmp_path / "r.html", sign=sign))
    page.click("[data-head='0.1']")
    assert page.locator("#ra-part-r").is_visible()
    assert page.locator("#ra-part-k").is_hidden()
    page.click("[data-view=k]")
    assert page.locator("#ra-part-r").is_hidden()
    assert page.locator("#ra-part-k").is_visible()
    assert page.get_attribute("[data-view=k]", "aria-pressed") == "true"
    page.focus("#ra-k")
    for key in ["ArrowUp"] * 4 + ["ArrowLeft"] * 4:
        page.keyboard.press(key)
    wanted = knocked_out(ra, 0)[0, 1]
    most = np.abs(wanted).max()
    for query in range(4):
        for key in range(query + 1):
            text = readout(page)
            found = re.match(READ, text)
            assert (int(found[1]), int(found[2])) == (query, key)
            assert told_loss(text) == pytest.approx(wanted[query, key], rel=6e-3, abs=1e-6 * most)
            page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        for _ in range(4):
            page.keyboard.press("ArrowLeft")
    bar = str(page.text_content("#ra-bar-k"))
    assert re.search(r"−\S+ in the way0 natsthe answer needs it \+\S+", bar)
    # The largest entries are those of the view.
    rows = page.locator("#ra-cells tbody tr").evaluate_all(
        "rows => rows.map(row => row.cells[4].textContent)"
    )
    sizes = np.sort(np.abs(wanted[np.abs(wanted) > 1e-9]))[::-1]
    assert [abs(value(one)) for one in rows] == pytest.approx(list(sizes), rel=6e-3, abs=1e-6)
    page.click("[data-view=r]")
    assert page.locator("#ra-part-k").is_hidden()
    assert "descent wants" in readout(page)
    assert "; if blocked: loss " in readout(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_green_is_what_the_answer_needs_and_brown_what_is_in_the_way(
    open_page: Callable[..., Any], tmp_path: Path, scheme: str
) -> None:
    ra = attending((tuple(f" w{i}" for i in range(6)),))
    page = open_page(write_report(ra, tmp_path / "r.html"), color_scheme=scheme)
    wanted = knocked_out(ra, 2)[0, 0]
    page.click("[data-head='2.0']")
    page.click("[data-view=k]")
    page.focus("#ra-k")
    for key in ["ArrowUp"] * 6 + ["ArrowDown"] * 5:
        page.keyboard.press(key)
    shades = page.locator(".token:not(.next)").evaluate_all(
        "chips => chips.map(c => c.style.background)"
    )
    seen = set()
    for shade, effect in zip(shades, wanted[5], strict=True):
        red, green, blue = map(int, re.findall(r"\d+", shade))
        if abs(effect) > 0.1 * np.abs(wanted).max():
            assert (min(green, blue) > red) == (effect > 0)
            assert (red > green > blue) == (effect < 0)
            seen.add(effect > 0)
    assert seen == {True, False}
    ends = {"light": ("0,60,48", "84,48,5"), "dark": ("191,240,231", "255,220,163")}[scheme]
    drawn = page.evaluate(
        """() => { const c = document.getElementById('ra-k'), p = c.getContext('2d');
            const all = p.getImageData(0, 0, c.width, c.height).data, found = new Set();
            for (let i = 0; i < all.length; i += 4)
              found.add([all[i], all[i + 1], all[i + 2]].join());
            return [...found] }"""
    )
    at = np.unravel_index(np.abs(wanted).argmax(), wanted.shape)
    assert ends[0 if wanted[at] > 0 else 1] in drawn  # the largest has the end of the scale


@pytest.mark.parametrize("inline", [False, True])
def test_a_click_on_an_edge_shows_its_head_with_the_cell(
    open_page: Callable[..., Any], browser: Any, tmp_path: Path, inline: bool
) -> None:
    ra = attending()
    if inline:
        path = tmp_path / "n.html"
        path.write_text(f'<!doctype html><meta charset="utf-8">{inline_report(ra)}')
        context = browser.new_context(offline=True)
        outer = context.new_page()
        outer.goto(path.as_uri())
        (page,) = (one for one in outer.frames if one.parent_frame is not None)
        page.wait_for_selector("#ra-grid [aria-selected=true]")
    else:
        page = open_page(write_report(ra, tmp_path / "r.html"))
    for example, edges in enumerate(ra.top_edges(10).by_example()):
        page.select_option("#ra-example", str(example))
        rows = page.locator(".edges:visible [data-edge]")
        assert rows.count() == len(edges)
        for i in (3, 0, 9):
            rows.nth(i).click()
            edge, text = edges[i], readout(page)
            assert str(page.text_content("#ra-title")).startswith(f"{edge.label}:")
            found = re.match(READ, text)
            assert (int(found[1]), int(found[2])) == (edge.query, edge.key)
            assert told_loss(text) == pytest.approx(edge.effect, rel=6e-3)
            assert page.locator("#ra-part-k").is_visible()
            assert rows.nth(i).get_attribute("aria-current") == "true"
            assert page.locator("[aria-current]").count() == 1
    if inline:
        context.close()


def test_an_edge_whose_maps_are_not_in_the_page_names_its_head(
    open_page: Callable[..., Any], tmp_path: Path
) -> None:
    ra = attending()
    page = open_page(write_report(ra, tmp_path / "r.html", max_megabytes=1e-5))
    head = ra.top_heads(1)[0]
    i, edge = next(
        (i, e) for i, e in enumerate(ra.top_edges(10).by_example()[0]) if e.label != head.label
    )
    page.locator(".edges:visible [data-edge]").nth(i).click()
    title = str(page.text_content("#ra-title"))
    assert title.startswith(f"{edge.label}:")
    assert title.endswith("its maps are not here")


def test_the_flow_tells_each_layer_and_leads_to_the_head(
    open_page: Callable[..., Any], tmp_path: Path
) -> None:
    ra = attending()
    page = open_page(write_report(ra, tmp_path / "r.html"))
    rows = np.stack([knocked_out(ra, layer)[0, :, 4] for layer in LAYERS])  # layer, head, key
    assert page.text_content("#ra-flow-title").endswith("(4)")
    page.focus("#ra-flow")
    for key in ["ArrowUp"] * 2 + ["ArrowLeft"] * 5:
        page.keyboard.press(key)
    for i, layer in enumerate(LAYERS):
        for j in range(5):
            text = str(page.text_content("#ra-flow-readout"))
            assert re.match(rf"layer {layer}, to .*\({j}\): ", text)
            assert told_loss(text) == pytest.approx(rows[i, :, j].sum(), rel=6e-3)
            page.keyboard.press("ArrowRight")
        if i == 0:
            for key in ["ArrowDown"] + ["ArrowLeft"] * 5:
                page.keyboard.press(key)
    page.keyboard.press("Enter")
    head = int(np.abs(rows[1, :, 4]).argmax())
    assert str(page.text_content("#ra-title")).startswith(f"L2H{head}:")
    found = re.match(READ, readout(page))
    assert (found[1], found[2]) == ("4", "4")
    page.select_option("#ra-example", "1")
    assert page.text_content("#ra-flow-title").endswith("(2)")


def test_without_scripts_the_edges_can_be_read(browser: Any, tmp_path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(write_report(attending(), tmp_path / "r.html").as_uri())
    text = page.inner_text("body")
    assert text.count("from (query) → to (key)") == 2
    assert "Where information enters" not in text
    context.close()
