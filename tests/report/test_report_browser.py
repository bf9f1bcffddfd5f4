"""The report in a real browser: what a click shows is what the cache holds, and nothing leaves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from browser import Seen, opening
from explorer_cells import NUMBER, ShownCell, same_cells, shown_cells, value, wanted_cells
from made_caches import make
from made_frames import sweep
from pages import EVIL, HOSTILE
from ra_lens.cache import RACache
from ra_lens.model import Site, Sites
from ra_lens.report import PatchedPrompt, Predictions, Section, write_report
from ra_lens.report.experiments import write_sweep_page
from ra_lens.run_info import RunInfo


class Opened(Seen):
    """A report."""

    def __init__(self, running: Any, path: Path, **context: Any) -> None:
        super().__init__(running, path, **context)
        self.page.wait_for_selector("#ra-grid [aria-selected=true], .main-svg")

    def check(self) -> None:
        assert self.errors == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:"))] == []
        assert len([url for url in self.requests if url.startswith("file:")]) == 1

    def choose(self, layer: int, head: int) -> None:
        self.page.click(f"[data-head='{layer}.{head}']")

    def cells(self) -> list[ShownCell]:
        return shown_cells(self.page)

    def readout(self) -> str:
        return str(self.page.text_content("#ra-readout"))

    def point_at(self, which: str, query: int, key: int, n: int) -> None:
        """Move the pointer to a cell, found by where the selected cell's frame says maps lie."""
        box = self.page.evaluate(
            """which => { const c = document.getElementById(`ra-${which}`);
                c.scrollIntoView({block: 'center'});
                const b = c.getBoundingClientRect(); return [b.left, b.top, b.width, b.height] }""",
            which,
        )
        # Keys reach the right edge less the blank part; walk there with the keyboard instead.
        self.page.mouse.move(box[0] + box[2] / 2, box[1] + 4)
        self.page.focus(f"#ra-{which}")
        for key_name in ["ArrowUp"] * n + ["ArrowLeft"] * n:
            self.page.keyboard.press(key_name)
        for key_name in ["ArrowDown"] * query + ["ArrowRight"] * key:
            self.page.keyboard.press(key_name)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Opened]]:
    with opening(browser, Opened, quiet=False) as get:
        yield get


def test_a_click_on_a_head_shows_its_maps(open_page: Callable[..., Opened], tmp_path: Path) -> None:
    ra = make()
    opened = open_page(write_report(ra, tmp_path / "r.html"))
    norms = ra.norms()
    for layer, head in [(2, 1), (0, 2), (0, 0)]:
        opened.choose(layer, head)
        row = ra.layers.index(layer)
        title = str(opened.page.text_content("#ra-title"))
        rank = 1 + int((norms[0] > norms[0, row, head]).sum())
        found = re.match(rf"L{layer}H{head}: rank (\d) of 6, ‖R‖ = ({NUMBER})", title)
        assert found is not None
        assert int(found[1]) == rank
        assert value(found[2]) == pytest.approx(norms[0, row, head].item(), rel=6e-3)
        same_cells(opened.cells(), wanted_cells(ra, layer, head, 0, 5))
    # Another prompt.
    opened.page.select_option("#ra-example", "1")
    opened.choose(2, 0)
    same_cells(opened.cells(), wanted_cells(ra, 2, 0, 1, 3))
    opened.check()


@pytest.mark.every_model
def test_the_keyboard_reaches_heads_and_cells(
    open_page: Callable[..., Opened], tmp_path: Path
) -> None:
    ra = make((("<s>", " a", "\n", " b", " c"),))
    opened = open_page(write_report(ra, tmp_path / "r.html"))
    page = opened.page
    page.focus("[data-head='0.0']")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert str(page.text_content("#ra-title")).startswith("L2H1:")
    r, a = -ra["ra", 2][0, 1], ra["pattern", 2][0, 1]
    for query, key in [(4, 0), (3, 2), (4, 4)]:
        opened.point_at("r", query, key, 5)
        found = re.search(
            rf"\((\d)\) to .*\((\d)\): −R ({NUMBER}) \(descent wants (\w+)\), A ({NUMBER}), "
            r"rank (\d) of (\d)",
            opened.readout(),
        )
        assert found is not None, opened.readout()
        assert (int(found[1]), int(found[2])) == (query, key)
        assert value(found[3]) == pytest.approx(r[query, key].item(), rel=6e-3)
        assert found[4] == ("more" if r[query, key] > 0 else "less")
        assert value(found[5]) == pytest.approx(a[query, key].item(), rel=6e-3)
        bigger = int((r[query, : query + 1].abs() > r[query, key].abs()).sum())
        assert (int(found[6]), int(found[7])) == (1 + bigger, query + 1)
        # The row shades the prompt: red where descent wants more; nothing after the query.
        shades = page.locator(".token:not(.next)").evaluate_all(
            "chips => chips.map(c => c.style.background)"
        )
        for j, shade in enumerate(shades):
            colour = re.findall(r"\d+", shade)
            assert bool(colour) == (j <= query)
            if colour and abs(r[query, j]) > 0.1 * r.abs().max():
                assert (int(colour[0]) > int(colour[2])) == (r[query, j].item() > 0)
        assert page.locator(".token.query").count() == 1
    opened.point_at("a", 0, 3, 5)
    assert "cannot attend there" in opened.readout()
    opened.check()


