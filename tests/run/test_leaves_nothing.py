"""A table: whatever happens inside a run, the user's model and session are as they were."""

from __future__ import annotations

import copy

import pytest
import torch

from left_behind import Oops, changes, graphs, raises, snapshot
from ra_lens import get_ra_caching_hooks, run_with_ra
from ra_lens.errors import BadInput, NothingToDifferentiate
from tiny_models import CASES, KINDS, OBSERVE_ONLY, random_ids, relative

POS, TARGET = 6, 8
IDS = random_ids(2, POS)


def used(model):
    """TransformerBridge attaches hooks of its own in its first forward pass: let it."""
    with torch.no_grad():
        model(IDS)
    return model


def nan(value, hook):
    return value * float("nan")


def constant(value, hook):
    return torch.ones_like(value)


def only_on_ra(error):
    """A names_filter that raises in the backward pass, when the first map has arrived."""

    def names_filter(name):
        raise error

    return names_filter


EVENTS = {
    "success": (None, {}),
    "success, norms": (None, {"store": "norms"}),
    "success, batches": (None, {"batch_size": 1, "progress": False}),
    "success, last layer": (None, {"layers": -1}),
    "success, recomputed": (None, {"recompute": True}),
    "success, vectors": (None, {"vectors": True}),
    "success, vectors recomputed": (None, {"vectors": True, "recompute": True}),
    "interrupted with vectors": (
        KeyboardInterrupt,
        {"names_filter": only_on_ra(KeyboardInterrupt()), "vectors": True},
    ),
    "bad target": (BadInput, {"target": 10_000}),
    "bad layer": (BadInput, {"layers": [9]}),
    "unknown hook": (BadInput, {"fwd_hooks": [("blocks.0.nothing", constant)]}),
    "hook raises": (Oops, {"fwd_hooks": [("blocks.1.attn.hook_pattern", raises(Oops()))]}),
    "interrupted": (
        KeyboardInterrupt,
        {"fwd_hooks": [("blocks.2.hook_resid_pre", raises(KeyboardInterrupt()))]},
    ),
    "metric raises": (Oops, {"target": None, "metric": raises(Oops())}),
    "metric of a wrong shape": (
        BadInput,
        {"target": None, "metric": lambda logits: logits[:, -1]},
    ),
    "metric without gradient": (
        NothingToDifferentiate,
        {"target": None, "metric": lambda logits: logits.detach()[:, -1, 5]},
    ),
    "NaN logits": (
        NothingToDifferentiate,
        {"fwd_hooks": [("blocks.2.hook_resid_post", nan)]},
    ),
    "raises in the backward pass": (Oops, {"names_filter": only_on_ra(Oops())}),
    "interrupted in the backward pass": (
        KeyboardInterrupt,
        {"names_filter": only_on_ra(KeyboardInterrupt())},
    ),
    "interrupted in the second batch": (KeyboardInterrupt, {"batch_size": 1, "progress": False}),
}


def interrupt_on_call(n):
    calls = []

    def hook(value, hook):
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt

    return hook


