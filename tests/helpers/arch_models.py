"""Tiny random models of architectures that need something of their own, and their oracle.

As in `tiny_models`: saved as Hugging Face folders with a word-level tokenizer. Configurations are
those of `conformance`, with 60 words, of which the last two are a mask and the one special token.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conformance.configs import ARCHITECTURES
from conformance.pieces import SHARED_EXPERT, Architecture
from oracle import Oracle
from ra_lens.model import load_folder
from saved_models import save, word_tokenizer
from tiny_models import KINDS

BRIDGE = "TransformerBridge"
D_VOCAB, MASK, PAD = 60, 58, 59
TOKENS = {
    "vocab_size": D_VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": PAD,
    "eos_token_id": PAD,
}
# Options beside those of the architecture of that name; another name is looked up first.
NAMES = {
    "bert": "bert_mlm",
    "gemma4": "gemma4_text",
    "gpt2_unscaled": "gpt2_noscale",
    "gpt_bigcode": "gpt_bigcode_mha",  # TransformerLens does not load it without multi_query
}
MORE: dict[str, dict[str, Any]] = {
    "t5": {"decoder_start_token_id": PAD},
    "bart": {"decoder_start_token_id": PAD},
    "gemma4": {"vocab_size_per_layer_input": D_VOCAB},
    # Layers with different numbers of heads.
    "laguna": {
        **SHARED_EXPERT,
        "num_hidden_layers": 3,
        "num_attention_heads_per_layer": [2, 6, 4],
        "mlp_layer_types": ["dense"] * 3,
    },
}
MAMBA = Architecture(
    "mamba",
    "MambaConfig",
    "MambaForCausalLM",
    {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 4},
)


def architecture(arch: str) -> Architecture:
    """Classes and options."""
    return {**ARCHITECTURES, "mamba": MAMBA}[NAMES.get(arch, arch)]


def has(arch: str) -> bool:
    """Whether the installed transformers knows the architecture."""
    return hasattr(transformers, architecture(arch).model)


def write(arch: str, where: Path, **changed: Any) -> Path:
    """Save a random model, of a configuration changed in this way, and its tokenizer."""
    found = architecture(arch)
    options = {**found.options, **TOKENS, **MORE.get(arch, {}), **changed}
    torch.manual_seed(len(arch))
    model = getattr(transformers, found.model)(getattr(transformers, found.config)(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            gain = parameter.ndim == 1 and name.endswith("weight")
            width = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(1 + 0.1 * noise if gain else width * noise)
    words = [f"w{i}" for i in range(MASK)] + ["[MASK]", "<pad>"]
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<pad>")
    return save(model, word_tokenizer(words, **special, mask_token="[MASK]"), where)


def load_bridge(arch: str, where: Path, dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
    """Write a model into a new folder below `where` and load it; skips where it cannot be."""
    if BRIDGE not in KINDS or not has(arch):
        pytest.skip(f"no TransformerBridge of {arch} here")
    folder = write(arch, Path(tempfile.mkdtemp(dir=where)), **changed)
    return load_folder(folder, kind=BRIDGE, device="cpu", dtype=dtype)


def open_model(arch: str, folder: Path) -> Oracle:
    """Hugging Face's own model of a folder, in float32 as the bridge is."""
    cls = getattr(transformers, architecture(arch).model)
    model = cls.from_pretrained(str(folder), attn_implementation="eager").eval()
    return Oracle(model, wide=False)
