"""Cuts where the model only shows its pattern: architectures of all kinds, and what is refused."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from arch_models import load_bridge, open_model, write
from cuts import as_edges, boxed, cutting
from oracle import nll
from patches import IDS, POS, TARGET, keeping, logits_with, pattern_of
from ra_lens import run_with_ra
from ra_lens.errors import UnsupportedModel
from ra_lens.knockouts import Edge, knockout_hooks
from ra_lens.model import load_folder
from ra_lens.patching import through_z
from tiny_models import CASES, N_HEADS, OBSERVE_ONLY, every_model, random_ids, relative

OBSERVED = sorted(OBSERVE_ONLY & set(CASES))
pytestmark = pytest.mark.skipif(not OBSERVED, reason="no TransformerBridge here")

V, Z = "blocks.1.attn.hook_v", "blocks.1.attn.hook_z"
ARCHS = {
    "bert": {"position": 2},  # the output of its attention is normalised
    "t5": {},  # three kinds of attention, biases of positions
    "gpt_neo": {},  # windows
    "laguna": {},  # a gate, heads that differ between layers, grouped heads
    "bart": {},
    "gemma4": {},  # values normalised after their hook
    "gpt_oss": {},  # in the path, with attention sinks
    "gemma2": {},  # in the path, with windows and a score cap
}


def opened(arch, tmp_path):
    """A bridge of an architecture and Hugging Face's own model of the same folder."""
    load_bridge(arch, tmp_path)  # skips where there is none
    folder = write(arch, tmp_path / "own")
    try:
        model = load_folder(folder, kind="TransformerBridge", device="cpu")
        model(random_ids(1, 4), **decoder_of(arch)[0])
    except Exception:
        pytest.skip(f"this TransformerLens does not run {arch}")
    return model, open_model(arch, folder)


def decoder_of(arch, n=1):
    if arch not in ("t5", "bart"):
        return {}, {}
    ids = torch.cat([torch.full((n, 1), 59), random_ids(n, 4, seed=2)], dim=1)
    return {"decoder_input": ids}, {"decoder_input_ids": ids}


@pytest.mark.parametrize("renormalise", [True, *every_model(False)])
@pytest.mark.parametrize(
    "arch", ["bert", "laguna", "gpt_oss", *every_model("gpt_neo", "t5", "bart", "gemma4", "gemma2")]
)
def test_logits_and_gradients_are_those_of_hugging_face(arch, renormalise, tmp_path):
    model, oracle = opened(arch, tmp_path)
    inputs, theirs = decoder_of(arch, 3)
    options = {"target": TARGET, **ARCHS[arch], **inputs}
    _, ra = run_with_ra(model, IDS, **options)
    # In all layers, those of the encoder, the decoder and between them too.
    rows = [
        [cell for i in ra.sites for cell in boxed([i], [0, 1], queries, keys)]
        for queries, keys in (([3, 4], [1, 2]), ([], []), ([2, 4], [0]))
    ]
    hooks = knockout_hooks(model, list(map(as_edges, rows)), renormalise=renormalise)

    def edit(site, pattern):
        # What an attention sink has, a row lacks; it takes part in the renormalising.
        if not renormalise or arch != "gpt_oss":
            return cutting(rows, renormalise=renormalise)(site, pattern)
        left = cutting(rows, renormalise=False)(site, pattern)
        gone = (pattern - left).sum(-1, keepdim=True)
        return left / (1 - gone)

    wanted, plain = (oracle.logits(IDS, edit=one, **theirs) for one in (edit, None))
    found = logits_with(model, hooks, **inputs)
    assert float((found - wanted).norm() / (wanted - plain).norm()) < 1e-4
    assert float((wanted - plain).norm() / plain.norm()) > 1e-3
    assert torch.equal(found[1], logits_with(model, [], **inputs)[1])
    _, cut = run_with_ra(model, IDS, fwd_hooks=hooks, **options)
    at = options.get("position", -1)

    def loss(logits):
        return nll(*[TARGET] * 3)(logits[:, : at + 1] if at >= 0 else logits)

    gradients, _ = oracle.score_gradients(IDS, loss, edit=edit, **theirs)
    for (layer, site), gradient in zip(ra.sites.items(), gradients, strict=True):
        assert relative(cut["ra", layer], site.scale * gradient) < 1e-5
    assert relative(cut["ra", 0], ra["ra", 0]) > 1e-3


def test_values_that_are_not_shown(tmp_path):
    model = load_bridge("jetmoe", tmp_path)
    _, ra = run_with_ra(model, IDS, target=TARGET)
    assert ra.sites[0].observe_only
    needed = r"no edge can be cut of layer 0: its hook_pattern only shows.*JetMoE.*other layers\."
    with pytest.raises(UnsupportedModel, match=needed):
        knockout_hooks(model, Edge(0, 1, 3, 1))


# ---- of one model -------------------------------------------------------------------------------


@pytest.fixture(params=OBSERVED, ids="-".join)
def case(request):
    return request.param


@pytest.fixture
def model(case, shared):
    model = shared(*case)
    run_with_ra(model, IDS, target=TARGET)
    return model


def cut_of(model):
    cells = boxed([0, 1, 2], [0, 2], [3, 5], [1, 2])
    return knockout_hooks(model, as_edges(cells)), cutting([cells] * 3)


