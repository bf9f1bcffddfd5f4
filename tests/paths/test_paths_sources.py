"""The same paths from a model, a cache, an ActivationCache and a tensor; and for batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from arch_models import load_bridge
from ra_lens import RACache, run_with_ra, trace_paths
from ra_lens.errors import BadInput, NotStored, UnsupportedModel
from ra_lens.paths import read_maps, trace_layers
from tiny_models import ANY_KIND, CASES, KINDS, N_HEADS, N_LAYERS, random_ids

PROMPT = "w5 w7 w9 w4 w6"


def same(one: Any, other: Any) -> bool:
    scores = [beam.score_norm for beam in other.beams]
    return [beam.positions for beam in one.beams] == [beam.positions for beam in other.beams] and [
        beam.score_norm for beam in one.beams
    ] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_models_patterns_are_those_of_the_hugging_face_model(
    arch: str, kind: str, shared: Any, reference: Any
) -> None:
    ids = random_ids(9)
    with torch.no_grad():
        attentions = reference(arch).model(ids.unsqueeze(0), output_attentions=True).attentions
    model = shared(arch, kind)
    for layer in range(N_LAYERS):
        for agg in ("mean", 2):
            found = trace_paths(model, ids, layer=layer, agg_heads=agg)
            assert found.layer == layer
            assert same(found, trace_paths(attentions[layer][0], agg_heads=agg))
    assert trace_paths(model, ids).layer == N_LAYERS - 1


@pytest.mark.parametrize("kind", ANY_KIND)
@pytest.mark.parametrize("follow", ["more", "less", "abs"])
def test_reversed_attention_from_everywhere(kind: str, follow: Any, shared: Any) -> None:
    model = shared("gpt2", kind)
    _, ra = run_with_ra(model, PROMPT, target="w8")
    found = trace_paths(model, PROMPT, follow=follow, target="w8", layer=1)
    assert same(found, trace_paths(ra, follow=follow, layer=1))
    assert same(found, trace_paths(ra.remove_batch_dim(), follow=follow, layer=1))
    assert same(found, trace_paths(ra["ra", 1], follow=follow))
    assert found.tokens == ("<|endoftext|>", *PROMPT.split())
    assert found.beams[0].token_ids is not None
    step = found.beams[0].steps[0]
    part = {"more": (-ra["ra", 1]).clamp(min=0), "less": ra["ra", 1].clamp(min=0)}
    value = part.get(follow, ra["ra", 1].abs())[0].mean(dim=0)[step.query, step.key]
    assert abs(step.value) == pytest.approx(float(value), rel=1e-4)
    assert step.value > 0 or follow != "more"
    assert step.value < 0 or follow != "less"


def test_an_activation_cache_will_do(shared: Any) -> None:
    model = shared("gpt2", KINDS[0])
    with torch.no_grad():
        _, cache = model.run_with_cache(PROMPT)
    found = trace_paths(cache, PROMPT, layer=0)
    assert same(found, trace_paths(model, PROMPT, layer=0))
    assert found.tokens == trace_paths(model, PROMPT, layer=0).tokens
    assert same(trace_paths(cache, layer=0), found)
    assert trace_paths(cache, layer=0).tokens[2] == "#2"
    assert same(
        trace_layers(cache, follow="pattern"), trace_layers(model, PROMPT, follow="pattern")
    )
    with pytest.raises(NotStored, match="no pattern gradients"):
        trace_paths(cache, follow="more")
    with pytest.raises(BadInput, match=r"prompts of \[3\] tokens for maps of \[6\]"):
        trace_paths(cache, "w5 w7")


@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_batch_gives_what_each_prompt_gives_alone(kind: str, shared: Any) -> None:
    model = shared("llama", kind, torch.float64)
    prompts = [PROMPT, "w8 w3 w6", "w9 w4 w12 w7 w8 w3 w11"]
    for options in ({}, {"follow": "more", "target": ["w3", "w4", "w5"], "layers": 1}):
        maps = read_maps(model, prompts, batch_size=2, **options)
        together = [trace_paths(one) for one in maps]
        for i, (prompt, found) in enumerate(zip(prompts, together, strict=True)):
            own: Any = {"follow": "more", "target": f"w{3 + i}", "layer": 1} if options else {}
            alone = trace_paths(model, prompt, **own)
            assert same(found, alone)
            assert found.tokens == alone.tokens
            assert [b.token_ids for b in found.beams] == [b.token_ids for b in alone.beams]
    _, ra = run_with_ra(model, prompts, target=["w3", "w4", "w5"])
    for i, maps in enumerate(read_maps(ra, follow="more")):
        found = trace_paths(maps, layer=1)
        assert same(found, together[i])
        assert same(found, trace_paths(ra, follow="more", layer=1, example=i))


def test_padding_is_no_token(shared: Any) -> None:
    model = shared("llama", KINDS[0])
    ids = random_ids(6)
    padded = torch.cat([torch.full((3,), 2), ids]).unsqueeze(0)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    assert same(trace_paths(model, padded, attention_mask=mask), trace_paths(model, ids))


def test_a_bos_token_in_the_middle_ends_a_path(shared: Any) -> None:
    model = shared("llama", KINDS[0])
    ids = torch.cat([torch.tensor([1]), random_ids(3), torch.tensor([1]), random_ids(4, seed=1)])
    ends = {beam.positions[-1] for beam in trace_paths(model, ids, top_beam=400).beams}
    assert ends == {0, 4}
    all_the_way = trace_paths(model, ids, top_beam=400, stop_at_bos=False)
    assert {beam.positions[-1] for beam in all_the_way.beams} == {0}
    other = trace_paths(model, ids, top_beam=400, bos_token_id=int(ids[2]))
    assert {beam.positions[-1] for beam in other.beams} == {0, 2}
    assert trace_paths(model, ids, target_pos=4).beams[0].positions[0] == 4


def test_a_table_has_a_row_per_step(shared: Any) -> None:
    found = trace_layers(shared("gpt2", KINDS[0]), PROMPT, top_beam=3)
    frame = found.to_dataframe()
    assert len(frame) == 3 * N_LAYERS
    assert frame.groupby("beam")["weight"].prod().tolist() == pytest.approx(
        [torch.tensor(beam.score_raw).exp().item() for beam in found.beams], rel=1e-5
    )
    residual = frame[frame["kind"] == "residual"]
    assert residual["head"].isna().all()
    assert (residual["query"] == residual["key"]).all()
    heads = frame[frame["kind"] == "head"]["head"]
    assert heads.between(0, N_HEADS - 1).all()
    assert isinstance(frame, pd.DataFrame)


def test_nothing_stays_on_the_model(shared: Any) -> None:
    model = shared("gpt2", KINDS[0])
    model.zero_grad()
    before = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}
    for function in (trace_paths, trace_layers):
        function(model, PROMPT)
        with pytest.raises(BadInput):
            function(model, PROMPT, target_pos=40)
    assert {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_whose_heads_write_otherwise_is_refused(fresh: Any) -> None:
    model = fresh("gpt2", KINDS[0])
    with torch.no_grad(), pytest.raises(UnsupportedModel, match="z is not A·v"):
        name = "blocks.1.attn.hook_z"
        with model.hooks(fwd_hooks=[(name, lambda z, hook: z * 1.5)]):
            trace_layers(model, PROMPT)
    assert trace_layers(model, PROMPT).beams


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, ra: trace_paths(m), BadInput, "found no prompt"),
        (lambda m, ra: trace_paths(3), BadInput, "found a int to trace"),
        (
            lambda m, ra: trace_paths(m, random_ids(2, 5)),
            BadInput,
            "this traces one. For several: ",
        ),
        (lambda m, ra: trace_paths(ra, PROMPT), BadInput, "prompt= with an RACache"),
        (lambda m, ra: trace_paths(ra, target="w5"), BadInput, "target= with an RACache"),
        (
            lambda m, ra: trace_paths(read_maps(ra)[0], follow="pattern"),
            BadInput,
            "follow= with maps",
        ),
        (lambda m, ra: trace_paths(read_maps(ra)[0], PROMPT), BadInput, "prompt= with maps"),
        (lambda m, ra: trace_layers(read_maps(ra)[0], layers=0), BadInput, "layers= with maps"),
        (lambda m, ra: trace_paths(read_maps(ra, layers=[0, 1])[0], layer=2), BadInput, "layer=2;"),
        (
            lambda m, ra: trace_paths(read_maps(m, PROMPT, follow="value_norm")[0]),
            BadInput,
            "found follow='value_norm'; give one of 'pattern'",
        ),
        (lambda m, ra: trace_paths(ra, layer=9), BadInput, "layers=[9]"),
        (lambda m, ra: trace_paths(ra, example=3), BadInput, "example=3"),
        (lambda m, ra: trace_paths(ra, bos_token_id=3), BadInput, "bos_token_id= with an RACache"),
        (lambda m, ra: trace_layers(ra), NotStored, "holds maps, not values"),
        (lambda m, ra: trace_paths(m, PROMPT, target="w5"), BadInput, "which has no loss"),
        (lambda m, ra: trace_paths(m, PROMPT).heads(), BadInput, "trace of one layer"),
        (lambda m, ra: trace_paths(torch.ones(2, 3)), BadInput, "shape (2, 3)"),
        (lambda m, ra: trace_paths(torch.ones(2, 2), "w5"), BadInput, "text with a tensor"),
    ],
)
def test_mistakes_are_named(shared: Any, call: Any, error: Any, message: str) -> None:
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, PROMPT, target="w8")
    assert isinstance(ra, RACache)
    with pytest.raises(error) as caught:
        call(model, ra)
    assert message in str(caught.value)


def test_what_cannot_be_traced_through_all_layers_is_refused(tmp_path: Path) -> None:
    ids = random_ids(6).clamp(max=12)
    bart, bert, odd = (load_bridge(arch, tmp_path) for arch in ("bart", "bert", "gemma4"))
    for follow in ("pattern", "more"):
        for function in (trace_layers, trace_paths):
            with pytest.raises(UnsupportedModel, match="part of a decoder beside an encoder"):
                function(bart, ids, follow=follow)
    _, ra = run_with_ra(bart, ids, target=5)
    with pytest.raises(UnsupportedModel, match="attends to later tokens"):
        trace_layers(ra, follow="abs", layers=0)
    found = trace_paths(ra, follow="abs", layer=0)
    assert same(found, trace_paths(ra["ra", 0], follow="abs"))
    for follow in ("value_norm", "pattern"):
        with pytest.raises(UnsupportedModel, match="trace_paths follows one layer of it"):
            trace_layers(bert, ids, follow=follow)
    assert all(step.key < step.query for b in trace_paths(bert, ids).beams for step in b.steps)
    with pytest.raises(UnsupportedModel, match="norm of what its heads write is not known"):
        trace_layers(odd, ids)
    assert trace_layers(odd, ids, follow="pattern").beams
