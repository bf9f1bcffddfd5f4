"""Figures: what they show is what the cache holds, and tokens stay text."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.io as pio
import pytest
import torch

from made_caches import LAYERS, ROWS, lower, make, sites, z
from ra_lens import run_with_ra
from ra_lens.cache import RACache
from ra_lens.errors import NotStored
from ra_lens.figures import head_grid, head_map, head_maps, query_key_pull
from ra_lens.figures.style import distinct, plotly_text, thinned
from ra_lens.head_maps import head_of_example
from ra_lens.run_info import RunInfo
from ra_lens.text import shorten, visible
from tiny_models import KINDS


@pytest.fixture
def ra() -> RACache:
    return make()


# ---- grid ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ra", "pattern"])
def test_the_grid_shows_the_mean_norms(ra: RACache, kind: Any) -> None:
    by_hand = torch.stack([ra[kind, layer].pow(2).sum((-1, -2)).sqrt().mean(0) for layer in LAYERS])
    figure = head_grid(ra, kind=kind)
    np.testing.assert_allclose(z(figure), by_hand.numpy(), rtol=1e-5)
    assert list(figure.data[0].y) == ["L0", "L2"]
    assert list(figure.data[0].x) == ["H0", "H1", "H2"]
    assert figure.data[0].zmin == 0
    assert figure.data[0].zmax == pytest.approx(by_hand.max().item())


def test_the_grid_ranks_heads_and_frames_the_first(ra: RACache) -> None:
    figure = head_grid(ra, top=2)
    ranks, values = np.asarray(figure.data[0].customdata)[..., 0], z(figure)
    assert values.ravel()[np.argsort(ranks.ravel())].tolist() == sorted(values.ravel())[::-1]
    marks = np.asarray(figure.data[0].text)
    assert (marks[ranks == 1].item(), marks[ranks == 2].item()) == ("1", "2")
    assert set(marks[ranks > 2]) == {""}
    middles = [((s.y0 + s.y1) / 2, (s.x0 + s.x1) / 2) for s in figure.layout.shapes]
    wanted = [tuple(np.argwhere(ranks == k)[0]) for k in (1, 2)]
    assert [(round(y), round(x)) for y, x in middles] == wanted


def test_the_grid_needs_norms_only(ra: RACache) -> None:
    norms = RACache(sites=sites(), store="norms", info=ra.info)
    for layer in LAYERS:
        norms._put_norms(layer, "ra", ra["ra", layer])
    np.testing.assert_array_equal(z(head_grid(norms)), z(head_grid(ra)))
    one = ra.apply_slice_to_batch_dim(1)
    np.testing.assert_allclose(z(head_grid(one)), ra.norms()[1].numpy(), rtol=1e-6)


def test_a_gradient_of_zero_has_a_scale_all_the_same() -> None:
    dead = make(scale=0.0)
    assert head_grid(dead).data[0].zmax == 1
    assert head_map(dead, (0, 0)).data[0].zmax == 1


# ---- maps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("example", [0, 1])
def test_maps_show_the_cache_without_padding(side: str, example: int) -> None:
    ra = make(side=side)
    figure = head_maps(ra, [(2, 1), (0, 2)], example=example)
    n, start = len(ROWS[example]), ra.info.starts[example]
    kept = slice(start, start + n)
    assert [trace.name for trace in figure.data] == [
        "L2H1 pattern", "L2H1 ra", "L0H2 pattern", "L0H2 ra",
    ]  # fmt: skip
    for i, (layer, head) in enumerate([(2, 1), (0, 2)]):
        a = lower(ra["pattern", layer][example, head, kept, kept])
        r = lower(-ra["ra", layer][example, head, kept, kept])
        np.testing.assert_array_equal(z(figure, 2 * i), a)
        np.testing.assert_array_equal(z(figure, 2 * i + 1), r)
        for trace, other in ((figure.data[2 * i], r), (figure.data[2 * i + 1], a)):
            told = np.asarray(trace.customdata, float)
            np.testing.assert_array_equal(told[..., 0], other)
            for row in range(n):  # the rank of |R| in the row, counted by hand
                sizes = [abs(v) for v in r[row, : row + 1].tolist()]
                ranks = [1 + sorted(sizes, reverse=True).index(size) for size in sizes]
                assert told[row, : row + 1, 1].tolist() == ranks
                assert not told[row, row + 1 :, 1].any()


def test_red_is_more_attention_and_the_bar_says_so(ra: RACache) -> None:
    descent, gradient = head_map(ra, (0, 0)), head_map(ra, (0, 0), sign="gradient")
    np.testing.assert_array_equal(z(descent), -z(gradient))
    low, high = descent.data[0].colorscale[0][1], descent.data[0].colorscale[-1][1]
    assert (low, high) == ("rgb(5,48,97)", "rgb(103,0,31)")  # blue, red
    assert "−R" in descent.data[0].colorbar.title.text
    assert "red: descent wants more, blue: less" in descent.data[0].colorbar.title.text
    assert "red: descent wants less, blue: more" in gradient.data[0].colorbar.title.text
    assert "−R = " in descent.data[0].hovertemplate
    assert "<br>R = " in gradient.data[0].hovertemplate


def test_colours_are_centred_at_zero_and_shared_unless_told(ra: RACache) -> None:
    heads = [(0, 0), (2, 2)]
    sizes = [ra["ra", layer][0, head].abs().max().item() for layer, head in heads]
    shared = head_maps(ra, heads)
    own = head_maps(ra, heads, shared_scale=False)
    for i, size in enumerate(sizes):
        for figure, limit in ((shared, max(sizes)), (own, size)):
            trace = figure.data[2 * i + 1]
            assert (trace.zmin, trace.zmid, trace.zmax) == pytest.approx((-limit, 0, limit))
        assert (shared.data[2 * i].zmin, shared.data[2 * i].zmax) == (0, 1)
    one = head_map(ra, heads[0], limit=max(sizes)).data[0]
    assert (one.zmin, one.zmid, one.zmax) == pytest.approx((-max(sizes), 0, max(sizes)))


def test_every_token_is_a_row_of_its_own_with_a_harmless_label(ra: RACache) -> None:
    figure = head_maps(ra, [(0, 0)])
    names = [
        "&lt;|end|&gt; (0)",
        "·Paris (1)",
        "⏎ (2)",
        "·Paris (3)",
        "&lt;b&gt;&amp;&#36;x&#36; (4)",
    ]
    for trace in figure.data:
        assert list(trace.x) == list(trace.y) == names
    for axis in (figure.layout.xaxis, figure.layout.yaxis2):
        assert axis.type == "category"
        assert list(axis.tickvals) == names
        assert list(axis.ticktext) == [
            "&lt;|end|&gt;", "·Paris", "⏎", "·Paris", "&lt;b&gt;&amp;&#36;x&#36;",
        ]  # fmt: skip


def test_long_prompts_are_cut_and_their_labels_thinned() -> None:
    ra = make((tuple(f" w{i}" for i in range(90)),))
    whole, cut = head_map(ra, (0, 0), max_tokens=None), head_map(ra, (0, 0), max_tokens=20)
    assert z(whole).shape == (90, 90)
    assert len(whole.data[0].x) == 90
    assert len(whole.layout.xaxis.tickvals) == 30
    assert 30 < len(whole.layout.yaxis.tickvals) <= 60
    assert whole.layout.xaxis.ticktext[-1] == "·w89"
    np.testing.assert_array_equal(z(cut), z(whole)[70:, 70:])
    assert cut.data[0].y[0] == "·w70 (70)"


def test_what_lies_above_the_diagonal_is_shown_where_the_model_looks_there(ra: RACache) -> None:
    ra["pattern", 0][0, 0, 1, 3] = 0.25
    assert not np.isnan(z(head_map(ra, (0, 0), kind="pattern"))).any()


def test_a_run_gives_the_same_maps_alone_and_in_a_batch(shared: Any) -> None:
    model = shared("gpt2", KINDS[0])
    prompts = ["w5 w7 w9", "w4 w6 w8 w10 w12 w5"]
    _, both = run_with_ra(model, prompts, target=3)
    _, alone = run_with_ra(model, prompts[0], target=3)
    head = alone.top_heads(1)[0]
    for figure in (head_map(both, head), head_map(alone.remove_batch_dim(), head)):
        np.testing.assert_allclose(
            z(figure), lower(-alone["ra", head.layer][0, head.head]), atol=1e-6
        )
        assert [name.split()[0] for name in figure.data[0].x[1:]] == ["w5", "w7", "w9"]


def test_without_tokens_positions_are_the_labels(ra: RACache) -> None:
    ra.info = RunInfo()
    assert list(head_map(ra, (0, 0)).data[0].x)[:2] == ["#0 (0)", "#1 (1)"]


def test_strongest_cells_are_those_of_the_map(ra: RACache) -> None:
    maps = head_of_example(ra, (2, 0))
    cells = maps.strongest(4)
    values = ra["ra", 2][0, 0]
    assert [abs(c.ra) for c in cells] == pytest.approx(
        values.abs().flatten().sort(descending=True).values[:4].tolist()
    )
    for cell in cells:
        assert cell.ra == values[cell.query, cell.key].item()
        assert cell.pattern == ra["pattern", 2][0, 0, cell.query, cell.key].item()
        assert cell.moves == ("more" if cell.ra < 0 else "less")
    assert head_of_example(ra, (2, 0), max_tokens=2).strongest(1)[0].query >= 3
    assert len(maps.strongest(1000)) == 15
    assert head_of_example(make(scale=0.0), (0, 0)).strongest(3) == []


# ---- manners ------------------------------------------------------------------------------------


def test_size_title_and_template_are_as_asked_and_nothing_global_changes(ra: RACache) -> None:
    before = pio.templates.default
    for figure in (
        head_grid(ra, width=500, height=300, title="T", template="plotly_dark"),
        head_map(ra, (0, 0), width=500, height=300, title="T", template="plotly_dark"),
        head_maps(ra, [(0, 0)], width=500, height=300, title="T", template="plotly_dark"),
    ):
        assert (figure.layout.width, figure.layout.height) == (500, 300)
        assert figure.layout.title.text == "T"
        assert figure.layout.template == pio.templates["plotly_dark"]
    assert pio.templates.default == before
    assert head_grid(ra).layout.width is None  # as wide as its container


def test_grey_shows_where_a_query_cannot_look(ra: RACache) -> None:
    figure = head_maps(ra, [(0, 0)])
    colours = {pair[1] for trace in figure.data for pair in trace.colorscale}
    assert figure.layout.plot_bgcolor not in colours
    assert not any(trace.hoverongaps for trace in figure.data)


def test_maps_that_were_not_kept_are_missed(ra: RACache) -> None:
    norms = RACache(sites=sites(), store="norms", info=ra.info)
    for layer in LAYERS:
        norms._put_norms(layer, "ra", ra["ra", layer])
    with pytest.raises(NotStored, match="store='maps'"):
        head_maps(norms, [(0, 0)])


# ---- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Paris", "·Paris"), ("\n\n", "⏎⏎"), ("\t", "⇥"), ("\r", "␍"), ("", "∅"), ("é", "é"),
        ("\u202eevil", "U+202Eevil"), ("\x00", "U+0000"), ("שלום", "שלום"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("\ud800", "U+D800"),
    ],
)  # fmt: skip
def test_tokens_can_be_seen_whole(token: str, shown: str) -> None:
    assert visible(token) == shown


def test_labels_helpers() -> None:
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcde…"
    assert plotly_text("<b>&amp;$") == "&lt;b&gt;&amp;amp;&#36;"
    assert distinct([" a", " a"]) == ["·a (0)", "·a (1)"]
    assert thinned(5, 10) == [0, 1, 2, 3, 4]
    assert thinned(10, 4) == [0, 3, 6, 9]
    assert thinned(9, 4) == [2, 5, 8]
    assert thinned(3, 0) == [2]


def test_an_option_that_no_figure_has_is_refused(ra: RACache) -> None:
    for draw in (head_map, query_key_pull):
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'tilte'.*title, width"):
            draw(ra, (0, 0), tilte="x")  # type: ignore[call-arg]
