"""Published heads, and how well scores find heads: by hand, and by counting pairs."""

from __future__ import annotations

import itertools

import pytest
import torch

from ra_lens.errors import BadInput
from ra_lens.heads import HeadScores, known_heads, localisation_scores


def scored(values, heads=None):
    scores = torch.tensor(values, dtype=torch.float64)
    return HeadScores("mine", "mine", scores, tuple(range(len(values))), 1, "toy", heads=heads)


def test_by_hand():
    # In order: true, other, true, other. Pairs won: 2 + 1 of 4. Precision 1/1 and 2/3.
    found = localisation_scores(scored([[4.0, 3.0], [2.0, 1.0]]), ["L0H0", "L1H0"])
    assert found.auroc == found.auroc_pessimistic == 0.75
    assert found.average_precision == pytest.approx((1 + 2 / 3) / 2)
    assert (found.to_verify, found.n_true, found.n_heads) == (3, 2, 4)


def test_ties_by_hand():
    # The true head ties with one other, above one: a half and a whole of two pairs; against it, one
    # of two. Both of the tie have to be looked at, and one of them is right.
    found = localisation_scores(scored([[5.0, 5.0, 1.0]]), (0, 1))
    assert found.auroc == 0.75 and found.auroc_pessimistic == 0.5
    assert found.average_precision == 0.5 and found.to_verify == 2
    flat = localisation_scores(scored([[0.0] * 4, [0.0] * 4]), ["L1H1", (0, 2)])
    assert flat.auroc == 0.5 and flat.auroc_pessimistic == 0.0 and flat.to_verify == 8
    assert flat.average_precision == 2 / 8


@pytest.mark.parametrize("seed", range(4))
def test_by_counting_pairs_and_going_down_the_list(seed):
    generator = torch.Generator().manual_seed(seed)
    # Few different values, so that there are many ties.
    scores = scored(torch.randint(-3, 4, (5, 6), generator=generator).tolist())
    every = [(layer, head) for layer in range(5) for head in range(6)]
    true = [every[i] for i in torch.randperm(30, generator=generator)[:7].tolist()]
    found = localisation_scores(scores, true)
    value = {pair: float(scores.scores[pair]) for pair in every}
    pairs = [(value[a], value[b]) for a, b in itertools.product(true, set(every) - set(true))]
    assert len(pairs) == 7 * 23
    assert found.auroc == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))
    assert found.auroc_pessimistic == pytest.approx(sum(a > b for a, b in pairs) / len(pairs))
    # Down the thresholds, as precision and recall are drawn.
    precision_times_recall, before, looked_at = 0.0, 0.0, None
    for threshold in sorted(set(value.values()), reverse=True):
        taken = [pair for pair in every if value[pair] >= threshold]
        right = sum(pair in true for pair in taken)
        precision_times_recall += (right / 7 - before) * right / len(taken)
        before = right / 7
        looked_at = len(taken) if right == 7 and looked_at is None else looked_at
    assert found.average_precision == pytest.approx(precision_times_recall)
    assert found.to_verify == looked_at


def test_the_worst_order_is_the_best_one_turned_around():
    scores = scored([[3.0, -4.0], [1.0, 0.5]])
    best = localisation_scores(scores, (0, 0))
    worst = localisation_scores(scores.reversed(), (0, 0))
    assert (best.auroc, worst.auroc) == (1.0, 0.0) and worst.to_verify == 4
    # A head that hurts is last by sign and first by size.
    assert localisation_scores(scores, "L0H1").auroc == 0.0
    assert localisation_scores(scores.absolute(), "L0H1").auroc == 1.0
    assert scores.absolute().order() == [(0, 1), (0, 0), (1, 0), (1, 1)]
    assert scores.reversed().absolute().direction == "forward"


def test_heads_that_do_not_exist_count_for_nothing():
    scores = scored([[1.0, float("nan")], [2.0, 3.0]], heads=(1, 2))
    found = localisation_scores(scores, "L1H1")
    assert (found.auroc, found.n_heads) == (1.0, 3)


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ([], "0 true heads"),
        (["L0H0", (0, 0)], "2 true heads, 1 different"),
        (["L0H0", "L0H1"], "2 true heads, 2 different ones, of 2 of toy; give each once"),
        ("L9H9", "found L9H9 among the true heads, but toy has no such head"),
        (["name mover"], r"found 'name mover' among heads. Give \(layer, head\) pairs"),
    ],
)
def test_what_cannot_be_found_is_refused(heads, said):
    with pytest.raises(BadInput, match=said):
        localisation_scores(scored([[1.0, 2.0]]), heads)


def test_published_heads():
    ioi = known_heads("ioi")
    assert {kind: len(heads) for kind, heads in ioi.items()} == {
        "name mover": 3,
        "backup name mover": 8,
        "negative name mover": 2,
        "S-inhibition": 4,
        "induction": 4,
        "duplicate token": 3,
        "previous token": 2,
    }
    assert len(ioi.heads) == len(set(ioi.heads)) == 26
    assert ioi["name mover"] == ("L9H9", "L10H0", "L9H6")
    assert ioi.model == "gpt2" and "2211.00593" in ioi.source
    greater = known_heads("greater_than")
    assert len(greater.heads) == 9 and "L9H1" in greater.heads and "2305.00586" in greater.source
    assert known_heads("induction").heads == ioi["induction"] == ("L5H5", "L5H8", "L5H9", "L6H9")
    with pytest.raises(BadInput, match=r"no published list of heads 'copy'.*'ioi', 'gr"):
        known_heads("copy")


def test_every_published_head_is_one_of_gpt2_small():
    gpt2 = scored([[float(12 * layer + head) for head in range(12)] for layer in range(12)])
    for name in ("ioi", "greater_than", "induction"):
        found = localisation_scores(gpt2, known_heads(name).heads)
        assert found.n_heads == 144 and 0 < found.auroc < 1
