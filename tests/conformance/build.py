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
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from .pieces import BOS, D_VOCAB, EOS, FIRST_WORD, PAD, Architecture

BATCH, POS, DECODER_POS = 2, 9, 6


def write_folder(architecture: Architecture, where: Path) -> Path:
    """Save a random model of this configuration, and a tokenizer of one word per id."""
    config = getattr(transformers, architecture.config)(**architecture.options)
    config._attn_implementation = "eager"
    model = getattr(transformers, architecture.model)(config).eval()
    randomise(model, seed=zlib.crc32(architecture.name.encode()))
    model.save_pretrained(str(where))
    tokenizer().save_pretrained(str(where))
    return where


def hf_model(architecture: Architecture, folder: Path) -> Any:
    """Hugging Face's own eager model of a folder, in float32."""
    cls: Any = getattr(transformers, architecture.model)
    return cls.from_pretrained(
        str(folder), attn_implementation="eager", dtype=torch.float32, local_files_only=True
    ).eval()


def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew: gains of norms around 1, the rest with a deviation of 0.25."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if gain else 0.25 * noise)


def tokenizer() -> Any:
    """Word-level tokenizer: `<pad>`, `<s>`, `</s>`, then w3, w4, …; a word's number is its id."""
    special = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}
    vocabulary = {special.get(i, f"w{i}"): i for i in range(D_VOCAB)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<pad>",
    )


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Ids of ordinary words."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, D_VOCAB, shape, generator=generator)
