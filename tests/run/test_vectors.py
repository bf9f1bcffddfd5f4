"""Vectors of a run: against a model's own hooks and autograd; alone, padded, edited, kept."""

from __future__ import annotations

import math

import pytest
import torch

from held import forget_older, tensors_of
from oracle import nll
from ra_lens import RACache, run_with_ra, vjp
from ra_lens.errors import BadInput, NotStored
from ra_lens.model.sites import VECTOR_KINDS
from tiny_models import (
    CASES,
    D_HEAD,
    D_MODEL,
    EDITABLE,
    N_HEADS,
    N_LAYERS,
    every_model,
    random_ids,
    relative,
)

POS, TARGETS = 7, [5, 11]
IDS = random_ids(2, POS)


def own_gradients(model, names, ids=IDS, targets=TARGETS):
    """What hook points show and the gradient there, by a backward pass of the test's own."""
    shown = {}

    def show(tensor, hook, name):
        shown[name] = tensor
        return tensor

    hooks = [
        (name, lambda tensor, hook, name=name: show(tensor.view_as(tensor), hook, name))
        for name in names
    ]
    was = {p: p.requires_grad for p in model.parameters()}
    for parameter in was:
        parameter.requires_grad_(parameter.is_floating_point())
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        total = nll(*targets)(model(ids))
        gradients = torch.autograd.grad(total, [shown[name] for name in names])
    for parameter, flag in was.items():
        parameter.requires_grad_(flag)
    return {
        name: (shown[name].detach(), gradient)
        for name, gradient in zip(names, gradients, strict=True)
    }


def by_head(value, n_heads):
    return value.reshape(*value.shape[:2], n_heads, -1)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_they_are_what_hooks_of_transformer_lens_show_and_autograd_there(arch, kind, shared):
    model = shared(arch, kind)
    _, ra = run_with_ra(model, IDS, target=TARGETS, vectors=True)
    layer = N_LAYERS - 1
    site = ra.sites[layer]
    shared_heads = site.n_key_value_heads
    out = f"blocks.{layer}.hook_attn_out"
    names = {name: f"{site.prefix}.hook_{name}" for name in ("q", "k", "v", "z")}
    own = own_gradients(model, [*names.values(), out])
    for name, heads in (("q", N_HEADS), ("k", shared_heads), ("v", shared_heads)):
        assert relative(ra[f"{name}_grad", layer], by_head(own[names[name]][1], heads)) < 1e-5
    shown, gradient = own[names["z"]]
    assert relative(ra["z", layer], by_head(shown, N_HEADS)) < 1e-6
    assert relative(ra["z_grad", layer], by_head(gradient, N_HEADS)) < 1e-5
    assert relative(ra["value", layer], by_head(own[names["v"]][0], shared_heads)) < 1e-6
    assert relative(ra["attn_out_grad", layer], own[out][1]) < 1e-5
    assert ra["query_in", layer].shape == (2, POS, D_MODEL)
    if arch in ("gpt2", "opt"):  # the others rotate what these hooks show
        assert relative(ra["query", layer], by_head(own[names["q"]][0], N_HEADS)) < 1e-6
        assert relative(ra["key", layer], by_head(own[names["k"]][0], shared_heads)) < 1e-6
        assert relative(ra["query_grad", layer], ra["q_grad", layer]) < 1e-5


def test_the_sums_of_the_paper_written_out_token_by_token(shared):
    # Equations 12, 13, 14, 17, 18, 19 and 7, one number at a time, from what the loss wants of the
    # layer's output down to the weights; the last layer of a model in float64.
    kind = CASES[0][1]
    model = shared("gpt2", kind, torch.float64)
    pos, layer, head = 4, N_LAYERS - 1, 1
    _, ra = run_with_ra(model, IDS[:1, :pos], target=TARGETS[:1], vectors=True)
    at = {name: ra[name, layer][0] for name in VECTOR_KINDS}
    w_o = model.blocks[layer].attn.W_O.detach()
    scale, tokens, parts = 1 / math.sqrt(D_HEAD), range(pos), range(D_HEAD)

    def dot(a, b):
        return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))

    e = [[dot(at["attn_out_grad"][i], w_o[head, d]) for d in parts] for i in tokens]
    a = [[float(ra["pattern", layer][0, head, i, j]) for j in tokens] for i in tokens]
    g = [[dot(e[i], at["value"][j, head]) for j in tokens] for i in tokens]
    average = [sum(a[i][j] * g[i][j] for j in tokens) for i in tokens]
    r = [[scale * a[i][j] * (g[i][j] - average[i]) for j in tokens] for i in tokens]
    q, k, x = at["query"][:, head], at["key"][:, head], at["query_in"]
    on_q = [[sum(r[i][j] * float(k[j, d]) for j in tokens) for d in parts] for i in tokens]
    on_k = [[sum(r[i][j] * float(q[i, d]) for i in tokens) for d in parts] for j in tokens]
    on_v = [[sum(a[i][j] * e[i][d] for i in tokens) for d in parts] for j in tokens]
    on_w = [
        [sum(float(x[t, m]) * on_q[t][d] for t in tokens) for d in parts] for m in range(D_MODEL)
    ]
    for found, wanted in (
        (at["z_grad"][:, head], e),
        (ra["ra", layer][0, head], r),
        (at["query_grad"][:, head], on_q),
        (at["key_grad"][:, head], on_k),
        (at["value_grad"][:, head], on_v),
        (vjp.weight_gradient(ra, "W_Q", (layer, head)).matrix, on_w),
    ):
        assert relative(found, torch.tensor(wanted, dtype=torch.float64)) < 1e-10


