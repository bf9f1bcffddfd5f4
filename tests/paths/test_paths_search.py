"""Best paths through one map: against every path there is, and worked by hand."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from ra_lens import trace_paths
from ra_lens.errors import BadInput

# Under the import hook of the tests a wrong type is told before the function runs.
unchecked = getattr(trace_paths, "__wrapped__", trace_paths)
NORMS = {"none": 0.0, "avg_logprob": 1.0, "sqrt": 0.5, "pow:0.7": 0.7, "pow:-0.5": -0.5}


def causal(n, *, seed, zeros=0.0):
    """Rows that sum to 1, some of whose entries are 0."""
    generator = np.random.default_rng(seed)
    weights = np.tril(generator.exponential(size=(n, n)) ** 2)
    weights *= generator.random((n, n)) >= zeros
    weights[np.arange(n), np.arange(n)] += 1e-3
    return weights / weights.sum(axis=1, keepdims=True)


def every_path(weights, start, *, bos=(), min_attn=0.0, top_k=None, mask=None):
    """All paths from `start`, written out: `{positions: sum of logs}`."""
    steps = {}
    for q in range(len(weights)):
        keys = [k for k in range(q) if weights[q, k] > 0 and weights[q, k] >= min_attn]
        keys = [k for k in keys if mask is None or mask[k]]
        keys.sort(key=lambda k: -weights[q, k])
        steps[q] = keys[:top_k]
    found = {}
    for size in range(start + 1):
        for inner in combinations(range(start), size):
            path = (start, *reversed(inner))
            pairs = list(pairwise(path))
            if any(k not in steps[q] for q, k in pairs):
                continue
            if any(p in bos for p in path[1:-1]):
                continue  # it would have ended there
            last = path[-1]
            if last == 0 or (last in bos and size) or not steps[last]:
                found[path] = sum(math.log(weights[q, k]) for q, k in pairs)
    return found


def best(paths, k, power):
    scored = [(s / (len(p) - 1) ** power if len(p) > 1 else s, p) for p, s in paths.items()]
    return sorted(scored, reverse=True)[:k]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_beam": 40},
        {"target_pos": 7},
        {"min_attn": 0.08},
        {"top_k": 3},
        {"bos": (4, 6)},
        {"bos": (11, 5), "min_attn": 0.05, "top_k": 4},
        {"mask": (1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1)},
    ],
    ids=str,
)
def test_exact_search_gives_the_best_of_all_paths(norm, options):
    options = dict(options)
    bos, mask = options.pop("bos", ()), options.pop("mask", None)
    for seed in range(3):
        weights = causal(12, seed=seed, zeros=0.2)
        ids = torch.arange(12) + 100
        for p in bos:
            ids[p] = 7
        result = trace_paths(
            torch.tensor(weights),
            ids,
            bos_token_id=7,
            length_norm=norm,
            attention_mask=None if mask is None else torch.tensor(mask),
            **options,
        )
        plain = {k: v for k, v in options.items() if k not in ("top_beam", "target_pos")}
        start = options.get("target_pos", 11)
        paths = every_path(weights, start, bos=bos, mask=mask, **plain)
        wanted = best(paths, options.get("top_beam", 5), NORMS[norm])
        assert [beam.positions for beam in result.beams] == [path for _, path in wanted]
        found = [beam.score_norm for beam in result.beams]
        assert found == pytest.approx([score for score, _ in wanted], abs=1e-12)
        for beam in result.beams:
            assert beam.score_raw == pytest.approx(paths[beam.positions], abs=1e-12)
            assert beam.edge_attns == pytest.approx(
                [weights[q, k] for q, k in zip(beam.positions, beam.positions[1:], strict=False)]
            )


def test_all_paths_come_out_once_where_all_are_asked_for():
    weights = causal(8, seed=5)
    result = trace_paths(torch.tensor(weights), top_beam=1000, length_norm="avg_logprob")
    paths = every_path(weights, 7)
    assert len(paths) == 2**6
    assert {beam.positions for beam in result.beams} == set(paths)


@pytest.mark.parametrize("norm", ["avg_logprob", "sqrt"])
def test_the_best_path_of_many_tokens(norm):
    n = 150  # the best of each length, one entry at a time
    weights = causal(n, seed=2, zeros=0.5)
    ends = [q for q in range(n) if not weights[q, :q].any()]
    best_of = [dict.fromkeys(ends, 0.0)]
    for _ in range(n):
        after = {}
        for q in range(n):
            ways = [
                math.log(weights[q, k]) + s
                for k, s in best_of[-1].items()
                if k < q and weights[q, k] > 0
            ]
            if ways:
                after[q] = max(ways)
        best_of.append(after)
    scores = [of[n - 1] / m ** NORMS[norm] for m, of in enumerate(best_of) if m and n - 1 in of]
    found = trace_paths(torch.tensor(weights), length_norm=norm, top_beam=10)
    assert found.beams[0].score_norm == pytest.approx(max(scores), abs=1e-12)
    ordered = [beam.score_norm for beam in found.beams]
    assert ordered == sorted(ordered, reverse=True)
    wide = trace_paths(
        torch.tensor(weights), length_norm=norm, search="beam", top_beam=400, top_k=n
    )
    assert found.beams[9].score_norm >= wide.beams[9].score_norm - 1e-12


# Three tokens before the last. From 3: mostly to 2; 2 goes nowhere in particular, 1 surely to 0.
TOY = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0],
        [0.9, 0.1, 0.0, 0.0],
        [0.3, 0.3, 0.4, 0.0],
        [0.1, 0.4, 0.45, 0.05],
    ],
    dtype=torch.float64,
)


def test_a_toy_worked_by_hand():
    # 3-1-0: .4*.9 = .36; 3-2-0: .45*.3 = .135; 3-2-1-0: .45*.3*.9 = .1215; 3-0: .1
    result = trace_paths(TOY)
    assert [beam.positions for beam in result.beams] == [(3, 1, 0), (3, 2, 0), (3, 2, 1, 0), (3, 0)]
    products = [math.exp(beam.score_raw) for beam in result.beams]
    assert products == pytest.approx([0.36, 0.135, 0.1215, 0.1])
    # Means of logs: ln(.36)/2 = -.511, ln(.1215)/3 = -.703, ln(.135)/2 = -1.001, ln(.1) = -2.303
    result = trace_paths(TOY, length_norm="avg_logprob")
    assert [beam.positions for beam in result.beams] == [(3, 1, 0), (3, 2, 1, 0), (3, 2, 0), (3, 0)]
    assert result.beams[1].score_norm == pytest.approx(math.log(0.1215) / 3)


def test_the_diagonal_is_never_a_step():
    weights = torch.eye(4, dtype=torch.float64) * 0.9 + TOY * 0.1
    assert all(step.key < step.query for beam in trace_paths(weights).beams for step in beam.steps)


def test_the_beam_misses_what_its_first_step_ranks_low():
    beam = trace_paths(TOY, search="beam", top_beam=1)
    assert beam.beams[0].positions == (3, 2, 0)  # 3-2 weighs more than 3-1, which is dropped
    exact = trace_paths(TOY, top_beam=1)
    assert exact.beams[0].positions == (3, 1, 0)
    assert exact.beams[0].score_raw > beam.beams[0].score_raw


@pytest.mark.parametrize("norm", NORMS)
def test_a_beam_as_wide_as_there_are_paths_misses_nothing(norm):
    weights = torch.tensor(causal(9, seed=3))
    wide = trace_paths(weights, search="beam", top_beam=300, top_k=9, length_norm=norm)
    exact = trace_paths(weights, top_beam=300, length_norm=norm)
    assert [b.positions for b in wide.beams] == [b.positions for b in exact.beams]


def test_paths_end_where_no_step_is_left():
    weights = torch.zeros(4, 4, dtype=torch.float64)
    weights[3, 2], weights[3, 1], weights[1, 0] = 0.5, 0.25, 0.5
    result = trace_paths(weights)
    assert [beam.positions for beam in result.beams] == [(3, 2), (3, 1, 0)]
    alone = trace_paths(weights, target_pos=2)
    assert [(b.positions, b.score_raw, b.steps) for b in alone.beams] == [((2,), 0.0, ())]
    assert trace_paths(weights, target_pos=0).beams[0].positions == (0,)


def test_a_weight_far_below_1e_12_counts_as_what_it_is():
    weights = torch.zeros(3, 3, dtype=torch.float64)
    weights[2, 1], weights[1, 0], weights[2, 0] = 1e-20, 0.5, 1e-18
    result = trace_paths(weights)
    assert [beam.positions for beam in result.beams] == [(2, 0), (2, 1, 0)]
    assert result.beams[0].score_raw == pytest.approx(math.log(1e-18))


def test_heads_are_put_together_or_taken_alone():
    maps = np.stack([causal(7, seed=i) for i in range(3)])
    for name, wanted in (("mean", maps.mean(0)), ("max", maps.max(0)), (1, maps[1]), (-1, maps[2])):
        found = trace_paths(torch.tensor(maps), agg_heads=name)
        alone = trace_paths(torch.tensor(wanted))
        assert [b.positions for b in found.beams] == [b.positions for b in alone.beams]
        assert found.beams[0].edge_attns == pytest.approx(alone.beams[0].edge_attns)
    assert trace_paths(torch.tensor(maps), agg_heads=-1).agg_heads == 2


# Two heads. From 2 the loss wants more of 1 by head 0 (−.6) and of 0 by head 1 (−.2); head 1 wants
# less of 1 (+.2). From 1, head 0 wants more of 0 (−.3), less of itself.
R = torch.tensor(
    [
        [[0, 0, 0], [-0.3, 0.3, 0], [0.2, -0.6, 0.4]],
        [[0, 0, 0], [0.0, 0.0, 0], [-0.2, 0.2, 0.0]],
    ],
    dtype=torch.float64,
)


def test_reversed_attention_is_followed_by_its_sign_and_heads_do_not_cancel():
    # Mean of (−R)+: [2,1] .3, [2,0] .1, [1,0] .15; the largest sum of a row is .4.
    more = trace_paths(R, follow="more")
    assert [beam.positions for beam in more.beams] == [(2, 1, 0), (2, 0)]
    assert more.beams[0].edge_attns == pytest.approx([0.75, 0.375])
    assert [step.value for step in more.beams[0].steps] == pytest.approx([0.3, 0.15])
    # Mean of (R)+: [2,0] .1, [2,1] .1, [1,0] 0, so 1 is a dead end; the largest sum is .2.
    less = trace_paths(R, follow="less")
    assert {beam.positions for beam in less.beams} == {(2, 1), (2, 0)}
    assert less.beams[0].edge_attns == pytest.approx([0.5])
    assert less.beams[0].steps[0].value == pytest.approx(-0.1)
    # Mean of |R|: [2,1] .4, [2,0] .2, [1,0] .15; the sum .6. R of the heads together: −.2, 0, −.15.
    either = trace_paths(R, follow="abs")
    assert either.beams[0].positions == (2, 0)
    assert [step.value for step in either.beams[1].steps] == pytest.approx([0.4, 0.15])
    strongest = trace_paths(R, follow="abs", agg_heads="max", length_norm="avg_logprob")
    assert [b.edge_attns for b in strongest.beams] == [
        pytest.approx([0.75, 0.375]), pytest.approx([0.25]),
    ]  # fmt: skip
    assert strongest.beams[1].steps[0].value == pytest.approx(-0.2)


@pytest.mark.parametrize("factor", [1e-6, 3.0])
@pytest.mark.parametrize("follow", ["more", "less", "abs", "knockout"])
def test_a_factor_in_the_loss_changes_no_path(factor, follow):
    maps = torch.randn(2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one = trace_paths(maps, follow=follow)
    other = trace_paths(maps * factor, follow=follow)
    assert [b.positions for b in one.beams] == [b.positions for b in other.beams]
    assert one.beams[0].edge_attns == pytest.approx(other.beams[0].edge_attns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "best"}, "found search='best'; give 'exact' or 'beam'"),
        ({"top_beam": 0}, "top_beam=0; ask for at least one path"),
        ({"top_k": 0}, "top_k=0; follow at least one"),
        ({"target_pos": 4}, "target_pos=4; this prompt has positions 0 to 3"),
        ({"target_pos": -5}, "target_pos=-5"),
        ({"agg_heads": "none"}, "agg_heads='none'; give 'mean', 'max' or the index"),
        ({"agg_heads": 1}, "agg_heads=1; this layer has heads 0 to 0"),
        ({"length_norm": "mean"}, "length_norm='mean'; give 'none'"),
        ({"length_norm": "pow:x"}, "length_norm='pow:x'"),
        ({"length_norm": "pow:nan"}, "length_norm='pow:nan'"),
        ({"follow": "ra"}, "found follow='ra'; give one of 'pattern', 'more'"),
        ({"layer": 2}, "layer=2 with a tensor"),
        ({"attention_mask": torch.ones(3)}, "attention_mask of 3 positions for 4 tokens"),
        ({"bos_token_id": 3}, "bos_token_id= without token ids"),
        ({"target": " x"}, "target= with a tensor"),
        ({"example": 1}, "example=1; there are examples 0 to 0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(BadInput) as error:
        unchecked(TOY, **options)
    assert message in str(error.value)


def test_a_gradient_that_is_nowhere_is_said_so():
    with pytest.raises(BadInput, match="nothing to follow from position 1"):
        trace_paths(R, follow="less", target_pos=1, agg_heads=1)
