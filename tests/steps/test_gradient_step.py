"""A step taken by hooks, against Hugging Face's model whose weights were changed by autograd."""

from __future__ import annotations

import pytest
import torch

from generating import generate, need_sound_generate
from left_behind import Oops, changes, raises, snapshot
from padded_rows import padded
from patches import logits_with
from ra_lens import run_with_ra
from ra_lens.errors import BadInput, NotStored, UnsupportedModel
from ra_lens.patching.masking import mask_heads
from ra_lens.steps import gradient_norm, gradient_step
from ra_lens.vjp import WEIGHTS
from refused import unchecked
from stepped import Stepped, mean_nll
from tiny_models import (
    ANY_KIND,
    CASES,
    N_HEADS,
    N_LAYERS,
    every_model,
    random_ids,
    relative,
    text,
)

POS, TARGETS = 6, (8, 21)
IDS = random_ids(len(TARGETS), POS)
OTHER = random_ids(3, 9, seed=4)  # another number of prompts, of another length
HEADS = [(0, 1), (1, 2), (1, 3), (2, 0)]
ALL = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
HT, BRIDGE = "HookedTransformer", "TransformerBridge"


@pytest.fixture(scope="module")
def oracle(folder):
    made = {}

    def get(arch):
        if arch not in made:
            made[arch] = Stepped(folder(arch))
        return made[arch]

    return get


@pytest.fixture(scope="module")
def learnt(shared):
    """A model of each kind with the run that a step is made of."""
    made = {}

    def get(arch, kind):
        if (arch, kind) not in made:
            model = shared(arch, kind)
            made[arch, kind] = run_with_ra(model, IDS, target=list(TARGETS), vectors=True)[1]
        return shared(arch, kind), made[arch, kind]

    return get


def changed(oracle, heads=HEADS, weights=WEIGHTS, eta=0.05, rows=IDS, targets=TARGETS):
    return oracle.after(mean_nll(rows, targets), heads, weights, eta)


def error(found, wanted, plain):
    """What a step does wrong, relative to what it changes, and relative to the logits."""
    change = float((wanted - plain).norm())
    assert change > 1e-3 * float(plain.norm())
    difference = float((found.double() - wanted).norm())
    return max(1e-2 * difference / change, difference / float(plain.norm()))


@pytest.mark.parametrize("weights", [WEIGHTS, *every_model(*((one,) for one in WEIGHTS))])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_hooks_do_what_changed_weights_do(arch, kind, weights, learnt, oracle):
    model, ra = learnt(arch, kind)
    after, norm = changed(oracle(arch), weights=weights, eta=0.3)
    assert gradient_norm(model, ra, HEADS, weights=weights) == pytest.approx(norm, rel=1e-4)
    hooks = gradient_step(model, ra, HEADS, 0.3, weights=weights)
    wanted, plain = after.logits(OTHER), oracle(arch).oracle.logits(OTHER)
    assert error(logits_with(model, hooks, OTHER), wanted, plain) < 1e-5
    assert relative(logits_with(model, (), OTHER), plain) < 1e-5  # and nothing stays


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_step_of_all_heads_and_one_that_climbs(arch, kind, learnt, oracle):
    model, ra = learnt(arch, kind)
    after, _ = changed(oracle(arch), heads=ALL, eta=-0.01)
    hooks = gradient_step(model, ra, None, -0.01)
    wanted, plain = after.logits(OTHER), oracle(arch).oracle.logits(OTHER)
    assert error(logits_with(model, hooks, OTHER), wanted, plain) < 1e-5


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_shared_keys_are_stepped_with_any_of_their_heads(arch, kind, learnt, oracle):
    model, ra = learnt(arch, kind)
    after, _ = changed(oracle(arch), heads=[(1, 0)], weights=("W_K", "W_V"), eta=1.0)
    hooks = gradient_step(model, ra, "L1H0", 1.0, weights=("W_V", "W_K"))
    wanted, plain = after.logits(OTHER), oracle(arch).oracle.logits(OTHER)
    assert error(logits_with(model, hooks, OTHER), wanted, plain) < 1e-5
    # Both heads of a group are the same step, where there are groups.
    other = logits_with(model, gradient_step(model, ra, "L1H1", 1.0, weights=["W_K", "W_V"]), OTHER)
    same = relative(other, wanted) < 1e-5
    assert same == (arch == "llama")