@pytest.mark.parametrize(("arch", "kind"), EDITABLE)
def test_gradients_are_those_of_the_model_as_hooks_edit_it(arch, kind, shared):
    # A pattern to which something is added: values are then weighed with the edited pattern.
    layer = 1
    added = 0.3 * torch.rand(2, N_HEADS, POS, POS, generator=torch.Generator().manual_seed(2))
    hooks = [(f"blocks.{layer}.attn.hook_pattern", lambda pattern, hook: pattern + added)]
    _, ra = run_with_ra(
        shared(arch, kind), IDS, target=TARGETS, fwd_hooks=hooks, vectors=["value_grad", "z_grad"]
    )
    edited, e = ra["pattern", layer] + added, ra["z_grad", layer]
    groups = ra.sites[layer].n_key_value_heads
    assert relative(ra["value_grad", layer], vjp.value_grad(edited, e, groups)) < 1e-5
    assert relative(ra["value_grad", layer], vjp.value_grad(edited - added, e, groups)) > 1e-2


@pytest.mark.parametrize("side", ["left", *every_model("right")])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_in_a_padded_batch_they_are_those_of_each_prompt_alone(arch, kind, side, shared):
    model = shared(arch, kind)
    rows, targets = [IDS[0].tolist(), IDS[1, :4].tolist()], TARGETS
    width = POS - 4
    tokens = [rows[0], [0] * width + rows[1] if side == "left" else rows[1] + [0] * width]
    real = [[1] * POS, [0] * width + [1] * 4 if side == "left" else [1] * 4 + [0] * width]
    _, both = run_with_ra(
        model, torch.tensor(tokens), attention_mask=torch.tensor(real), target=targets, vectors=True
    )
    for i, row in enumerate(rows):
        _, alone = run_with_ra(model, torch.tensor([row]), target=targets[i], vectors=True)
        columns = torch.tensor(real[i]).bool()
        for kind_of in VECTOR_KINDS:
            found = both[kind_of, 0][i]
            assert relative(found[columns], alone[kind_of, 0][0]) < 2e-5, kind_of
            assert not found[~columns].any()


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_batches_recomputing_and_what_else_is_kept_change_nothing(arch, kind, shared):
    model = shared(arch, kind)
    _, ra = run_with_ra(model, IDS, target=TARGETS, vectors=True)
    _, apart = run_with_ra(model, IDS, target=TARGETS, vectors=True, batch_size=1, progress=False)
    _, again = run_with_ra(model, IDS, target=TARGETS, vectors=True, recompute=True)
    _, norms = run_with_ra(model, IDS, target=TARGETS, vectors=True, store="norms")
    for name in VECTOR_KINDS:
        for layer in range(N_LAYERS):
            for other in (apart, again, norms):
                assert relative(other[name, layer], ra[name, layer]) < 1e-5, name
    assert ("ra", 0) not in norms
    with pytest.raises(NotStored, match="store='norms'"):
        norms["ra", 0]


def test_maps_are_the_same_with_and_without(shared):
    for arch, kind in CASES:
        _, without = run_with_ra(shared(arch, kind), IDS, target=TARGETS)
        _, ra = run_with_ra(shared(arch, kind), IDS, target=TARGETS, vectors=True)
        for layer in range(N_LAYERS):
            assert relative(ra["ra", layer], without["ra", layer]) < 1e-6


