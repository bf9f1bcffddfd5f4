"""The same paths and scores as `reverse-attention` 0.1.0 on the same attention, each option."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ra_lens import trace_paths
from ra_lens.errors import BadInput
from tiny_models import ANY_KIND, KINDS, N_LAYERS, random_ids

theirs = pytest.importorskip("reverse_attention", reason="reverse-attention is not installed")
beam_module = pytest.importorskip("reverse_attention.beam")

NORMS = ("none", "avg_logprob", "sqrt", "pow:0.7")
BOS = 1


def random_maps(n: int, seed: int, heads: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(heads, n, n, generator=generator)
    above = torch.ones(n, n, dtype=torch.bool).triu(1)
    return scores.masked_fill(above, float("-inf")).softmax(dim=-1)


def assert_same(result: Any, beams: Any) -> None:
    assert [list(beam.positions) for beam in result.beams] == [b.positions for b in beams]
    for found, wanted in zip(result.beams, beams, strict=True):
        assert found.edge_attns == pytest.approx(wanted.edge_attns, abs=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(4))
def test_the_same_matrix_gives_the_same_beams(norm: str, seed: int) -> None:
    n = 10 + 5 * seed
    maps = random_maps(n, seed)
    ids = torch.arange(n) + 50
    ids[[3, 6]] = 1
    mask = torch.ones(n, dtype=torch.long)
    mask[[1, 5]] = 0
    cases = [
        {},
        {"top_beam": 1, "top_k": 2},
        {"top_beam": 20, "top_k": 3},
        {"min_attn": 0.05},
        {"target_pos": n // 2},
        {"attention_mask": mask},
        {"attention_mask": mask, "min_attn": 0.1, "top_beam": 7, "stop_at_bos": False},
        {"stop_at_bos": False},
    ]
    for agg in ("mean", "max"):
        attn = maps.mean(dim=0) if agg == "mean" else maps.max(dim=0).values
        for options in cases:
            full = {"target_pos": n - 1, **options}
            stop = full.get("stop_at_bos", True)
            wanted = beam_module.beam_search_backward(
                attn, bos_positions=[3, 6] if stop else [], length_norm=norm, **full
            )
            found = trace_paths(
                maps,
                ids,
                bos_token_id=1,
                search="beam",
                sinks=True,
                agg_heads=agg,
                length_norm=norm,
                **full,
            )
            assert_same(found, wanted)
            for ours, state in zip(found.beams, wanted, strict=True):
                assert ours.score_raw == pytest.approx(state.log_score, abs=1e-6)


@pytest.fixture(scope="module")
def tracer(folder: Callable[..., Path]) -> Any:
    where = str(folder("llama"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        where, attn_implementation="eager", dtype=torch.float64
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    return theirs.ReverseAttentionTracer(model, tokenizer)


def trace(tracer: Any, ids: torch.Tensor, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no BOS
        return tracer.trace(ids, **options)


IDS = torch.cat([torch.tensor([BOS]), random_ids(5), torch.tensor([BOS]), random_ids(6, seed=1)])
CASES: list[dict[str, Any]] = [
    {},
    *({"layer": layer} for layer in range(N_LAYERS)),
    {"layer": -2, "agg_heads": "max"},
    {"top_beam": 1},
    {"top_beam": 12, "top_k": 2},
    {"min_attn": 0.1, "layer": 0},
    {"target_pos": 6},
    {"target_pos": -3, "stop_at_bos": False},
    {"bos_token_id": int(IDS[9]), "layer": 1},
    {"attention_mask": torch.tensor([1] * 11 + [0] * 2), "target_pos": 10},
    *({"length_norm": norm} for norm in NORMS),
    *({"length_norm": norm, "top_beam": 8, "layer": 0, "agg_heads": "max"} for norm in NORMS),
]


@pytest.mark.parametrize("kind", ANY_KIND)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_model_gives_the_same_beams(tracer: Any, shared: Any, kind: str, options: Any) -> None:
    model = shared("llama", kind, torch.float64)
    mask = options.get("attention_mask")
    batch = {**options, "attention_mask": mask.unsqueeze(0)} if mask is not None else options
    wanted = trace(tracer, IDS.unsqueeze(0), **batch)
    own = {"length_norm": "avg_logprob", "search": "beam", "sinks": True, **batch}
    found = trace_paths(model, IDS.unsqueeze(0), **own)
    assert_same(found, wanted.beams)
    for ours, beam in zip(found.beams, wanted.beams, strict=True):
        assert ours.score_raw == pytest.approx(beam.score_raw, abs=1e-6)
        assert ours.score_norm == pytest.approx(beam.score_norm, abs=1e-6)
        assert list(ours.token_ids or ()) == beam.token_ids
        assert list(ours.tokens) == beam.tokens
    assert (found.layer, found.target_pos, found.top_k) == (
        wanted.layer, wanted.target_pos, wanted.top_k,
    )  # fmt: skip
    if mask is None:  # padding is no token here
        assert (found.seq_len, list(found.tokens)) == (wanted.seq_len, wanted.tokens)


def approximate(value: Any) -> Any:
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-6)
    if isinstance(value, dict):
        return {name: approximate(inner) for name, inner in value.items()}
    return [approximate(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("norm", NORMS)
def test_the_json_holds_what_theirs_does(tracer: Any, shared: Any, norm: str) -> None:
    from reverse_attention.sankey import trace_result_to_json

    model = shared("llama", KINDS[0], torch.float64)
    options: dict[str, Any] = {"length_norm": norm, "layer": 1, "top_beam": 6}
    wanted = json.loads(trace_result_to_json(trace(tracer, IDS.unsqueeze(0), **options)))
    found = json.loads(trace_paths(model, IDS, search="beam", sinks=True, **options).to_json())
    del wanted["paths_text"]  # sentences of their own
    assert len(found["paths_text"]) == len(found["beams"])

    def by_name(data: Any) -> Any:
        data["sankey"]["links"].sort(key=lambda link: (link["source"], link["target"]))
        return data

    by_name(wanted), by_name(found)
    for name, value in wanted.items():
        if name == "beams":
            for ours, beam in zip(found["beams"], value, strict=True):
                assert {key: ours[key] for key in beam} == approximate(beam)
        elif name == "metadata":
            assert {key: found["metadata"][key] for key in value} == value
        else:
            assert found[name] == approximate(value)


# ---- what is a bug there, and is right here -----------------------------------------------------


@pytest.fixture(scope="module")
def gpt2_tracer(folder: Callable[..., Path]) -> Any:
    where = str(folder("gpt2"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        where, attn_implementation="eager", dtype=torch.float64
    )
    return theirs.ReverseAttentionTracer(model, transformers.AutoTokenizer.from_pretrained(where))


def test_bos_that_is_also_the_pad_token_is_no_padding_here(gpt2_tracer: Any, shared: Any) -> None:
    ids = torch.cat([torch.tensor([0]), random_ids(6)])  # BOS, which pads in the GPT-2 family
    wanted = trace(gpt2_tracer, ids.unsqueeze(0), length_norm="none")
    # Taken for padding: hidden from the model, and no path arrives at it.
    assert all(0 not in beam.positions for beam in wanted.beams)
    model = shared("gpt2", KINDS[0], torch.float64)
    found = trace_paths(model, ids, search="beam")
    assert all(beam.positions[-1] == 0 for beam in found.beams)
    # Told that nothing is padding, theirs agrees.
    ones = torch.ones(1, 7, dtype=torch.long)
    told = trace(gpt2_tracer, ids.unsqueeze(0), length_norm="none", attention_mask=ones)
    assert_same(found, told.beams)


def test_the_last_token_is_no_padding_here(tracer: Any, shared: Any) -> None:
    ids = torch.cat([IDS[:9], torch.tensor([2, 2])])
    mask = torch.tensor([[1] * 9 + [0] * 2])
    wanted = trace(tracer, ids.unsqueeze(0), attention_mask=mask)
    assert wanted.target_pos == 10  # a padding token
    model = shared("llama", KINDS[0], torch.float64)
    found = trace_paths(model, ids.unsqueeze(0), attention_mask=mask)
    assert (found.target_pos, found.seq_len) == (8, 9)


def test_small_weights_are_not_raised_here() -> None:
    attn = torch.zeros(3, 3, dtype=torch.float64)
    attn[2, 1], attn[1, 0], attn[2, 0] = 1e-20, 0.5, 1e-18
    wanted = beam_module.beam_search_backward(attn, 2, length_norm="none")
    # Both steps count as 1e-12 there, so that 0.5 decides; 1e-18 is 200 times 0.5e-20.
    assert wanted[0].log_score == pytest.approx(-27.631, abs=1e-3)
    assert trace_paths(attn, search="beam").beams[0].score_raw == pytest.approx(-41.4465, abs=1e-3)


def test_a_nonsense_power_is_refused_here() -> None:
    assert beam_module.beam_search_backward(random_maps(6, 0)[0], 5, length_norm="pow:nan")
    with pytest.raises(BadInput, match="pow:nan"):
        trace_paths(random_maps(6, 0)[0], search="beam", length_norm="pow:nan")


def test_the_model_is_left_in_the_mode_it_is_in(folder: Callable[..., Path], fresh: Any) -> None:
    inner = transformers.AutoModelForCausalLM.from_pretrained(str(folder("llama"))).train()
    theirs.ReverseAttentionTracer(inner, None)
    assert not inner.training
    model = fresh("llama", KINDS[0]).train()
    trace_paths(model, IDS)
    assert model.training


def test_beam_search_misses_some_of_the_best() -> None:
    """How many of the true five best paths each search finds, as docs/paths.md tells."""
    found = dict.fromkeys(("none", "avg_logprob"), 0)
    for norm in found:
        for seed in range(20):
            maps = random_maps(24, 100 + seed)
            exact = trace_paths(maps, length_norm=norm)
            beam = trace_paths(maps, length_norm=norm, search="beam")
            best = {b.positions for b in exact.beams}
            found[norm] += len(best & {b.positions for b in beam.beams})
            assert exact.beams[0].score_norm >= beam.beams[0].score_norm - 1e-12
    assert all(0 < count < 100 for count in found.values()), found
