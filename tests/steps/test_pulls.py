"""Pairs, outputs and losses after a step, against Hugging Face's model that was really changed."""

from __future__ import annotations

import math

import pytest
import torch

from left_behind import changes, snapshot
from oracle import nll
from padded_rows import padded
from ra_lens import run_with_ra
from ra_lens.errors import BadInput, NotStored, UnsupportedModel
from ra_lens.steps import (
    gradient_norm,
    largest_linear_step,
    output_shift,
    pulls,
    step_effect,
)
from stepped import Stepped, mean_nll
from tiny_models import ANY_KIND, CASES, D_HEAD, KINDS, N_HEADS, N_KV, every_model, random_ids, text

POS, TARGETS = 6, (8, 21)
IDS = random_ids(len(TARGETS), POS)
OPTIONS = {"target": list(TARGETS)}
EVERY = POS * POS


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
    made = {}

    def get(arch, kind, dtype=torch.float32):
        if (arch, kind, dtype) not in made:
            model = shared(arch, kind, dtype)
            made[arch, kind, dtype] = run_with_ra(model, IDS, **OPTIONS, vectors=True)[1]
        return shared(arch, kind, dtype), made[arch, kind, dtype]

    return get


def products(oracle, arch, layer, head, example):
    """q·k of one head and example, as Hugging Face's model multiplies them."""
    seen = oracle.seen(IDS, nll(*TARGETS))[1][layer].product[example, head]
    return seen * D_HEAD**0.5 if arch == "opt" else seen  # which scales its queries before


# ---- pairs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [0, *every_model(1)])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_products_are_those_of_the_changed_model(arch, kind, example, learnt, oracle):
    model, ra = learnt(arch, kind)
    found = pulls(ra, "L1H2", example=example, k=EVERY, eta=0.5, model=model, input=IDS, **OPTIONS)
    row, target = IDS[example : example + 1], TARGETS[example : example + 1]
    after, _ = oracle(arch).after(mean_nll(row, target), [(1, 2)], ("W_Q", "W_K"), 0.5)
    before = products(oracle(arch).oracle, arch, 1, 2, example)
    wanted = products(after, arch, 1, 2, example)
    r = ra["ra", 1][example, 2]
    assert len(found) == int((r != 0).sum()) > POS
    assert [abs(pair.ra) for pair in found] == sorted((abs(p.ra) for p in found), reverse=True)
    size = float(wanted.abs().max())
    for pair in found:
        at = pair.query, pair.key
        assert (pair.layer, pair.head, pair.example) == (1, 2, example)
        assert pair.ra == pytest.approx(float(r[at]))
        assert pair.together == (pair.ra < 0)
        assert pair.pattern == pytest.approx(float(ra["pattern", 1][example, 2][at]))
        assert pair.product == pytest.approx(float(before[at]), abs=1e-4 * size)
        assert pair.product_after == pytest.approx(float(wanted[at]), abs=1e-4 * size)
        assert pair.change == pytest.approx(float(wanted[at] - before[at]), abs=1e-4 * size)
    assert max(abs(pair.change) for pair in found) > 1e-2 * size
    # The tokens are those at these positions.
    tokens = [f"w{int(i)}" for i in IDS[example]]
    assert all(p.query_token.strip() == tokens[p.query] for p in found)
    assert all(p.key_token.strip() == tokens[p.key] for p in found)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_first_order_of_all_pairs_is_the_gradient_of_the_weights(arch, kind, learnt, oracle):
    """Σ R Δ(q·k) = −η (‖∂L/∂W_Q‖² + ‖∂L/∂W_K‖²), of a head that shares its keys with no other."""
    if arch == "llama":
        pytest.skip("heads share keys here")
    model, ra = learnt(arch, kind)
    found = pulls(ra, (1, 2), k=EVERY, eta=0.25, model=model, input=IDS, **OPTIONS)
    loss = mean_nll(IDS[:1], TARGETS[:1])
    _, norm = oracle(arch).after(loss, [(1, 2)], ("W_Q", "W_K"), 0.25)
    total = sum(pair.ra * pair.predicted for pair in found)
    assert total == pytest.approx(-0.25 * norm**2, rel=1e-3)


