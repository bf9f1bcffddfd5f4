"""Steps on architectures that need something of their own, against their own weights, changed.

The oracle is TransformerLens: autograd gives the gradient of its parameters, which a second copy of
the model is moved against, bias and all else as they were.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

from arch_models import BRIDGE, load_bridge
from conformance.variants import BASE, VARIANTS
from patches import logits_with
from ra_lens import run_with_ra
from ra_lens.errors import NotStored, UnsupportedModel
from ra_lens.steps import gradient_step
from ra_lens.vjp import WEIGHTS
from saved_models import randomise
from tiny_models import KINDS, every_model

IDS = torch.randint(3, 28, (2, 6), generator=torch.Generator().manual_seed(1))
OTHER = torch.randint(3, 28, (3, 8), generator=torch.Generator().manual_seed(2))
TARGETS = [5, 11]


def loss_of(model, **inputs):
    log_p = model(IDS, **inputs)[:, -1].log_softmax(-1)
    return -sum(log_p[i, target] for i, target in enumerate(TARGETS)) / len(TARGETS)


def moved(model, parameters, eta, **inputs):
    """Move a copy of a model against the gradient of some of its parameters."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss_of(model, **inputs), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= eta * gradient


def fits(found, wanted, plain):
    assert float((wanted - plain).norm()) > 1e-3 * float(plain.norm())
    assert float((found - wanted).norm()) < 1e-5 * float(plain.norm())


# ---- TransformerBridge --------------------------------------------------------------------------

