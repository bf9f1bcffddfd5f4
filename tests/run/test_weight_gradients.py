"""Gradients of W_Q, W_K, W_V and W_O from the vectors of a run, against those of autograd."""

from __future__ import annotations

import pytest
import torch

from oracle import nll
from ra_lens import rank_heads, run_with_ra, vjp
from ra_lens.errors import BadInput, NotStored
from ra_lens.tasks import Prompt
from tiny_models import (
    CASES,
    D_HEAD,
    D_MODEL,
    KINDS,
    N_HEADS,
    N_LAYERS,
    every_model,
    random_ids,
    relative,
)

POS, TARGETS = 7, [5, 11]
IDS = random_ids(2, POS)
LAYER = 1


def of_autograd(model, example):
    """Autograd's gradient of W_Q, W_K, W_V and W_O of a bridge's or HookedTransformer's layer.

    By head of the model's own, `[head, into, out]`.
    """
    attn = model.blocks[LAYER].attn
    if type(model).__name__ == "HookedTransformer":
        named = dict(attn.named_parameters())
        weights = [named.get(f"_{name}", named.get(name)) for name in vjp.WEIGHTS]
    else:
        linear = [getattr(attn, name).original_component for name in "qkvo"]
        weights = [module.weight for module in linear]
    was = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    with torch.enable_grad():
        total = nll(TARGETS[example])(model(IDS[example : example + 1]))
        found = torch.autograd.grad(total, weights)
    for weight, flag in zip(weights, was, strict=True):
        weight.requires_grad_(flag)
    if type(model).__name__ != "HookedTransformer":
        found = [
            gradient if type(module).__name__ == "Conv1D" else gradient.T
            for gradient, module in zip(found, linear, strict=True)
        ]
        found = [
            g.reshape(-1, D_HEAD, D_MODEL)
            if name == "W_O"
            else g.reshape(D_MODEL, -1, D_HEAD).transpose(0, 1)
            for name, g in zip(vjp.WEIGHTS, found, strict=True)
        ]
    return dict(zip(vjp.WEIGHTS, found, strict=True))


@pytest.mark.parametrize("weight", vjp.WEIGHTS)
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_they_are_those_of_autograd_example_by_example(arch, kind, weight, shared):
    model = shared(arch, kind, torch.float64)
    _, ra = run_with_ra(model, IDS, target=TARGETS, vectors=True, layers=LAYER)
    norms = vjp.weight_norms(ra, weight)
    for example in range(2):
        wanted = of_autograd(model, example)[weight]
        share = N_HEADS // len(wanted)
        for head in range(N_HEADS):
            found = vjp.weight_gradient(ra, weight, (LAYER, head), example=example)
            right = wanted[head // share]
            assert relative(found.matrix, right) < 1e-5
            assert found.norm == pytest.approx(float(right.norm()), rel=1e-5)
            values = torch.linalg.svdvals(right.double())
            k = min(POS, D_HEAD)
            assert torch.allclose(found.singular_values.double()[:k], values[:k], rtol=1e-3)
        assert torch.allclose(norms[example, 0], wanted.flatten(1).norm(dim=1), rtol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_shares_of_tokens_sum_to_one_and_are_those_of_leaving_a_token_out(shared):
    _, ra = run_with_ra(shared(*CASES[0]), IDS, target=TARGETS, vectors=True)
    found = vjp.weight_gradient(ra, "W_V", "L1H2")
    matrix = found.matrix.double()
    by_hand = [
        float((torch.outer(x, d).double() * matrix).sum() / (matrix * matrix).sum())
        for x, d in zip(found.read, found.grad, strict=True)
    ]
    assert found.shares.tolist() == pytest.approx(by_hand, abs=1e-5)
    assert float(found.shares.sum()) == pytest.approx(1, abs=1e-5)
    assert len(found.tokens) == POS
    assert found.tokens == tuple(ra.str_tokens[0])


def test_the_rank_is_the_number_of_independent_tokens():
    generator = torch.Generator().manual_seed(0)
    read, grad = torch.randn(6, 9, generator=generator), torch.randn(6, 4, generator=generator)
    tokens = tuple("abcdef")
    assert vjp.WeightGradient("W_Q", read, grad, tokens).rank == 4  # as wide as a head
    grad[2:] = 0  # two tokens that matter
    assert vjp.WeightGradient("W_Q", read, grad, tokens).rank == 2
    read[1] = -2 * read[0]  # of which one is a multiple of the other
    assert vjp.WeightGradient("W_Q", read, grad, tokens).rank == 1
    nothing = vjp.WeightGradient("W_Q", read, 0 * grad, tokens)
    assert nothing.rank == 0
    assert nothing.norm == 0


def test_padding_has_no_part_in_them(shared):
    model = shared(*CASES[0])
    short = IDS[1, :4].tolist()
    tokens = torch.tensor([IDS[0].tolist(), [0, 0, 0, *short]])
    mask = torch.tensor([[1] * POS, [0, 0, 0, 1, 1, 1, 1]])
    options = {"target": TARGETS, "vectors": True}
    _, both = run_with_ra(model, tokens, attention_mask=mask, **options)
    _, alone = run_with_ra(model, torch.tensor([short]), target=TARGETS[1], vectors=True)
    for weight in vjp.WEIGHTS:
        found = vjp.weight_gradient(both, weight, "L0H1", example=1)
        assert len(found.tokens) == len(found.read) == 4
        assert relative(found.matrix, vjp.weight_gradient(alone, weight, "L0H1").matrix) < 2e-5
        assert torch.allclose(
            vjp.weight_norms(both, weight)[1], vjp.weight_norms(alone, weight)[0], rtol=1e-4
        )


@pytest.mark.parametrize("kind", [KINDS[0], *every_model(*KINDS[1:])])
def test_a_ranking_by_them_is_their_norm_averaged_over_prompts(kind, shared):
    model = shared("llama", kind)
    prompts = [Prompt("w3 w4 w5 w6", " w7"), Prompt("w8 w9 w3", " w4")]
    scores = rank_heads(model, prompts, method="w_norm", answer_in_input=False, progress=False)
    wanted = torch.zeros(N_LAYERS, N_HEADS, dtype=torch.float64)
    for prompt in prompts:
        _, ra = run_with_ra(model, prompt.text, target=prompt.answer, vectors=True)
        for layer in range(N_LAYERS):
            for head in range(N_HEADS):
                parts = [vjp.weight_gradient(ra, w, (layer, head)).norm for w in vjp.WEIGHTS]
                wanted[layer, head] += sum(part**2 for part in parts) ** 0.5 / 2
    assert torch.allclose(scores.scores, wanted, rtol=1e-4)


def test_what_is_missing_is_said(shared, request):
    model = shared(*CASES[0])
    _, without = run_with_ra(model, IDS, target=TARGETS)
    with pytest.raises(NotStored, match="vectors=True"):
        vjp.weight_gradient(without, "W_Q", "L1H2")
    _, ra = run_with_ra(model, IDS, target=TARGETS, vectors=True)
    if not request.config.getoption("--check-shapes"):  # which refuses it first
        with pytest.raises(BadInput, match="weight='W_X'"):
            vjp.weight_norms(ra, "W_X")
    with pytest.raises(BadInput, match=r"layer=1, head=9"):
        vjp.weight_gradient(ra, "W_Q", "L1H9")
    with pytest.raises(BadInput, match="example=4"):
        vjp.weight_gradient(ra, "W_Q", "L1H2", example=4)