@pytest.mark.parametrize("kind", ANY_KIND)
def test_first_order_is_the_limit_of_small_steps(kind, learnt):
    model, ra = learnt("gpt2", kind, torch.float64)
    errors = []
    for eta in (1.0, 0.1, 0.01):
        found = pulls(ra, "L1H2", k=EVERY, eta=eta, model=model, input=IDS, **OPTIONS)
        change = torch.tensor([pair.change for pair in found])
        predicted = torch.tensor([pair.predicted for pair in found])
        errors.append(float((change - predicted).norm() / change.norm()))
    assert errors[0] > 1e-3
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.4)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.4)


def test_cosines_are_those_of_the_vectors(learnt):
    _, ra = learnt(*CASES[0])
    for pair in pulls(ra, "L2H1", k=5):
        q = ra["query", 2][0, pair.query, 1].tolist()
        key = ra["key", 2][0, pair.key, 1].tolist()
        product = sum(a * b for a, b in zip(q, key, strict=True))
        assert pair.product == pytest.approx(product, rel=1e-4, abs=1e-5)
        assert pair.cosine == pytest.approx(product / math.hypot(*q) / math.hypot(*key), abs=1e-5)
        assert math.isnan(pair.product_after) and math.isnan(pair.predicted)
        assert math.isnan(pair.cosine_after)


def test_pairs_are_printed_and_tabulated(learnt):
    model, ra = learnt("gpt2", KINDS[0])
    found = pulls(ra, "L1H2", k=3, eta=0.5, model=model, input=IDS, **OPTIONS)
    lines = repr(found).splitlines()
    assert lines[0] == "Pulls of L1H2: 3 pairs, before and after a step of 0.5"
    assert len(lines) == 4 and all(" → " in line and "q·k" in line for line in lines[1:])
    wish = "together" if found[0].ra < 0 else "apart"
    assert f"R {found[0].ra:+.3g} ({wish})" in lines[1]
    assert repr(pulls(ra, "L1H2", k=3)[:2]).startswith("Pulls of L1H2: 2 pairs\n")
    frame = found.to_dataframe()
    assert list(frame.query_token) == [pair.query_token for pair in found]
    assert {"ra", "product", "product_after", "cosine", "cosine_after", "predicted"} <= {*frame}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_token(side, shared):
    kind = KINDS[0]
    model = shared("llama", kind)
    rows = [random_ids(4, seed=1), random_ids(7, seed=2)]
    tokens, mask = padded(side, 2, rows)
    options = {"target": [8, 21], "attention_mask": mask, "padding_side": side}
    _, ra = run_with_ra(model, tokens, **options, vectors=True)
    _, alone = run_with_ra(model, rows[0][None], target=8, vectors=True)
    found = pulls(ra, "L1H2", k=99, eta=0.1, model=model, input=tokens, **options)
    wanted = pulls(alone, "L1H2", k=99, eta=0.1, model=model, input=rows[0][None], target=8)
    by_place = {(pair.query, pair.key): pair for pair in found}
    assert len(found) == len(wanted)
    for pair in wanted:
        other = by_place[pair.query, pair.key]
        assert other.query_token == pair.query_token
        assert other.product_after == pytest.approx(pair.product_after, rel=1e-3, abs=1e-4)


def test_the_models_own_prediction_needs_no_target(shared):
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, text(IDS[0]), vectors=True)
    found = pulls(ra, "L1H2", k=3, eta=0.5, model=model, input=text(IDS[0]))
    assert all(pair.change != 0 for pair in found)
    effect = step_effect(model, text(IDS[0]), ra, None, 1.0)
    assert float(effect.loss_before) == pytest.approx(float(ra.loss), rel=1e-4)


