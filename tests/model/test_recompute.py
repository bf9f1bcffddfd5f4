"""Blocks that run again in the backward pass, and what a run leaves out or computes in fewer steps.

The same maps, one layer alive, nothing left; the same numbers, where nobody looks.
"""

from __future__ import annotations

import gc

import pytest
import torch

from held import Held, counted
from ra_lens import run_with_ra
from ra_lens.errors import UnsupportedModel
from ra_lens.model import as_lens
from tiny_models import CASES, D_VOCAB, EDITABLE, KINDS, N_HEADS, random_ids, relative, text

IDS, TARGET = random_ids(2, 7), 8
LAST = torch.tensor([[5], [3]])


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_maps_are_identical(arch, kind, fresh):
    model = fresh(arch, kind)
    # The first run of a bridge also finds out which layers only show their pattern.
    first = run_with_ra(model, IDS, target=TARGET, recompute=True)[1]
    for layers in (None, [1], [0, 2]):
        logits, plain = run_with_ra(model, IDS, target=TARGET, layers=layers)
        again_logits, again = run_with_ra(model, IDS, target=TARGET, layers=layers, recompute=True)
        assert torch.equal(logits, again_logits)
        assert len(plain) == 3 * len(plain.layers)
        for name, value in plain.items():
            assert torch.equal(again[name], value)
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-8)
        assert float(plain.norms().min()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_padded_prompts_and_answers_of_several_tokens(kind, shared):
    model = shared("llama", kind)
    prompts = [text(IDS[0]), text(IDS[1, :4])]
    answers = [f" {text([5, 9])}", f" {text([11])}"]
    options = {"target": answers, "padding_side": "left"}
    plain = run_with_ra(model, prompts, **options)[1]
    again = run_with_ra(model, prompts, **options, recompute=True)[1]
    for name, value in plain.items():
        assert torch.equal(again[name], value)


@pytest.mark.parametrize(("arch", "kind"), EDITABLE)
def test_edits_by_hooks_count_as_without(arch, kind, shared):
    model = shared(arch, kind)

    def halve(pattern, hook):
        return pattern * torch.tensor([1.0, 0.5, 0.0, 1.0]).reshape(1, -1, 1, 1)

    def push(resid, hook):
        resid += 0.1
        return resid

    hooks = [("blocks.1.attn.hook_pattern", halve), ("blocks.2.hook_resid_pre", push)]
    run_with_ra(model, IDS, target=TARGET)
    plain = run_with_ra(model, IDS, target=TARGET, fwd_hooks=hooks)[1]
    again = run_with_ra(model, IDS, target=TARGET, fwd_hooks=hooks, recompute=True)[1]
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-9)
    untouched = run_with_ra(model, IDS, target=TARGET)[1]
    assert not torch.allclose(untouched["ra", 0], plain["ra", 0])


