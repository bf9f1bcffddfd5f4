"""Models to measure with: random weights in the shapes of known models, nothing downloaded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import Shape
from ra_lens.model import load_folder

NAME = "random weights"
HUGGING_FACE = "Hugging Face alone"
"""A kind beside TransformerLens's classes: the model inside, in eval mode, with eager attention."""


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
        kind: `"HookedTransformer"`, `"TransformerBridge"` or `HUGGING_FACE`.
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
        kind: `"HookedTransformer"`, `"TransformerBridge"` or `HUGGING_FACE`.
        n_layer: Layers.
        n_vocab: Words.
        changes: Fields of its configuration that differ.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "num_hidden_layers": n_layer,
            "vocab_size": n_vocab,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            **changes,
        }
    )
    torch.manual_seed(0)
    return _loaded(LlamaForCausalLM(config), n_vocab, kind)


def gemma3(kind: str, *, n_layer: int = 18, n_vocab: int = 262144, **changes: Any) -> Any:
    """Load a model of the shape of Gemma 3 270M: 4 heads of 256, one of keys and values, tied.

    Args:
        kind: `"HookedTransformer"`, `"TransformerBridge"` or `HUGGING_FACE`.
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
    torch.manual_seed(0)
    return _loaded(Gemma3ForCausalLM(config), n_vocab, kind)


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


def inside(shape: Shape, *, device: str, dtype: torch.dtype) -> Any:
    """A Hugging Face model of a shape, a Llama if it is gated, made where it is wanted."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    kind: Any = LlamaForCausalLM if shape.gated else GPT2LMHeadModel
    if shape.gated:
        config: Any = LlamaConfig(
            vocab_size=shape.d_vocab,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_mlp,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_key_value_heads,
            head_dim=shape.d_head,
        )
    else:
        config = GPT2Config(
            vocab_size=shape.d_vocab,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_embd=shape.d_model,
            n_inner=shape.d_mlp,
        )
    torch.manual_seed(0)
    with torch.device(device):
        model = kind(config).to(dtype)
    model.set_attn_implementation("eager")
    return model.eval()


def made(shape: Shape, kind: str, *, device: str, dtype: torch.dtype, of: Any = None) -> Any:
    """A model of a shape, made on its device without passing through a file, for large ones.

    Args:
        shape: Its shape.
        kind: `"HookedTransformer"` or `"TransformerBridge"`.
        device: Where to make it.
        dtype: Of its weights.
        of: For a bridge: the Hugging Face model inside. Default: `inside(shape)`.
    """
    if kind == "TransformerBridge":
        from transformer_lens.model_bridge import TransformerBridge

        of = inside(shape, device=device, dtype=dtype) if of is None else of
        with tempfile.TemporaryDirectory() as folder:
            of.config.save_pretrained(folder)
            word_level_tokenizer(shape.d_vocab).save_pretrained(folder)
            model: Any = TransformerBridge.boot_transformers(
                folder, hf_model=of, device=device, dtype=dtype
            )
        model.cfg.model_name = NAME
        return model.eval()
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformers import PreTrainedTokenizerFast

    as_llama: dict[str, Any] = {
        "act_fn": "silu",
        "normalization_type": "RMS",
        "final_rms": True,
        "positional_embedding_type": "rotary",
        "rotary_dim": shape.d_head,
        "gated_mlp": True,
    }
    cfg = HookedTransformerConfig(
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        n_key_value_heads=(
            None if shape.n_key_value_heads == shape.n_heads else shape.n_key_value_heads
        ),
        d_head=shape.d_head,
        d_model=shape.d_model,
        d_mlp=shape.d_mlp,
        d_vocab=shape.d_vocab,
        n_ctx=1024,
        model_name=NAME,
        device=device,
        dtype=dtype,
        seed=0,
        **(as_llama if shape.gated else {"act_fn": "gelu_new", "normalization_type": "LN"}),
    )
    with tempfile.TemporaryDirectory() as folder, torch.device(device):
        word_level_tokenizer(shape.d_vocab).save_pretrained(folder)
        # It reads the tokenizer again from where that was.
        return HookedTransformer(cfg, PreTrainedTokenizerFast.from_pretrained(folder)).eval()


def _loaded(model: Any, n_vocab: int, kind: str) -> Any:
    """A Hugging Face model as one of `kind`, with a tokenizer that reads words `w0`, `w1`, …."""
    if kind == HUGGING_FACE:
        model.set_attn_implementation("eager")
        return model.eval()
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
