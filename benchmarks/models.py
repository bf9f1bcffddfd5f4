"""Models to measure with: the shape of GPT-2 small, random weights, nothing downloaded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from ra_lens.sites import load_folder


def gpt2_small(kind: str, *, n_layer: int = 12, rotary: bool = False) -> Any:
    """Load a model of the shape of GPT-2 small, whose tokenizer reads words `w0` to `w50256`.

    Args:
        kind: `"HookedTransformer"` or `"TransformerBridge"`.
        n_layer: Layers.
        rotary: GPT-NeoX of that shape, whose positions are rotary, in the place of GPT-2.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    if rotary:
        config = GPTNeoXConfig(
            vocab_size=50257,
            hidden_size=768,
            num_hidden_layers=n_layer,
            num_attention_heads=12,
            intermediate_size=3072,
            max_position_embeddings=1024,
        )
        model = GPTNeoXForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(n_layer=n_layer))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _word_level_tokenizer().save_pretrained(folder)
        return load_folder(Path(folder), kind=kind, device="cpu")  # pyright: ignore


def _word_level_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50257)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    last = "w50256"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=last, eos_token=last, pad_token=last, unk_token="w0"
    )
