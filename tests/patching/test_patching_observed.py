"""Where the model only shows its pattern: the addition through z, and when it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from oracle import nll
from patches import IDS, POS, TARGET, keeping, logits_with, pattern_of
from ra_lens import patch_hooks, run_with_ra
from ra_lens.errors import UnsupportedModel
from ra_lens.patching.masking import mask_hooks
from tiny_models import CASES, N_HEADS, N_LAYERS, OBSERVE_ONLY, relative

SCALE = -30.0
OBSERVED = sorted(OBSERVE_ONLY & set(CASES))
pytestmark = pytest.mark.skipif(not OBSERVED, reason="no TransformerBridge here")

V, Z = "blocks.1.attn.hook_v", "blocks.1.attn.hook_z"


def patch_of(model):
    _, ra = run_with_ra(model, IDS, target=TARGET)
    maps = ra.mean()
    deltas = {i: SCALE * maps["ra", i].double() for i in range(N_LAYERS)}
    return maps.patch_hooks(scale=SCALE), deltas, ra


@pytest.fixture(params=OBSERVED, ids="-".join)
def case(request):
    """Architecture and class."""
    return request.param


@pytest.fixture
def model(case, shared):
    return shared(*case)


@pytest.fixture
def oracle(case, reference):
    return reference(case[0])


def test_the_gradient_of_the_patched_model_is_hugging_faces(model, oracle):
    hooks, deltas, ra = patch_of(model)
    gradients, _ = oracle.score_gradients(IDS, nll(*[TARGET] * 3), deltas)
    _, patched = run_with_ra(model, IDS, target=TARGET, fwd_hooks=hooks)
    for layer in range(N_LAYERS):
        wanted = ra.scale[layer] * gradients[layer]
        assert relative(patched["ra", layer], wanted) < 1e-4
        assert relative(ra["ra", layer], wanted) > 1e-2


def test_two_patches_add_up(model, oracle):
    hooks, deltas, ra = patch_of(model)
    more = ra.mean().patch_hooks(scale=0.7, kind="pattern", heads=[(1, 2), (2, 0)])
    for layer, head in ((1, 2), (2, 0)):
        deltas[layer][head] += 0.7 * ra.mean()["pattern", layer][head]
    wanted = oracle.logits(IDS, pattern_deltas=deltas)
    for both in ([*hooks, *more], [*more, *hooks]):
        assert relative(logits_with(model, both), wanted) < 1e-4
    with model.hooks(fwd_hooks=hooks):
        assert relative(logits_with(model, more), wanted) < 1e-4
    # The same hooks twice are two patches as well.
    twice = {i: 2 * delta for i, delta in patch_of(model)[1].items()}
    wanted = oracle.logits(IDS, pattern_deltas=twice)
    assert relative(logits_with(model, [*hooks, *hooks]), wanted) < 1e-4


def test_hooks_on_z_that_come_after_see_the_patched_z(model, reference):
    hooks, deltas, ra = patch_of(model)
    seen = {}

    def halve(z, hook):
        return 0.5 * z

    def halve_in_place(z, hook):
        z.mul_(0.5)

    look = keeping(Z, seen)
    logits_with(model, [look])
    plain = seen[Z]
    wanted = logits_with(model, [*hooks, look, (Z, halve)])
    again = logits_with(model, [*hooks, (Z, halve_in_place)])
    assert relative(again, wanted) < 1e-6
    # By hand, with the rest of the model unpatched: z + D V.
    one = patch_hooks({1: ra.mean()["ra", 1]}, ra.sites, scale=SCALE)
    logits_with(model, [keeping(V, seen), *one, look])
    for head in range(N_HEADS):
        by_hand = plain[:, :, head] + deltas[1][head].float() @ seen[V][:, :, head]
        assert relative(seen[Z][:, :, head], by_hand) < 1e-5
    # Masked after the patch, the heads say nothing.
    keep = torch.ones(N_LAYERS, N_HEADS, dtype=torch.bool)
    keep[1] = False
    masked = mask_hooks(ra.sites, keep)
    assert torch.equal(logits_with(model, [*one, *masked]), logits_with(model, masked))


def test_values_edited_before_the_patch_or_in_place_are_the_values(model):
    hooks, _, ra = patch_of(model)

    def shift(v, hook):
        return v + 0.5

    def shift_in_place(v, hook):
        v.add_(0.5)

    # Rows of R sum to 0, so a constant added to all values adds nothing more than it does alone.
    wanted = logits_with(model, [(V, shift), *hooks])
    assert relative(logits_with(model, [*hooks, (V, shift_in_place)]), wanted) < 1e-6

    def first_only(v, hook):
        return v * torch.eye(POS)[0][None, :, None, None]

    one = patch_hooks({1: ra.mean()["ra", 1]}, ra.sites, scale=SCALE)
    seen = {}
    look = keeping(Z, seen)
    logits_with(model, [(V, first_only), look])
    before = seen[Z]
    logits_with(model, [(V, first_only), *one, look])
    logits_with(model, [keeping(V, seen)])
    for head in range(N_HEADS):
        column = SCALE * ra.mean()["ra", 1][head][:, 0]
        by_hand = before[:, :, head] + column[None, :, None] * seen[V][:, :1, head]
        assert relative(seen[Z][:, :, head], by_hand) < 1e-5


def gate(z, hook):
    return z * 0.5


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(lambda hooks: [(Z, gate), *hooks], id="z edited first"),
        pytest.param(lambda hooks: [*hooks, (V, lambda v, hook: 0.5 * v)], id="values edited last"),
        pytest.param(lambda hooks: [(Z, lambda z, hook: z * float("nan")), *hooks], id="nan"),
    ],
)
def test_z_that_is_not_pattern_times_values_is_refused(model, before):
    hooks, _, _ = patch_of(model)
    needed = (
        r"layer 1 is observe-only.*pattern times values differs from z by .*gates or normalises"
        r".*put the patch before hooks that edit z, and after hooks that edit v"
    )
    plain = logits_with(model, [])
    with pytest.raises(UnsupportedModel, match=needed):
        logits_with(model, before(hooks))
    # Nothing of the pass that failed is left in the next.
    assert torch.equal(logits_with(model, []), plain)
    wanted = logits_with(model, patch_of(model)[0])
    assert torch.equal(logits_with(model, hooks), wanted)


def test_a_head_with_a_gate_of_its_own_is_found(model):
    # One head of one layer scaled by 1.02: less than a percent of z as a whole.
    hooks, _, _ = patch_of(model)
    factor = torch.ones(N_HEADS).index_fill(0, torch.tensor([2]), 1.02)[:, None]
    with pytest.raises(UnsupportedModel, match=r"layer 1 .*differs from z by (1\.9|2\.0)%"):
        logits_with(model, [(Z, lambda z, hook: z * factor), *hooks])


def test_values_and_z_that_never_fire_are_missed(model):
    hooks, _, _ = patch_of(model)
    silent = [(name, hook) for name, hook in hooks if not name.endswith(("hook_v", "hook_z"))]
    with pytest.raises(UnsupportedModel, match=r"hook_v and hook_z did not fire.*HookedTransfor"):
        logits_with(model, silent)


def test_an_unchecked_addition_is_refused(case, fresh, shared):
    # Fused attention gives no pattern to check with.
    hooks, _, _ = patch_of(shared(*case))
    model = fresh(*case)
    model.original_model.config._attn_implementation = "sdpa"
    shown = {}
    logits_with(model, [keeping(pattern_of(0), shown)])
    if shown:
        pytest.skip("this architecture shows its pattern all the same")
    with pytest.raises(UnsupportedModel, match=r"layer 0 did not fire.*implementation='eager'"):
        logits_with(model, hooks)


def test_a_compatible_bridge_adds_once(oracle, case, fresh):
    # There a hook fires once for each name of its hook point.
    model = fresh(*case)
    model.enable_compatibility_mode(disable_warnings=True)
    hooks, deltas, _ = patch_of(model)
    wanted = oracle.logits(IDS, pattern_deltas=deltas)
    found = logits_with(model, hooks).log_softmax(-1)
    assert relative(found, wanted.log_softmax(-1)) < 1e-4


def test_nothing_is_left_on_the_model(model):
    hooks, _, _ = patch_of(model)

    def stop(residual, hook):
        raise KeyboardInterrupt

    def attached():
        return {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}

    plain, before = logits_with(model, []), attached()
    logits_with(model, hooks)
    with pytest.raises(KeyboardInterrupt):
        logits_with(model, [*hooks, ("blocks.1.hook_out", stop)])
    assert attached() == before
    assert not any(point.ctx for point in model.hook_dict.values())
    assert torch.equal(logits_with(model, []), plain)


def test_a_pass_that_failed_between_z_and_the_pattern_is_forgotten(model, oracle):
    hooks, deltas, _ = patch_of(model)

    def stop(z, hook):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            logits_with(model, [*hooks, *hooks, (Z, stop)])
    wanted = oracle.logits(IDS, pattern_deltas={i: 2 * d for i, d in deltas.items()})
    assert relative(logits_with(model, [*hooks, *hooks]), wanted) < 1e-4


def test_grouped_queries_share_their_values(shared):
    # No tiny model has both an observed pattern and grouped queries; the pattern of this one is
    # used, so it tells what the addition through z has to give.
    model = shared("llama", "TransformerBridge")
    _, ra = run_with_ra(model, IDS, target=TARGET)
    observed = {i: replace(site, observe_only=True) for i, site in ra.sites.items()}
    assert observed[0].n_key_value_heads < observed[0].n_heads
    maps = {i: ra["ra", i] for i in range(N_LAYERS)}
    wanted = logits_with(model, patch_hooks(maps, ra.sites, scale=SCALE))
    hooks = {
        layer: dict(patch_hooks({layer: maps[layer]}, observed, scale=SCALE)) for layer in maps
    }
    # Here the pattern comes before z; show it afterwards.
    kept = {}
    reordered = []
    for layer, by_name in hooks.items():
        site = observed[layer]

        def keep(pattern, hook, layer=layer):
            kept[layer] = pattern

        def check(residual, hook, layer=layer, by_name=by_name, site=site):
            by_name[site.pattern_name](kept[layer], hook)

        reordered += [
            (site.pattern_name, keep),
            (site.value_name, by_name[site.value_name]),
            (site.z_name, by_name[site.z_name]),
            (site.block_output_name, check),
        ]
    assert relative(logits_with(model, reordered), wanted) < 1e-5
