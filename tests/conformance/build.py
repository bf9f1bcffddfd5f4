"""Random models of the configurations, saved as folders that TransformerLens can load.

Weights are drawn wider than an initialisation would, and no bias is zero, so that attention is far
from uniform and a forgotten bias, gain or scale shows.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
import transformers

from saved_models import randomise, save, word_tokenizer

from .pieces import BOS, D_VOCAB, EOS, FIRST_WORD, PAD, Architecture

BATCH, POS, DECODER_POS = 2, 9, 6


def write_folder(architecture: Architecture, where: Path) -> Path:
    """Save a random model of this configuration, and a tokenizer of one word per id."""
    config = getattr(transformers, architecture.config)(**architecture.options)
    config._attn_implementation = "eager"
    model = getattr(transformers, architecture.model)(config).eval()
    randomise(model, seed=zlib.crc32(architecture.name.encode()))
    return save(model, tokenizer(), where)


def hf_model(architecture: Architecture, folder: Path) -> Any:
    """Hugging Face's own eager model of a folder, in float32."""
    cls: Any = getattr(transformers, architecture.model)
    return cls.from_pretrained(
        str(folder), attn_implementation="eager", dtype=torch.float32, local_files_only=True
    ).eval()


def tokenizer() -> Any:
    """Word-level tokenizer: `<pad>`, `<s>`, `</s>`, then w3, w4, …; a word's number is its id."""
    special = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    return word_tokenizer([special.get(i, f"w{i}") for i in range(D_VOCAB)], **names)


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Ids of ordinary words."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, D_VOCAB, shape, generator=generator)