@pytest.mark.parametrize(("arch", "depth"), [("gpt2", "n_layer"), ("llama", "num_hidden_layers")])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_tensors_of_one_layer_are_alive(arch, depth, kind, shared):
    n_layers = 8
    model, most = shared(arch, kind, **{depth: n_layers}), {}
    run_with_ra(model, IDS, target=TARGET)
    map_size = IDS.shape[0] * N_HEADS * IDS.shape[1] ** 2
    for recompute in (False, True):
        with counted(lambda x: x.numel() == map_size):
            run_with_ra(model, IDS, target=TARGET, store="norms", recompute=recompute)
        most[recompute] = Held.most
        gc.collect()
        assert Held.alive == 0
    assert most[False] >= n_layers - 1  # the first layer's values need no gradient
    # One layer's, and one more between the softmax and the tap that stands in for it.
    assert most[True] <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_cut_off_are_refused(kind, shared):
    model = shared("gpt2", kind)
    run_with_ra(model, IDS, target=TARGET)
    hook = ("blocks.2.hook_resid_pre", lambda x, hook: x.detach() * 0 + 1)
    with pytest.raises(UnsupportedModel, match=r"layers \[0, 1\].*recompute=True.*layers="):
        run_with_ra(model, IDS, target=TARGET, fwd_hooks=[hook], recompute=True)
    # Without it their gradient is known: zero.
    ra = run_with_ra(model, IDS, target=TARGET, fwd_hooks=[hook])[1]
    assert not ra["ra", 0].any()
    assert ra["ra", 2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_counts_in_the_second_pass_too(kind, shared):
    model = shared("llama", kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = run_with_ra(model, IDS, target=TARGET)[1]
        again = run_with_ra(model, IDS, target=TARGET, recompute=True)[1]
    for name, value in plain.items():
        assert torch.equal(again[name], value)
    exact = run_with_ra(model, IDS, target=TARGET)[1]
    assert not torch.equal(exact["ra", 0], plain["ra", 0])


@pytest.mark.parametrize("kind", KINDS)
def test_forward_methods_are_put_back(kind, shared):
    model = shared("gpt2", kind)

    def fail(value, hook):
        raise ZeroDivisionError

    before = {name: set(vars(m)) for name, m in model.named_modules()}
    run_with_ra(model, IDS, target=TARGET, recompute=True)
    with pytest.raises(ZeroDivisionError):
        run_with_ra(
            model, IDS, target=TARGET, recompute=True, fwd_hooks=[("blocks.1.attn.hook_z", fail)]
        )
    after = {name: set(vars(m)) for name, m in model.named_modules()}
    assert [name for name in after if "forward" in after[name] - before[name]] == []


# ---- left out, or computed in fewer steps --------------------------------------------------------


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_logits_at_chosen_positions_are_the_models_own(arch, kind, shared):
    model = shared(arch, kind)
    lens = as_lens(model)
    with torch.no_grad():
        whole = model(IDS)
        with lens.running(LAST):
            read = model(IDS)
        again = model(IDS)
    assert read.shape == (2, 1, D_VOCAB)
    assert relative(read, whole[torch.arange(2)[:, None], LAST]) < 2e-6
    assert torch.equal(again, whole)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_gradients_of_chosen_positions_are_the_models_own(arch, kind, shared):
    """One position is read twice in one row, as a short answer beside a long one is."""
    model = shared(arch, kind)
    lens = as_lens(model)
    columns = torch.tensor([[4, 5, 6], [3, 3, 3]])
    weights = torch.randn(2, 3, D_VOCAB, generator=torch.Generator().manual_seed(0))
    gradients = {}

    def leaf(x, hook):
        gradients["x"] = x.detach().requires_grad_()
        return gradients["x"]

    found = []
    for positions in (columns, None):
        with model.hooks(fwd_hooks=[("hook_embed", leaf)]), lens.running(positions):
            logits = model(IDS)
        if positions is None:
            logits = logits[torch.arange(2)[:, None], columns]
        found.append(torch.autograd.grad((logits * weights).sum(), gradients["x"])[0])
    assert relative(*found) < 5e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_mlp_runs_where_it_is_read(kind, shared):
    model, ran = shared("gpt2", kind), []
    lens = as_lens(model)
    original = torch.addmm  # which both classes multiply with, rows first

    def count(*args, **kwargs):
        ran.append(args[1].shape[0])
        return original(*args, **kwargs)

    torch.addmm = count
    try:
        with torch.no_grad(), lens.running(LAST):
            model(IDS)
    finally:
        torch.addmm = original
    assert ran[-2:] == [2, 2]
    assert 14 in ran


@pytest.mark.parametrize(
    "name", ["blocks.2.mlp.hook_post", "blocks.2.hook_resid_post", "ln_final.hook_normalized"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_on_what_comes_of_the_last_mlp_sees_every_position(name, kind, shared):
    model, seen = shared("gpt2", kind), []

    def keep(value, hook):
        seen.append(value.detach().clone())

    wanted = run_with_ra(model, IDS, target=TARGET)[1]
    ra = run_with_ra(model, IDS, target=TARGET, fwd_hooks=[(name, keep)])[1]
    with torch.no_grad():
        model.run_with_hooks(IDS, fwd_hooks=[(name, keep)])
    mine, own = seen
    assert own.shape[:2] == IDS.shape
    assert relative(mine, own) < 2e-6
    for layer in ra.layers:
        assert relative(ra["ra", layer], wanted["ra", layer]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_after_the_last_attention_counts(kind, shared):
    model = shared("gpt2", kind)

    def double(value, hook):
        return 2 * value

    hook = ("blocks.2.hook_mlp_out", double)
    with torch.no_grad():
        wanted = model.run_with_hooks(IDS, fwd_hooks=[hook])[:, -1]
    logits, _ = run_with_ra(model, IDS, target=TARGET, fwd_hooks=[hook])
    assert relative(logits[:, -1], wanted) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_functions_are_the_same_and_half_precision_keeps_its_own(arch, kind, dtype, fresh):
    model = fresh(arch, kind, dtype)
    with torch.no_grad():
        own = model(IDS)
        with as_lens(model).running(None):
            fused = model(IDS)
    assert relative(fused, own) <= {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_have_the_epsilon_of_the_model(kind, fresh, reference):
    """Far from the usual 1e-5, which differs too little from others to show."""
    large = {"layer_norm_epsilon": 0.5}
    model = fresh("gpt2", kind, torch.float64, **large)
    with torch.no_grad(), as_lens(model).running(None):
        found = model(IDS)
    wanted = reference("gpt2", **large).logits(IDS)
    assert relative(found, wanted) < 1e-12
    assert relative(reference("gpt2").logits(IDS), wanted) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", ["hook_scale", "hook_normalized"])
def test_a_hook_inside_a_norm_still_edits_it(point, kind, shared):
    model = shared("gpt2", kind)

    def halve(value, hook):
        return value / 2

    hook = (f"blocks.1.ln1.{point}", halve)
    with torch.no_grad():
        wanted = model.run_with_hooks(IDS, fwd_hooks=[hook])[:, -1]
        plain = model(IDS)[:, -1]
    logits, _ = run_with_ra(model, IDS, target=TARGET, fwd_hooks=[hook])
    assert relative(logits[:, -1], wanted) < 2e-6
    assert relative(plain, wanted) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", ["hook_pre", "hook_pre_linear", "hook_post"])
def test_a_hook_inside_a_gated_mlp_still_edits_it(point, kind, shared):
    model = shared("llama", kind)
    name = f"blocks.1.mlp.{point}"
    if name not in model.hook_dict:
        pytest.skip(f"no hook point {name}")

    def halve(value, hook):
        return value / 2

    with torch.no_grad():
        wanted = model.run_with_hooks(IDS, fwd_hooks=[(name, halve)])
        plain = model(IDS)
        with as_lens(model).running(None, [(name, halve)]):
            found = model(IDS)
    assert relative(found, wanted) < 2e-6
    assert relative(plain, wanted) > 1e-3


@pytest.mark.skipif("HookedTransformer" not in KINDS, reason="no HookedTransformer here")
def test_a_gated_mlp_copies_no_weights(shared):
    model = shared("llama", "HookedTransformer")
    with (
        torch.no_grad(),
        as_lens(model).running(None),
        torch.profiler.profile(record_shapes=True) as profile,
    ):
        model(IDS)
    shapes = {tuple(model.blocks[0].mlp.W_in.shape), tuple(model.blocks[0].mlp.W_out.shape)}
    copied = [e for e in profile.events() if e.name == "aten::copy_"]
    assert copied
    assert not [e for e in copied if shapes & {tuple(s) for s in e.input_shapes}]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_put_back(kind, shared):
    model = shared("gpt2", kind)
    modules = as_lens(model)._modules

    def state():
        return [(set(vars(m)), vars(m).get("act_fn")) for m in modules]

    model(IDS)
    before = state()
    with pytest.raises(ZeroDivisionError), as_lens(model).running(LAST):
        assert state() != before
        raise ZeroDivisionError
    assert state() == before