ARCHS = ["qwen3", "gemma2", *every_model("gpt_neox", "olmo2", "bloom", "mpt", "codegen", "phi3")]
ARCHS += every_model("falcon_rope_mqa", "laguna", "gpt_neo", "starcoder2", "cohere", "gpt_oss")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ARCHS)
def test_a_bridge_does_what_changed_weights_do(arch, tmp_path):
    model, other = (load_bridge(arch, tmp_path) for _ in range(2))
    _, ra = run_with_ra(model, IDS, target=TARGETS, vectors=True)
    plain = logits_with(other, (), OTHER)
    eta = 0.05
    attentions = [other.get_submodule(site.prefix) for site in ra.sites.values()]
    matrices = [getattr(a, name).original_component for a in attentions for name in "qkvo"]
    moved(other, [matrix.weight for matrix in matrices], eta)
    wanted = logits_with(other, (), OTHER)
    fits(logits_with(model, gradient_step(model, ra, None, eta), OTHER), wanted, plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.every_model
def test_an_encoder_decoder_is_stepped_in_all_its_attention(tmp_path):
    model, other = (load_bridge("bart", tmp_path) for _ in range(2))
    read = {"decoder_input": torch.tensor([[59, 4, 7], [59, 9, 3]])}
    _, ra = run_with_ra(model, IDS, target=TARGETS, vectors=True, **read)
    assert any(site.cross for site in ra.sites.values())
    plain = logits_with(other, (), IDS, **read)
    attentions = [other.get_submodule(site.prefix) for site in ra.sites.values()]
    matrices = [getattr(a, name).original_component for a in attentions for name in "qkvo"]
    moved(other, [matrix.weight for matrix in matrices], 0.05, **read)
    wanted = logits_with(other, (), IDS, **read)
    hooks = gradient_step(model, ra, None, 0.05)
    fits(logits_with(model, hooks, IDS, **read), wanted, plain)


REFUSED = {
    "deepseek_v3": r"where W_Q of layer 0 would give its product: in latent attention \(MLA\)",
    "hrm_text": r"runs several times in one forward pass",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ["deepseek_v3", *every_model("hrm_text")])
def test_what_cannot_be_exact_on_a_bridge_is_refused(arch, tmp_path):
    model = load_bridge(arch, tmp_path)
    _, ra = run_with_ra(model, IDS, target=TARGETS, vectors=True)
    with pytest.raises(UnsupportedModel, match=REFUSED[arch]):
        gradient_step(model, ra, None, 0.1)


class Rounding(torch.nn.Linear):
    """Rounds what it reads, as quantised layers do."""

    def forward(self, input):
        return super().forward((8 * input).round() / 8)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_round_what_they_read_are_refused(tmp_path):
    model = load_bridge("qwen3", tmp_path)
    _, ra = run_with_ra(model, IDS, target=TARGETS, vectors=True)
    matrix = model.get_submodule("blocks.1.attn.k").original_component
    matrix.__class__ = Rounding
    said = r"W_K of layer 1 is held by a Rounding, which does more than multiply"
    with pytest.raises(UnsupportedModel, match=said):
        gradient_step(model, ra, None, 0.1)
    assert gradient_step(model, ra, "L0H0", 0.1)


@pytest.mark.filterwarnings("ignore")
def test_inputs_split_by_head_after_the_run_are_refused_on_a_bridge(tmp_path):
    model = load_bridge("qwen3", tmp_path)
    _, ra = run_with_ra(model, IDS, target=TARGETS, vectors=True)
    model.set_use_split_qkv_input(True)
    with pytest.raises(UnsupportedModel, match=r"Switch off use_split_qkv_input and use_attn_in"):
        logits_with(model, gradient_step(model, ra, None, 0.1), OTHER)


# ---- HookedTransformer --------------------------------------------------------------------------

OF_VARIANTS = ["qk_norm", "grouped_query", "grouped_query_ungrouped"]
OF_VARIANTS += every_model("rotary", "shortformer", "parallel", "no_norm", "result", "clip_qkv")
OF_VARIANTS += every_model("attention_only", "score_softcap", "attention_sinks", "local_windows")
needs_hooked = pytest.mark.skipif("HookedTransformer" not in KINDS, reason="TransformerLens 4")


def hooked(name: str) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    options = {**BASE, **VARIANTS[name], "dtype": torch.float64, "seed": 0}
    if not options.keys() <= set(inspect.signature(HookedTransformerConfig).parameters):
        pytest.skip(f"this HookedTransformer has no {name}")
    model = HookedTransformer(HookedTransformerConfig(**options))
    randomise(model, seed=3)
    return model.eval()


@needs_hooked
@pytest.mark.parametrize("variant", OF_VARIANTS)
def test_a_hooked_transformer_does_what_changed_weights_do(variant):
    model = hooked(variant)
    other = copy.deepcopy(model)
    _, ra = run_with_ra(model, IDS, target=TARGETS, vectors=True)
    plain = logits_with(other, (), OTHER)
    shared = "n_key_value_heads" in VARIANTS[variant]
    names = ("W_Q", "_W_K", "_W_V", "W_O") if shared else WEIGHTS
    moved(other, [getattr(block.attn, name) for block in other.blocks for name in names], 0.1)
    wanted = logits_with(other, (), OTHER)
    fits(logits_with(model, gradient_step(model, ra, None, 0.1), OTHER), wanted, plain)


@needs_hooked
def test_a_hooked_transformer_whose_inputs_are_split_later_is_stepped_the_same():
    model = hooked("standard")
    _, ra = run_with_ra(model, IDS, target=TARGETS, vectors=True)
    hooks = gradient_step(model, ra, None, 0.1)
    wanted = logits_with(model, hooks, OTHER)
    model.set_use_split_qkv_input(True)
    assert float((logits_with(model, hooks, OTHER) - wanted).norm()) < 1e-9 * float(wanted.norm())
    _, split = run_with_ra(model, IDS, target=TARGETS, vectors=True)
    with pytest.raises(NotStored, match="'query_in'"):
        gradient_step(model, split, None, 0.1)


@needs_hooked
def test_a_norm_behind_attention_leaves_no_place_for_w_o_on_a_hooked_transformer():
    model = hooked("norm_before_and_after")
    other = copy.deepcopy(model)
    _, ra = run_with_ra(model, IDS, target=TARGETS, vectors=True)
    with pytest.raises(UnsupportedModel, match=r"normalises what attention gives.*Leave W_O out"):
        gradient_step(model, ra, None, 0.1)
    names = WEIGHTS[:3]
    plain = logits_with(other, (), OTHER)
    moved(other, [getattr(block.attn, name) for block in other.blocks for name in names], 0.1)
    wanted = logits_with(other, (), OTHER)
    hooks = gradient_step(model, ra, None, 0.1, weights=names)
    fits(logits_with(model, hooks, OTHER), wanted, plain)


assert BRIDGE == "TransformerBridge"
