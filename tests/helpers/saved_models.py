"""What saved models of tests have in common: wide random weights, and a tokenizer of words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn


def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew: gains of norms around 1, the rest with a deviation of 0.25."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if gain else 0.25 * noise)


def silence(model: nn.Module) -> None:
    """Every parameter is 0, but gains of norms are 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = "ln_" in name and name.endswith("weight")
            parameter.fill_(1.0 if gain else 0.0)


def word_tokenizer(words: Sequence[str], splitter: Any = None, **special: str) -> Any:
    """A token for each word, whose place is its id; text is cut at white space by default."""
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    inner.pre_tokenizer = splitter or pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def save(model: Any, tokenizer: Any, where: Path) -> Path:
    """Save both as a Hugging Face folder; gives the folder."""
    model.save_pretrained(str(where))
    tokenizer.save_pretrained(str(where))
    return where


def save_random(config: Any, tokenizer: Any, where: Path, *, seed: int) -> Path:
    """Save a random model of a configuration."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, seed)
    return save(model, tokenizer, where)
