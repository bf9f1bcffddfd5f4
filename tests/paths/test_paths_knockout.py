"""Paths along edges that the loss would miss: worked by hand, and by making each cut."""

from __future__ import annotations

import json
import math
from itertools import product
from typing import Any

import pytest
import torch

from ra_lens import run_with_ra, trace_paths
from ra_lens.errors import BadInput, NotStored
from ra_lens.paths import trace_layers
from tiny_models import CASES, KINDS, N_HEADS, N_LAYERS

PROMPT = "w5 w7 w9 w4 w6"

# Two heads, what cutting each edge does to the loss. Without 2 → 1 it rises in head 0 and falls in
# head 1; without 1 → 0 it rises by .6 in head 1.
CUTS = torch.tensor(
    [
        [[0.0, 0.0, 0.0], [-0.2, 0.0, 0.0], [0.2, 0.8, -0.5]],
        [[0.0, 0.0, 0.0], [0.6, -0.6, 0.0], [0.4, -0.3, 0.1]],
    ],
    dtype=torch.float64,
)


def test_a_toy_worked_by_hand() -> None:
    # Mean of the positive parts: [2,1] .4, [2,0] .3, [1,0] .3; the largest sum of a row is .7.
    found = trace_paths(CUTS, follow="knockout")
    assert [beam.positions for beam in found.beams] == [(2, 0), (2, 1, 0)]
    assert found.beams[0].edge_attns == pytest.approx([3 / 7])
    assert found.beams[1].edge_attns == pytest.approx([4 / 7, 3 / 7])
    assert [step.value for step in found.beams[1].steps] == pytest.approx([0.4, 0.3])
    # Head 0 alone: [2,1] .8 and [2,0] .2 of 1; from 1 nothing would be missed.
    alone = trace_paths(CUTS, follow="knockout", agg_heads=0)
    assert [beam.positions for beam in alone.beams] == [(2, 1), (2, 0)]
    assert [beam.edge_attns for beam in alone.beams] == [
        pytest.approx([0.8]), pytest.approx([0.2]),
    ]  # fmt: skip
    assert alone.beams[0].steps[0].value == pytest.approx(0.8)
    with pytest.raises(BadInput, match="nothing to follow from position 1"):
        trace_paths(CUTS, follow="knockout", agg_heads=0, target_pos=1)


def cuts_made(ra: Any, layer: int) -> torch.Tensor:
    """Σ (A′ − A) G of each edge, A′ being the row without it, renormalised: each cut made."""
    pattern, grad = (ra[kind, layer][0].double() for kind in ("pattern", "pattern_grad"))
    found = torch.zeros_like(pattern)
    for head, query, key in product(*map(range, pattern.shape)):
        row = pattern[head, query].clone()
        row[key] = 0
        if row.sum() > 0:
            found[head, query, key] = (
                (row / row.sum() - pattern[head, query]) * grad[head, query]
            ).sum()
    return found


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_step_tells_what_its_cut_does_to_a_linear_loss(arch: str, kind: str, shared: Any) -> None:
    model = shared(arch, kind, torch.float64)
    _, ra = run_with_ra(model, PROMPT, target="w8")
    made = {layer: cuts_made(ra, layer) for layer in range(N_LAYERS)}
    largest = max(float(cuts.clamp(min=0).sum(dim=(0, 2)).max()) for cuts in made.values())
    found = trace_layers(model, PROMPT, follow="knockout", target="w8", top_beam=40)
    checked = 0
    for step in (step for beam in found.beams for step in beam.steps):
        if step.kind == "residual":
            leaves = float(made[step.layer][:, step.query].clamp(min=0).sum())
            assert step.weight == pytest.approx(1 - leaves / largest, abs=1e-5)
            continue
        cut = float(made[step.layer][step.head, step.query, step.key])
        assert step.value == pytest.approx(cut, rel=1e-4, abs=1e-7)
        assert step.weight == pytest.approx(cut / largest, rel=1e-4)
        checked += 1
    assert checked > 40
    for layer in range(N_LAYERS):
        means = made[layer].clamp(min=0).mean(dim=0)
        if not means[-1, :-1].any():
            continue
        one = trace_paths(ra, follow="knockout", layer=layer)
        for step in (step for beam in one.beams for step in beam.steps):
            assert step.value == pytest.approx(float(means[step.query, step.key]), rel=1e-4)


def test_the_best_of_all_paths(shared: Any) -> None:
    """Every way through three layers, written out, on maps made by cutting."""
    _, ra = run_with_ra(shared("llama", KINDS[-1], torch.float64), "w5 w7 w9", target="w8")
    made = torch.stack([cuts_made(ra, layer) for layer in range(N_LAYERS)]).clamp(min=0)
    n = made.shape[-1]
    made /= made.sum(dim=(1, 3)).max()
    stays = 1 - made.sum(dim=(1, 3))
    scores = []
    choices = [(h, k) for h in range(N_HEADS) for k in range(n)] + [(None, None)]
    for chosen in product(choices, repeat=N_LAYERS):
        p, weight = n - 1, 1.0
        for row, (head, key) in zip(reversed(range(N_LAYERS)), chosen, strict=True):
            weight *= float(stays[row, p] if head is None else made[row, head, p, key])
            p = p if head is None else key
            if weight <= 0:
                break
        else:
            scores += [math.log(weight)] if p != n - 1 else []
    wanted = sorted(scores, reverse=True)[:20]
    found = trace_layers(ra, follow="knockout", top_beam=20)
    assert [beam.score_raw for beam in found.beams] == pytest.approx(wanted, abs=1e-4)


def test_a_page_says_what_the_loss_does_without_a_step(shared: Any) -> None:
    _, ra = run_with_ra(shared("gpt2", KINDS[0]), PROMPT, target="w8")
    found = trace_layers(ra, follow="knockout")
    step = next(step for step in found.beams[0].steps if step.moves)
    page = found.to_html()
    assert f", loss {step.value:+.3g} without it" in page
    assert "edges whose cut raises the loss" in page
    assert json.loads(found.to_json())["metadata"]["follow"] == "knockout"
    layer = next(i for i in range(N_LAYERS) if cuts_made(ra, i)[:, -1, :-1].max() > 0)
    assert "without it, mean of heads" in trace_paths(ra, follow="knockout", layer=layer).to_html()


def test_a_cache_without_patterns_says_what_is_missing(shared: Any) -> None:
    _, ra = run_with_ra(shared("gpt2", KINDS[0]), PROMPT, target="w8", store="norms")
    with pytest.raises(NotStored, match="was not kept"):
        trace_layers(ra, follow="knockout")
