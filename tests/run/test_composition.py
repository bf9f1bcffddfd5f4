"""With other hooks on the model: R is the gradient of the model as those hooks leave it."""

from __future__ import annotations

import pytest
import torch

from patches import pattern_of
from ra_lens import RACache, get_ra_caching_hooks, run_with_ra
from ra_lens.errors import NotStored, UnsupportedModel
from tiny_models import (
    CASES,
    EDITABLE,
    KINDS,
    N_HEADS,
    N_LAYERS,
    OBSERVE_ONLY,
    random_ids,
    relative,
)

POS, TARGET = 6, 8
IDS = random_ids(2, POS)


def loss_of(logits):
    return -logits[:, -1].log_softmax(-1)[:, TARGET].sum()


def by_autograd(model, fwd_hooks, scale):
    """R of the intervened model: scale · dL/dS at hook_attn_scores, with plain autograd."""
    scores = {}

    def keep(layer):
        def hook(value, hook):
            scores[layer] = value

        return hook

    capture = [(f"blocks.{i}.attn.hook_attn_scores", keep(i)) for i in range(N_LAYERS)]
    with torch.enable_grad(), model.hooks(fwd_hooks=[*fwd_hooks, *capture]):
        total = loss_of(model(IDS))
        tensors = [scores[i] for i in range(N_LAYERS)]
        gradients = torch.autograd.grad(total, tensors, allow_unused=True)
    return [
        torch.zeros_like(s) if g is None else scale * g
        for s, g in zip(tensors, gradients, strict=True)
    ]


def check(ra, wanted):
    for layer, value in enumerate(wanted):
        if value.abs().max() == 0:
            assert ra["ra", layer].abs().max() == 0
        else:
            assert relative(ra["ra", layer], value) < 1e-5


def zero_head_in_place(pattern, hook):
    pattern[:, 1] = 0.0


def zero_head(pattern, hook):
    keep = torch.ones(N_HEADS).index_fill(0, torch.tensor([1]), 0.0)
    return pattern * keep[:, None, None]


def half_and_uniform(pattern, hook):
    return 0.5 * pattern + 0.1


def half_and_uniform_in_place(pattern, hook):
    pattern.mul_(0.5).add_(0.1)
    return pattern


def constant(value, hook):
    return (1.7 * torch.arange(value.numel())).sin().reshape(value.shape).to(value)


def shift_scores(scores, hook):
    return scores + 0.7 * torch.arange(scores.shape[-1]).to(scores.dtype)


# (what the run gets, the same without in-place edits, which plain autograd does not allow)
PATTERN_EDITS = {
    "head zeroed in place": (zero_head_in_place, zero_head),
    "head zeroed": (zero_head, zero_head),
    "all edited": (half_and_uniform, half_and_uniform),
    "all edited in place": (half_and_uniform_in_place, half_and_uniform),
    "replaced": (constant, constant),
}
OTHER_EDITS = {
    "z constant": ("blocks.1.attn.hook_z", constant),
    "residual constant": ("blocks.1.hook_resid_pre", constant),
    "scores shifted": ("blocks.1.attn.hook_attn_scores", shift_scores),
}


@pytest.mark.parametrize("edit", PATTERN_EDITS)
@pytest.mark.parametrize(("arch", "kind"), EDITABLE)
def test_an_edit_of_the_pattern_is_part_of_the_model(arch, kind, edit, shared):
    model, (given, functional) = shared(arch, kind), PATTERN_EDITS[edit]
    _, plain = run_with_ra(model, IDS, target=TARGET)
    wanted = by_autograd(model, [(pattern_of(1), functional)], plain.scale[0])
    logits, ra = run_with_ra(model, IDS, target=TARGET, fwd_hooks=[(pattern_of(1), given)])
    check(ra, wanted)
    assert relative(ra["ra", 0], plain["ra", 0]) > 1e-3
    with torch.no_grad():
        own = model.run_with_hooks(IDS, fwd_hooks=[(pattern_of(1), functional)])
    assert relative(logits[:, -1], own[:, -1]) < 1e-5
    # The pattern kept is the softmax's, before the edit.
    assert relative(ra["pattern", 1], plain["pattern", 1]) < 1e-6
    # A hook of torch comes before those of TransformerLens, where the pattern is taken.

    def before_the_point(_module, args):
        edited = given(args[0], None)
        return args if edited is None else (edited,)

    point = model.hook_dict[pattern_of(1)]
    with point.register_forward_pre_hook(before_the_point):
        _, ra = run_with_ra(model, IDS, target=TARGET)
    check(ra, wanted)
    assert relative(ra["pattern", 1], plain["pattern", 1]) < 1e-6


