"""R against autograd and finite differences of a separate float64 Hugging Face model."""

from __future__ import annotations

import math

import pytest
import torch

from oracle import nll
from ra_lens import run_with_ra
from tiny_models import CASES, D_HEAD, KINDS, N_HEADS, N_LAYERS, every_model, random_ids, relative

SCALE = 1 / math.sqrt(D_HEAD)
POS = 7


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_float32_maps_equal_float64_autograd_at_the_softmax_input(arch, kind, fresh, reference):
    ids, targets = random_ids(2, POS), [5, 11]
    gradients, patterns = reference(arch).score_gradients(ids, nll(*targets))
    model = fresh(arch, kind)
    # The second run knows whether hook_pattern is in the path, and starts its graph elsewhere.
    for _ in range(2):
        _, ra = run_with_ra(model, ids, target=targets)
        for layer in range(N_LAYERS):
            assert ra["ra", layer].dtype == torch.float32
            assert relative(ra["ra", layer], SCALE * gradients[layer]) < 1e-5
            assert relative(ra["pattern", layer], patterns[layer]) < 1e-5
            assert ra.scale[layer] == pytest.approx(SCALE, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *every_model(torch.float64)])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_model_read_for_the_first_time_gives_the_same_maps_to_the_bit(arch, kind, dtype, fresh):
    model = fresh(arch, kind, dtype)
    (_, first), (_, second) = (run_with_ra(model, random_ids(2, POS), target=5) for _ in range(2))
    for layer in range(N_LAYERS):
        for name in ("ra", "pattern", "pattern_grad"):
            assert torch.equal(first[name, layer], second[name, layer])


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_pattern_gradients_give_the_change_of_loss_when_the_pattern_moves(
    arch, kind, shared, reference
):
    # dL = G · dA, and dA = J dS: A ⊙ (G − rowsum(A ⊙ G)) is dL/dS whatever constant a row of G has.
    ids, targets = random_ids(2, POS), [5, 11]
    gradients, _ = reference(arch).score_gradients(ids, nll(*targets))
    _, ra = run_with_ra(shared(arch, kind), ids, target=targets)
    for layer in range(N_LAYERS):
        a, g = ra["pattern", layer].double(), ra["pattern_grad", layer].double()
        through_softmax = a * g - a * (a * g).sum(-1, keepdim=True)
        assert relative(through_softmax, gradients[layer]) < 1e-5


@pytest.mark.parametrize(("arch", "kind"), CASES)
@pytest.mark.parametrize("layer", [0, *every_model(*range(1, N_LAYERS))])
def test_float64_maps_equal_central_differences_of_the_loss(arch, kind, layer, shared, reference):
    pos, target = 5, 8
    ids = random_ids(1, pos, seed=3)

    def loss(logits):
        return -logits[:, -1].log_softmax(-1)[:, target]

    _, ra = run_with_ra(shared(arch, kind, torch.float64), ids, target=target)
    found = ra["ra", layer][0] / ra.scale[layer]
    assert found.dtype == torch.float64
    # Every entry below the diagonal, each its own perturbation.
    entries = [(h, q, k) for h in range(N_HEADS) for q in range(pos) for k in range(q + 1)]
    directions = torch.zeros(len(entries) + 1, N_HEADS, pos, pos, dtype=torch.float64)
    for n, (h, q, k) in enumerate(entries):
        directions[n, h, q, k] = 1.0
    generator = torch.Generator().manual_seed(layer)
    directions[-1] = torch.randn(N_HEADS, pos, pos, dtype=torch.float64, generator=generator)
    directions[-1] = directions[-1].tril()
    wanted = reference(arch).finite_differences(ids, loss, layer, directions)
    by_entry = torch.stack([found[entry] for entry in entries])
    # Hugging Face's Llama and GPT-J compute norms, scores or softmax in float32 whatever the dtype.
    in_float32 = arch in ("llama", "gptj") and kind == "TransformerBridge"
    tolerance = 1e-5 if in_float32 else 1e-6
    assert relative(by_entry, wanted[:-1]) < tolerance
    along = (found * directions[-1]).sum()
    assert abs(along - wanted[-1]) < tolerance * found.norm() * directions[-1].norm()


@pytest.mark.parametrize("kind", KINDS)
def test_scale_by_inverse_layer_is_the_models_own(kind, fresh, reference):
    ids, target = random_ids(2, POS, seed=1), [9, 4]
    option = {"scale_attn_by_inverse_layer_idx": True}
    model = fresh("gpt2", kind, **option)
    scales = [SCALE / (layer + 1) for layer in range(N_LAYERS)]
    wanted = reference("gpt2", **option).ra(ids, nll(*target), scales)
    _, ra = run_with_ra(model, ids, target=target)
    for layer in range(N_LAYERS):
        assert ra.scale[layer] == pytest.approx(scales[layer], rel=1e-6)
        assert relative(ra["ra", layer], wanted[layer]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["gpt2", "opt"])  # the others rotate q and k after their hooks
def test_scale_is_the_factor_between_products_and_scores(arch, kind, shared):
    model, ids = shared(arch, kind), random_ids(1, POS, seed=4)
    _, cache = model.run_with_cache(ids)
    _, ra = run_with_ra(model, ids, target=3)
    for layer in range(N_LAYERS):
        q, k = cache["q", layer][0], cache["k", layer][0]
        q, k = q.reshape(POS, N_HEADS, D_HEAD), k.reshape(POS, N_HEADS, D_HEAD)
        products = torch.einsum("qhd,khd->hqk", q, k)
        scores = ra["pattern", layer][0].log()
        lower = torch.ones(POS, POS).tril().bool()
        # log A = S − log Z(row): compare differences within a row, against its first column.
        ours = ra.scale[layer] * (products - products[..., :1])
        theirs = scores - scores[..., :1]
        assert relative(ours[:, lower], theirs[:, lower]) < 1e-4


@pytest.mark.every_model
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_bfloat16_model_gives_float32_maps_close_to_those_of_float32(arch, kind, shared, fresh):
    ids, target = random_ids(2, POS), [5, 11]
    _, exact = run_with_ra(shared(arch, kind), ids, target=target)
    _, ra = run_with_ra(fresh(arch, kind, torch.bfloat16), ids, target=target)
    for layer in range(N_LAYERS):
        assert ra["ra", layer].dtype == torch.float32
        assert 0 < relative(ra["ra", layer], exact["ra", layer]) < 0.25
    # In float32 the identities hold to float32's precision, not bfloat16's.
    rows = ra["ra", 0].sum(-1).abs().max()
    assert rows < 0.02 * ra["ra", 0].abs().max()


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_logits_are_the_models_own(arch, kind, shared, reference):
    model, ids = shared(arch, kind), random_ids(3, POS, seed=5)
    with torch.no_grad():
        own = model(ids)
    last, _ = run_with_ra(model, ids, target=6)
    every, _ = run_with_ra(model, ids, target=6, return_logits="all")
    assert not last.requires_grad
    torch.testing.assert_close(last[:, -1], own[:, -1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(every, own, rtol=1e-5, atol=1e-5)
    assert relative(every, reference(arch).logits(ids)) < 1e-5