def run(model, event):
    error, options = EVENTS[event]
    options = {"target": TARGET, **options}
    if event == "interrupted in the second batch":
        options["fwd_hooks"] = [("blocks.0.hook_resid_pre", interrupt_on_call(2))]
    if error is None:
        run_with_ra(model, IDS, **options)
    else:
        with pytest.raises(error):
            run_with_ra(model, IDS, **options)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize(
    ("arch", "kind"),
    [("llama", kind) for kind in KINDS]
    + [c for c in CASES if c == ("gpt2", "TransformerBridge")]  # which keeps its last pattern
    + sorted(OBSERVE_ONLY & set(CASES))[-1:],
)
def test_nothing_is_left_behind(arch, kind, event, fresh):
    model = used(fresh(arch, kind))
    before = snapshot(model)
    run(model, event)  # before any run has shown the model's routes
    assert changes(before, snapshot(model)) == {}
    run_with_ra(model, IDS, target=TARGET)
    run(model, event)
    assert changes(before, snapshot(model)) == {}
    # In the state that users have: hooks of theirs, some gradients, some parameters frozen.
    model(IDS).sum().backward()
    for i, parameter in enumerate(torch.nn.Module.parameters(model)):
        parameter.requires_grad_(i % 2 == 0)
    if hasattr(model, "is_caching"):
        model.is_caching = True  # as get_caching_hooks leaves it
    seen = []
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda p, hook: seen.append(1))]):
        before = snapshot(model)
        run(model, event)
        assert changes(before, snapshot(model)) == {}
        with torch.no_grad():
            before = snapshot(model)
            run(model, event)
            assert changes(before, snapshot(model)) == {}


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_it_works_without_gradients_and_with_frozen_parameters(arch, kind, fresh, shared):
    _, wanted = run_with_ra(shared(arch, kind), IDS, target=TARGET)
    model = fresh(arch, kind)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _ in range(2):
        with torch.no_grad():
            logits, ra = run_with_ra(model, IDS, target=TARGET)
            assert not torch.is_grad_enabled()
        assert relative(ra.stack(), wanted.stack()) < 1e-6
        assert not ra["ra", 0].requires_grad
        assert not logits.requires_grad
        assert not ra.loss.requires_grad


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_parameters_get_no_gradient(arch, kind, fresh):
    model = fresh(arch, kind)
    run_with_ra(model, IDS, target=TARGET)
    run_with_ra(model, IDS, metric=lambda logits: logits[:, -1, 3])
    assert all(p.grad is None for p in torch.nn.Module.parameters(model))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_graph_built_before_is_differentiated_as_if_nothing_had_happened(arch, kind, fresh):
    def gradients(in_between):
        model, fired = fresh(arch, kind), []
        first = next(iter(torch.nn.Module.parameters(model)))
        first.register_hook(lambda grad: fired.append(grad.abs().sum().item()))
        loss = model(IDS)[:, -1, 3].sum()
        in_between(model)
        loss.backward()
        assert len(fired) == 1
        return [p.grad for p in torch.nn.Module.parameters(model)]

    wanted = gradients(lambda model: None)
    found = gradients(lambda model: run_with_ra(model, IDS, target=TARGET))
    assert sum(g is not None for g in wanted) > 10
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_random_stream_continues_as_without_a_run(kind, shared):
    model = shared("gpt2", kind)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    run_with_ra(model, IDS, target=TARGET)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(("arch", "kind"), [c for c in CASES if c not in OBSERVE_ONLY])
def test_hooks_for_ones_own_backward_pass_leave_with_their_context(arch, kind, fresh):
    model = used(fresh(arch, kind))
    before = snapshot(model)
    _, fwd_hooks, bwd_hooks = get_ra_caching_hooks(model)
    with pytest.raises(Oops), model.hooks(fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks):
        model(IDS)
        raise Oops
    # Tensors of a pass without a backward are those that the model keeps by itself.
    assert [key for key in changes(before, snapshot(model)) if key[-1] != "tensors"] == []


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_model_can_be_copied_after_a_run(arch, kind, fresh):
    model = fresh(arch, kind)
    _, ra = run_with_ra(model, IDS, target=TARGET)
    with pytest.raises(Oops):
        run_with_ra(model, IDS, metric=raises(Oops()))
    assert graphs(model) == []
    again = copy.deepcopy(model)
    assert torch.equal(run_with_ra(again, IDS, target=TARGET)[1].stack(), ra.stack())


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_frozen_model_can_be_copied_after_ones_own_backward_pass(arch, kind, fresh):
    model = fresh(arch, kind)
    for parameter in torch.nn.Module.parameters(model):
        parameter.requires_grad_(False)
    run_with_ra(model, IDS, target=TARGET)
    _, fwd_hooks, bwd_hooks = get_ra_caching_hooks(model)
    with model.hooks(fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks):
        model(IDS)[:, -1, TARGET].sum().backward()
    assert graphs(model) == []
    copy.deepcopy(model)


@pytest.mark.parametrize("kind", KINDS)
def test_train_mode_without_dropout_is_kept(kind, fresh):
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = used(fresh("gpt2", kind, **options).train())
    before = snapshot(model)
    run_with_ra(model, IDS, target=TARGET)
    assert changes(before, snapshot(model)) == {}
    assert model.training
