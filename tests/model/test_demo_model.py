"""The embedded model, as each class that this TransformerLens has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import transformers.utils.logging
from transformers import GPT2LMHeadModel

from ra_lens import load_demo_model, run_with_ra
from ra_lens.errors import BadInput
from ra_lens.model.hugging_face import no_loading_bars
from ra_lens.model.loading import demo_model_folder
from ra_lens.tasks import load_task
from tiny_models import KINDS, relative

PROMPTS = [p.text for p in load_task("country-capital").sample(6, shots=2, seed=3)]
ANSWERS = [p.answer for p in load_task("country-capital").sample(6, shots=2, seed=3)]


@pytest.fixture(scope="module")
def models():
    return {kind: load_demo_model(kind=kind) for kind in KINDS}


def test_every_kind_has_the_logits_of_the_weights_shipped(models):
    reference = GPT2LMHeadModel.from_pretrained(demo_model_folder(), attn_implementation="eager")
    for model in models.values():
        tokens = model.to_tokens(PROMPTS)
        assert tokens[0, 0] == model.tokenizer.bos_token_id != tokens[0, 1]
        with torch.no_grad():
            assert (model(tokens) - reference(tokens).logits).abs().max() < 1e-4


def test_every_kind_has_the_same_maps_and_the_right_answers(models):
    runs = {kind: run_with_ra(model, PROMPTS, target=ANSWERS) for kind, model in models.items()}
    (_, first), *others = runs.values()
    for _, other in others:
        assert relative(other.stack(), first.stack()) < 1e-4
    for kind, (logits, ra) in runs.items():
        assert ra.info.prepended == "<|endoftext|>"
        assert ra.info.model_name == "ra-lens-demo"
        top = [models[kind].to_string([i]) for i in logits[:, -1].argmax(-1).tolist()]
        assert top == ANSWERS


def test_maps_of_a_padded_batch_are_those_of_each_prompt_alone(models):
    texts = [PROMPTS[0], "The capital city of Italy is", "Q: Italy\nA:"]
    for model in models.values():
        for side in ("left", "right"):
            _, both = run_with_ra(model, texts, target=" Rome", padding_side=side)
            for i, text in enumerate(texts):
                _, alone = run_with_ra(model, text, target=" Rome")
                start, n = both.info.starts[i], alone.stack().shape[-1]
                cut = both.stack()[:, i, :, start : start + n, start : start + n]
                assert relative(cut, alone.stack()[:, 0]) < 1e-5


@pytest.mark.every_model
def test_loading_shows_no_progress_bar_and_leaves_those_of_others():
    code = (
        "from transformers.utils import logging as bars; before = bars.is_progress_bar_enabled()\n"
        "from ra_lens import load_demo_model; load_demo_model()\n"
        "print(bars.is_progress_bar_enabled() is before)"
    )
    env = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
    assert "Loading weights" not in done.stderr


@pytest.mark.parametrize("setting", [None, False, True])  # unset, "0" and "1" in the environment
def test_bars_are_hidden_and_back_without_a_word_whatever_decides(setting, monkeypatch):
    decided = "HF_HUB_DISABLE_PROGRESS_BARS"
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], decided, setting)
    bars = transformers.utils.logging
    monkeypatch.setattr(bars, "_tqdm_active", True)
    with no_loading_bars():
        assert not bars.is_progress_bar_enabled()
    assert bars.is_progress_bar_enabled()


@pytest.mark.parametrize("kind", ["HookedTransformer", "TransformerBridge"])
def test_a_kind_that_this_version_does_not_have(kind):
    if kind not in KINDS:
        with pytest.raises(BadInput, match=rf"kind='{kind}' is not in the installed Transf.*has "):
            load_demo_model(kind=kind)
    else:
        assert type(load_demo_model(kind=kind)).__name__ == kind