def test_only_what_is_asked_for_is_kept(shared):
    _, ra = run_with_ra(shared(*CASES[0]), IDS, target=TARGETS, layers=[1], vectors="key_grad")
    kept = [name for name in ra.keys() if "hook_ra" not in name and "pattern" not in name]  # noqa: SIM118
    assert kept == ["blocks.1.attn.hook_key_grad"]
    assert "vectors" in repr(ra)
    assert ("key_grad", 1) in ra
    assert ("query", 1) not in ra
    with pytest.raises(NotStored, match=r"'query', 1.*not among the vectors= asked for"):
        ra["query", 1]
    _, ra = run_with_ra(shared(*CASES[0]), IDS, target=TARGETS)
    assert "vectors" not in repr(ra)
    with pytest.raises(NotStored, match=r"vectors=True"):
        ra["query", 1]


def test_what_cannot_be_asked_for_is_said(shared):
    model = shared(*CASES[0])
    with pytest.raises(BadInput, match=r"vectors='querry'.*give True, or some of query, key"):
        run_with_ra(model, IDS, target=TARGETS, vectors=["querry"])
    with pytest.raises(BadInput, match=r"store='mean', which keeps maps only"):
        run_with_ra(model, IDS, target=TARGETS, vectors=True, store="mean")


def test_they_are_saved_sliced_and_moved_with_the_cache(shared, tmp_path):
    _, ra = run_with_ra(shared(*CASES[0]), IDS, target=TARGETS, vectors=["query", "query_grad"])
    ra.save(tmp_path / "ra.safetensors")
    back = RACache.load(tmp_path / "ra.safetensors")
    assert list(back) == list(ra)
    second = ra.apply_slice_to_batch_dim(1)
    for name in ("query", "query_grad"):
        assert torch.equal(back[name, 2], ra[name, 2])
        assert torch.equal(second[name, 2], ra[name, 2][1])
        assert ra.to(torch.float64)[name, 2].dtype == torch.float64


def test_a_layer_cut_off_from_the_loss_has_gradients_of_zero(shared):
    model = shared(*CASES[0])

    def cut(value, hook):
        return torch.zeros_like(value)

    hooks = [(f"blocks.{layer}.hook_attn_out", cut) for layer in (0, 1)]
    _, ra = run_with_ra(model, IDS, target=TARGETS, fwd_hooks=hooks, vectors=True)
    for name in VECTOR_KINDS:
        if name.endswith("_grad"):
            assert not ra[name, 1].any(), name
            assert ra[name, 2].any(), name


@pytest.mark.parametrize(("arch", "kind"), CASES[:2])
def test_float16_gradients_are_near_those_of_float32(arch, kind, shared, fresh):
    _, exact = run_with_ra(shared(arch, kind), IDS, target=TARGETS, vectors=True)
    _, ra = run_with_ra(fresh(arch, kind, torch.float16), IDS, target=TARGETS, vectors=True)
    for name in VECTOR_KINDS:
        assert ra[name, 1].dtype == torch.float32
        assert relative(ra[name, 1], exact[name, 1]) < 0.05, name


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_the_product_of_queries_and_keys_is_the_score(arch, kind, shared):
    # log A = c q·k − log Z(row): compare differences within a row, against its first column.
    _, ra = run_with_ra(shared(arch, kind), IDS, target=TARGETS, vectors=["query", "key"])
    lower = torch.ones(POS, POS).tril().bool()
    for layer, site in ra.sites.items():
        key = ra["key", layer].repeat_interleave(N_HEADS // site.n_key_value_heads, dim=2)
        products = torch.einsum("bqhd,bkhd->bhqk", ra["query", layer], key)
        ours = site.need_scale() * (products - products[..., :1])
        scores = ra["pattern", layer].log()
        theirs = scores - scores[..., :1]
        assert relative(ours[..., lower], theirs[..., lower]) < 1e-4


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_nothing_of_the_graph_outlives_a_run(arch, kind, fresh):
    # A hook on the graph that holds a tensor of that graph would keep both for good.
    model = fresh(arch, kind)
    run_with_ra(model, IDS, target=TARGETS, vectors=True)
    forget_older()
    run_with_ra(model, IDS, target=TARGETS, vectors=True)
    for shape in ((2, POS, N_HEADS, D_HEAD), (2, POS, N_HEADS * D_HEAD), (2, POS, D_MODEL)):
        assert not [t for t in tensors_of(shape) if t.grad_fn is not None], shape