@pytest.mark.every_model
def test_the_pointer_chooses_rows_and_the_prompt_does_too(
    open_page: Callable[..., Opened], tmp_path: Path
) -> None:
    opened = open_page(write_report(make(), tmp_path / "r.html", examples=[0]))
    page = opened.page
    canvas = page.locator("#ra-r")
    canvas.scroll_into_view_if_needed()
    seen = set()
    box = canvas.bounding_box()
    for step in range(1, 40):
        page.mouse.move(box["x"] + box["width"] * 0.35, box["y"] + box["height"] * step / 40)
        seen.add(re.search(r"from .*?\((\d)\) to", opened.readout())[1])
    assert seen == set("01234")
    page.locator(".token:not(.next)").nth(3).hover()
    r = make()["ra", int(str(page.text_content("#ra-title"))[1])]
    assert "(3) to" in opened.readout()
    assert r.shape[-1] == 5
    opened.check()


@pytest.mark.every_model
def test_what_is_drawn_is_red_for_more_and_hatched_where_nothing_is(
    open_page: Callable[..., Opened], tmp_path: Path
) -> None:
    ra = make((("a", "b", "c"),))
    ra["ra", 0][0, 0] = torch.tensor([[0.0, 0, 0], [-1.0, 1.0, 0], [0.0, torch.nan, 0.5]])
    for scheme in ("light", "dark"):
        opened = open_page(write_report(ra, tmp_path / "r.html"), color_scheme=scheme)
        opened.choose(0, 0)
        # Colours of the map's middle lines, from right to left and from top to bottom.
        drawn = opened.page.evaluate(
            """() => { const c = document.getElementById('ra-r'), p = c.getContext('2d');
                const [w, h] = [c.width, c.height], all = p.getImageData(0, 0, w, h).data;
                const count = {};
                for (let i = 0; i < all.length; i += 4) if (all[i + 3] === 255) {
                  const key = [all[i], all[i + 1], all[i + 2]].join();
                  count[key] = (count[key] || 0) + 1; }
                return count }"""
        )
        red, blue = {"light": ("103,0,31", "5,48,97"), "dark": ("255,201,176", "185,220,255")}[
            scheme
        ]
        cell = drawn[red]  # one cell of each
        assert drawn[blue] == pytest.approx(cell, rel=0.3)
        zero = {"light": "247,247,247", "dark": "34,38,44"}[scheme]
        assert drawn[zero] == pytest.approx(2 * cell, rel=0.35)
        assert drawn["224,168,0"] > 0.5 * cell  # not a number
        nothing = {"light": "236,238,241", "dark": "21,24,28"}[scheme]
        assert drawn[nothing] > cell  # three cells, half of them hatching
        opened.check()


@pytest.mark.every_model
def test_hostile_tokens_are_text(open_page: Callable[..., Opened], tmp_path: Path) -> None:
    ra = make((HOSTILE,))
    ra.info = replace(ra.info, targets=(EVIL,), model_name=EVIL)
    one = Predictions(((EVIL, 0.5),), 0.5, 1)
    section = Section(EVIL, (EVIL,))
    path = write_report(
        ra, tmp_path / "r.html", command=EVIL, sections=[section],
        patched=[PatchedPrompt(-30.0, one, one)],
    )  # fmt: skip
    opened = open_page(path)
    page = opened.page
    page.evaluate("() => { window.alert = () => { document.title = 'ran' } }")
    shown = page.locator(".token").all_text_contents()
    assert shown == [
        EVIL, "\"'`", "🙂", "שלום", "<!--", "%{y}", "&lt;", "U+202Eabc", "⏎", "]]>", "U+0000", EVIL,
    ]  # fmt: skip
    for layer in ra.layers:
        for head in range(ra.n_heads):
            opened.choose(layer, head)
    opened.point_at("r", 10, 0, len(HOSTILE))
    assert f"to {EVIL} (0)" in opened.readout()
    assert page.title() == f"Reversed Attention of {EVIL}"
    assert page.locator("script").count() == 1 + 6 + 1  # data, maps, ours
    # A script that got in all the same would not run.
    page.evaluate(
        "() => { const s = document.createElement('div'); "
        "s.innerHTML = '<img src=x onerror=\"document.title=1\">'; document.body.append(s) }"
    )
    page.wait_for_timeout(100)
    assert page.title() == f"Reversed Attention of {EVIL}"
    assert any("Content Security Policy" in text for text in opened.errors)


