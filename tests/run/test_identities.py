"""Sums and zeros that hold for every Reversed Attention, and the formula against autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra_lens import run_with_ra
from ra_lens.collect import reversed_attention
from tiny_models import CASES, D_HEAD, N_HEADS, N_LAYERS, random_ids, relative

POS, TARGET = 7, 8
IDS = random_ids(2, POS)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_rows_sum_to_zero_and_what_the_mask_hides_is_zero(arch, kind, shared):
    _, ra = run_with_ra(shared(arch, kind), IDS, target=TARGET)
    r, a = ra.stack(), ra.stack("pattern")
    assert r.shape == (N_LAYERS, 2, N_HEADS, POS, POS)
    size = r.abs().max()
    assert r.sum(-1).abs().max() < 1e-6 * size
    above = torch.ones(POS, POS).triu(1).bool()
    assert r[..., above].abs().max() == 0
    assert r[a == 0].abs().max() == 0
    assert r[..., 0, :].abs().max() < 1e-7 * size  # the first token sees only itself
    assert r[-1, :, :, :-1].abs().max() == 0  # last layer: only the last row reaches the loss
    torch.testing.assert_close(a.sum(-1), torch.ones_like(a.sum(-1)))


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_pattern_times_its_gradient_splits_into_ra_and_what_each_query_gets(arch, kind, fresh):
    # A ⊙ G = R / scale + A ⊙ (z · dL/dz): rowsum(A ⊙ G) = z · dL/dz, as z = A V and G = dL/dz Vᵀ.
    model = fresh(arch, kind)
    kept = {}

    def keep(layer):
        def hook(z, hook):
            shift = torch.zeros_like(z).requires_grad_()
            kept[layer] = z.detach(), shift
            return z + shift

        return hook

    with model.hooks(fwd_hooks=[(f"blocks.{i}.attn.hook_z", keep(i)) for i in range(N_LAYERS)]):
        loss = -model(IDS)[:, -1].log_softmax(-1)[:, TARGET].sum()
        z = [kept[i][0] for i in range(N_LAYERS)]
        dz = torch.autograd.grad(loss, [kept[i][1] for i in range(N_LAYERS)])
    _, ra = run_with_ra(model, IDS, target=TARGET)
    for layer in range(N_LAYERS):
        shape = (2, POS, N_HEADS, D_HEAD)
        dot = (z[layer].reshape(shape) * dz[layer].reshape(shape)).sum(-1).transpose(1, 2)
        a, g = ra["pattern", layer], ra["pattern_grad", layer]
        wanted = ra["ra", layer] / ra.scale[layer] + a * dot.unsqueeze(-1)
        assert relative(a * g, wanted) < 1e-5


def pattern_and_gradient(seed, batch, heads, pos, masked, sharpness):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, pos, pos)
    scores = sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    if masked:
        scores = scores.masked_fill(torch.ones(pos, pos).triu(1).bool(), -torch.inf)
    return scores, gradient


case = {
    "seed": st.integers(0, 10_000),
    "batch": st.integers(1, 3),
    "heads": st.integers(1, 4),
    "pos": st.integers(1, 8),
    "masked": st.booleans(),
    "sharpness": st.sampled_from([0.1, 1.0, 5.0]),
}


@settings(max_examples=40, deadline=None)
@given(scale=st.floats(0.01, 3.0), **case)
def test_the_formula_is_the_derivative_of_softmax(scale, **options):
    products, gradient = pattern_and_gradient(**options)
    products.requires_grad_()
    pattern = (scale * products).softmax(-1)  # −inf stays −inf
    (pattern * gradient).sum().backward()
    wanted = products.grad.nan_to_num(0.0)
    found = reversed_attention(pattern.detach(), gradient, scale)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(**case)
def test_a_constant_added_to_a_row_of_the_gradient_changes_nothing(**options):
    scores, gradient = pattern_and_gradient(**options)
    pattern = scores.softmax(-1)
    found = reversed_attention(pattern, gradient, 1.0)
    shifted = reversed_attention(pattern, gradient + torch.randn((*gradient.shape[:-1], 1)), 1.0)
    torch.testing.assert_close(found, shifted, rtol=1e-8, atol=1e-10)
    assert found.sum(-1).abs().max() < 1e-12
    assert bool((found[pattern == 0] == 0).all())


def test_the_arguments_of_the_formula_are_left_alone():
    scores, gradient = pattern_and_gradient(0, 2, 3, 4, True, 1.0)
    pattern = scores.softmax(-1)
    before = pattern.clone(), gradient.clone()
    reversed_attention(pattern, gradient, 0.5)
    assert torch.equal(pattern, before[0])
    assert torch.equal(gradient, before[1])


def test_the_formula_on_paper():
    # A = (1/4, 3/4), G = (4, 0): A·G = 1, so R~ = (1/4 · (4 − 1), 3/4 · (0 − 1)) = (3/4, −3/4).
    pattern = torch.tensor([[[[0.25, 0.75]]]])
    gradient = torch.tensor([[[[4.0, 0.0]]]])
    wanted = torch.tensor([[[[0.375, -0.375]]]])  # × scale 1/2
    torch.testing.assert_close(reversed_attention(pattern, gradient, 0.5), wanted)
