"""Models to measure with: the shape of GPT-2 small, random weights, nothing downloaded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ra_lens.model import load_folder


def huggingface(
    *, n_layer: int = 12, n_head: int = 12, width: int = 768, n_vocab: int = 50257
) -> Any:
    """The Hugging Face model with the weights of `gpt2_small`, in eval mode, eager attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=n_vocab, n_layer=n_layer, n_head=n_head, n_embd=width)
    model = GPT2LMHeadModel(config)
    model.set_attn_implementation("eager")
    return model.eval()


def random_tokens(*shape: int, n_vocab: int = 50000) -> Tensor:
    """Token ids, the same in every call."""
    return torch.randint(0, n_vocab, shape, generator=torch.Generator().manual_seed(0))


def gpt2_small(
    kind: str,
    *,
    n_layer: int = 12,
    n_head: int = 12,
    n_ctx: int = 1024,
    width: int = 768,
    n_vocab: int = 50257,
    rotary: bool = False,
) -> Any:
    """Load a model of the shape of GPT-2 small, whose tokenizer reads words `w0`, `w1`, ….

    Args:
        kind: `"HookedTransformer"` or `"TransformerBridge"`.
        n_layer: Layers.
        n_head: Heads; the width stays.
        n_ctx: Longest prompt.
        width: Of the residual stream.
        n_vocab: Words.
        rotary: GPT-NeoX of that shape, whose positions are rotary, in the place of GPT-2.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    if rotary:
        config = GPTNeoXConfig(
            vocab_size=n_vocab,
            hidden_size=width,
            num_hidden_layers=n_layer,
            num_attention_heads=n_head,
            intermediate_size=4 * width,
            max_position_embeddings=n_ctx,
        )
        model = GPTNeoXForCausalLM(config)
    else:
        config = GPT2Config(
            vocab_size=n_vocab, n_layer=n_layer, n_head=n_head, n_positions=n_ctx, n_embd=width
        )
        model = GPT2LMHeadModel(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        word_level_tokenizer(n_vocab).save_pretrained(folder)
        return load_folder(Path(folder), kind=kind, device="cpu")  # pyright: ignore


def word_level_tokenizer(n_vocab: int) -> Any:
    """A tokenizer whose token i is the word `wi`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n_vocab)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    last = f"w{n_vocab - 1}"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=last, eos_token=last, pad_token=last, unk_token="w0"
    )
