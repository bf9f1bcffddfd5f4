"""What blocking attention would do to the loss, as figures show it: of one head, and of layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from made_caches import LAYERS, ROWS, attending, knocked_out, lower, make, z
from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NotStored
from ra_lens.figures import flow_map, head_grid, head_map, head_maps, token_row
from ra_lens.model import Site, Sites
from ra_lens.run_info import RunInfo
from refused import unchecked

BROWN, GREEN = "rgb(84,48,5)", "rgb(0,60,48)"


def done(ra: RACache, layer: int, head: int, example: int = 0) -> np.ndarray:
    n = len(ROWS[example])
    return lower(torch.from_numpy(knocked_out(ra, layer)[example, head, :n, :n]))


def cut(ra: RACache, layer: int, head: int, example: int = 0) -> np.ndarray:
    n = len(ROWS[example])
    both = (ra[kind, layer][example, head, :n, :n] for kind in ("pattern", "pattern_grad"))
    a, g = both
    return lower(-a * g)


# ---- one head -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sharp", [1.0, 30.0])
@pytest.mark.parametrize("example", [0, 1])
def test_a_map_shows_what_removing_each_edge_does(sharp: float, example: int) -> None:
    ra = attending(sharp=sharp)
    for layer in LAYERS:
        for kind, wanted in (("knockout", done), ("cut", cut)):
            figure = head_map(ra, (layer, 1), kind=kind, example=example)
            np.testing.assert_allclose(z(figure), wanted(ra, layer, 1, example), atol=1e-9)
            assert figure.data[0].zmax == pytest.approx(np.nanmax(np.abs(z(figure))))
            assert figure.data[0].zmin == -figure.data[0].zmax


def test_green_is_what_the_answer_needs_and_the_bar_says_so_with_the_unit() -> None:
    for objective, unit in (
        ("answer_nll", "nats"),
        ("logit_diff", "logits"),
        ("custom", "units of the loss"),
    ):
        ra = attending(objective=objective)
        trace = head_map(ra, (0, 0), kind="knockout").data[0]
        assert (trace.colorscale[0][1], trace.colorscale[-1][1]) == (BROWN, GREEN)
        title = trace.colorbar.title.text
        assert title.startswith(f"loss if blocked ({unit})")
        assert title.endswith("green: the answer needs it, brown: it is in the way")
        assert f"loss if blocked = %{{z:+.3g}} {unit}" in trace.hovertemplate
        assert "<br>A = %{customdata[0]:.3g}" in trace.hovertemplate
        np.testing.assert_array_equal(
            np.asarray(trace.customdata)[..., 0].astype(float),
            lower(ra["pattern", 0][0, 0].float()),
        )
    # The sign asked for is R's; what blocking does has one sign only.
    both = [z(head_map(ra, (0, 0), kind="knockout", sign=sign)) for sign in ("descent", "gradient")]
    np.testing.assert_array_equal(*both)


def test_three_maps_stand_beside_each_other_each_with_its_bar() -> None:
    ra, heads = attending(), [(0, 0), (2, 2)]
    figure = head_maps(ra, heads, kinds=["pattern", "ra", "knockout"])
    assert [trace.name for trace in figure.data] == [
        f"{label} {kind}" for label in ("L0H0", "L2H2") for kind in ("pattern", "ra", "knockout")
    ]
    assert all(trace.showscale for trace in figure.data)
    assert [a.text for a in figure.layout.annotations][:3] == [
        "L0H0 attention", "L0H0 −R", "L0H0 loss if blocked",
    ]  # fmt: skip
    wanted = [done(ra, *head) for head in heads]
    for i in (0, 1):
        np.testing.assert_allclose(z(figure, 3 * i + 2), wanted[i], atol=1e-9)
        most = max(np.nanmax(np.abs(one)) for one in wanted)
        assert figure.data[3 * i + 2].zmax == pytest.approx(most)  # on one scale, and not on R's
    assert len({figure.data[i].zmax for i in (1, 4)}) == 1
    alone = head_maps(ra, heads, kinds=["knockout"])
    assert [trace.showscale for trace in alone.data] == [True, False]


def test_a_row_of_tokens_is_shaded_by_what_blocking_does() -> None:
    ra = attending()
    figure = token_row(ra, (2, 1), kind="knockout")
    told = np.asarray(figure.data[0].customdata, float)
    np.testing.assert_allclose(told[:, 1], done(ra, 2, 1)[-1], atol=1e-9)
    np.testing.assert_allclose(told[:, 2], ra["pattern", 2][0, 1, 4].numpy())
    assert "loss if blocked = %{customdata[1]:.3g} nats" in figure.data[0].hovertemplate
    assert "the answer needs it" in figure.data[0].marker.colorbar.title.text
    fills = [shape.fillcolor for shape in figure.layout.shapes]
    for fill, value in zip(fills, told[:, 1], strict=True):
        red, green, blue = map(float, fill[4:-1].split(","))
        if abs(value) > 0.2 * np.abs(told[:, 1]).max():
            assert (min(green, blue) > red) == (value > 0)
    assert not token_row(ra, (2, 1)).data[0].marker.colorbar.title.text


def test_what_is_no_number_is_crossed_out() -> None:
    ra = attending()
    ra["pattern", 0][0, 1, 3, 2] = torch.nan
    heatmap, crosses = head_map(ra, (0, 1), kind="knockout").data
    assert np.isnan(np.asarray(heatmap.z, float)[3, 2])
    assert ra["knockout", 0][0, 1, 3, 2].isnan()
    assert (crosses.x, crosses.y) == (("⏎ (2)",), ("·Paris (3)",))


def test_a_cut_needs_the_gradient_of_the_pattern_and_says_so() -> None:
    ra = make()
    for draw in (head_map, token_row):
        with pytest.raises(NotStored, match="'cut' is made from 'pattern' and 'pattern_grad'"):
            draw(ra, (0, 0), kind="cut")
    for draw in (unchecked(head_map), unchecked(token_row)):
        with pytest.raises(BadInput, match="give 'ra', 'pattern', 'knockout' or 'cut'"):
            draw(ra, (0, 0), kind="pattern_grad")


# ---- grids --------------------------------------------------------------------------------------


def test_the_grid_shows_norms_of_what_blocking_does() -> None:
    ra = attending()
    figure = head_grid(ra, kind=["knockout", "cut"])
    wanted = np.stack([np.sqrt((knocked_out(ra, i) ** 2).sum((-1, -2))).mean(0) for i in LAYERS])
    np.testing.assert_allclose(z(figure), wanted, rtol=1e-5)
    cuts = [-ra["pattern", i] * ra["pattern_grad", i] for i in LAYERS]
    wanted = torch.stack([one.pow(2).sum((-1, -2)).sqrt().mean(0) for one in cuts]).numpy()
    np.testing.assert_allclose(z(figure, 1), wanted, rtol=1e-5)
    assert figure.layout.annotations[0].text == "knockout ‖R~/(1 − A)‖, nats"
    assert figure.data[0].colorbar.title.text == "‖knockout‖"
    ranks = np.asarray(figure.data[0].customdata)[..., 0]
    assert z(figure).ravel()[np.argsort(ranks.ravel())].tolist() == sorted(z(figure).ravel())[::-1]


def test_the_grid_says_what_it_lacks() -> None:
    with pytest.raises(NotStored, match="found kind 'size'; a cache gives ra, pattern"):
        unchecked(head_grid)(make(), kind="size")
    norms = replace(make(), _maps={}, store="norms")
    with pytest.raises(NotStored, match="'knockout' is made from 'pattern' and 'ra'"):
        head_grid(norms, kind="knockout")


# ---- layers × tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("example", [0, 1])
def test_the_flow_is_the_sum_over_heads_of_the_last_row(example: int) -> None:
    ra = attending()
    n = len(ROWS[example])
    figure = flow_map(ra, example=example)
    wanted = [knocked_out(ra, i)[example, :, n - 1, :n].sum(axis=0) for i in LAYERS]
    np.testing.assert_allclose(z(figure), wanted, atol=1e-6)
    trace = figure.data[0]
    assert (trace.zmin, trace.zmax) == pytest.approx((-np.abs(wanted).max(), np.abs(wanted).max()))
    assert (trace.colorscale[0][1], trace.colorscale[-1][1]) == (BROWN, GREEN)
    assert trace.colorbar.title.text.startswith("loss if blocked (nats)")
    assert list(trace.y) == ["layer 0", "layer 2"]
    assert list(figure.layout.yaxis.ticktext) == ["0", "2"]
    assert [name.rpartition(" ")[2] for name in trace.x] == [f"({i})" for i in range(n)]
    cuts = [cut(ra, i, h, example)[-1] for i in LAYERS for h in range(3)]
    np.testing.assert_allclose(
        z(flow_map(ra, by="cut", example=example)),
        np.reshape(cuts, (2, 3, n)).sum(axis=1),
        atol=1e-6,
    )


def test_the_flow_into_chosen_tokens_is_grey_where_they_cannot_look() -> None:
    ra = attending()
    figure = flow_map(ra, queries=[1, 2], heads=["L0H1", "L2H0"], limit=3.0)
    wanted = [knocked_out(ra, i)[0, h, 1:3].sum(axis=0) for i, h in ((0, 1), (2, 0))]
    np.testing.assert_allclose(z(figure)[:, :3], np.asarray(wanted)[:, :3], atol=1e-6)
    assert np.isnan(z(figure)[:, 3:]).all()
    assert figure.layout.plot_bgcolor not in {pair[1] for pair in figure.data[0].colorscale}
    assert figure.data[0].hoverongaps is False
    assert figure.data[0].zmax == 3.0
    # A text of this prompt alone.
    np.testing.assert_allclose(
        z(flow_map(ra, queries=" a", example=1))[:, :2],
        [knocked_out(ra, i)[1, :, 1, :2].sum(axis=0) for i in LAYERS],
        atol=1e-6,
    )


def test_the_flow_of_a_long_prompt_shows_its_end() -> None:
    ra = attending((tuple(f" w{i}" for i in range(60)),)).remove_batch_dim()
    whole, end = flow_map(ra), flow_map(ra, max_tokens=20, title="T", width=500, height=300)
    np.testing.assert_array_equal(z(end), z(whole)[:, 40:])
    assert end.data[0].x[0] == "·w40 (40)"
    assert (end.layout.title.text, end.layout.width, end.layout.height) == ("T", 500, 300)
    assert len(whole.layout.xaxis.tickvals) == 30


def test_tokens_of_the_flow_stay_text() -> None:
    trace = flow_map(attending()).data[0]
    assert trace.x[-1] == "&lt;b&gt;&amp;&#36;x&#36; (4)"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"by": "ra"}, BadInput, r"by='ra'; give 'knockout' or 'cut'.*ra\.flow\(by=…\)"),
        ({"example": 2}, BadInput, "example=2.*examples 0 to 1"),
        ({"queries": 9}, BadInput, "9"),
        ({"heads": "L0H7"}, BadInput, "L0H7"),
        ({"by": "cut"}, NotStored, "'cut' is made from"),
    ],
)
def test_mistakes_in_a_flow_are_named(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        unchecked(flow_map)(make(), **options)


def test_a_flow_between_texts_is_refused() -> None:
    info = RunInfo(str_tokens=(tuple("abcde"),), decoder_tokens=(("x", "y", "z"),))
    own = Site(0, "decoder_blocks.0.self_attn", 2, 2, 0.5)
    ra = RACache(
        sites=Sites({0: own, 1: Site(1, "decoder_blocks.0.cross_attn", 2, 2, 0.5, cross=True)}),
        info=info,
    )
    for layer, shape in ((0, (1, 2, 3, 3)), (1, (1, 2, 3, 5))):
        for kind in ("ra", "pattern"):
            ra._put(layer, kind, torch.rand(shape))
    with pytest.raises(BadInput, match="tokens of different texts"):
        flow_map(ra)
