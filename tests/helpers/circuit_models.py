"""A tiny random GPT-2 whose tokenizer knows every word of the prompts of indirect objects."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Regex, pre_tokenizers

from ra_lens.tasks import circuits
from saved_models import save_random, word_tokenizer

N_LAYERS, N_HEADS, D_HEAD = 2, 3, 4


def ioi_words() -> list[str]:
    """Words and signs of the templates and of the lists beside them."""
    texts = [re.sub(r"\{\w+\}", " ", text) for text in circuits._IOI]
    listed = [word for words in circuits._words().values() for word in words]
    return sorted({*listed, *re.findall(r"\w+|[^\w\s]", " ".join(texts))})


def ioi_tokenizer() -> Any:
    words = ["<|endoftext|>", "<unk>", *ioi_words()]
    splitter = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    special = {"unk_token": "<unk>", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return word_tokenizer(words, splitter, **special)


def write_ioi_model(where: Path) -> Path:
    """Save the model as a Hugging Face folder."""
    tokenizer = ioi_tokenizer()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_embd=N_HEADS * D_HEAD,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return save_random(config, tokenizer, where, seed=4)
