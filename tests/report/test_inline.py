"""A cache in a notebook: what the cell holds, how much, and that it never fails there."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from made_caches import lower, make
from other_process import printed_by
from pages import EVIL, HOSTILE, Page, lower_triangles
from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NotStored
from ra_lens.model import Site, Sites
from ra_lens.report import inline_report
from ra_lens.run_info import RunInfo
from tiny_models import every_model


def large(
    n_layers: int, n_heads: int, n_tokens: int, n_prompts: int = 1, *, looks_ahead: bool = False
) -> RACache:
    generator = torch.Generator().manual_seed(0)
    rows = tuple(tuple(f" w{i}" for i in range(n_tokens)) for _ in range(n_prompts))
    ra = RACache(
        sites=Sites(
            {i: Site(i, f"blocks.{i}.attn", n_heads, n_heads, 0.5) for i in range(n_layers)}
        ),
        loss=torch.ones(n_prompts),
        info=RunInfo(model_name="large", str_tokens=rows, starts=(0,) * n_prompts),
    )
    shape = (n_prompts, n_heads, n_tokens, n_tokens)
    for layer in range(n_layers):
        for kind in ("ra", "pattern"):
            maps = torch.rand(shape, generator=generator)
            ra._put(layer, kind, maps if looks_ahead else maps.tril())
    return ra


class Cell:
    """What a cell holds: the page around, and the page in its frame."""

    def __init__(self, html: str) -> None:
        self.around = Page(html)
        (self.frame,) = (attrs for tag, attrs in self.around.tags if tag == "iframe")
        self.inside = Page(str(self.frame["srcdoc"]))


def mega_bytes(html: str) -> float:
    return len(html.encode()) / 1e6


def part(ra: RACache, *kinds: str, layers: Any = None) -> RACache:
    """The same with some of its maps, and all norms, as `names_filter` leaves it."""
    layers = ra.layers if layers is None else layers
    names = {ra.sites[layer].map_name(kind) for layer in layers for kind in kinds}
    return replace(ra, _maps={name: t for name, t in ra.items() if name in names})


# ---- what is in it ------------------------------------------------------------------------------


def test_the_maps_in_the_frame_are_those_of_the_cache() -> None:
    ra = make()
    page = Cell(inline_report(ra)).inside
    data, maps = page.data(), page.maps()
    assert len(maps) == 2 * len(ra.layers) * ra.n_heads
    for example, n in enumerate((5, 3)):
        for layer in ra.layers:
            for head in range(ra.n_heads):
                limit = data["examples"][example]["maps"][f"{layer}.{head}"]["limit"]
                a, r = lower_triangles(maps[f"{example}.{layer}.{head}"], limit, n)
                wanted = ra["ra", layer][example, head, :n, :n]
                # Half precision: 11 bits.
                np.testing.assert_allclose(r, lower(wanted), rtol=2**-11, atol=3e-8 * limit)
                pattern = lower(ra["pattern", layer][example, head, :n, :n])
                np.testing.assert_allclose(a, pattern, rtol=2**-11, atol=3e-8)
    np.testing.assert_allclose(data["norms"], ra.norms().mean(0).numpy(), rtol=1e-4)
    for wanted in (
        "Reversed Attention of toy",
        "·Paris",
        "p(target) = 0.368",
        "−R: where one step",
    ):
        assert wanted in page.text


def test_the_frame_keeps_to_itself() -> None:
    html = inline_report(make())
    cell = Cell(html)
    assert cell.frame["sandbox"] == "allow-scripts"
    assert "src" not in cell.frame
    for page in (cell.around, cell.inside):
        assert not [a for _, a in page.tags if {"src", "href", "srcset", "action"} & set(a)]
        assert not [tag for tag, _ in page.tags if tag in ("link", "img", "object", "base")]
    (policy,) = (str(a["content"]) for _, a in cell.inside.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    for word in ("://", "@import", "url(", "Plotly", "fetch(", "XMLHttpRequest", "innerHTML"):
        assert word not in html


def test_the_text_stands_beside_the_frame() -> None:
    ra = make()
    assert Cell(inline_report(ra)).around.text == " ".join(repr(ra).split())


def test_options_are_those_of_the_report() -> None:
    ra = make()
    page = Cell(inline_report(ra, examples=[1], sign="gradient", top=2, max_tokens=2)).inside
    data = page.data()
    assert (data["sign"], data["top"], len(data["examples"])) == ("gradient", 2, 1)
    assert data["examples"][0]["maps"]["0.0"]["rows"] == ["input", 1, 2]
    assert "The maps show R, the gradient itself" in page.text
    assert "Shown: 1 of 2 prompts" in page.text


def test_the_frame_is_as_tall_as_asked() -> None:
    fits, fixed = (Cell(inline_report(make(), height=h)).frame for h in (None, 300))
    assert fits["data-fits"] == "true"
    assert "data-fits" not in fixed
    assert "height:300px" in str(fixed["style"])


def test_hostile_text_stays_text() -> None:
    ra = make((HOSTILE,))
    ra.info = replace(ra.info, targets=(EVIL,), model_name=f"'{EVIL}\"")
    cell = Cell(inline_report(ra))
    calm = Cell(inline_report(make((tuple("abcdefghijk"),))))
    breaks = ("br", "wbr")
    for page, plain in ((cell.around, calm.around), (cell.inside, calm.inside)):
        names = [tag for tag, _ in page.tags if tag not in breaks]
        assert names == [tag for tag, _ in plain.tags if tag not in breaks]
    assert cell.frame["title"] == f"Reversed Attention of '{EVIL}\""
    for token in ("\"'`", "🙂", "שלום", "<!--", "&lt;", "U+202Eabc", "⏎", "]]>", "U+0000"):
        assert token in cell.inside.text


# ---- how much -----------------------------------------------------------------------------------


def test_all_heads_of_a_small_language_model_fit() -> None:
    ra = large(30, 9, 12)
    html = inline_report(ra)
    assert mega_bytes(html) < 0.3
    assert len(Cell(html).inside.maps()) == 270


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((20, 9, 128), {}),
        ((10, 9, 200), {"max_tokens": 200, "max_megabytes": 1}),
        ((12, 12, 30, 12), {"max_megabytes": 0.4}),
        ((2, 3, 60), {"max_megabytes": 0.08}),
    ],
)
@pytest.mark.parametrize("looks_ahead", [False, *every_model(True)])
def test_it_never_takes_more_than_it_may(shape: Any, options: Any, looks_ahead: bool) -> None:
    ra = large(*shape, looks_ahead=looks_ahead)
    html = inline_report(ra, **options)
    allowed = options.get("max_megabytes", 3)
    assert mega_bytes(html) <= allowed
    page = Cell(html).inside
    shown = len(page.data()["examples"])
    stored = len(page.maps()) // shown
    kept = {f"{i}.{s.layer}.{s.head}" for i in range(shown) for s in ra.top_heads(stored)}
    assert set(page.maps()) == kept
    n_heads = shape[0] * shape[1]
    assert 0 < stored < n_heads
    assert f"{stored} heads with the largest norms; the other {n_heads - stored} are" in page.text
    # Space is used: two heads more would not fit.
    one = (mega_bytes(html) - mega_bytes(inline_report(part(ra), **options))) / stored
    assert mega_bytes(html) + 2 * one > allowed


def test_of_long_prompts_fewer_are_shown() -> None:
    ra = part(large(2, 3, 8, 4))
    ra.store = "norms"
    ra.info = replace(ra.info, str_tokens=(tuple(f" w{i}" for i in range(3000)),) * 4)
    html = inline_report(ra, max_megabytes=0.7)
    assert mega_bytes(html) < 0.7 / 2  # the other half is for maps
    assert "Shown: 2 of 4 prompts" in Cell(html).inside.text


def test_of_many_prompts_the_first_are_shown() -> None:
    ra = large(2, 2, 4, 500)
    html = inline_report(ra)
    page = Cell(html).inside
    assert len(page.data()["examples"]) == 10
    assert "Shown: 10 of 500 prompts; ra.show(examples=[…])" in page.text
    np.testing.assert_allclose(page.data()["norms"], ra.norms().mean(0).numpy(), rtol=1e-4)


def test_a_size_below_what_the_tokens_take_is_refused() -> None:
    with pytest.raises(
        BadInput, match=r"found max_megabytes=0\.01; the frame takes 0\.0\d+ MB without"
    ):
        inline_report(make(), max_megabytes=0.01)


# ---- what cannot be drawn whole -----------------------------------------------------------------


def without_tokens(ra: RACache) -> RACache:
    return replace(ra, info=RunInfo(model_name="toy"), loss=torch.full((2,), torch.nan))


MAPS = 2 * 2 * 3
PARTIAL = {
    "norms": (lambda ra: replace(part(ra), store="norms"), 0, "not kept (store='norms')"),
    "mean": (lambda ra: replace(part(ra), store="mean"), 0, "not kept (store='mean')"),
    "gradients": (lambda ra: part(ra, "pattern_grad"), 0, "does not hold both R and the attention"),
    "R alone": (lambda ra: part(ra, "ra"), 0, "does not hold both R and the attention"),
    "one layer": (lambda ra: part(ra, "ra", "pattern", layers=[2]), MAPS // 2, "maps of 3 heads"),
    "no tokens": (without_tokens, MAPS, "#4"),
    "nothing told": (lambda ra: without_tokens(part(ra)), 0, "Norms only"),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_what_is_there_is_shown(name: str) -> None:
    cut, n_maps, said = PARTIAL[name]
    full = make()
    for layer in full.layers:
        full._put(layer, "pattern_grad", torch.zeros_like(full["ra", layer]))
    ra = cut(full)
    page = Cell(str(ra._repr_html_())).inside
    assert len(page.maps()) == n_maps
    assert said in page.text
    np.testing.assert_allclose(page.data()["norms"], ra.norms().mean(0).numpy(), rtol=1e-4)
    assert ("Choose one to see its maps" in page.text) == (n_maps > 0)


def test_a_cache_without_batch_dimension_is_shown() -> None:
    ra = make().apply_slice_to_batch_dim(0)
    assert len(Cell(str(ra._repr_html_())).inside.maps()) == 6


def test_before_the_backward_pass_there_is_only_text(capsys: pytest.CaptureFixture[str]) -> None:
    ra = RACache(sites=make().sites)
    assert ra._repr_html_() is None
    with pytest.raises(NotStored, match="run the backward pass first"):
        inline_report(ra)
    ra.show()
    assert capsys.readouterr().out == f"{ra!r}\n"


def test_what_goes_wrong_stands_below_the_text() -> None:
    ra = make()
    ra["ra", 0].resize_(0)  # by whoever had the tensor
    page = Page(str(ra._repr_html_()))
    assert not [tag for tag, _ in page.tags if tag == "iframe"]
    assert page.text.startswith(" ".join(repr(ra).split()))
    assert "Not drawn: " in page.text


# ---- where it is shown --------------------------------------------------------------------------


@pytest.fixture
def ipython(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands for IPython: a shell that shows some types, and what was displayed."""
    displayed: list[Any] = []
    shell = types.SimpleNamespace(display_formatter=types.SimpleNamespace(active_types=[]))
    top, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    top.get_ipython = lambda: shell  # type: ignore[attr-defined]
    display.display = lambda data, *, raw: displayed.append((data, raw))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", top)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return types.SimpleNamespace(shell=shell, displayed=displayed, top=top)


