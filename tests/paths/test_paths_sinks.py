"""Paths leave attention sinks out: what is left is shared, from every source, and it is told."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from command_line import call
from ra_lens import run_with_ra, trace_paths
from ra_lens.errors import BadInput
from ra_lens.paths import read_maps, trace_layers
from ra_lens.paths.result import page_data
from ra_lens.paths.weights import LayerMaps, across_layers, aggregate
from tiny_models import KINDS, N_HEADS, N_LAYERS

PROMPT = "w5 w7 w9 w4 w6"
FOLLOWS = ("value_norm", "pattern", "more", "less", "abs", "knockout")

# Two heads, three tokens; token 0 is the sink.
TOY = np.array(
    [
        [[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.8, 0.15, 0.05]],
        [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.7, 0.1, 0.2]],
    ]
)


def test_attention_without_the_sink_shares_its_half_anew() -> None:
    (one,) = across_layers([LayerMaps(TOY)], "pattern", None, (0,))
    # Token 2 looks at 1 and 2 with .15, .05 and .1, .2, in all .5: half of the weight among them.
    np.testing.assert_allclose(one.heads[:, 2], [[0, 0.15, 0.05], [0, 0.1, 0.2]])
    np.testing.assert_allclose(one.heads[:, 1], np.array([[0, 0.1, 0], [0, 0.5, 0]]) / 1.2)
    np.testing.assert_allclose(one.heads[:, 0], [[0.25, 0, 0], [0.25, 0, 0]])  # looks at itself
    np.testing.assert_allclose(one.residual, [0.5, 0.5, 0.5])


def test_norms_without_the_sink_are_shared_with_the_stream() -> None:
    maps = LayerMaps(TOY, np.array([[9.0, 2.0, 4.0], [9.0, 1.0, 1.0]]), np.array([1.0, 2.0, 3.0]))
    (one,) = across_layers([maps], "value_norm", None, (0,))
    # Token 2: .15·2, .05·4, .1·1, .2·1 and a stream of 3: 3.8, without what token 0 writes.
    np.testing.assert_allclose(one.heads[:, 2], np.array([[0, 0.3, 0.2], [0, 0.1, 0.2]]) / 3.8)
    np.testing.assert_allclose(one.residual[2], 3 / 3.8)


def test_a_gradient_is_measured_against_the_largest_without_the_sink() -> None:
    cuts = np.zeros((2, 3, 3))
    cuts[0, 2], cuts[1, 2], cuts[0, 1] = [5.0, 0.3, 0.1], [0.0, 0.2, -1.0], [7.0, 0.3, 0.0]
    (one,) = across_layers([LayerMaps(cuts)], "knockout", None, (0,))
    np.testing.assert_allclose(one.heads[:, 2], np.array([[0, 0.3, 0.1], [0, 0.2, 0]]) / 0.6)
    np.testing.assert_allclose(one.residual, [1, 0.5, 0])
    weights, values = aggregate(cuts, "knockout", "mean", (0,))
    np.testing.assert_allclose(weights[2, :2], [0, 1])  # of sums below the diagonal, .25
    np.testing.assert_allclose(values[2, :2], [0, 0.25])


@pytest.mark.parametrize("residual", [None, 0.0, 0.4])
@pytest.mark.parametrize("follow", FOLLOWS)
def test_what_is_left_is_shared_out(follow: Any, residual: float | None) -> None:
    generator = np.random.default_rng(0)
    forward = follow in ("value_norm", "pattern")
    layers = [
        LayerMaps(
            np.tril(generator.random((3, 6, 6)) if forward else generator.normal(size=(3, 6, 6))),
            generator.random((3, 6)),
            generator.random(6),
        )
        for _ in range(2)
    ]
    before = [layer.maps.copy() for layer in layers]
    for weights in across_layers(layers, follow, residual, (0, 2)):
        np.testing.assert_allclose(weights.heads.sum(axis=(0, 2)) + weights.residual, 1.0)
        for sink in (0, 2):
            others = [q for q in range(6) if q != sink]
            assert not weights.heads[:, others, sink].any()
    for layer, kept in zip(layers, before, strict=True):
        np.testing.assert_array_equal(layer.maps, kept)


# ---- a model whose heads rest on its first token ------------------------------------------------


@pytest.fixture
def resting(fresh: Any) -> Iterator[Any]:
    """Scores of the first key are raised, and what it has to give is taken."""
    model = fresh("gpt2", KINDS[0])

    def raise_first(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        scores = scores.clone()
        scores[..., 0] += 12
        return scores

    def quieten(values: torch.Tensor, hook: Any) -> torch.Tensor:
        values = values.clone()
        values[:, 0] *= 0.02
        return values

    hooks = [
        (f"blocks.{layer}.attn.hook_{name}", function)
        for layer in range(N_LAYERS)
        for name, function in (("attn_scores", raise_first), ("v", quieten))
    ]
    with model.hooks(fwd_hooks=hooks):
        yield model


def arrives(trace: Any) -> set[int]:
    return {step.key for beam in trace.beams for step in beam.steps if step.moves}


def own(follow: str) -> dict[str, Any]:
    return {} if follow in ("value_norm", "pattern") else {"target": "w8"}


@pytest.mark.parametrize("follow", FOLLOWS)
def test_no_path_goes_to_a_sink_unless_asked(resting: Any, follow: Any) -> None:
    found = trace_layers(resting, PROMPT, follow=follow, top_beam=60, **own(follow))
    assert found.sinks == (0,)
    assert arrives(found)
    assert 0 not in arrives(found)
    asked = trace_layers(resting, PROMPT, follow=follow, top_beam=60, sinks=True, **own(follow))
    assert asked.sinks == ()
    assert 0 in arrives(asked)
    some = trace_layers(resting, PROMPT, follow=follow, layers=[0, 2], **own(follow))
    assert some.sinks == (0,)
    assert 0 not in arrives(some)
    if follow == "value_norm":
        return
    one = trace_paths(resting, PROMPT, follow=follow, layer=1, **own(follow))
    assert one.sinks == (0,)  # found in all layers
    assert 0 not in arrives(one)
    assert 0 in arrives(
        trace_paths(resting, PROMPT, follow=follow, layer=1, sinks=True, **own(follow))
    )


def test_the_best_of_all_paths_without_the_sink(resting: Any) -> None:
    """Every way through three layers, written out, on attention without its first column."""
    _, ra = run_with_ra(resting, "w5 w7 w9", target="w8")
    maps = torch.stack([ra["pattern", layer][0] for layer in range(N_LAYERS)]).double()
    n = maps.shape[-1]
    first = maps[:, :, 0, 0].clone()
    maps[..., 0] = 0
    maps[:, :, 0, 0] = first
    shares = 0.5 * maps / maps.sum(dim=(1, 3))[:, None, :, None]
    scores = []
    choices = [(h, k) for h in range(N_HEADS) for k in range(n)] + [(None, None)]
    for chosen in product(choices, repeat=N_LAYERS):
        p, weight = n - 1, 1.0
        for row, (head, key) in zip(reversed(range(N_LAYERS)), chosen, strict=True):
            weight *= 0.5 if head is None else float(shares[row, head, p, key])
            p = p if head is None else key
            if weight <= 0:
                break
        else:
            scores += [math.log(weight)] if p != n - 1 else []
    wanted = sorted(scores, reverse=True)[:20]
    found = trace_layers(ra, follow="pattern", top_beam=20)
    assert found.sinks == (0,)
    assert [beam.score_raw for beam in found.beams] == pytest.approx(wanted, abs=1e-5)


def test_every_source_names_the_same_sink(resting: Any) -> None:
    _, ra = run_with_ra(resting, [PROMPT, "w8 w3 w6 w9 w4 w7 w5"], target="w8")
    for i in range(2):
        assert trace_paths(ra, layer=1, example=i).sinks == (0,)
        assert trace_layers(ra, follow="knockout", example=i).sinks == (0,)
    assert [m.sinks for m in read_maps(ra)] == [(0,), (0,)]
    _, part = run_with_ra(resting, PROMPT, target="w8", layers=1)  # four heads tell nothing
    assert trace_paths(part, layer=1).sinks == ()
    with torch.no_grad():
        _, cache = resting.run_with_cache(PROMPT)
    assert trace_paths(cache, layer=1).sinks == (0,)
    every = torch.cat([ra["pattern", layer][1] for layer in range(N_LAYERS)])
    assert trace_paths(every).sinks == (0,)
    assert trace_paths(every, sinks=True).sinks == ()
    assert trace_paths(every, follow="knockout").sinks == ()  # no pattern to find it in
    batch = read_maps(resting, [PROMPT, "w8 w3 w6 w9 w4 w7 w5"], follow="value_norm", batch_size=2)
    assert [m.sinks for m in batch] == [(0,), (0,)]


def test_a_loud_token_that_all_look_at_is_no_sink(fresh: Any) -> None:
    model = fresh("gpt2", KINDS[0])

    def raise_first(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        scores = scores.clone()
        scores[..., 0] += 12
        return scores

    with model.hooks(fwd_hooks=[(lambda name: name.endswith("attn_scores"), raise_first)]):
        assert trace_layers(model, PROMPT).sinks == ()
        assert trace_layers(model, PROMPT, follow="pattern").sinks == (0,)  # values not read


def test_the_sink_is_named_in_words_json_and_page(resting: Any) -> None:
    found = trace_layers(resting, PROMPT)
    named = "the attention sink “<|endoftext|>” (0)"
    assert repr(found).splitlines()[-1] == f"  left out: {named} (sinks=True goes there)"
    assert json.loads(found.to_json())["metadata"]["sinks"] == [0]
    assert page_data(found)["about"].endswith(f" Left out: {named}.")
    asked = trace_layers(resting, PROMPT, sinks=True)
    assert "sink" not in repr(asked)
    assert "attention sink" not in asked.to_html()


def test_where_nothing_is_left_the_sink_is_named(resting: Any) -> None:
    for target_pos in (0, 1):
        with pytest.raises(BadInput, match=r"Left out: the attention sink .* \(0\); sinks=True"):
            trace_layers(resting, PROMPT, target_pos=target_pos)
    assert trace_layers(resting, PROMPT, target_pos=1, sinks=True).beams
    with pytest.raises(BadInput, match=r"Left out: the attention sink .* \(0\); sinks=True"):
        trace_paths(resting, PROMPT, target_pos=1, layer=0, follow="abs", target="w8")
    assert trace_paths(resting, PROMPT, target_pos=1).beams[0].positions == (1,)


def test_a_model_without_sinks_gives_what_it_gave(shared: Any) -> None:
    for follow in FOLLOWS:
        one = trace_layers(shared("gpt2", KINDS[0]), PROMPT, follow=follow, **own(follow))
        other = trace_layers(
            shared("gpt2", KINDS[0]), PROMPT, follow=follow, sinks=True, **own(follow)
        )
        assert one.sinks == ()
        assert [b.score_raw for b in one.beams] == [b.score_raw for b in other.beams]


def test_the_command_line_leaves_it_out_or_goes_there(
    resting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ra_lens.cli.session.load", lambda *_, **__: resting)
    left = call("trace", "-p", PROMPT)
    assert (left.exit_code, left.stderr) == (0, "")
    told = "Left out: the attention sink “<|endoftext|>” (0); --sinks goes there."
    assert left.stdout.rstrip().endswith(told)
    there = call("trace", "-p", PROMPT, "--sinks", "--json")
    assert json.loads(there.stdout)["metadata"]["sinks"] == []
    assert "Left out" not in call("trace", "-p", PROMPT, "--sinks").stdout