@pytest.mark.every_model
def test_ten_thousand_tokens_are_shown(open_page: Callable[..., Opened], tmp_path: Path) -> None:
    short = make((tuple(f" w{i}" for i in range(20)),))
    page = Path(write_report(short, tmp_path / "r.html", examples=[0])).read_text()
    chips = "".join(f'<bdi class="token">·x{i}</bdi><wbr>' for i in range(10_000))
    # As if the last 20 of 10,020 tokens had maps.
    page = re.sub(r'(data-side="input">)', lambda found: found[1] + chips, page)
    page = page.replace('["input",0,20]', '["input",10000,20]')
    (tmp_path / "r.html").write_text(page)
    opened = open_page(tmp_path / "r.html")
    assert opened.page.locator(".token").count() == 10_021
    assert re.search(r"from ·w\d+ \(100\d\d\) to ·w\d+ \(100\d\d\)", opened.readout())
    assert "The maps show the last 20 tokens only." in str(opened.page.text_content("#ra-cut"))
    opened.check()


@pytest.mark.every_model
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)])
def test_nothing_is_wider_than_the_window(
    open_page: Callable[..., Opened], tmp_path: Path, size: tuple[int, int]
) -> None:
    ra = make((tuple(f" word{i}" for i in range(40)),))
    path = write_report(ra, tmp_path / "r.html")
    opened = open_page(path, viewport={"width": size[0], "height": size[1]})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= size[0]
    opened.page.emulate_media(media="print")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert opened.page.locator("#ra-before").is_hidden()
    opened.check()


@pytest.mark.every_model
def test_without_scripts_the_text_can_be_read(browser: Any, tmp_path: Path) -> None:
    path = write_report(make(), tmp_path / "r.html")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    text = page.inner_text("body")
    for wanted in ("·Paris", "p(target) = 0.368", "Top heads", "does not run"):
        assert wanted in text
    assert "stronger head" not in text
    context.close()


@pytest.mark.every_model
def test_pages_with_plotly_figures_draw_them(
    open_page: Callable[..., Opened], tmp_path: Path
) -> None:
    path = write_sweep_page(sweep(), tmp_path / "s.html", metric="top1")
    opened = open_page(path)
    assert opened.page.locator(".main-svg .scatterlayer .trace").count() >= 3
    opened.check()


@pytest.mark.every_model
def test_cross_attention_shades_what_the_encoder_read(
    open_page: Callable[..., Opened], tmp_path: Path
) -> None:
    r = torch.randn(1, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    info = RunInfo(
        objective="answer_nll",
        targets=(" t",),
        str_tokens=(tuple("abcde"),),
        decoder_tokens=(("x", "y", "z"),),
    )
    site = Site(0, "decoder_blocks.0.cross_attn", 2, 2, 0.5, cross=True)
    ra = RACache(sites=Sites({0: site}), info=info)
    ra._put(0, "ra", r)
    ra._put(0, "pattern", r.abs())
    opened = open_page(write_report(ra, tmp_path / "r.html"))
    opened.choose(0, 1)
    assert "decoder 0 cross, head 1" in str(opened.page.text_content("#ra-title"))
    cells = opened.cells()
    query, key = divmod(int(r[0, 1].abs().argmax()), 5)
    assert cells[0][:3] == (query, key, pytest.approx(-r[0, 1, query, key].item(), rel=6e-3))
    assert opened.page.locator(".token.query").text_content() == "xyz"[query]
    shaded = opened.page.locator(".prompt[data-side='input'] .token[style]").all_text_contents()
    assert shaded == list("abcde")
    assert opened.page.locator(".token.next").text_content() == "·t"
    opened.check()
