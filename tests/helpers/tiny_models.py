"""Tiny random models of four architectures, saved as Hugging Face folders for every test to load.

Sizes are all different (2 to 5 examples, 3 layers, 4 heads, 6 numbers per head, 7 or more tokens),
so that a transposed axis shows. Weights are drawn larger than an initialisation would, and no bias
is zero, so that attention is far from uniform and a forgotten bias matters.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers

from ra_lens.model import available_kinds, load_folder
from saved_models import save_random, word_tokenizer

ARCHS = ("gpt2", "llama", "opt", "gptj")
KINDS = available_kinds()
CASES = [(arch, kind) for arch in ARCHS for kind in KINDS]
# TransformerBridge leaves the attention of these to Hugging Face and only shows its pattern.
OBSERVE_ONLY = {("opt", "TransformerBridge"), ("gptj", "TransformerBridge")}
EDITABLE = [case for case in CASES if case not in OBSERVE_ONLY]
# What a test over architectures and classes runs on by default; the others with --every-model.
REPRESENTATIVE = {("gpt2", KINDS[0]), ("llama", KINDS[-1]), ("opt", KINDS[-1])}


def every_model(*values: Any) -> list[Any]:
    """Values of a parameter that are left to CI, as `@pytest.mark.every_model` leaves a test."""
    return [pytest.param(value, marks=pytest.mark.every_model) for value in values]


ANY_KIND = [KINDS[0], *every_model(*KINDS[1:])]
"""The classes, for tests whose question is another: the first by default."""

N_LAYERS, N_HEADS, N_KV, D_HEAD, D_MODEL, D_VOCAB, N_CTX = 3, 4, 2, 6, 24, 34, 16
BOS = {"gpt2": 0, "llama": 1, "opt": 1, "gptj": 0}


def config(arch: str) -> Any:
    """Hugging Face configuration of a tiny model."""
    ids = {"vocab_size": D_VOCAB, "bos_token_id": BOS[arch]}
    if arch.startswith("gpt2"):
        return transformers.GPT2Config(
            n_layer=N_LAYERS,
            n_embd=D_MODEL,
            n_head=N_HEADS,
            n_positions=N_CTX,
            eos_token_id=0,
            **ids,
        )
    if arch == "gptj":
        return transformers.GPTJConfig(
            n_layer=N_LAYERS,
            n_embd=D_MODEL,
            n_head=N_HEADS,
            rotary_dim=4,
            n_positions=N_CTX,
            eos_token_id=0,
            **ids,
        )
    if arch == "opt":
        return transformers.OPTConfig(
            num_hidden_layers=N_LAYERS,
            hidden_size=D_MODEL,
            word_embed_proj_dim=D_MODEL,
            num_attention_heads=N_HEADS,
            ffn_dim=4 * D_MODEL,
            max_position_embeddings=N_CTX,
            eos_token_id=1,
            pad_token_id=2,
            **ids,
        )
    if arch == "llama":
        return transformers.LlamaConfig(
            num_hidden_layers=N_LAYERS,
            hidden_size=D_MODEL,
            num_attention_heads=N_HEADS,
            num_key_value_heads=N_KV,
            intermediate_size=4 * D_MODEL,
            max_position_embeddings=N_CTX,
            eos_token_id=1,
            pad_token_id=2,
            **ids,
        )
    raise ValueError(arch)


def words(arch: str) -> list[str]:
    """The vocabulary: special tokens, then w3, w4, …; the word is its id."""
    special = ["<|endoftext|>", "<s>", "<pad>"]
    return special + [f"w{i}" for i in range(3, D_VOCAB)]


def tokenizer(arch: str) -> Any:
    """Word-level tokenizer; in the GPT-2 family pad, BOS and EOS are one, elsewhere they differ."""
    one = BOS[arch] == 0
    end, pad = ("<|endoftext|>", "<|endoftext|>") if one else ("<s>", "<pad>")
    return word_tokenizer(
        words(arch), bos_token=end, eos_token=end, pad_token=pad, unk_token="<pad>"
    )


def write_folder(arch: str, where: Path, **overrides: Any) -> Path:
    """Save a random model and its tokenizer; gives the folder."""
    cfg = config(arch)
    for name, value in overrides.items():
        setattr(cfg, name, value)
    return save_random(cfg, tokenizer(arch), where, seed=len(arch))


def load(folder: Path, kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Load a folder with one TransformerLens class, on the CPU."""
    return load_folder(folder, kind=kind, device="cpu", dtype=dtype)


def copied(model: Any) -> Any:
    """A deep copy of a model.

    Each of its modules has several empty dictionaries for hooks, of a class that `deepcopy` takes
    apart and puts together; copied entry by entry they take half of the time.
    """

    def by_entry(one: OrderedDict[Any, Any], memo: dict[int, Any]) -> OrderedDict[Any, Any]:
        other: OrderedDict[Any, Any] = OrderedDict()
        memo[id(one)] = other
        for key, value in one.items():
            other[copy.deepcopy(key, memo)] = copy.deepcopy(value, memo)
        return other

    with patch.dict(copy._deepcopy_dispatch, {OrderedDict: by_entry}):
        return copy.deepcopy(model)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Ids of ordinary words (no special token)."""
    return torch.randint(3, D_VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def text(ids: Any) -> str:
    """The prompt whose words have these ids."""
    return " ".join(f"w{int(i)}" for i in ids)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what is wanted."""
    found, wanted = found.detach().double(), wanted.detach().double()
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found - wanted).norm() / wanted.norm())
