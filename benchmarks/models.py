"""Models to measure with: random weights in the shapes of known models, nothing downloaded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import Shape
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
    return _loaded(model, n_vocab, kind)


def smollm2(kind: str, *, n_layer: int = 30, n_vocab: int = 49152, **changes: Any) -> Any:
    """Load a model of the shape of SmolLM2-135M: Llama with 9 heads, 3 of keys and values, tied.

    Args:
        kind: `"HookedTransformer"` or `"TransformerBridge"`.
        n_layer: Layers.
        n_vocab: Words.
        changes: Fields of its configuration that differ.
    """
    return llama(
        kind,
        **{
            "num_hidden_layers": n_layer,
            "vocab_size": n_vocab,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            **changes,
        },
    )


def llama(
    kind: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, **config: Any
) -> Any:
    """Load a Llama of random weights; without changes it has the shape of Llama 7B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    chosen = LlamaConfig(**config)
    return _loaded(_random(LlamaForCausalLM, chosen, device, dtype), chosen.vocab_size, kind)


def gemma3(kind: str, *, n_layer: int = 18, n_vocab: int = 262144, **changes: Any) -> Any:
    """Load a model of the shape of Gemma 3 270M: 4 heads of 256, one of keys and values, tied.

    Args:
        kind: `"HookedTransformer"` or `"TransformerBridge"`.
        n_layer: Layers.
        n_vocab: Words.
        changes: Fields of its configuration that differ.
    """
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **{
            "num_hidden_layers": n_layer,
            "vocab_size": n_vocab,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
            "max_position_embeddings": 2048,
            **changes,
        }
    )
    return _loaded(_random(Gemma3ForCausalLM, config), n_vocab, kind)


def shape_of(model: Any) -> Shape:
    """What decides how much a loaded model multiplies."""
    cfg = model.cfg
    return Shape(
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_key_value_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        d_head=cfg.d_head,
        d_model=cfg.d_model,
        d_mlp=cfg.d_mlp,
        d_vocab=cfg.d_vocab,
        gated=bool(getattr(cfg, "gated_mlp", False)),
    )


def _random(kind: Any, config: Any, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A Hugging Face model of random weights, made where and in what it is wanted."""
    torch.manual_seed(0)
    with torch.device(device):
        return kind(config).to(dtype)


def _loaded(model: Any, n_vocab: int, kind: str) -> Any:
    """A Hugging Face model as one of `kind`, with a tokenizer that reads words `w0`, `w1`, …."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        word_level_tokenizer(n_vocab).save_pretrained(folder)
        parameter = next(model.parameters())
        device, dtype = str(parameter.device), parameter.dtype
        del model, parameter
        return load_folder(Path(folder), kind=kind, device=device, dtype=dtype)  # pyright: ignore


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
