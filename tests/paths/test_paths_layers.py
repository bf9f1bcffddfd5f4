"""Paths through all layers: against every path, by hand, and against what masking heads does."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from ra_lens import load_demo_model, load_task, run_with_ra
from ra_lens.errors import BadInput
from ra_lens.model import as_lens
from ra_lens.patching.masking import mask_hooks
from ra_lens.paths import read_maps, trace_layers
from ra_lens.paths.search import layered_paths
from ra_lens.paths.weights import LayerMaps, across_layers
from ra_lens.questions import ask, read_questions
from tiny_models import CASES, D_HEAD, D_MODEL, KINDS, N_HEADS, N_LAYERS, random_ids

IDS = random_ids(7)


def graph_of(seed: int, layers: int, heads: int, n: int) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    maps = np.tril(generator.random((layers, heads, n, n)) ** 3)
    maps *= generator.random(maps.shape) > 0.2
    return maps, generator.random((layers, n))


def every_path(maps: Any, stays: Any, start: int, *, must_move: bool) -> list[tuple[float, Any]]:
    layers, heads, n, _ = maps.shape
    found = []
    choices = [(h, k) for h in range(heads) for k in range(n)] + [(None, None)]
    for chosen in product(choices, repeat=layers):
        p, score, edges = start, 0.0, []
        for row, (head, key) in zip(reversed(range(layers)), chosen, strict=True):
            weight = stays[row, p] if head is None else maps[row, head, p, key]
            key = p if head is None else key
            if key > p or weight == 0:
                break
            edges.append((row, head, p, key))
            score += math.log(weight)
            p = key
        else:
            if p != start or not must_move:
                found.append((score, edges))
    return sorted(found, key=lambda pair: -pair[0])


@pytest.mark.parametrize("must_move", [True, False])
@pytest.mark.parametrize(("layers", "heads", "n"), [(3, 2, 5), (4, 1, 4), (1, 3, 6)])
def test_the_best_of_all_paths(layers: int, heads: int, n: int, must_move: bool) -> None:
    for seed in range(3):
        maps, stays = graph_of(seed, layers, heads, n)
        with np.errstate(divide="ignore"):
            graph = list(np.log(maps)), list(np.log(stays))
        for start in (n - 1, n - 2):
            wanted = every_path(maps, stays, start, must_move=must_move)[:25]
            found = layered_paths(*graph, start, 25, must_move=must_move)
            assert [edges for edges, _ in found] == [edges for _, edges in wanted]
            scores = [score for score, _ in wanted]
            assert [score for _, score in found] == pytest.approx(scores, abs=1e-12)


# Two layers of two heads, two tokens; attention of the second token, which is what there is to say.
TOY = torch.tensor(
    [[[[1.0, 0.0], [0.6, 0.4]], [[1.0, 0.0], [0.2, 0.8]]],
     [[[1.0, 0.0], [0.9, 0.1]], [[1.0, 0.0], [0.5, 0.5]]]],
    dtype=torch.float64,
)  # fmt: skip


def layers_of(maps: torch.Tensor, **more: Any) -> list[LayerMaps]:
    return [LayerMaps(m.numpy(), **more) for m in maps]


def test_attention_shares_half_with_the_residual_connection() -> None:
    first, second = across_layers(layers_of(TOY), "pattern", None)
    np.testing.assert_allclose(second.heads[:, 1], [[0.225, 0.025], [0.125, 0.125]])
    np.testing.assert_allclose(second.residual, [0.5, 0.5])
    # From token 1 to token 0: by head 0 of layer 1 (.225), where token 0 keeps all it has in
    # layer 0 (.5 residual, or .25 by a head that looks at itself); or later.
    with np.errstate(divide="ignore"):
        heads = [np.log(first.heads), np.log(second.heads)]
        stays = [np.log(first.residual), np.log(second.residual)]
    best = layered_paths(heads, stays, 1, 4)
    found = [(edges, round(math.exp(score), 9)) for edges, score in best]
    assert found == [
        ([(1, 0, 1, 0), (0, None, 0, 0)], 0.1125),
        ([(1, None, 1, 1), (0, 0, 1, 0)], 0.075),
        ([(1, 1, 1, 0), (0, None, 0, 0)], 0.0625),
        ([(1, 0, 1, 0), (0, 0, 0, 0)], 0.05625),
    ]


def test_norms_share_what_arrives() -> None:
    written = np.array([[1.0, 2.0], [3.0, 1.0]])
    (one,) = across_layers(
        layers_of(TOY[:1], written=written, stream=np.array([4.0, 2.0])), "value_norm", None
    )
    # Token 1: head 0 writes .6·1 and .4·2, head 1 .2·3 and .8·1; the stream has 2; in all 4.8.
    np.testing.assert_allclose(one.heads[:, 1], np.array([[0.6, 0.8], [0.6, 0.8]]) / 4.8)
    np.testing.assert_allclose(one.residual, [4 / 8, 2 / 4.8])
    (set_,) = across_layers(
        layers_of(TOY[:1], written=written, stream=np.array([4.0, 2.0])), "value_norm", 0.3
    )
    np.testing.assert_allclose(set_.heads[:, 1], 0.7 * np.array([[0.6, 0.8], [0.6, 0.8]]) / 2.8)
    np.testing.assert_allclose(set_.residual, [0.3, 0.3])


def test_the_gradient_pulls_what_it_can_and_the_rest_stays() -> None:
    maps = torch.tensor([[[[0, 0], [-0.1, 0.1]]], [[[0, 0], [-0.4, 0.4]]]], dtype=torch.float64)
    first, second = across_layers(layers_of(maps), "more", None)
    np.testing.assert_allclose(first.heads[0], [[0, 0], [0.25, 0]])
    np.testing.assert_allclose(first.residual, [1, 0.75])
    np.testing.assert_allclose(second.heads[0], [[0, 0], [1, 0]])
    np.testing.assert_allclose(second.residual, [1, 0])
    np.testing.assert_allclose(second.values[0], [[0, 0], [0.4, -0.4]])


FOLLOWS = ("value_norm", "pattern", "more", "less", "abs", "knockout")


@pytest.mark.parametrize("residual", [None, 0.0, 0.4])
@pytest.mark.parametrize("follow", FOLLOWS)
def test_what_arrives_at_a_token_is_shared_out(follow: Any, residual: float | None) -> None:
    generator = np.random.default_rng(0)
    layers = [
        LayerMaps(np.tril(generator.normal(size=(3, 6, 6))), generator.random((3, 6)), np.ones(6))
        if follow in ("more", "less", "abs", "knockout")
        else LayerMaps(
            np.tril(generator.random((3, 6, 6))), generator.random((3, 6)), generator.random(6)
        )
        for _ in range(2)
    ]
    for weights in across_layers(layers, follow, residual):
        assert (weights.heads >= 0).all()
        np.testing.assert_allclose(weights.heads.sum(axis=(0, 2)) + weights.residual, 1.0)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_norms_are_those_of_the_hugging_face_model(
    arch: str, kind: str, shared: Any, reference: Any
) -> None:
    model = shared(arch, kind, torch.float64)
    result = trace_layers(model, IDS.unsqueeze(0), top_beam=60)
    seen = contributions(reference(arch).model, IDS)
    checked = 0
    for beam in result.beams:
        for step in beam.steps:
            norms, stream = seen[step.layer]
            whole = float(norms[:, step.query].sum() + stream[step.query])
            if step.kind == "residual":
                assert step.weight == pytest.approx(float(stream[step.query]) / whole, rel=1e-5)
            else:
                wanted = float(norms[step.head, step.query, step.key])
                assert step.value == pytest.approx(wanted, rel=1e-5)
                assert step.weight == pytest.approx(wanted / whole, rel=1e-5)
                checked += 1
    assert checked > 60


def contributions(model: Any, ids: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """‖what a head writes‖ by [head, query, key], and ‖stream‖, of a Hugging Face model.

    The output projection is given one head's numbers made from one key alone, one by one.
    """
    streams: dict[int, torch.Tensor] = {}
    values: dict[int, torch.Tensor] = {}
    projections: dict[int, Any] = {}
    handles = []
    for i, block in enumerate(blocks_of(model)):
        attention = getattr(block, "attn", None) or block.self_attn
        projections[i] = first_of(attention, "c_proj", "o_proj", "out_proj")

        def before(_module: Any, args: Any, kwargs: Any, i: int = i) -> None:
            streams[i] = (args[0] if args else kwargs["hidden_states"])[0].detach()

        def at_value(module: Any, _args: Any, output: torch.Tensor, i: int = i) -> None:
            joint = type(module).__name__ == "Conv1D"  # queries, keys and values in a row
            values[i] = (output.chunk(3, dim=-1)[2] if joint else output)[0].detach()

        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        value = first_of(attention, "c_attn", "v_proj")
        handles.append(value.register_forward_hook(at_value))
    with torch.no_grad():
        attentions = model(ids.unsqueeze(0), output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    n, found = len(ids), {}
    for i, pattern in enumerate(attentions):
        v = values[i].reshape(n, -1, D_HEAD)
        v = v.repeat_interleave(N_HEADS // v.shape[1], dim=1)  # [key, head, d_head]
        norms = torch.zeros(N_HEADS, n, n, dtype=torch.float64)
        with torch.no_grad():
            nothing = projections[i](torch.zeros(1, D_MODEL, dtype=torch.float64))
            for head, query, key in product(range(N_HEADS), range(n), range(n)):
                alone = torch.zeros(N_HEADS, D_HEAD, dtype=torch.float64)
                alone[head] = pattern[0, head, query, key] * v[key, head]
                norms[head, query, key] = (projections[i](alone.reshape(1, -1)) - nothing).norm()
        found[i] = (norms, streams[i].norm(dim=-1))
    return found


def blocks_of(model: Any) -> Any:
    inner = getattr(model, "transformer", None) or model.model
    return first_of(getattr(inner, "decoder", inner), "h", "layers")


def first_of(module: Any, *names: str) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


@pytest.mark.parametrize("follow", FOLLOWS)
def test_a_batch_gives_what_each_prompt_gives_alone(shared: Any, follow: Any) -> None:
    model = shared("llama", KINDS[0], torch.float64)
    prompts = ["w5 w7 w9 w4", "w8 w3 w6 w9 w4 w12", "w5 w6 w7 w3 w4"]
    targets: Any = {} if follow in ("value_norm", "pattern") else {"target": "w8"}
    together = read_maps(model, prompts, follow=follow, batch_size=2, **targets)
    for prompt, maps in zip(prompts, together, strict=True):
        found = trace_layers(maps)
        alone = trace_layers(model, prompt, follow=follow, **targets)
        assert [b.steps[0].layer for b in found.beams] == [N_LAYERS - 1] * 5
        assert [b.positions for b in found.beams] == [b.positions for b in alone.beams]
        assert [b.heads for b in found.beams] == [b.heads for b in alone.beams]
        assert found.tokens == alone.tokens
        scores = [b.score_raw for b in alone.beams]
        # A Llama of TransformerBridge rounds its pattern to float32, row by row as wide as it is.
        assert [b.score_raw for b in found.beams] == pytest.approx(scores, abs=1e-6)


def test_a_cache_gives_what_the_model_gives(shared: Any) -> None:
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, "w5 w7 w9 w4", target="w8")
    for follow in ("more", "knockout", "pattern"):
        target: Any = {} if follow == "pattern" else {"target": "w8"}
        from_model = trace_layers(model, "w5 w7 w9 w4", follow=follow, **target)
        from_cache = trace_layers(ra, follow=follow)
        assert [b.heads for b in from_cache.beams] == [b.heads for b in from_model.beams]
        assert from_cache.paths_text == from_model.paths_text
    some = trace_layers(ra, follow="more", layers=[0, -1])
    assert [s.layer for s in some.beams[0].steps] == [N_LAYERS - 1, 0]


def test_it_reads_as_a_sentence() -> None:
    model = load_demo_model()
    result = trace_layers(model, "Q: France\nA: Paris\n\nQ: Italy\nA:")
    best = result.beams[0]
    moved = [step for step in best.steps if step.moves]
    assert len(moved) == 1
    step = moved[0]
    assert step.query == 10
    tokens = [str(token).replace(" ", "·") for token in result.tokens]
    assert result.paths_text[0] == (
        f"layer {step.layer} head {step.head} moved “{tokens[step.key]}” ({step.key}) to "
        f"“{tokens[10]}” (10) (score {best.score_norm:.4g})"
    )
    assert (step.layer, step.head) in result.heads()
    assert result.paths_text[0] in repr(result)


def test_heads_of_a_path_go_into_patch_hooks() -> None:
    model = load_demo_model()
    prompt = "Q: France\nA: Paris\n\nQ: Italy\nA:"
    _, ra = run_with_ra(model, prompt, target=" Rome")
    heads = trace_layers(ra, follow="more").heads(3)
    hooks = ra.mean().patch_hooks(scale=-5.0, heads=heads)
    assert {name for name, _ in hooks} == {
        as_lens(model).sites[layer].pattern_name for layer, _ in heads
    }


TASKS = ("country-capital", "antonym", "present-past", "singular-plural")


def test_masking_the_heads_of_the_best_paths_hurts_more_than_masking_random_heads() -> None:
    """In nats of −log p(answer), on the embedded model; docs/paths.md has the numbers."""
    model = load_demo_model()
    lens = as_lens(model)
    shape = (len(lens.sites), next(iter(lens.sites.values())).n_heads)
    generator = torch.Generator().manual_seed(0)

    def loss(questions: Any, heads_of: list[list[tuple[int, int]]]) -> torch.Tensor:
        keep = torch.ones(len(questions), *shape, dtype=torch.bool)
        for i, heads in enumerate(heads_of):
            for layer, head in heads:
                keep[i, layer, head] = False
        marks = ask(lens, questions, lambda part: mask_hooks(lens.sites, keep[part]))
        return -marks.probability.log()

    def drawn(n: int) -> list[tuple[int, int]]:
        order = torch.randperm(shape[0] * shape[1], generator=generator)[:n]
        return [divmod(int(i), shape[1]) for i in order]

    for n_paths, at_least in ((1, 0.5), (5, 3.0)):
        for task in TASKS:
            prompts = load_task(task).split().prompts("test", shots=2, n=12)
            questions = read_questions(lens, prompts)
            maps = read_maps(model, [prompt.text for prompt in prompts], follow="value_norm")
            heads = [trace_layers(one).heads(n_paths) for one in maps]
            before = loss(questions, [[] for _ in prompts])
            masked = loss(questions, heads) - before
            random = torch.stack(
                [loss(questions, [drawn(len(h)) for h in heads]) - before for _ in range(4)]
            )
            assert float(masked.mean()) > at_least, (task, n_paths)
            assert float(masked.mean()) > 3 * float(random.mean()), (task, n_paths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual": 1.0}, "residual=1.0; give the share of the residual connection"),
        ({"residual": -0.1}, "residual=-0.1"),
        ({"top_beam": 0}, "top_beam=0"),
        ({"target_pos": 9}, "target_pos=9; this prompt has positions 0 to 4"),
        ({"target_pos": 0}, "no path that leaves position 0"),
        ({"layers": [7]}, "layers=[7]"),
        ({"target": "w5"}, "target= with follow='value_norm', which has no loss"),
    ],
)
def test_mistakes_are_named(shared: Any, options: Any, message: str) -> None:
    with pytest.raises(BadInput) as error:
        trace_layers(shared("gpt2", KINDS[0]), "w5 w7 w9 w4", **options)
    assert message in str(error.value)
