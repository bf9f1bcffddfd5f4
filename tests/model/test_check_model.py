"""`check_model`: what it says of models that are known, and that it says when one is broken."""

from __future__ import annotations

import pytest
import torch

from arch_models import BRIDGE, load_bridge
from left_behind import changes, snapshot
from ra_lens import check, check_model, run_with_ra
from ra_lens.errors import UnsupportedModel
from tiny_models import CASES, D_HEAD, KINDS, N_LAYERS, OBSERVE_ONLY, random_ids


@pytest.fixture
def load(tmp_path):
    return lambda arch: load_bridge(arch, tmp_path)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_known_models_are_told_as_they_are(arch, kind, fresh):
    model = fresh(arch, kind)
    with torch.no_grad():
        model(random_ids(1, 4))  # TransformerBridge attaches hooks of its own: let it
    before = snapshot(model)
    report = check_model(model)
    assert changes(before, snapshot(model)) == {}
    assert report.ok
    assert report.model_class == kind
    observed = (arch, kind) in OBSERVE_ONLY
    for layer, row in enumerate(report.sites):
        assert (row.layer, row.label) == (layer, f"layer {layer}")
        assert row.hook == f"blocks.{layer}.attn.hook_pattern"
        assert row.observe_only is observed
        assert row.patches == ("z" if observed else "pattern")
        assert row.scale == pytest.approx(D_HEAD**-0.5, rel=1e-6)
        assert (row.n_heads, row.n_key_value_heads) == (4, 2 if arch == "llama" else 4)
        assert row.notes == ()
    if kind == BRIDGE:
        assert report.logits_error < 1e-5
    else:
        assert report.logits_error is None
    assert check_model(model) is report
    assert check_model(model, prompt=random_ids(1, 3)) is not report


@pytest.mark.parametrize(("arch", "kind"), [c for c in CASES if c[0] == "llama"])
def test_the_report_reads_as_a_table(arch, kind, shared):
    report = check_model(shared(arch, kind))
    text = str(report)
    assert f"({kind}, float32, reads left to right)" in text
    assert f"0…{N_LAYERS - 1}" in text
    assert "blocks.{…}.attn.hook_pattern" in text
    assert "in the path" in text
    assert "Nothing speaks against" in text
    frame = report.to_dataframe()
    assert list(frame["layer"]) == list(range(N_LAYERS))
    assert set(frame["patches"]) == {"pattern"}


@pytest.mark.parametrize(
    ("arch", "patches", "notes"),
    [
        ("gpt_oss", "pattern", "attention sinks"),
        ("afmoe", "z", "gated (sigmoid)"),
        ("jetmoe", "refused", ""),
        ("bert", "z", "both directions"),
        ("bitnet", "pattern", "z is not pattern times values"),
        ("gemma4", "z", ""),
    ],
)
def test_what_is_unusual_is_noted(arch, patches, notes, load):
    report = check_model(load(arch))
    assert report.ok
    assert {row.patches for row in report.sites} == {patches}
    assert all(notes in "; ".join(row.notes) for row in report.sites)
    if patches == "refused":
        assert "no hook point shows the values" in str(report)


def test_encoder_decoders_have_a_row_for_each_attention(load):
    report = check_model(load("bart"))
    assert report.ok
    labels = ["encoder 0", "encoder 1", "decoder 0", "decoder 0 cross", "decoder 1"]
    assert [row.label for row in report.sites] == [*labels, "decoder 1 cross"]
    assert "decoder_blocks.0.cross_attn.hook_pattern" in str(report)


def test_logits_that_are_not_hugging_faces_are_a_problem(load):
    # TransformerLens scales the scores of this model although its configuration says not to.
    report = check_model(load("gpt2_unscaled"))
    assert not report.ok
    assert report.logits_error > 0.01
    assert "PROBLEM: the logits differ from those of the Hugging Face model by" in str(report)


@pytest.mark.filterwarnings("ignore:BitNetArchitectureAdapter does not support")
@pytest.mark.parametrize(
    ("arch", "said", "way_out"),
    [
        ("gpt_oss", "rows of the pattern do not sum to 1", {"fold_value_biases": False}),
        ("bitnet", "BitNet quantises them", {"no_processing": True}),
    ],
)
def test_processing_that_breaks_a_model_is_a_problem(arch, said, way_out, load):
    ids = torch.arange(3, 9)[None]

    def log_probs(model):
        with torch.no_grad():
            return model(ids).log_softmax(-1)

    model = load(arch)
    assert check_model(model).ok
    wanted = log_probs(model)
    model.enable_compatibility_mode(disable_warnings=True)
    assert (log_probs(model) - wanted).norm() > 1e-3 * wanted.norm()
    assert said in " ".join(check_model(model).problems)
    model = load(arch)
    model.enable_compatibility_mode(disable_warnings=True, **way_out)
    assert (log_probs(model) - wanted).norm() < 1e-5 * wanted.norm()
    assert check_model(model).ok


@pytest.mark.parametrize(("arch", "ok"), [("opt", False), ("gpt_oss", True)])
def test_an_edit_that_does_not_do_what_the_maps_say_is_told(arch, ok, load, monkeypatch):
    model = load(arch)
    assert check_model(model).ok
    honest = check.patch_hooks
    monkeypatch.setattr(
        check, "patch_hooks", lambda maps, sites, scale: honest(maps, sites, scale=0 * scale)
    )
    report = check_model(model, prompt=torch.arange(1, 9)[None])
    assert report.ok is ok
    if ok:  # a mixture of experts, where it can be chance
        assert "the loss is not smooth near these tokens" in report.notes[0]
    else:
        assert "edit of the patterns changed the loss by 0 instead of" in report.problems[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_that_fails_is_told_as_such(kind, fresh):
    model = fresh("gpt2", kind)

    def fail(module, args):
        raise RuntimeError("no kernel for this")

    handle = model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(UnsupportedModel, match=r"forward pass of .* fails in .*no kernel for this"):
        check_model(model)
    handle.remove()
    assert check_model(model).ok


@pytest.mark.every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_no_problem(kind, dtype, fresh):
    report = check_model(fresh("llama", kind, dtype))
    assert report.ok
    assert report.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("kind", KINDS)
def test_a_check_tells_later_runs_the_route(kind, fresh):
    model = fresh("opt", kind)
    check_model(model)
    _, ra = run_with_ra(model, random_ids(1, 4), target=3)
    assert [s.observe_only for s in ra.sites.values()] == [kind == BRIDGE] * N_LAYERS
