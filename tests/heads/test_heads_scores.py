"""`HeadScores`: what follows from the numbers, with orders written down by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra_lens.errors import BadInput
from ra_lens.head_names import HeadScore
from ra_lens.heads import HeadScores

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, 2.0])
TABLES = st.integers(1, 4).flatmap(
    lambda heads: st.lists(
        st.lists(NUMBERS, min_size=heads, max_size=heads), min_size=1, max_size=5
    )
)


def made(rows, layers=None, **more):
    return HeadScores(
        method="mine",
        title="my method",
        scores=torch.tensor(rows, dtype=torch.float64),
        layers=tuple(layers if layers is not None else range(len(rows))),
        n_examples=25,
        model_name="tiny",
        **more,
    )


# Layers 1 and 4 of a hybrid, three heads each, with ties.
HYBRID = made([[2.0, 5.0, 2.0], [-1.0, 5.0, 7.0]], layers=(1, 4))
HYBRID_ORDER = [(4, 2), (1, 1), (4, 1), (1, 0), (1, 2), (4, 0)]


def test_the_order_is_by_score_and_ties_keep_the_order_of_the_model():
    assert HYBRID.order() == HYBRID_ORDER
    assert HYBRID.top(3) == [HeadScore(4, 2, 7.0), HeadScore(1, 1, 5.0), HeadScore(4, 1, 5.0)]
    assert len(HYBRID.top(100)) == len(HYBRID) == 6
    assert HYBRID.labels == ["L1H0", "L1H1", "L1H2", "L4H0", "L4H1", "L4H2"]
    assert made([[0.0] * 3] * 2).order() == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_reversed_turns_ties_around_too():
    back = HYBRID.reversed()
    assert back.order() == HYBRID_ORDER[::-1]
    assert back.scores.tolist() == [[-2.0, -5.0, -2.0], [1.0, -5.0, -7.0]]
    assert (back.is_reversed, back.direction, HYBRID.direction) == (True, "reversed", "forward")
    assert back.top(1) == [HeadScore(4, 0, 1.0)]
    again = back.reversed()
    assert again.order() == HYBRID_ORDER
    assert torch.equal(again.scores, HYBRID.scores)
    assert again.direction == "forward"


def test_scores_of_each_prompt_turn_around_with_their_mean_and_have_its_shape():
    each = torch.tensor([[[1.0, 4.0, 0.0], [2.0, 9.0, 5.0]], [[3.0, 2.0, 0.0], [0.0, 9.0, 5.0]]])
    scores = made(each.mean(0).tolist(), each=each, heads=(2, 3))
    assert scores.each.isnan().tolist() == [[[False, False, True], [False] * 3]] * 2
    back = scores.reversed().each
    assert torch.equal(back.nan_to_num(0.0), -scores.each.nan_to_num(0.0))
    assert HYBRID.each is None and HYBRID.reversed().each is None
    narrow = replace(scores, each=None)
    object.__setattr__(narrow, "each", each[:, :, :2])  # past the checks of stated shapes
    with pytest.raises(BadInput, match=r"'mine' gave scores of each prompt of shape \(2, 2, 2\)"):
        narrow.__post_init__()


def test_the_first_heads_of_the_order_are_kept():
    assert HYBRID.keep_mask(0).tolist() == [[False] * 3] * 2
    assert HYBRID.keep_mask(3).tolist() == [[False, True, False], [False, True, True]]
    assert HYBRID.keep_mask(6).tolist() == [[True] * 3] * 2
    assert HYBRID.reversed().keep_mask(2).tolist() == [[False, False, True], [True, False, False]]
    for n in (-1, 7):
        with pytest.raises(BadInput, match=rf"n={n}; tiny has 6 heads"):
            HYBRID.keep_mask(n)


def test_the_table_has_one_row_per_head_in_order():
    frame = made([[2.0, 5.0], [5.0, 7.0]], layers=(1, 4), seed=3, draw=2).to_dataframe()
    assert frame["label"].tolist() == ["L4H1", "L1H1", "L4H0", "L1H0"]
    assert frame["layer"].tolist() == [4, 1, 4, 1]
    assert frame["head"].tolist() == [1, 1, 0, 0]
    assert frame["score"].tolist() == [7.0, 5.0, 5.0, 2.0]
    assert frame["rank"].tolist() == [1, 2, 3, 4]
    about = frame[["model", "method", "title", "direction", "seed", "draw", "n_examples"]]
    assert set(about.itertuples(index=False, name=None)) == {
        ("tiny", "mine", "my method", "forward", 3, 2, 25)
    }
    turned = HYBRID.reversed().to_dataframe()
    assert turned["direction"].unique().tolist() == ["reversed"]
    assert turned["rank"].tolist() == [1, 2, 3, 4, 5, 6]
    assert turned["label"].iloc[0] == "L4H0"


def test_scores_are_float64_on_the_cpu_without_a_graph():
    scores = HeadScores("m", "t", torch.ones(2, 3, requires_grad=True) * 2, (0, 1), 1, "tiny")
    assert scores.scores.dtype == torch.float64
    assert not scores.scores.requires_grad
    assert scores.n_heads == 3


def test_it_says_what_it_is():
    text = repr(HYBRID)
    assert "HeadScores of tiny by 'mine' (my method): layers 1, 4, 3 heads, 25 prompts" in text
    assert "first: L4H2 7, L1H1 5, L4H1 5, L1H0 2, L1H2 2, …" in text
    assert "25 prompts, reversed" in repr(HYBRID.reversed())


def test_what_ranks_nothing_is_refused():
    nan = float("nan")
    needed = r"method 'mine' gave NaN for 2 of 4 heads \(L1H1, L4H0\).*score 0|minus infinity"
    with pytest.raises(BadInput, match=needed):
        made([[1.0, nan], [nan, 2.0]], layers=(1, 4))
    with pytest.raises(BadInput, match=r"'mine' gave scores of shape \(2, 2\) for 3 layers"):
        made([[1.0, 2.0], [3.0, 4.0]], layers=(0, 1, 2))
    with pytest.raises(BadInput, match="k=0; ask for at least one head"):
        HYBRID.top(0)
    assert made([[0.0, -float("inf")]]).order() == [(0, 0), (0, 1)]


@settings(max_examples=50, deadline=None)
@given(rows=TABLES, factor=st.sampled_from([2.0, 1024.0]))
def test_an_order_is_a_permutation_that_reversing_twice_and_scaling_leave(rows, factor):
    scores = made(rows)
    every = [(layer, head) for layer in range(len(rows)) for head in range(len(rows[0]))]
    order = scores.order()
    assert sorted(order) == every
    values = [rows[layer][head] for layer, head in order]
    assert values == sorted(values, reverse=True)
    # Ties: ascending by place.
    assert order == sorted(every, key=lambda cell: (-rows[cell[0]][cell[1]], cell))
    assert scores.reversed().order() == order[::-1]
    assert scores.reversed().reversed().order() == order
    # By powers of 2 upwards, which round nothing; halving the smallest numbers would.
    assert made([[factor * x for x in row] for row in rows]).order() == order
    for n in range(len(order) + 1):
        kept = scores.keep_mask(n)
        assert {(i, h) for i, h in kept.nonzero().tolist()} == set(order[:n])