def test_show_displays_in_a_notebook(ipython: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ra = make()
    ipython.shell.display_formatter.active_types = ["text/plain", "text/html"]
    ra.show(top=3)
    wanted = {"text/plain": repr(ra), "text/html": inline_report(ra, top=3)}
    assert ipython.displayed == [(wanted, True)]
    assert capsys.readouterr().out == ""


def test_show_prints_elsewhere(
    ipython: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ra = make()
    ipython.shell.display_formatter.active_types = ["text/plain"]  # in a terminal
    ra.show()
    ipython.top.get_ipython = lambda: None  # IPython is there, and does not run this
    ra.show()
    monkeypatch.delitem(sys.modules, "IPython")
    ra.show()
    assert ipython.displayed == []
    assert capsys.readouterr().out == 3 * f"{ra!r}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "found top=0"),
        ({"examples": [2]}, "found example=2; this cache has examples 0 to 1"),
        ({"max_tokens": 0}, "found max_tokens=0"),
        ({"max_megabytes": -1}, r"max_megabytes=-1\.0"),
        ({"sign": "plus"}, "found sign='plus'; give 'descent'"),
        ({"height": 0}, "found height=0; give at least 1"),
        ({"height": "tall"}, "found height='tall'; give a whole number"),
    ],
)
def test_mistakes_are_named(options: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make().show(**options)


def test_a_notebook_gets_both_forms_and_a_terminal_text_without_drawing() -> None:
    formatters = pytest.importorskip("IPython.core.formatters")
    ra = make()
    data, _ = formatters.DisplayFormatter().format(ra)
    assert data == {"text/plain": repr(ra), "text/html": inline_report(ra)}
    terminal = formatters.DisplayFormatter()
    terminal.active_types = ["text/plain"]
    ra._repr_html_ = None  # type: ignore[method-assign]
    assert terminal.format(ra)[0] == {"text/plain": repr(ra)}


@pytest.mark.every_model
def test_nobody_who_does_not_look_pays() -> None:
    code = (
        "import sys, torch; from ra_lens import RACache; from ra_lens.model import Site, Sites; "
        "seen = lambda: [m for m in ('ra_lens.report', 'plotly', 'pandas') if m in sys.modules]; "
        "ra = RACache(Sites({0: Site(0, 'blocks.0.attn', 1, 1, .5)})); "
        "[ra._put(0, kind, torch.ones(1, 1, 1, 1)) for kind in ('ra', 'pattern')]; "
        "first = repr(ra) and seen(); print(first, len(ra._repr_html_()) > 9, seen())"
    )
    assert printed_by(code) == "[] True ['ra_lens.report']"
