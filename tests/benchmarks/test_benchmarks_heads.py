"""What the benchmarks of head ranking compare does the same thing; how fast is not tested."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks import demonstrations, knockouts, mediation, perturbation
from benchmarks.timing import low_high
from ra_lens.model import load_folder
from saved_models import randomise


@pytest.fixture(autouse=True)
def narrow(tmp_path_factory, monkeypatch):
    """Their words and layers, 24 numbers wide: the width of GPT-2 takes a minute to load."""

    def load(kind, *, n_layer):
        words = {f"w{i}": i for i in range(8000)}
        inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "w0")
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(
            GPT2Config(n_layer=n_layer, n_embd=24, n_head=4, vocab_size=8000, **ids)
        )
        randomise(model, seed=0)
        folder = tmp_path_factory.mktemp("narrow")
        model.save_pretrained(str(folder))
        PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(str(folder))
        return load_folder(folder, kind=kind, device="cpu", dtype=torch.float32)

    monkeypatch.setattr(mediation, "gpt2_small", load)
    monkeypatch.setattr(perturbation, "gpt2_small", load)
    monkeypatch.setattr(knockouts, "gpt2_small", load)


def checked(table):
    assert set(table) == {"title", "how", "columns", "rows"}
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    return json.loads(json.dumps(table))["rows"]


def assert_within(table, ratio, spread):
    """The medians of two rounds are their means, whose ratio lies between those of the rounds."""
    for row in table["rows"]:
        named = dict(zip(table["columns"], row, strict=True))
        low, high = low_high(named[spread])
        assert low - 0.006 < named[ratio] < high + 0.006


def test_causal_mediation_has_the_same_effects_either_way():
    table = mediation.measure(rounds=2, quick=True)
    for *_, apart, largest in checked(table):
        assert largest > 1e-6
        assert apart < 1e-4
    for over in ("full / CM1", "CM1 / RA"):
        assert_within(table, over, f"spread of {over}")


def test_the_perturbation_test_has_the_same_logit_differences_either_way():
    table = perturbation.measure(rounds=2, quick=True)
    rows = checked(table)
    assert len(rows) == 2
    assert all(apart < 1e-3 for *_, apart in rows)
    assert_within(table, "ratio", "spread")


def test_knockouts_foretold_are_those_done():
    table = knockouts.measure(rounds=2, quick=True)
    [(_, tokens, edges, *_, rho)] = checked(table)
    assert edges == 2 * 4 * (tokens * (tokens + 1) // 2 - 1)
    assert rho > 0.9
    assert_within(table, "ratio", "spread")


@pytest.mark.every_model
def test_shared_demonstrations_give_the_same_numbers_as_in_full():
    table = demonstrations.measure(rounds=2, quick=True)
    rows = checked(table)
    assert {row[0] for row in rows} == set(demonstrations.WHAT)
    for *_, apart in rows:
        assert apart < 1e-4
    assert_within(table, "own / shared", "spread")
