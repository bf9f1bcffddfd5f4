"""Models whose layers lie on several devices: here accelerate moves weights in and out."""

from __future__ import annotations

import accelerate
import pytest
import torch
import transformers

from ra_lens import check_model, run_with_ra
from ra_lens.model import load_folder
from tiny_models import KINDS, N_LAYERS, random_ids, relative

BRIDGE = "TransformerBridge"
pytestmark = pytest.mark.skipif(BRIDGE not in KINDS, reason="no TransformerBridge here")
IDS, TARGETS = random_ids(2, 6), [5, 11]
LAYERS = {"llama": "model.layers", "opt": "model.decoder.layers"}


def dispatched(arch, folder, tmp_path, where):
    """The bridge of a model whose second layer accelerate keeps `where` until it is used."""
    from transformer_lens.model_bridge import TransformerBridge

    hf_model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder(arch)), attn_implementation="eager"
    )
    devices = {"": "cpu", f"{LAYERS[arch]}.1": where}
    hf_model = accelerate.dispatch_model(
        hf_model, devices, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    try:
        return TransformerBridge.boot_transformers(str(folder(arch)), hf_model=hf_model).eval()
    except ValueError as refusal:
        if "offload" not in str(refusal):
            raise
        pytest.skip("this TransformerLens refuses weights on disk")


def parameters_of(model):
    return {
        name: (p.device, p.requires_grad, p.dtype)
        for name, p in torch.nn.Module.named_parameters(model.original_model)
    }


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("arch", LAYERS)
def test_maps_and_patches_are_those_of_the_model_in_one_place(arch, where, folder, tmp_path):
    model = dispatched(arch, folder, tmp_path, where)
    plain = load_folder(folder(arch), kind=BRIDGE, device="cpu")
    before = parameters_of(model)
    assert any(p.device.type == "meta" for p in model.original_model.parameters()) == (
        where == "disk"
    )
    _, wanted = run_with_ra(plain, IDS, target=TARGETS)
    for _ in range(2):
        _, ra = run_with_ra(model, IDS, target=TARGETS)
        for layer in range(N_LAYERS):
            for kind in ("ra", "pattern", "pattern_grad"):
                assert relative(ra[kind, layer], wanted[kind, layer]) < 1e-6
                assert ra[kind, layer].device.type == "cpu"
    assert parameters_of(model) == before
    hooks = wanted.mean().patch_hooks(scale=-10.0)
    with torch.no_grad():
        found = model.run_with_hooks(IDS, fwd_hooks=hooks)
        assert relative(found, plain.run_with_hooks(IDS, fwd_hooks=hooks)) < 1e-6
        assert relative(found, plain(IDS)) > 1e-3
    report = check_model(model)
    assert report.ok
    assert report.logits_error < 1e-5
    assert parameters_of(model) == before
