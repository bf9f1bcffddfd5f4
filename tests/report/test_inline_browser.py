"""Frames in a page, as a notebook has them: what a click shows, and that nothing passes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import Seen, opening
from explorer_cells import same_cells, shown_cells, value, wanted_cells
from made_caches import make
from ra_lens.cache import RACache
from ra_lens.report import inline_report

# A browser takes seconds to start; what the frame holds is tested in test_inline.py.
pytestmark = pytest.mark.every_model

SECRET = "what the page knows"


class Notebook(Seen):
    """A page with cells, of which each frame is on its own."""

    def __init__(self, running: Any, path: Path, **context: Any) -> None:
        super().__init__(running, path, **context)
        self.frames = [frame for frame in self.page.frames if frame.parent_frame is not None]
        for frame in self.frames:
            frame.wait_for_selector("#ra-grid [aria-selected=true]")

    def settled(self, i: int) -> bool:
        """Wait until a frame is as tall as what is in it; tell whether it is."""
        wanted = "() => document.body.getBoundingClientRect().height"
        for _ in range(50):
            inner = self.frames[i].evaluate("() => innerHeight")
            if abs(self.frames[i].evaluate(wanted) - inner) < 1:
                return True
            self.page.wait_for_timeout(40)
        return False

    def title(self, i: int) -> str:
        return str(self.frames[i].text_content("#ra-title"))


def write(path: Path, *cells: str, style: str = "") -> Path:
    body = "".join(f"<div class=output>{cell}</div>" for cell in cells)
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><title>{SECRET}</title>'
        f'<style>{style}</style><body><script>var secret = "{SECRET}"</script>{body}</body>',
        encoding="utf-8",
    )
    return path


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Notebook]]:
    with opening(browser, Notebook) as get:

        def write_and_open(*cells: str, style: str = "", **context: Any) -> Notebook:
            return get(write(tmp_path / "notebook.html", *cells, style=style), **context)

        yield write_and_open


def test_frames_of_one_notebook_do_not_disturb_each_other(
    open_page: Callable[..., Notebook],
) -> None:
    first, second = make(), make((("x", "y", "z", "w"),), scale=3.0)
    page = open_page(inline_report(first), inline_report(second))
    assert [page.settled(i) for i in (0, 1)] == [True, True]
    heights = page.page.locator("iframe").evaluate_all("all => all.map(f => f.offsetHeight)")
    assert heights[0] != heights[1]
    before = page.title(1)
    page.frames[0].click("[data-head='0.2']")
    assert page.title(0).startswith("L0H2:")
    assert page.title(1) == before
    same_cells(shown_cells(page.frames[0]), wanted_cells(first, 0, 2, 0, 5))
    page.frames[1].click("[data-head='2.0']")
    same_cells(shown_cells(page.frames[1]), wanted_cells(second, 2, 0, 0, 4))
    assert page.title(0).startswith("L0H2:")
    page.frames[0].select_option("#ra-example", "1")
    page.frames[0].click("[data-head='2.1']")
    same_cells(shown_cells(page.frames[0]), wanted_cells(first, 2, 1, 1, 3))
    assert [page.settled(i) for i in (0, 1)] == [True, True]
    assert page.page.locator("pre:visible").count() == 0


def test_the_map_drawn_from_is_that_of_the_cache(open_page: Callable[..., Notebook]) -> None:
    """Every cell, as the keyboard reaches it and as it is read out."""
    ra = make((("<s>", " a", " b"),))
    frame = open_page(inline_report(ra)).frames[0]
    frame.click("[data-head='0.1']")
    r, a = -ra["ra", 0][0, 1], ra["pattern", 0][0, 1]
    frame.focus("#ra-r")
    for _ in range(3):
        frame.page.keyboard.press("ArrowUp")
        frame.page.keyboard.press("ArrowLeft")
    for query in range(3):
        for key in range(query + 1):
            read = re.search(
                rf"\({query}\) to .*\({key}\): −R (\S+) .*, A ([\d.e−-]+), rank",
                str(frame.text_content("#ra-readout")),
            )
            assert read is not None
            assert value(read[1]) == pytest.approx(r[query, key].item(), rel=6e-3)
            assert value(read[2]) == pytest.approx(a[query, key].item(), rel=6e-3)
            frame.page.keyboard.press("ArrowRight")
        frame.page.keyboard.press("ArrowDown")
        for _ in range(3):
            frame.page.keyboard.press("ArrowLeft")


@pytest.mark.every_model
def test_a_frame_reaches_neither_its_page_nor_a_network(browser: Any, tmp_path: Path) -> None:
    with opening(browser, Notebook, quiet=False) as get:
        page = get(write(tmp_path / "notebook.html", inline_report(make())))
        frame = page.frames[0]
        for code in ("parent.secret", "parent.document.title", "top.location.href", "localStorage"):
            reach = f"() => {{ try {{ return String({code}) }} catch (e) {{ return e.name }} }}"
            assert frame.evaluate(reach) == "SecurityError", code
        assert [url.partition(":")[0] for url in page.requests] == ["file"]
        refused: list[Any] = []
        page.page.on("requestfailed", lambda request: refused.append(request.failure))
        for way in (
            "fetch('https://example.org/x').then(() => 'there', e => e.name)",
            "new Promise(done => { const i = new Image(); i.onerror = () => done('TypeError'); "
            "i.onload = () => done('there'); i.src = 'https://example.org/x.png' })",
            "new Promise(done => { const s = document.createElement('script'); "
            "s.onerror = () => done('TypeError'); s.src = 'https://example.org/x.js'; "
            "document.head.append(s) })",
        ):
            assert frame.evaluate(f"() => {way}") == "TypeError"
        # By the policy, before there was a connection that could fail.
        assert refused == ["csp"] * (len(page.requests) - 1)


def test_a_frame_follows_the_light_of_its_page(open_page: Callable[..., Notebook]) -> None:
    """Whatever the system prefers; without a word, as notebooks change their themes."""
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(251, 251, 250)", "rgb(20, 23, 27)"
    for scheme, style, wanted in (
        ("dark", "body { color: #222; background: #fff }", light),
        ("light", "body { color: #ddd; background: #111 }", dark),
    ):
        page = open_page(inline_report(make()), style=style, color_scheme=scheme)
        assert page.settled(0)
        assert page.frames[0].evaluate(ground) == wanted
        other = {light: dark, dark: light}[wanted]
        page.page.evaluate(
            "([ink]) => { document.body.style.color = ink; document.body.dataset.theme = '1' }",
            ["#eee" if other == dark else "#111"],
        )
        page.frames[0].wait_for_function(f"() => ({ground})() === '{other}'")
        # What is drawn changes with it, here where a token cannot attend.
        nothing = {light: "236,238,241", dark: "21,24,28"}[other]
        drawn = page.frames[0].evaluate(
            """() => { const c = document.getElementById('ra-r'), p = c.getContext('2d');
                const all = p.getImageData(0, 0, c.width, c.height).data, found = new Set();
                for (let i = 0; i < all.length; i += 4)
                  found.add([all[i], all[i + 1], all[i + 2]].join());
                return [...found] }"""
        )
        assert nothing in drawn


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(open_page: Callable[..., Notebook], width: int) -> None:
    ra = make((tuple(f" word{i}" for i in range(40)),))
    page = open_page(inline_report(ra), viewport={"width": width, "height": 900})
    assert page.settled(0)
    frame = page.frames[0]
    wide = frame.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1] <= width
    boxes = [frame.locator(name).bounding_box() for name in ("#ra-grid", "#ra-maps")]
    beside = boxes[1]["y"] < boxes[0]["y"] + boxes[0]["height"]
    assert beside == (width > 1000)


@pytest.mark.every_model
def test_a_frame_of_fixed_height_scrolls_by_itself(open_page: Callable[..., Notebook]) -> None:
    page = open_page(inline_report(make(), height=300))
    page.page.wait_for_timeout(200)
    assert page.frames[0].evaluate("() => innerHeight") == 300
    assert page.frames[0].evaluate("() => document.documentElement.scrollHeight") > 300


@pytest.mark.every_model
def test_other_frames_cannot_change_the_height(open_page: Callable[..., Notebook]) -> None:
    page = open_page(inline_report(make()))
    assert page.settled(0)
    height = "() => document.querySelector('iframe.ra-lens').offsetHeight"
    before = page.page.evaluate(height)
    page.page.evaluate(
        """() => new Promise((done) => {
          addEventListener("message", (event) => event.data.last && setTimeout(done, 50));
          const other = document.createElement("iframe");
          other.sandbox = "allow-scripts";
          other.srcdoc = `<script>parent.postMessage({ raLensHeight: 7 }, "*");
            parent.postMessage({ last: true }, "*")<\\/script>`;
          document.body.append(other);
        })"""
    )
    assert page.page.evaluate(height) == before
    # Nor can this one say nonsense.
    page.frames[0].evaluate("() => parent.postMessage({ raLensHeight: '7px;color:red' }, '*')")
    page.page.wait_for_timeout(50)
    assert page.page.evaluate(height) == before


@pytest.mark.every_model
def test_the_text_is_there_where_frames_are_left_out(browser: Any, tmp_path: Path) -> None:
    ra = make()
    without = re.sub(r"<(iframe|script).*?</\1>", "", inline_report(ra), flags=re.S)
    with opening(browser, Seen) as get:
        page = get(write(tmp_path / "page.html", without)).page
        assert page.locator("pre:visible").text_content() == repr(ra)


@pytest.mark.every_model
def test_without_maps_the_grid_is_there(open_page: Callable[..., Notebook]) -> None:
    full = make()
    ra = RACache(sites=full.sites, loss=full.loss, info=full.info, store="norms")
    for layer in full.layers:
        for kind in ("ra", "pattern"):
            ra._put_norms(layer, kind, full[kind, layer])
    frame = open_page(inline_report(ra)).frames[0]
    frame.click("[data-head='0.1']")
    norm = ra.norms()[0, 0, 1].item()
    title = str(frame.text_content("#ra-title"))
    found = re.match(r"L0H1: rank \d of 6, ‖R‖ = ([\d.]+) .*; its maps are not here$", title)
    assert found is not None
    assert value(found[1]) == pytest.approx(norm, rel=6e-3)
    for part in ("#ra-maps", "#ra-own", "#ra-scale"):
        assert frame.locator(part).is_hidden()