@pytest.mark.parametrize("side", ["left", *every_model("right")])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_step_learnt_from_padded_prompts_and_applied_to_padded_ones(
    arch, kind, side, shared, oracle
):
    model = shared(arch, kind)
    pad = 2 if arch in ("llama", "opt") else 0
    rows = [random_ids(n, seed=n) for n in (4, 7, 5)]
    tokens, mask = padded(side, pad, rows)
    targets = (8, 21, 5)
    _, ra = run_with_ra(
        model, tokens, target=list(targets), attention_mask=mask, vectors=True, padding_side=side
    )
    after, _ = changed(oracle(arch), rows=rows, targets=targets, eta=0.3)
    hooks = gradient_step(model, ra, HEADS, 0.3)
    again, stepped = run_with_ra(
        model, tokens, target=list(targets), attention_mask=mask, fwd_hooks=hooks, store="norms"
    )
    for i, row in enumerate(rows):
        wanted = after.logits(row.unsqueeze(0))[0, -1]
        assert relative(again[i, -1], wanted) < 2e-5
    losses = [
        float(-after.logits(r[None])[0, -1].log_softmax(-1)[t])
        for r, t in zip(rows, targets, strict=True)
    ]
    assert stepped.loss.tolist() == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_generated_texts_are_those_of_the_stepped_model(arch, kind, cached, learnt, oracle):
    model, ra = learnt(arch, kind)
    start = IDS[:1]
    plain = generate(model, start, (), use_past_kv_cache=cached)
    same = torch.equal(plain[0, POS:], greedy(oracle(arch).oracle, start, plain.shape[1] - POS))
    need_sound_generate(same)
    eta = 1.0 if arch == "gptj" else 0.1  # its first answers are sure
    after, _ = changed(oracle(arch), heads=ALL, eta=eta)
    hooks = gradient_step(model, ra, None, eta)
    found = generate(model, start, hooks, use_past_kv_cache=cached)
    assert torch.equal(found[0, POS:], greedy(after, start, found.shape[1] - POS))
    assert not torch.equal(found, plain)


