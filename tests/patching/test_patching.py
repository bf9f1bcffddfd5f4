"""Adding maps to the pattern: exactly what is said, checked by doing it by hand."""

from __future__ import annotations

import math

import pytest
import torch

from patches import IDS, POS, TARGET, adding, keeping, logits_with, pattern_of
from ra_lens import patch_hooks, run_with_ra
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.model import Site
from tiny_models import (
    CASES,
    EDITABLE,
    KINDS,
    N_HEADS,
    N_LAYERS,
    OBSERVE_ONLY,
    relative,
)

IDS_TOY = torch.tensor([[0, 1]])


@pytest.mark.parametrize(("arch", "kind"), EDITABLE)
def test_rows_stay_sums_of_one_with_ra_and_become_two_with_the_pattern(arch, kind, shared):
    model = shared(arch, kind)
    _, ra = run_with_ra(model, IDS, target=TARGET)
    for what, scale, total in (("ra", -30.0, 1.0), ("pattern", 1.0, 2.0)):
        seen = {}
        look = [keeping(pattern_of(i), seen) for i in range(N_LAYERS)]
        logits_with(model, [*ra.mean().patch_hooks(scale=scale, kind=what), *look])
        assert len(seen) == N_LAYERS
        for sums in (pattern.sum(-1) for pattern in seen.values()):
            torch.testing.assert_close(sums, torch.full_like(sums, total), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_the_loss_moves_as_the_gradient_at_the_pattern_predicts(arch, kind, shared):
    # new − old = scale · Σ G ⊙ R + O(scale²), layer by layer and head by head.
    model, ids = shared(arch, kind, torch.float64), IDS[:1]
    _, ra = run_with_ra(model, ids, target=TARGET)

    def loss(layer, scale):
        maps = {layer: ra["ra", layer][0]}
        hooks = patch_hooks(maps, ra.sites, scale=scale)
        return -logits_with(model, hooks, ids)[0, -1].log_softmax(-1)[TARGET]

    for layer in range(N_LAYERS):
        size = 1e-3 / float(ra["ra", layer].abs().max())
        found = (loss(layer, size) - loss(layer, -size)) / (2 * size)
        wanted = (ra["pattern_grad", layer] * ra["ra", layer]).sum()
        assert float(found) == pytest.approx(float(wanted), rel=1e-4)
        # Σ G ⊙ R = scale · Σ A (G − rowsum(A ⊙ G))² ≥ 0: a negative factor is a descent step.
        assert wanted > 0
        assert loss(layer, -size) < loss(layer, 0.0) < loss(layer, size)


@pytest.mark.parametrize("kind", KINDS)
def test_patches_compose_with_other_hooks_in_their_order(kind, shared):
    model = shared("gpt2", kind)
    _, ra = run_with_ra(model, IDS, target=TARGET)
    one = patch_hooks({1: ra["ra", 1].mean(0)}, ra.sites, scale=-10.0)
    half = [(pattern_of(1), lambda p, hook: 0.5 * p)]
    value = -10 * ra["ra", 1].mean(0)
    first = logits_with(model, [(pattern_of(1), lambda p, hook: 0.5 * (p + value))])
    last = logits_with(model, [(pattern_of(1), lambda p, hook: 0.5 * p + value)])
    assert relative(logits_with(model, [*one, *half]), first) < 1e-5
    assert relative(logits_with(model, [*half, *one]), last) < 1e-5
    assert relative(first, last) > 1e-4
    # And run_with_ra gives the gradient of the patched model.
    _, twice = run_with_ra(model, IDS, target=TARGET, fwd_hooks=one)
    by_hand = [(pattern_of(1), adding(value))]
    _, wanted = run_with_ra(model, IDS, target=TARGET, fwd_hooks=by_hand)
    assert relative(twice.stack(), wanted.stack()) < 1e-5


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_patched_model_does_not_look_ahead(arch, kind, shared):
    """Maps with numbers above the diagonal, as no run makes them."""
    model = shared(arch, kind)
    _, ra = run_with_ra(model, IDS, target=TARGET)
    full = {layer: torch.full((N_HEADS, POS, POS), 0.1) for layer in range(N_LAYERS)}
    hooks = patch_hooks(full, ra.sites, scale=1.0)
    other = IDS.clone()
    other[:, -1] = IDS[:, 0]
    found, changed = logits_with(model, hooks), logits_with(model, hooks, other)
    assert relative(changed[:, :-1], found[:, :-1]) < 1e-6
    assert relative(found[:, :-1], logits_with(model, [])[:, :-1]) > 1e-2


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_maps_of_each_example_patch_that_example(arch, kind, shared):
    model = shared(arch, kind)
    _, ra = run_with_ra(model, IDS, target=TARGET)
    maps = {i: ra["ra", i] for i in range(N_LAYERS)}
    together = logits_with(model, patch_hooks(maps, ra.sites, scale=-20.0))
    for i in range(3):
        own = {layer: value[i] for layer, value in maps.items()}
        alone = logits_with(model, patch_hooks(own, ra.sites, scale=-20.0), IDS[i : i + 1])
        assert relative(together[i], alone[0]) < 1e-4


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_prompt_of_another_length_is_refused(arch, kind, shared):
    model = shared(arch, kind)
    _, ra = run_with_ra(model, IDS, target=TARGET)
    hooks = ra.mean().patch_hooks(scale=-30.0)
    needed = (
        r"found 5 tokens at layer 0, but the map to add has 6, and align='exact' needs both equal. "
        r"Use prompts of the length.*align='left'.*align='right'"
    )
    with pytest.raises(BadInput, match=needed):
        logits_with(model, hooks, IDS[:, :5])
    assert relative(logits_with(model, []), model(IDS).detach()) < 1e-6


@pytest.mark.parametrize(("what", "scale"), [("ra", -30.0), ("pattern", 1.0), ("ra", 0.5)])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_patching_is_adding_scale_times_the_mean_map_to_hugging_faces_softmax_output(
    arch, kind, what, scale, shared, reference
):
    model = shared(arch, kind)
    _, ra = run_with_ra(model, IDS, target=TARGET)
    deltas = {i: scale * ra[what, i].double().mean(0) for i in range(N_LAYERS)}
    wanted = reference(arch).logits(IDS, pattern_deltas=deltas)
    plain = logits_with(model, [])
    assert relative(plain, wanted) > 1e-3
    hooks = ra.mean().patch_hooks(scale=scale, kind=what)
    assert relative(logits_with(model, hooks), wanted) < 1e-5
    with torch.no_grad():
        assert relative(model.run_with_hooks(IDS, fwd_hooks=hooks), wanted) < 1e-5
    assert torch.equal(logits_with(model, []), plain)


@pytest.mark.parametrize(("arch", "kind"), EDITABLE)
def test_adding_to_the_scores_is_adding_to_the_softmax_input_in_hugging_face(
    arch, kind, shared, reference
):
    model = shared(arch, kind)
    _, ra = run_with_ra(model, IDS, target=TARGET)
    # Large steps: e^200 would overflow if exponentials were taken as they are.
    for scale in (-30.0, 200 / float(ra.stack().abs().max())):
        deltas = {i: scale * ra["ra", i].double().mean(0) for i in range(N_LAYERS)}
        wanted = reference(arch).logits(IDS, deltas)
        found = logits_with(model, ra.mean().patch_hooks(scale=scale, at="scores"))
        assert relative(found, wanted) < 1e-4
        assert relative(logits_with(model, []), wanted) > 1e-2


@pytest.mark.every_model
@pytest.mark.parametrize("options", [{}, {"renormalise": True}, {"at": "scores"}])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_bfloat16_models_are_patched(arch, kind, options, shared):
    if options and (arch, kind) in OBSERVE_ONLY:
        pytest.skip("refused on observed patterns, which another test shows")
    model, wide = shared(arch, kind, torch.bfloat16), shared(arch, kind)
    _, ra = run_with_ra(wide, IDS, target=TARGET)
    hooks = ra.mean().patch_hooks(scale=-10.0, **options)
    wanted = logits_with(wide, hooks)
    found = logits_with(model, hooks)
    assert relative(found, wanted) < 0.2
    assert relative(found, wanted) < 0.5 * relative(logits_with(wide, []), wanted)


def test_it_must_be_known_whether_an_edit_changes_anything():
    bridges = [case for case in CASES if case[1] == "TransformerBridge"]
    if not bridges:
        pytest.skip("HookedTransformer always goes on with the pattern hooked")
    sites = {0: Site(0, "blocks.0.attn", N_HEADS, N_HEADS, 1.0, observe_only=None)}
    zeros = {0: torch.zeros(N_HEADS, POS, POS)}
    with pytest.raises(UnsupportedModel, match=r"not known whether.*layers \[0\].*run_with_ra"):
        patch_hooks(zeros, sites, scale=1.0)


@pytest.fixture
def toy():
    """One attention layer, one head, two tokens; every number below is worked by hand.

    Embeddings e0 = (1,0,0,0), e1 = (0,3,0,0); W_K = W_V = W_O = 1; W_Q takes e1 to (2 ln 3, 0,0,0)
    and e0 to 0; logit 0 reads u = (2,1,0,0) from the residual stream; softmax scale 1/√4 = 1/2.
    """
    if "HookedTransformer" not in KINDS:
        pytest.skip("TransformerBridge has no model without norms and MLPs to set by hand")
    import transformer_lens

    cfg = transformer_lens.HookedTransformerConfig(
        n_layers=1,
        d_model=4,
        d_head=4,
        n_heads=1,
        n_ctx=2,
        d_vocab=3,
        attn_only=True,
        normalization_type=None,
        device="cpu",
    )
    model = transformer_lens.HookedTransformer(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        attn, one = model.blocks[0].attn, torch.eye(4)
        model.embed.W_E[0, 0], model.embed.W_E[1, 1] = 1.0, 3.0
        attn.W_K[0], attn.W_V[0], attn.W_O[0] = one, one, one
        attn.W_Q[0, 1, 0] = 2 * math.log(3) / 3
        model.unembed.W_U[:, 0] = torch.tensor([2.0, 1.0, 0.0, 0.0])
    return model


def test_a_toy_on_paper(toy):
    # Row 1: products q·k = (2 ln 3, 0), scores (ln 3, 0), A = (3/4, 1/4).
    # logit 0 = u·(e1 + A e) = 3 + 3/4·2 + 1/4·3 = 21/4.
    # G = (u·e0, u·e1) = (2, 3); A·G = 9/4; R~ = (3/4·(−1/4), 1/4·(3/4)) = (−3/16, 3/16).
    # R = R~/2 = (−3/32, 3/32). Row 0 is not read.
    logits, ra = run_with_ra(toy, torch.tensor([[0, 1]]), metric=lambda logits: logits[:, -1, 0])
    expected = {
        "pattern": [[1.0, 0.0], [0.75, 0.25]],
        "pattern_grad": [[0.0, 0.0], [2.0, 3.0]],
        "ra": [[0.0, 0.0], [-3 / 32, 3 / 32]],
    }
    for kind, values in expected.items():
        torch.testing.assert_close(ra[kind, 0][0, 0], torch.tensor(values))
    assert float(logits[0, -1, 0]) == pytest.approx(21 / 4)
    assert float(ra.loss[0]) == pytest.approx(21 / 4)
    assert ra.scale == {0: 0.5}
    assert float(ra.norms()[0, 0, 0]) == pytest.approx(math.sqrt(2) * 3 / 32)
    # With scale −8/3: A' = (3/4 + 1/4, 1/4 − 1/4) = (1, 0), so logit 0 = 3 + 2 = 5 < 21/4.
    hooks = ra.mean().patch_hooks(scale=-8 / 3)
    patched = toy.run_with_hooks(torch.tensor([[0, 1]]), fwd_hooks=hooks)
    assert float(patched[0, -1, 0].detach()) == pytest.approx(5.0)


def test_variants_on_paper(toy):
    # A = (3/4, 1/4), R = (−3/32, 3/32); logit 0 = 3 + 2 A'_0 + 3 A'_1. Row 0 of R is 0.
    _, ra = run_with_ra(toy, IDS_TOY, metric=lambda logits: logits[:, -1, 0])
    mean = ra.mean()

    def logit(**options):
        hooks = mean.patch_hooks(**options)
        return float(toy.run_with_hooks(IDS_TOY, fwd_hooks=hooks)[0, -1, 0].detach())

    # −8: D = (3/4, −3/4), A + D = (3/2, −1/2): logit 3 + 3 − 3/2 = 9/2;
    # renormalised (3/2, 0) / (3/2) = (1, 0): logit 5.
    assert logit(scale=-8.0) == pytest.approx(9 / 2)
    assert logit(scale=-8.0, renormalise=True) == pytest.approx(5.0)
    # +1 · A: A + A = (3/2, 1/2), logit 3 + 3 + 3/2 = 15/2; renormalised it is A again: 21/4.
    assert logit(scale=1.0, kind="pattern") == pytest.approx(15 / 2)
    assert logit(scale=1.0, kind="pattern", renormalise=True) == pytest.approx(21 / 4)
    # At the scores with D = (ln 2/2, −ln 2/2): odds 3 · 2 = 6, A' = (6/7, 1/7), logit 36/7.
    step = -math.log(2) * 16 / 3
    assert logit(scale=step, at="scores") == pytest.approx(3 + 15 / 7)
    # Only row 1 is read; row 0 has nothing to add.
    assert logit(scale=-8.0, rows=1) == pytest.approx(9 / 2)
    assert logit(scale=-8.0, rows=[-1]) == pytest.approx(9 / 2)
    assert logit(scale=-8.0, rows=slice(0, 1)) == pytest.approx(21 / 4)
    assert logit(scale=1.0, kind="pattern", rows=0) == pytest.approx(21 / 4)
    assert logit(scale=-8.0, heads=["L0H0"]) == pytest.approx(9 / 2)


def test_alignment_on_paper(toy):
    # Maps of one token are [[x]]; with A = (3/4, 1/4) at row 1, x = 1 goes to (0, 0) with "left",
    # which is not read, and to (1, 1) with "right": A' = (3/4, 5/4), logit 3 + 3/2 + 15/4.
    _, ra = run_with_ra(toy, IDS_TOY, metric=lambda logits: logits[:, -1, 0])
    ones = {0: torch.ones(1, 1, 1)}
    for align, wanted in (("left", 21 / 4), ("right", 33 / 4)):
        hooks = patch_hooks(ones, ra.sites, scale=1.0, align=align)
        found = toy.run_with_hooks(IDS_TOY, fwd_hooks=hooks)[0, -1, 0]
        assert float(found.detach()) == pytest.approx(wanted)


def test_the_toy_with_a_probability(toy):
    # L = −log p(0) with logits (21/4, 0, 0): dL/dlogit0 = p − 1, so R is (p − 1) times the above.
    _, ra = run_with_ra(toy, torch.tensor([[0, 1]]), target=0)
    p = math.exp(21 / 4) / (math.exp(21 / 4) + 2)
    wanted = torch.tensor([[0.0, 0.0], [-3 / 32, 3 / 32]]) * (p - 1)
    torch.testing.assert_close(ra["ra", 0][0, 0], wanted, rtol=1e-4, atol=1e-7)
    assert float(ra.loss[0]) == pytest.approx(-math.log(p), rel=1e-4)
