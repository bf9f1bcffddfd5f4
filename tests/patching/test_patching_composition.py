"""Patches beside TransformerLens's own activation patching: that of a model which is patched."""

from __future__ import annotations

import pytest
import torch

from ra_lens import run_with_ra
from tiny_models import CASES, N_HEADS, OBSERVE_ONLY, every_model, random_ids

POS, TARGET = 6, 8
IDS = random_ids(2, POS)


def by_position(table, name, clean):
    def at(layer, pos):
        def put(value, hook):
            value = value.clone()
            value[:, pos] = clean[name, layer][:, pos]
            return value

        return put

    return [(i, at(*i)) for i in [(0, 1), (1, POS - 1), (2, 3)]]


def by_head(table, name, clean):
    def at(layer, head):
        def put(value, hook):
            value[:, :, head] = clean[name, layer][:, :, head]

        return put

    return [(i, at(*i)) for i in [(0, 1), (1, 0), (2, table.shape[1] - 1)]]


def by_head_and_position(table, name, clean):
    def at(layer, pos, head):
        def put(value, hook):
            value = value.clone()
            value[:, pos, head] = clean[name, layer][:, pos, head]
            return value

        return put

    return [(i, at(*i)) for i in [(0, 1, 1), (1, POS - 1, 0), (2, 3, 1)]]


def by_pattern(table, name, clean):
    def at(layer, head):
        def put(value, hook):
            value[:, head] = clean[name, layer][:, head]

        return put

    return [(i, at(*i)) for i in [(0, 1), (1, 0), (2, N_HEADS - 1)]]


ACT_PATCH = {
    "get_act_patch_resid_pre": ("resid_pre", by_position),
    "get_act_patch_attn_out": ("attn_out", by_position),
    "get_act_patch_mlp_out": ("mlp_out", by_position),
    "get_act_patch_attn_head_out_all_pos": ("z", by_head),
    "get_act_patch_attn_head_q_all_pos": ("q", by_head),
    "get_act_patch_attn_head_v_all_pos": ("v", by_head),
    "get_act_patch_attn_head_out_by_pos": ("z", by_head_and_position),
    "get_act_patch_attn_head_pattern_all_pos": ("pattern", by_pattern),
}


SOME = (
    "get_act_patch_resid_pre",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_pattern_all_pos",
)
FUNCTIONS = [*SOME, *every_model(*(name for name in ACT_PATCH if name not in SOME))]
PATCHED = [(arch, kind) for arch, kind in CASES if arch in ("llama", "opt")]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("arch", "kind"), PATCHED)
@pytest.mark.filterwarnings("ignore:A hook on .* returned a modified tensor")  # TransformerLens 4
def test_activation_patching_of_a_patched_model(arch, kind, function, shared):
    import transformer_lens.patching as activation_patching

    name, by_hand = ACT_PATCH[function]
    if name == "pattern" and (arch, kind) in OBSERVE_ONLY:
        pytest.skip("TransformerLens only shows the pattern of this model, and patches nothing")
    model, corrupted = shared(arch, kind), random_ids(1, POS, seed=9)
    patch = getattr(activation_patching, function)
    _, ra = run_with_ra(model, IDS, target=TARGET)
    hooks = ra.mean().patch_hooks(scale=-20.0)
    with torch.no_grad():
        _, clean = model.run_with_cache(IDS[:1])

    def metric(logits):
        return logits[0, -1, TARGET]

    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        table = patch(model, corrupted, clean, metric)
    place = "" if name in ("resid_pre", "attn_out", "mlp_out") else "attn."
    for index, put in by_hand(table, name, clean):
        hook = (f"blocks.{index[0]}.{place}hook_{name}", put)
        with torch.no_grad():
            wanted = metric(model.run_with_hooks(corrupted, fwd_hooks=[*hooks, hook]))
            plain = metric(model.run_with_hooks(corrupted, fwd_hooks=[hook]))
        assert float(table[index]) == pytest.approx(float(wanted), rel=1e-4, abs=1e-4)
        assert abs(float(wanted - plain)) > 1e-3