# ---- the output of a head -----------------------------------------------------------------------


def z_of(oracle, layer, head):
    """What a head gives to W_O, from the patterns and values of Hugging Face's model."""
    module = next(
        m
        for name, m in oracle.model.named_modules()
        if f".{layer}." in name
        and name.rpartition(".")[2] in ("c_proj", "o_proj", "out_proj")
        and "mlp" not in name
    )
    seen = []
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    oracle.logits(IDS)
    handle.remove()
    return seen[0].reshape(*IDS.shape, N_HEADS, D_HEAD)[:, :, head]


@pytest.mark.parametrize("weights", [("W_Q", "W_K", "W_V"), *every_model(("W_Q",), ("W_V",))])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_outputs_move_as_in_the_changed_model(arch, kind, weights, learnt, oracle):
    model, ra = learnt(arch, kind)
    shift = output_shift(model, IDS, ra, "L1H2", 0.2, weights=weights, **OPTIONS)
    after, _ = oracle(arch).after(mean_nll(IDS, TARGETS), [(1, 2)], weights, 0.2)
    wanted = z_of(after, 1, 2) - z_of(oracle(arch).oracle, 1, 2)
    size = float(wanted.norm())
    assert size > 1e-3 * float(shift.z.norm())
    assert float((shift.measured.double() - wanted).norm()) < 1e-3 * size
    if weights == ("W_V",):  # in which z is linear
        assert shift.error < 1e-3


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_what_is_foretold_of_outputs_is_the_limit_of_small_steps(arch, kind, learnt):
    model, ra = learnt(arch, kind, torch.float64)
    errors = [output_shift(model, IDS, ra, "L1H2", eta, **OPTIONS).error for eta in (1e-2, 1e-3)]
    bound = (
        1e-3 if (arch, kind) in (("opt", "TransformerBridge"), ("gptj", "TransformerBridge")) else 0
    )
    # Some bridges multiply in float32 in the middle.
    assert errors[0] > 1e-5
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2, abs=bound)
    assert "foretold to" in repr(output_shift(model, IDS, ra, "L1H2", 1e-2, **OPTIONS))


# ---- the loss -----------------------------------------------------------------------------------

HEADS = [(0, 1), (1, 2), (2, 0)]


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_the_loss_is_foretold_by_the_gradient_and_measured_as_changed(arch, kind, learnt, oracle):
    model, ra = learnt(arch, kind)
    effect = step_effect(model, IDS, ra, HEADS, 0.05, **OPTIONS)
    loss = mean_nll(IDS, TARGETS)
    after, norm = oracle(arch).after(loss, HEADS, ("W_Q", "W_K", "W_V", "W_O"), 0.05)
    losses = [float(loss(one).detach()) for one in (oracle(arch).oracle, after)]
    assert effect.norm == pytest.approx(norm, rel=1e-4)
    assert effect.predicted == pytest.approx(-0.05 * norm**2, rel=1e-4)
    assert effect.measured == pytest.approx(losses[1] - losses[0], rel=1e-3)
    assert float(effect.loss_after.mean()) == pytest.approx(losses[1], rel=1e-4)
    assert f"{effect.predicted:+.4g}" in repr(effect)