def greedy(oracle, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, oracle.logits(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0, -n:]


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_several_steps_are_their_hooks_after_each_other(arch, kind, learnt, oracle):
    model, ra = learnt(arch, kind)
    changing, hooks = oracle(arch), gradient_step(model, ra, HEADS, 0.1)
    for _ in range(2):
        _, ra = run_with_ra(model, IDS, target=list(TARGETS), vectors=True, fwd_hooks=hooks)
        hooks = [*hooks, *gradient_step(model, ra, HEADS, 0.1)]
    plain = changing.oracle.logits(OTHER)
    for _ in range(3):
        after, _ = changed(changing, eta=0.1)
        changing = Stepped.of(after)
    assert error(logits_with(model, hooks, OTHER), after.logits(OTHER), plain) < 2e-5


# ---- beside other hooks -------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_masked_heads_are_masked_in_the_stepped_model(arch, kind, learnt, oracle):
    model, ra = learnt(arch, kind)
    masked = [(0, 3), (1, 2)]
    after, _ = changed(oracle(arch), eta=0.3)
    step, mask = gradient_step(model, ra, HEADS, 0.3), mask_heads(model, masked)
    with torch.no_grad():  # the same in Hugging Face's model: rows of W_O of zeros
        for parameter, marks in oracle(arch).slices(after.model, set(masked), {"W_O"}):
            parameter *= 1 - marks
    wanted = after.logits(OTHER)
    plain = oracle(arch).oracle.logits(OTHER)
    assert error(logits_with(model, [*mask, *step], OTHER), wanted, plain) < 1e-5
    if kind == BRIDGE:  # what W_O read is seen there after every hook
        assert error(logits_with(model, [*step, *mask], OTHER), wanted, plain) < 1e-5
        return
    with pytest.raises(UnsupportedModel, match="another hook changes z after the step"):
        logits_with(model, [*step, *mask], OTHER)


@pytest.mark.parametrize("kind", ANY_KIND)
def test_hooks_after_a_step_see_the_stepped_model(kind, learnt, oracle):
    model, ra = learnt("gpt2", kind)
    seen = []
    keep = ("blocks.1.attn.hook_q", lambda value, hook: seen.append(value.detach().clone()))
    logits_with(model, [keep], IDS)
    logits_with(model, [*gradient_step(model, ra, "L1H2", 1.0), keep], IDS)
    moved = (seen[1] - seen[0]).abs().amax(dim=(0, 1, 3))
    assert moved[2] > 1e-2 and moved[[0, 1, 3]].abs().max() == 0


def test_a_step_in_compatibility_mode_is_taken_once(fresh, oracle):
    pytest.importorskip("transformer_lens.model_bridge")
    model = fresh("gpt2", BRIDGE)
    model.enable_compatibility_mode(no_processing=True)
    _, ra = run_with_ra(model, IDS, target=list(TARGETS), vectors=True)
    after, _ = changed(oracle("gpt2"), eta=0.3)
    wanted, plain = after.logits(OTHER), oracle("gpt2").oracle.logits(OTHER)
    found = logits_with(model, gradient_step(model, ra, HEADS, 0.3), OTHER)
    assert error(found, wanted, plain) < 1e-5


@pytest.mark.parametrize("event", ["success", "a hook raises", "bad head"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_nothing_is_left(arch, kind, event, fresh):
    model = fresh(arch, kind)
    _, ra = run_with_ra(model, IDS, target=list(TARGETS), vectors=True)
    hooks = gradient_step(model, ra, HEADS, 0.1)
    logits_with(model, hooks, IDS)  # a bridge keeps its last pattern, whoever runs it
    run_with_ra(model, IDS, target=8)
    before = snapshot(model)
    if event == "success":
        hooks = gradient_step(model, ra, HEADS, 0.1)
        run_with_ra(model, IDS, target=8, fwd_hooks=hooks)
    elif event == "a hook raises":
        with pytest.raises(Oops):
            broken = [*hooks, ("blocks.2.attn.hook_z", raises(Oops()))]
            run_with_ra(model, IDS, target=8, fwd_hooks=broken)
    else:
        with pytest.raises(BadInput):
            gradient_step(model, ra, "L9H0", 0.1)
    assert not changes(before, snapshot(model))


# ---- which loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ANY_KIND)
def test_the_gradient_is_that_of_the_mean_loss_or_of_the_one_number_of_a_metric(kind, shared):
    model = shared("gpt2", kind)
    _, ra = run_with_ra(model, IDS, target=list(TARGETS), vectors=True)
    each = [
        run_with_ra(model, IDS[i : i + 1], target=TARGETS[i], vectors=True)[1] for i in range(2)
    ]
    norms = [gradient_norm(model, one, "L1H2") for one in each]
    assert gradient_norm(model, ra, "L1H2") < sum(norms) / 2 + 1e-6

    def total(logits):
        log_p = logits[:, -1].log_softmax(-1)
        return -sum(log_p[i, target] for i, target in enumerate(TARGETS))

    _, one_number = run_with_ra(model, IDS, metric=total, vectors=True)
    assert one_number.loss.ndim == 0
    assert gradient_norm(model, one_number, "L1H2") == pytest.approx(
        2 * gradient_norm(model, ra, "L1H2"), rel=1e-4
    )
    alone = ra.apply_slice_to_batch_dim(1)
    assert not alone.has_batch_dim
    assert gradient_norm(model, alone, "L1H2") == pytest.approx(norms[1], rel=1e-4)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ANY_KIND)
def test_what_cannot_be_used_is_refused(kind, learnt, shared):
    model, ra = learnt("gpt2", kind)
    _, maps = run_with_ra(model, IDS, target=8)
    with pytest.raises(NotStored, match=r"'query_in'.*was not kept.*vectors=True"):
        gradient_step(model, maps, "L1H2", 0.1)
    _, some = run_with_ra(model, IDS, target=8, vectors=["query_in", "q_grad"])
    assert gradient_step(model, some, "L1H2", 0.1, weights="W_Q")
    with pytest.raises(NotStored, match=r"'key_in'.*not among the vectors= asked for"):
        gradient_step(model, some, "L1H2", 0.1, weights=["W_K"])
    with pytest.raises(BadInput, match=r"found head L1H9, but layer 1 has heads 0 to 3"):
        gradient_step(model, ra, "L1H9", 0.1)
    with pytest.raises(BadInput, match=r"found weights='W_X'; give one of 'W_Q', 'W_K'"):
        unchecked(gradient_step)(model, ra, "L1H2", 0.1, weights="W_X")
    with pytest.raises(BadInput, match=r"none of W_Q, W_K, W_V, W_O"):
        gradient_step(model, ra, "L1H2", 0.1, weights=())
    with pytest.raises(BadInput, match=r"found eta=nan; give a finite number"):
        gradient_step(model, ra, "L1H2", float("nan"))
    other = shared("gpt2", kind, n_head=2)
    with pytest.raises(BadInput, match=r"cache with 4 heads at blocks.1.attn.*Give the model that"):
        gradient_step(other, ra, "L1H2", 0.1)


def test_words_can_be_stepped_on_too(learnt, shared):
    kind = CASES[0][1]
    model = shared("gpt2", kind)
    _, ra = run_with_ra(model, text(IDS[0]), target=" w8", vectors=True)
    assert gradient_norm(model, ra, None) > 0
