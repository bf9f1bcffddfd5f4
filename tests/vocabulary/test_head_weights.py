"""Weights of heads, gains of norms and W_U: against Hugging Face's, and what is refused."""

from __future__ import annotations

import pytest
import torch

from arch_models import has, load_bridge
from folded import fold
from left_behind import changes, snapshot
from projected import final, layer_of, load_projected
from ra_lens.errors import UnsupportedModel
from ra_lens.model import as_lens
from ra_lens.model.gains import read_gain
from ra_lens.model.sites import WEIGHTS
from ra_lens.model.unembedding import unembedding
from ra_lens.model.weights import head_weights
from tiny_models import ANY_KIND, CASES, D_MODEL, KINDS, random_ids, relative

LAYER = 1
IDS = random_ids(7)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_weights_gains_and_unembedding_are_those_of_hugging_face(arch, kind, shared, folder):
    lens = as_lens(shared(arch, kind))
    reference = load_projected(arch, folder(arch))
    wanted = layer_of(arch, reference, LAYER, IDS, 8)
    found = head_weights(lens, lens.sites[LAYER], applied_to_values=True)
    for name in WEIGHTS:
        assert relative(found[name], wanted.weights[name]) < 1e-6, name
    for name in ("W_Q", "W_K", "W_V"):
        assert relative(found.norms[name].gain, wanted.gain) < 1e-4
        assert found.norms[name].centred == wanted.centred
    gain, centred, w_u = final(arch, reference)
    unembed = unembedding(lens)
    assert relative(unembed.norm.gain, gain) < 1e-4
    assert unembed.norm.centred == centred
    assert relative(unembed.weights, w_u) < 1e-6


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_biases_are_what_the_projections_add(arch, kind, shared, folder):
    lens = as_lens(shared(arch, kind))
    wanted = layer_of(arch, load_projected(arch, folder(arch)), LAYER, IDS, 8)
    found = head_weights(lens, lens.sites[LAYER], ["W_Q", "W_K", "W_V"])
    for name, given in (("W_Q", "q"), ("W_K", "k"), ("W_V", "v")):
        x = wanted.seen["x"]
        made = torch.einsum("td,hde->the", x, found[name].double()) + found.biases[name].double()
        assert relative(made, wanted.seen[given]) < 1e-5


@pytest.mark.parametrize("kind", ANY_KIND)
def test_scores_are_what_a_step_adds_to_the_logits(kind, shared):
    # To first order in the step, for a direction at right angles to the stream: there, the size
    # that the norm divides by stays, and what is left is the score, over that size.
    model = shared("gpt2", kind, torch.float64)
    lens = as_lens(model)
    generator = torch.Generator().manual_seed(1)
    stream, direction = torch.randn(2, D_MODEL, generator=generator, dtype=torch.float64)
    about = stream - stream.mean()
    direction = direction - direction.mean()
    direction = direction - about * (direction @ about) / (about @ about)
    step = 1e-4
    with torch.no_grad():
        ends = [
            model.unembed(model.ln_final((stream + sign * step * direction)[None, None]))[0, 0]
            for sign in (1, -1)
        ]
    slope = (ends[0] - ends[1]) / (2 * step)
    wanted = (slope - slope.mean()) * about.square().mean().sqrt()
    assert relative(unembedding(lens).scores(direction + 3.0), wanted) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_folding_and_centring_leave_the_scores(kind, fresh):
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    before = unembedding(as_lens(fresh("gpt2", kind))).scores(direction)
    options = {"fold_ln": True, "center_unembed": True, "center_writing_weights": True}
    folded = fold(fresh("gpt2", kind), kind, **options)
    assert relative(unembedding(as_lens(folded)).scores(direction), before) < 1e-4


@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_short_run_meets_no_hook_of_the_users_and_leaves_nothing(kind, fresh):
    model = fresh("gpt2", kind)
    met = []

    def count(value, hook):
        met.append(hook.name)

    model(random_ids(1, 3))  # in which a bridge attaches hooks of its own
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", count)]):
        lens, before = as_lens(model), snapshot(model)
        head_weights(lens, lens.sites[LAYER], applied_to_values=True)
        unembedding(lens)
        assert met == []
        assert changes(before, snapshot(model)) == {}
        model(random_ids(1, 3))
        assert met


@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_weight_that_the_layer_does_not_use_is_refused(kind, fresh):
    model = fresh("opt", kind)
    lens = as_lens(model)
    point = lens.hook_points[f"{lens.sites[LAYER].prefix}.hook_z"]

    def gate(_module, _args, z):
        return z * torch.linspace(1, 2, z.shape[1]).reshape(-1, *[1] * (z.ndim - 2))

    handle = point.register_forward_hook(gate)
    try:
        with pytest.raises(UnsupportedModel, match=r"layer 1 of .*heads give is not A·v"):
            head_weights(lens, lens.sites[LAYER], ["W_O"], applied_to_values=True)
    finally:
        handle.remove()
    head_weights(lens, lens.sites[LAYER], ["W_O"], applied_to_values=True)


class _Root(torch.nn.Module):
    def forward(self, x):
        return x.sign() * x.abs().sqrt()


class _Size(torch.nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return self.gain * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class _NoNorm(torch.nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("width", [5, 6])
def test_gains_of_norms_and_of_what_is_none(width):
    like = torch.zeros(1, 1, width)
    gain = torch.linspace(0.5, -2, width)
    layer, rms = torch.nn.LayerNorm(width), _Size(gain)
    with torch.no_grad():
        layer.weight.copy_(gain)
        layer.bias.fill_(0.7)
    for module, centred in ((layer, True), (rms, False)):
        found = read_gain(module, like, "it")
        torch.testing.assert_close(found.gain, gain, rtol=1e-4, atol=1e-4)
        assert found.centred == centred
    none = read_gain(_NoNorm(), like, "it")
    torch.testing.assert_close(none.gain, torch.ones(width))
    assert not none.centred
    x, y = torch.randn(2, width)
    for found in (read_gain(layer, like, "it"), none):  # the transpose
        torch.testing.assert_close(found(x) @ y, x @ found.back(y))
    with pytest.raises(UnsupportedModel, match=r"it \(_Root\) is no LayerNorm and no RMSNorm"):
        read_gain(_Root(), like, "it")


@pytest.mark.every_model
@pytest.mark.parametrize(
    ("arch", "names", "message"),
    [
        ("gemma2", ["W_O"], "stands between it and the residual stream"),
        ("deepseek_v3", ["W_Q"], "it has no W_Q of one matrix for each head"),
        ("bert", WEIGHTS, None),
    ],
)
def test_what_has_no_plain_matrices_is_refused(arch, names, message, tmp_path):
    if not has(arch):
        pytest.skip(f"no {arch} here")
    lens = as_lens(load_bridge(arch, tmp_path))
    if message is None:
        with pytest.raises(UnsupportedModel, match="reads both ways"):
            unembedding(lens)
        return
    with pytest.raises(UnsupportedModel, match=message):
        head_weights(lens, lens.sites[0], names)