def test_the_route_is_z(model):
    hooks, _ = cut_of(model)
    names = [name.rpartition(".")[2] for name, _ in hooks]
    assert names == ["hook_v", "hook_z", "hook_pattern", "hook_out"] * 3


def test_a_compatible_bridge_cuts_once(case, fresh, reference):
    # There a hook fires once for each name of its hook point.
    model = fresh(*case)
    model.enable_compatibility_mode(disable_warnings=True)
    run_with_ra(model, IDS, target=TARGET)
    hooks, edit = cut_of(model)
    wanted = reference(case[0]).logits(IDS, edit=edit).log_softmax(-1)
    assert relative(logits_with(model, hooks).log_softmax(-1), wanted) < 1e-4


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(lambda hooks: [(Z, lambda z, hook: 0.5 * z), *hooks], id="z edited first"),
        pytest.param(lambda hooks: [*hooks, (V, lambda v, hook: 0.5 * v)], id="values edited last"),
        pytest.param(lambda hooks: [(Z, lambda z, hook: z * float("nan")), *hooks], id="nan"),
    ],
)
def test_z_that_is_not_pattern_times_values_is_refused(model, before):
    hooks, _ = cut_of(model)
    needed = (
        r"layer 1 is observe-only.*pattern times values differs from z by .*cutting edges through z"
        r".*gates or normalises.*put the cut before hooks that edit z, and after hooks that edit v"
    )
    plain, wanted = logits_with(model, []), logits_with(model, hooks)
    with pytest.raises(UnsupportedModel, match=needed):
        logits_with(model, before(hooks))
    # Nothing of the pass that failed is left in the next.
    assert torch.equal(logits_with(model, []), plain)
    assert torch.equal(logits_with(model, hooks), wanted)


def test_values_edited_before_the_cut_are_the_values(model, case, reference):
    hooks, _ = cut_of(model)
    # Rows of A' − A sum to 0, so a constant added to all values adds what it adds without a cut.
    shift = [(V, lambda v, hook: v + 0.5)]
    moved = logits_with(model, [*shift, *hooks]) - logits_with(model, shift)
    assert float(moved.norm()) > 0.1
    first_only = [(V, lambda v, hook: v * torch.eye(POS)[0][None, :, None, None])]
    none_there = knockout_hooks(model, as_edges(boxed([1], [0], [3], [1])), renormalise=False)
    found = logits_with(model, [*first_only, *none_there])
    assert relative(found, logits_with(model, first_only)) < 1e-6


@pytest.mark.filterwarnings("ignore:A hook on .* returned a modified tensor")  # TransformerLens 4
def test_a_pattern_edited_in_vain_is_told(model):
    hooks, _ = cut_of(model)

    def halve(pattern, hook):
        return 0.5 * pattern

    with pytest.raises(UnsupportedModel, match=r"layer 1 is observe-only"):
        logits_with(model, [(pattern_of(1), halve), *hooks])

    def nudge(pattern, hook):
        return pattern * (1 + 1e-5)  # as a rounding would

    with pytest.raises(UnsupportedModel, match=r"another pattern than the one that was cut.*put"):
        logits_with(model, [(pattern_of(1), nudge), *hooks])
    assert torch.equal(
        logits_with(model, [*hooks, (pattern_of(1), halve)]), logits_with(model, hooks)
    )


def test_values_and_z_that_never_fire_are_missed(model):
    hooks, _ = cut_of(model)
    silent = [(name, hook) for name, hook in hooks if not name.endswith(("hook_v", "hook_z"))]
    with pytest.raises(UnsupportedModel, match=r"did not fire before it, so edges cannot be cut"):
        logits_with(model, silent)


def test_fused_attention_has_no_pattern_to_cut(case, fresh):
    model = fresh(*case)
    run_with_ra(model, IDS, target=TARGET)
    hooks, _ = cut_of(model)
    model.original_model.config._attn_implementation = "sdpa"
    shown = {}
    logits_with(model, [keeping(pattern_of(0), shown)])
    if shown:
        pytest.skip("this architecture computes its pattern all the same")
    needed = r"no pattern of shape \(3, 4, 6, 6\) was found.*'eager' and without torch\.compile"
    with pytest.raises(UnsupportedModel, match=needed):
        logits_with(model, hooks)


def test_a_pass_that_failed_between_z_and_the_pattern_is_forgotten(model):
    hooks, _ = cut_of(model)
    wanted = logits_with(model, hooks)
    constant = torch.randn(3, POS, N_HEADS, model.cfg.d_head)

    def stop(z, hook):
        raise KeyboardInterrupt

    # The same values, tensor and all, in every pass: nothing but what was dropped tells them apart.
    put = (V, lambda v, hook: constant)
    alike = logits_with(model, [put, *hooks])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            logits_with(model, [put, *hooks, (Z, stop)])
        assert torch.equal(logits_with(model, [put, *cut_of(model)[0]]), alike)
        assert torch.equal(logits_with(model, [put, *hooks]), alike)
    assert torch.equal(logits_with(model, hooks), wanted)


def test_no_values_are_held_when_the_hooks_are_gone(model):
    hooks, _ = cut_of(model)
    seen = []

    def stop(z, hook):
        seen.append(weakref.ref(z))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        logits_with(model, [*hooks, (Z, stop)])
    assert len(through_z._ledgers) > 0  # that of the layer that was stopped
    del hooks
    gc.collect()
    assert len(through_z._ledgers) == 0
    assert [one() for one in seen] == [None]
