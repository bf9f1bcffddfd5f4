"""Models of transformers, as objects: the same logits, nothing shared, and nothing left on them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from ra_lens import load_model, run_with_ra
from ra_lens.errors import BadInput
from saved_models import randomise
from tiny_models import KINDS, N_LAYERS, config, random_ids, relative, text, tokenizer

IDS = random_ids(2, 6)
PEFT_IS_OLDER = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def hugging_face(arch: str) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(config(arch)).eval()
    randomise(model, seed=1)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: Any, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_its_logits_are_those_of_the_object(arch, kind):
    mine = hugging_face(arch)
    model = load_model(mine, tokenizer=tokenizer(arch), kind=kind, device="cpu")
    assert type(model).__name__ == kind
    assert relative(logits(model), logits(mine)) < 1e-5
    assert model.cfg.model_name == type(mine).__name__
    assert model.to_tokens(text([4, 5]))[0, -2:].tolist() == [4, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_shared_with_the_object_and_nothing_left_on_it(kind):
    mine = hugging_face("llama").train()
    words = tokenizer("llama")
    before, settings = state(mine), mine.config.to_dict()
    random = torch.random.get_rng_state()
    model = load_model(mine, tokenizer=words, kind=kind, device="cpu")
    assert torch.equal(random, torch.random.get_rng_state())
    mine_at = {value.untyped_storage().data_ptr() for value in mine.state_dict().values()}
    its_at = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    assert not mine_at & its_at
    run_with_ra(model, IDS, target=4)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    assert same(mine, before)
    assert mine.config.to_dict() == settings
    assert mine.training
    assert all(value.requires_grad and value.grad is None for value in mine.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in mine.modules())
    assert words.padding_side == tokenizer("llama").padding_side


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_type_asked_for(kind):
    mine = hugging_face("llama").double()
    model = load_model(mine, tokenizer=tokenizer("llama"), kind=kind, device="cpu")
    assert model.W_E.dtype == torch.float32
    half = load_model(
        mine, tokenizer=tokenizer("llama"), kind=kind, device="cpu", dtype=torch.bfloat16
    )
    assert half.W_E.dtype == torch.bfloat16
    assert mine.dtype == torch.float64


def test_the_hooks_of_the_object_are_not_the_models():
    mine = hugging_face("gpt2")
    calls: list[int] = []
    mine.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    for kind in KINDS:
        logits(load_model(mine, tokenizer=tokenizer("gpt2"), kind=kind, device="cpu"))
    assert not calls


def test_its_name_is_where_it_was_loaded_from():
    mine = hugging_face("gpt2")
    mine.config._name_or_path = "someone/their-model"
    assert load_model(mine, tokenizer=tokenizer("gpt2")).cfg.model_name == "their-model"


def lora(**options: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, **options
    )


@PEFT_IS_OLDER
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_place", [False, True])
def test_adapters_are_merged_into_the_copy(in_place, kind):
    peft = pytest.importorskip("peft")
    plain = hugging_face("llama")
    if in_place:
        mine = copy.deepcopy(plain)
        mine.add_adapter(lora())
    else:
        mine = peft.get_peft_model(copy.deepcopy(plain), lora())
    mine.eval()
    before, wanted = state(mine), logits(mine)
    assert relative(wanted, logits(plain)) > 0.1  # the adapters do something
    model = load_model(mine, tokenizer=tokenizer("llama"), kind=kind, device="cpu")
    assert relative(logits(model), wanted) < 1e-5
    assert same(mine, before)
    assert torch.equal(logits(mine), wanted)
    assert len(run_with_ra(model, IDS, target=4)[1].layers) == N_LAYERS


@PEFT_IS_OLDER
def test_adapters_that_cannot_be_merged_are_refused():
    peft = pytest.importorskip("peft")
    learned = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    mine = peft.get_peft_model(hugging_face("llama"), learned)
    with pytest.raises(BadInput, match=r"adapters of this PeftModel.*cannot be merged.*get_base_m"):
        load_model(mine, tokenizer=tokenizer("llama"))


def test_what_cannot_be_copied_is_refused():
    words = tokenizer("gpt2")
    with pytest.raises(BadInput, match=r"GPT2LMHeadModel without its tokenizer.*AutoTokenizer"):
        load_model(hugging_face("gpt2"))
    with pytest.raises(BadInput, match=r"found a Linear; give a model of transformers"):
        load_model(torch.nn.Linear(2, 2), tokenizer=words)
    with pytest.raises(BadInput, match=r"no numbers at transformer\.wte\.weight.*Load it whole"):
        load_model(hugging_face("gpt2").to("meta"), tokenizer=words)
    quantised = hugging_face("gpt2")
    weight = torch.zeros_like(quantised.transformer.h[0].mlp.c_fc.weight, dtype=torch.int8)
    quantised.transformer.h[0].mlp.c_fc.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(BadInput, match=r"quantised weights \(.*c_fc\.weight is int8\).*dequantize"):
        load_model(quantised, tokenizer=words)
    with pytest.raises(BadInput, match=r"found tokenizer= with 'gpt2', which brings its own"):
        load_model("gpt2", tokenizer=words)