@pytest.mark.parametrize("edit", OTHER_EDITS)
@pytest.mark.parametrize(("arch", "kind"), EDITABLE)
def test_edits_elsewhere_are_part_of_the_model(arch, kind, edit, shared):
    model = shared(arch, kind)
    _, plain = run_with_ra(model, IDS, target=TARGET)
    wanted = by_autograd(model, [OTHER_EDITS[edit]], plain.scale[0])
    _, ra = run_with_ra(model, IDS, target=TARGET, fwd_hooks=[OTHER_EDITS[edit]])
    check(ra, wanted)


def scale_up(value, hook):
    return 1.5 * value


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("blocks.1.attn.hook_z", scale_up),
        ("blocks.1.attn.hook_z", constant),
        ("blocks.1.hook_resid_pre", scale_up),
        ("blocks.1.hook_resid_pre", constant),
    ],
)
@pytest.mark.parametrize(("arch", "kind"), sorted(OBSERVE_ONLY & set(CASES)))
def test_edits_around_an_observed_pattern_are_part_of_the_model(arch, kind, name, edit, shared):
    model, observed = shared(arch, kind), {}
    run_with_ra(model, IDS, target=TARGET)
    keep = [(pattern_of(i), lambda p, hook, i=i: observed.update({i: p})) for i in range(3)]
    with torch.enable_grad(), model.hooks(fwd_hooks=[(name, edit), *keep]):
        total = loss_of(model(IDS))
        tensors = [observed[i] for i in range(N_LAYERS)]
        gradients = torch.autograd.grad(total, tensors, allow_unused=True)
    _, ra = run_with_ra(model, IDS, target=TARGET, fwd_hooks=[(name, edit)])
    for layer, (a, g) in enumerate(zip(tensors, gradients, strict=True)):
        if g is None:
            assert ra["ra", layer].abs().max() == 0
            continue
        (wanted,) = torch.autograd.grad(  # through the softmax alone
            ((s := a.detach().log().requires_grad_()).softmax(-1) * g).sum(), s
        )
        assert relative(ra["ra", layer], ra.scale[layer] * wanted) < 1e-5


@pytest.mark.parametrize("edit", PATTERN_EDITS)
@pytest.mark.parametrize(("arch", "kind"), sorted(OBSERVE_ONLY & set(CASES)))
@pytest.mark.filterwarnings("ignore:A hook on .* returned a modified tensor")  # TransformerLens 4
def test_an_edit_of_an_observed_pattern_changes_nothing(arch, kind, edit, fresh):
    model = fresh(arch, kind)
    hooks = [(pattern_of(1), PATTERN_EDITS[edit][0])]
    _, plain = run_with_ra(fresh(arch, kind), IDS, target=TARGET)
    for _ in range(2):
        _, ra = run_with_ra(model, IDS, target=TARGET, fwd_hooks=hooks)
        assert relative(ra.stack(), plain.stack()) < 1e-6


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("arch", "kind", "name"),
    [(arch, kind, "blocks.0.hook_resid_pre") for arch, kind in CASES]
    + [(arch, kind, "blocks.0.ln1.hook_in") for arch, kind in CASES if kind == "TransformerBridge"],
)
def test_edits_in_place_before_the_first_pattern(arch, kind, name, known, fresh, shared):
    def add_in_place(value, hook):
        value.add_(0.25)

    def add(value, hook):
        return value + 0.25

    model = shared(arch, kind)
    run_with_ra(model, IDS, target=TARGET)
    model = model if known else fresh(arch, kind)
    _, wanted = run_with_ra(shared(arch, kind), IDS, target=TARGET, fwd_hooks=[(name, add)])
    _, ra = run_with_ra(model, IDS, target=TARGET, fwd_hooks=[(name, add_in_place)])
    if name != "blocks.0.ln1.hook_in":  # there the residual stream itself changes too
        assert relative(ra.stack(), wanted.stack()) < 1e-5
    assert relative(ra["pattern", 0], wanted["pattern", 0]) < 1e-5


