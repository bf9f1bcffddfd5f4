"""Hooks for one's own backward pass: several through one graph, one through several passes."""

from __future__ import annotations

import gc
import math

import pytest
import torch

from held import Held, counted, forget_older, tensors_of
from oracle import nll
from ra_lens import get_ra_caching_hooks, run_with_ra
from ra_lens.errors import UnsupportedModel
from tiny_models import (
    CASES,
    D_HEAD,
    EDITABLE,
    KINDS,
    N_HEADS,
    N_LAYERS,
    OBSERVE_ONLY,
    random_ids,
    relative,
)

SCALE = 1 / math.sqrt(D_HEAD)
POS = 7
IDS = random_ids(2, POS)
CLASSES = ([5, 11], [8, 3], [20, 30])


def loss_of(logits, targets):
    return -sum(logits[i, -1].log_softmax(-1)[t] for i, t in enumerate(targets))


@pytest.mark.parametrize("met", [False, True])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_each_backward_pass_through_one_graph_gives_its_own_maps(arch, kind, met, fresh, reference):
    model = fresh(arch, kind)
    if met:  # a run before has shown whether hook_pattern is in the path
        run_with_ra(model, IDS, target=4)
    ra, fwd_hooks, bwd_hooks = get_ra_caching_hooks(model)
    with model.hooks(fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks):
        logits = model(IDS)
        for targets in CLASSES:
            loss_of(logits, targets).backward(retain_graph=True)
            wanted = reference(arch).ra(IDS, nll(*targets), [SCALE] * N_LAYERS)
            for layer in range(N_LAYERS):
                assert relative(ra["ra", layer], wanted[layer]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_norms_follow_too_and_so_does_a_pass_between(kind, shared, reference):
    """The second backward pass through an old graph comes after another forward pass."""
    model = shared("gpt2", kind)
    ra, fwd_hooks, _ = get_ra_caching_hooks(model, store="norms")
    with model.hooks(fwd_hooks=fwd_hooks):
        first = model(IDS)
        loss_of(first, CLASSES[0]).backward(retain_graph=True)
        loss_of(model(random_ids(2, POS, seed=3)), CLASSES[0]).backward()
        other = ra.norms()
        loss_of(first, CLASSES[1]).backward()
    wanted = reference("gpt2").ra(IDS, nll(*CLASSES[1]), [SCALE] * N_LAYERS)
    wanted = torch.stack([torch.linalg.matrix_norm(r) for r in wanted], dim=1)
    assert relative(ra.norms(), wanted) < 1e-5
    assert relative(other, wanted) > 0.1


@pytest.mark.parametrize("met", [False, True])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_loss_over_two_passes_takes_a_set_of_hooks_for_each(arch, kind, met, fresh, reference):
    model = fresh(arch, kind)
    if met:
        run_with_ra(model, IDS, target=4)
    clean, corrupted = IDS, random_ids(2, POS - 1, seed=9)
    clean_ra, clean_hooks, _ = get_ra_caching_hooks(model)
    corrupted_ra, corrupted_hooks, _ = get_ra_caching_hooks(model)
    with model.hooks(fwd_hooks=clean_hooks):
        clean_logits = model(clean)
    with model.hooks(fwd_hooks=corrupted_hooks):
        corrupted_logits = model(corrupted)
    one, two = loss_of(clean_logits, CLASSES[0]), loss_of(corrupted_logits, CLASSES[1])
    (one * two.exp()).backward()

    # The product rule, with each factor from a model of its own.
    oracle, scales = reference(arch), [SCALE] * N_LAYERS
    inputs = list(zip((clean, corrupted), CLASSES[:2], strict=True))
    own = [nll(*targets)(oracle.logits(ids)) for ids, targets in inputs]
    factors = (own[1].exp(), own[0] * own[1].exp())
    for found, (ids, targets), factor in zip(
        (clean_ra, corrupted_ra), inputs, factors, strict=True
    ):
        wanted = oracle.ra(ids, nll(*targets), scales)
        for layer in range(N_LAYERS):
            assert relative(found["ra", layer], factor * wanted[layer]) < 1e-5


@pytest.mark.parametrize(("arch", "kind"), EDITABLE)
def test_one_set_for_two_passes_is_refused_with_what_to_do(arch, kind, shared):
    model = shared(arch, kind)
    _, fwd_hooks, _ = get_ra_caching_hooks(model)
    needed = (
        r"fired twice before a backward pass, and one set of hooks collects from one forward pass"
        r".*several forward passes \(clean and corrupted\) call get_ra_caching_hooks once for each"
    )
    with model.hooks(fwd_hooks=fwd_hooks), pytest.raises(UnsupportedModel, match=needed):
        loss_of(model(IDS), CLASSES[0]) + loss_of(model(IDS), CLASSES[1])


def maps_alive():
    gc.collect()
    return len(tensors_of((2, N_HEADS, POS, POS)))


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_no_pattern_outlives_the_graph_it_belongs_to(arch, kind, fresh):
    model = fresh(arch, kind)
    forget_older()
    run_with_ra(model, IDS, target=4)
    before = maps_alive()
    ra, fwd_hooks, _ = get_ra_caching_hooks(model, store="norms")
    packing = counted(lambda x: x.shape == (2, N_HEADS, POS, POS))
    with packing, model.hooks(fwd_hooks=fwd_hooks):
        loss = loss_of(model(IDS), CLASSES[0])
        loss.backward(retain_graph=True)
        assert Held.alive >= N_LAYERS
        loss.backward()
    assert float(ra.norms().min()) > 0
    assert Held.alive == 0
    if (arch, kind) not in OBSERVE_ONLY:  # there the hook on the pattern keeps it, not autograd
        assert maps_alive() == before
    del loss
    assert maps_alive() == before
