"""Grids of heads by any score, side by side, sorted; small multiples of maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from made_caches import LAYERS, lower, make, z
from ra_lens.cache import RACache
from ra_lens.figures import head_grid, head_map, head_maps
from ra_lens.head_maps import head_of_example
from ra_lens.heads import HeadScores
from ra_lens.model import Site, Sites
from ra_lens.run_info import RunInfo

SCORES = torch.tensor([[0.5, -2.0, 0.25], [1.5, -torch.inf, 0.5]])


def scores(values: torch.Tensor = SCORES, **changes: Any) -> HeadScores:
    found = HeadScores("own", "my <own> score", values, LAYERS, n_examples=3, model_name="toy")
    return replace(found, **changes)


def told(figure: Any, i: int = 0) -> np.ndarray:
    return np.asarray(figure.data[i].customdata)


# ---- grids --------------------------------------------------------------------------------------


def test_any_scores_can_be_drawn_with_zero_in_the_middle() -> None:
    figure = head_grid(scores(), top=2)
    trace = figure.data[0]
    np.testing.assert_array_equal(z(figure), [[0.5, -2.0, 0.25], [1.5, np.nan, 0.5]])
    assert (trace.zmin, trace.zmid, trace.zmax) == (-2.0, 0, 2.0)
    # Ties keep the model's order; a head without a score comes last.
    assert told(figure)[..., 0].tolist() == [[2, 5, 4], [1, 6, 3]]
    assert [list(row) for row in trace.text] == [["2", "", ""], ["1", "", ""]]
    assert trace.name == "my &lt;own&gt; score"
    assert trace.hoverongaps is False


def test_scores_that_are_never_negative_start_at_zero() -> None:
    trace = head_grid(scores(SCORES.abs().clamp(max=2.0))).data[0]
    assert (trace.zmin, trace.zmid, trace.zmax) == (0, None, 2.0)


def test_the_sorted_view_puts_the_first_head_of_each_layer_on_the_left() -> None:
    figure = head_grid(scores(), order="score", top=2)
    np.testing.assert_array_equal(z(figure), [[0.5, 0.25, -2.0], [1.5, 0.5, np.nan]])
    assert told(figure)[..., 1].tolist() == [[0, 2, 1], [0, 2, 1]]
    assert told(figure)[..., 0].tolist() == [[2, 4, 5], [1, 3, 6]]
    assert list(figure.data[0].x) == ["1", "2", "3"]
    assert "%{customdata[1]}" in figure.data[0].hovertemplate
    assert {(round(s.x0 + s.x1) / 2, round(s.y0 + s.y1) / 2) for s in figure.layout.shapes} == {
        (0.0, 0.0),
        (0.0, 1.0),
    }


def test_reversed_scores_rank_the_other_way_round() -> None:
    figure = head_grid(scores(SCORES.clamp(min=-3.0)).reversed())
    assert told(figure)[..., 0].tolist() == [[5, 2, 3], [6, 1, 4]]


def test_grids_stand_side_by_side_with_their_own_or_a_shared_scale() -> None:
    ra = make()
    own = head_grid([ra, scores(SCORES.abs().clamp(max=9.0))], kind=["ra", "pattern"])
    shared = head_grid([ra, ra], kind="ra", shared_scale=True, titles=["a", "b<"])
    assert len(own.data) == 3
    for i, kind in enumerate(("ra", "pattern")):
        norms = ra.norms(kind).mean(0).numpy()
        np.testing.assert_allclose(z(own, i), norms, rtol=1e-5)
        assert own.data[i].zmax == pytest.approx(norms.max())
        assert own.data[i].showscale
    assert [a.text for a in shared.layout.annotations] == ["a", "b&lt;"]
    assert [trace.showscale for trace in shared.data] == [False, True]
    assert shared.data[0].zmax == shared.data[1].zmax
    mixed = head_grid([ra, scores()], shared_scale=True)
    assert {(t.zmin, t.zmax) for t in mixed.data} == {
        (-max(2.0, ra.norms().mean(0).max().item()), max(2.0, ra.norms().mean(0).max().item()))
    }
    assert mixed.data[1].colorbar.title.text == "score"


# ---- maps ---------------------------------------------------------------------------------------


def test_small_multiples_hold_one_kind_and_share_a_bar() -> None:
    ra, heads = make(), [(0, 0), (0, 1), (2, 0), (2, 2)]
    figure = head_maps(ra, heads, kinds=["ra"], columns=3)
    assert [trace.name for trace in figure.data] == ["L0H0 ra", "L0H1 ra", "L2H0 ra", "L2H2 ra"]
    for i, (layer, head) in enumerate(heads):
        np.testing.assert_array_equal(z(figure, i), lower(-ra["ra", layer][0, head]))
    assert [trace.showscale for trace in figure.data] == [True, False, False, False]
    assert len({trace.zmax for trace in figure.data}) == 1
    # Two rows: the fourth map stands below the first.
    assert figure.layout.xaxis4.domain == figure.layout.xaxis.domain
    assert figure.layout.yaxis4.domain[1] < figure.layout.yaxis.domain[0]
    apart = head_maps(ra, heads, kinds=["ra"], shared_scale=False)
    assert all(trace.showscale for trace in apart.data)
    assert len({trace.zmax for trace in apart.data}) == 4


@pytest.mark.parametrize("kind", ["ra", "pattern"])
def test_a_number_that_is_none_is_crossed_out_and_not_drawn_as_zero(kind: Any) -> None:
    ra = make()
    ra[kind, 0][0, 1, 3, 2] = torch.nan
    ra[kind, 0][0, 1, 4, 0] = torch.inf
    heatmap, crosses = head_map(ra, (0, 1), kind=kind).data
    shown = np.asarray(heatmap.z, float)
    assert np.isnan(shown[3, 2])
    assert np.isnan(shown[4, 0])
    assert np.isnan(shown[0, 1])  # above the diagonal, without a cross
    assert list(zip(crosses.x, crosses.y, strict=True)) == [
        ("⏎ (2)", "·Paris (3)"),
        ("&lt;|end|&gt; (0)", "&lt;b&gt;&amp;&#36;x&#36; (4)"),
    ]
    assert np.isfinite(heatmap.zmax)
    # In the other kind of map nothing is missing.
    other: Any = "pattern" if kind == "ra" else "ra"
    assert len(head_map(ra, (0, 1), kind=other).data) == 1


def test_long_maps_tell_less_in_a_smaller_file() -> None:
    ra = make((tuple(f" w{i}" for i in range(600)),))
    long, cut = (head_map(ra, (0, 0), max_tokens=n) for n in (None, 500))
    assert long.data[0].customdata is None
    assert "rank" not in long.data[0].hovertemplate
    assert np.asarray(cut.data[0].customdata).shape == (500, 500, 2)
    assert len(long.to_json()) < 7 * 600**2 + 60_000


def test_a_map_with_other_keys_than_queries_has_labels_for_both() -> None:
    info = RunInfo(
        str_tokens=(("a", "b"), ("a", "b", "c", "d", "e")), decoder_tokens=(("x",), ("x", "y", "z"))
    )
    site = Site(0, "decoder_blocks.0.cross_attn", 2, 2, 0.5, cross=True)
    ra = RACache(sites=Sites({0: site}), info=info)
    r = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    ra._put(0, "ra", r)
    ra._put(0, "pattern", r.abs())
    maps = head_of_example(ra, (0, 1), example=1)
    assert (maps.tokens, maps.key_tokens) == (("x", "y", "z"), ("a", "b", "c", "d", "e"))
    assert not maps.causal
    np.testing.assert_array_equal(maps.ra, r[1, 1].numpy())
    cell = maps.strongest(1)[0]
    assert (cell.query, cell.key) == divmod(int(r[1, 1].abs().argmax()), 5)
    assert maps.key_token(cell) == "abcde"[cell.key]
    assert head_of_example(ra, (0, 1), example=0).ra.shape == (1, 2)
    trace = head_map(ra, (0, 1), example=1).data[0]
    assert (list(trace.x)[-1], list(trace.y)[-1]) == ("e (4)", "z (2)")
    cut = head_of_example(ra, (0, 1), example=1, max_tokens=2)
    np.testing.assert_array_equal(cut.ra, r[1, 1, 1:, 3:].numpy())