@pytest.mark.parametrize(("arch", "kind"), EDITABLE)
def test_hooks_already_on_the_model_are_honoured(arch, kind, fresh):
    model, hook = fresh(arch, kind), (pattern_of(1), zero_head_in_place)
    run_with_ra(model, IDS, target=TARGET)
    _, wanted = run_with_ra(model, IDS, target=TARGET, fwd_hooks=[hook])
    with model.hooks(fwd_hooks=[hook]):
        _, outer = run_with_ra(model, IDS, target=TARGET)
        _, again = run_with_ra(model, IDS, target=TARGET)  # the outer hook is still there
    assert relative(outer.stack(), wanted.stack()) < 1e-6
    assert relative(again.stack(), wanted.stack()) < 1e-6
    by_predicate = [(lambda name: name == pattern_of(1), zero_head_in_place)]
    _, chosen = run_with_ra(model, IDS, target=TARGET, fwd_hooks=by_predicate)
    assert relative(chosen.stack(), wanted.stack()) < 1e-6
    _, plain = run_with_ra(model, IDS, target=TARGET)
    assert relative(plain.stack(), wanted.stack()) > 1e-3
    model.hook_dict[pattern_of(1)].add_hook(zero_head_in_place, is_permanent=True)
    _, permanent = run_with_ra(model, IDS, target=TARGET)
    assert relative(permanent.stack(), wanted.stack()) < 1e-6


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_hook_sees_the_pattern_that_it_would_see_without_us(arch, kind, shared):
    model, seen = shared(arch, kind), []
    hook = (pattern_of(2), lambda pattern, hook: seen.append(pattern.detach().clone()))
    run_with_ra(model, IDS, target=TARGET, fwd_hooks=[hook])
    with torch.no_grad():
        model.run_with_hooks(IDS, fwd_hooks=[hook])
    # A run spells some functions in fewer steps, so the last bit may differ.
    torch.testing.assert_close(seen[0], seen[1], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_hooks_of_the_user_fire_and_change_nothing(kind, shared):
    model, fired = shared("gpt2", kind), []
    _, plain = run_with_ra(model, IDS, target=TARGET)
    hook = (pattern_of(1), lambda grad, hook: fired.append(grad.detach().clone()))
    with model.hooks(bwd_hooks=[hook]):
        _, ra = run_with_ra(model, IDS, target=TARGET)
    assert relative(ra.stack(), plain.stack()) < 1e-6
    assert len(fired) == 1
    assert relative(fired[0], plain["pattern_grad", 1]) < 1e-5


@pytest.mark.parametrize("kind", [k for k in KINDS if k == "TransformerBridge"])
def test_a_layer_cut_off_before_its_route_is_known_says_what_to_do(kind, fresh):
    model, hooks = fresh("gpt2", kind), [("blocks.1.attn.hook_z", constant)]
    with pytest.raises(UnsupportedModel, match=r"layers \[1\].*run_with_ra once without"):
        run_with_ra(model, IDS, target=TARGET, fwd_hooks=hooks)
    run_with_ra(model, IDS, target=TARGET)
    _, ra = run_with_ra(model, IDS, target=TARGET, fwd_hooks=hooks)
    assert ra["ra", 1].abs().max() == 0


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_hooks_for_ones_own_backward_pass_give_the_same(arch, kind, frozen, fresh, shared):
    model = fresh(arch, kind)
    _, wanted = run_with_ra(shared(arch, kind), IDS, target=TARGET)
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen)
    ra, fwd_hooks, bwd_hooks = get_ra_caching_hooks(model)
    assert "RACache" in repr(ra)
    assert len(ra) == 0
    with model.hooks(fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks):
        loss_of(model(IDS)).backward()
        assert relative(ra.stack(), wanted.stack()) < 1e-5
        assert relative(ra.stack("pattern_grad"), wanted.stack("pattern_grad")) < 1e-5
        assert relative(ra.norms(), wanted.norms()) < 1e-5
        (2 * loss_of(model(IDS)) / len(IDS)).backward()  # a second pass replaces the first
        assert relative(ra.stack(), wanted.stack()) < 1e-5
    assert all(p.grad is None for p in model.parameters()) == frozen
    layers, fwd_hooks, bwd_hooks = get_ra_caching_hooks(
        model, layers=[-1], names_filter="blocks.2.attn.hook_ra"
    )
    with model.hooks(fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks):
        loss_of(model(IDS)).backward()
    assert list(layers) == ["blocks.2.attn.hook_ra"]
    assert relative(layers["ra", 2], wanted["ra", 2]) < 1e-5


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_transformer_lens_cache_with_gradients_is_read(arch, kind, fresh):
    model = fresh(arch, kind)
    _, cache = model.run_with_cache(IDS, return_type="loss", incl_bwd=True)
    if (arch, kind) in OBSERVE_ONLY:
        with pytest.raises(NotStored, match=r"no pattern gradients.*run_with_ra instead"):
            RACache.from_activation_cache(cache, model)
        return
    ra = RACache.from_activation_cache(cache, model)

    def next_token_loss(logits):
        log_probs = logits[:, :-1].log_softmax(-1)
        return -log_probs.gather(-1, IDS[:, 1:, None]).mean()

    _, wanted = run_with_ra(model, IDS, metric=next_token_loss)
    assert relative(ra.stack(), wanted.stack()) < 1e-5
    assert relative(ra.norms(), wanted.norms()) < 1e-5
    assert ra.layers == list(range(N_LAYERS))
    _, without = model.run_with_cache(IDS)
    with pytest.raises(NotStored, match="incl_bwd=True"):
        RACache.from_activation_cache(without, model)