@pytest.mark.parametrize("within", [0.1, *every_model(0.3)])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_the_largest_linear_step_is_where_the_changed_model_leaves_first_order(
    arch, kind, within, learnt, oracle
):
    model, ra = learnt(arch, kind)
    found = largest_linear_step(model, IDS, ra, "L1H2", within=within, **OPTIONS)
    loss = mean_nll(IDS, TARGETS)
    weights = ("W_Q", "W_K", "W_V", "W_O")

    def error(eta):
        after, norm = oracle(arch).after(loss, [(1, 2)], weights, eta)
        with torch.no_grad():
            change = float(loss(after) - loss(oracle(arch).oracle))
        return abs(change + eta * norm**2) / (eta * norm**2)

    assert error(found.eta * 0.98) < within < error(found.eta * 1.05)
    assert found.effect.eta == found.eta and found.effect.error <= within
    steps = [eta for eta, _, _ in found.tried]
    assert steps == sorted(steps) and found.eta in steps
    assert len(steps) < 30
    assert str(found).startswith(f"{found.eta:.4g}: within {within:.0%} of first order")


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ANY_KIND)
def test_what_cannot_be_used_is_refused(kind, learnt):
    model, ra = learnt("gpt2", kind)
    _, maps = run_with_ra(model, IDS, **OPTIONS)
    with pytest.raises(NotStored, match=r"'query'.*was not kept.*vectors=True"):
        pulls(maps, "L1H2")
    _, norms = run_with_ra(model, IDS, **OPTIONS, store="norms", vectors=True)
    with pytest.raises(NotStored, match=r"store='norms'"):
        pulls(norms, "L1H2")
    with pytest.raises(BadInput, match=r"found eta=0.5 without model=; the step is really taken"):
        pulls(ra, "L1H2", eta=0.5, input=IDS)
    with pytest.raises(BadInput, match=r"found eta=0.5 without input=;"):
        pulls(ra, "L1H2", eta=0.5, model=model)
    with pytest.raises(BadInput, match="found other prompts than those"):
        pulls(ra, "L1H2", eta=0.5, model=model, input=IDS.flip(0), **OPTIONS)
    with pytest.raises(BadInput, match=r"found head \(layer=1, head=4\)"):
        pulls(ra, "L1H4")
    with pytest.raises(BadInput, match=r"example=2"):
        pulls(ra, "L1H2", example=2)
    with pytest.raises(BadInput, match=r"found W_O in weights=, which z does not depend on"):
        output_shift(model, IDS, ra, "L1H2", 0.1, weights=("W_V", "W_O"), **OPTIONS)
    with pytest.raises(BadInput, match=r"found a loss of .* where the cache has .*give target="):
        step_effect(model, IDS, ra, None, 0.1, target=[9, 9])
    with pytest.raises(BadInput, match=r"found within=1; give a share between 0 and 1"):
        largest_linear_step(model, IDS, ra, None, within=1, **OPTIONS)


def test_a_gradient_of_nothing_has_no_largest_step(shared):
    model = shared("gpt2", KINDS[0])

    def blocked(logits):  # depends on the attention of no layer but through what is cut off
        return logits[:, -1, 3] * 0

    _, ra = run_with_ra(model, IDS, metric=blocked, vectors=True, fwd_hooks=[("hook_embed", same)])
    assert gradient_norm(model, ra) == 0
    with pytest.raises(BadInput, match=r"the gradient of these weights is 0"):
        largest_linear_step(model, IDS, ra, None, metric=blocked)


def same(value, hook):
    return value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["gemma2", *every_model("laguna")])
def test_outputs_behind_caps_and_gates_are_not_foretold(arch, tmp_path):
    from arch_models import load_bridge

    model = load_bridge(arch, tmp_path)
    ids = torch.randint(3, 28, (2, 6), generator=torch.Generator().manual_seed(1))
    _, ra = run_with_ra(model, ids, target=[5, 11], vectors=True)
    said = {"gemma2": r"its scores are not c·q·k \(they may be capped\)", "laguna": r"may be gated"}
    with pytest.raises(UnsupportedModel, match=said[arch]):
        output_shift(model, ids, ra, "L0H1", 0.01, target=[5, 11])


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_nothing_is_left(arch, kind, fresh):
    model = fresh(arch, kind)
    _, ra = run_with_ra(model, IDS, **OPTIONS, vectors=True)
    before = snapshot(model)
    pulls(ra, "L1H2", eta=0.1, model=model, input=IDS, **OPTIONS)
    output_shift(model, IDS, ra, "L1H2", 0.1, **OPTIONS)
    step_effect(model, IDS, ra, None, 0.1, **OPTIONS)
    assert not changes(before, snapshot(model))


assert N_KV < N_HEADS
