"""Tiny GGUF files, written as llama.cpp's converter writes them, and the models they were made of.

A model of transformers with known weights comes first, so that it does not depend on transformers'
reader of GGUF. Names, permutations and offsets are those of llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from saved_models import randomise

N_LAYERS, N_HEADS, N_KV, D_MODEL, D_MLP, N_CTX = 2, 4, 2, 64, 96, 32
THETA = 5000.0  # not what any configuration has by default
WINDOW = 4
SPECIAL = ["<|endoftext|>", "<|start|>"]
LETTERS = ["Ġ", *"abcdefghijklmnopqrstuvwxyz"]
MERGES = ["Ġ a", "Ġ b", "c d", "Ġa b"]
TOKENS = [*SPECIAL, *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
# Gemma's and Phi-3's own files have a vocabulary of sentencepiece, without merges.
SENTENCE_PIECE = ("gemma3", "phi3")
PIECES = [*SPECIAL, "<unk>", *(token.replace("Ġ", "▁") for token in TOKENS[2:-1])]
TEXT = "abcd cd ab xyz"

_LLAMA = {
    r"model\.embed_tokens": "token_embd",
    r"model\.norm": "output_norm",
    r"lm_head": "output",
    r"model\.layers\.(\d+)\.input_layernorm": r"blk.\1.attn_norm",
    r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj": r"blk.\1.attn_\2",
    r"model\.layers\.(\d+)\.self_attn\.([qk])_norm": r"blk.\1.attn_\2_norm",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": r"blk.\1.attn_output",
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"blk.\1.ffn_norm",
    r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj": r"blk.\1.ffn_\2",
}
_NAMES = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3": {
        **_LLAMA,
        r"model\.layers\.(\d+)\.post_attention_layernorm": r"blk.\1.post_attention_norm",
        r"model\.layers\.(\d+)\.pre_feedforward_layernorm": r"blk.\1.ffn_norm",
        r"model\.layers\.(\d+)\.post_feedforward_layernorm": r"blk.\1.post_ffw_norm",
    },
    "phi3": {
        **_LLAMA,
        r"model\.layers\.(\d+)\.self_attn\.qkv_proj": r"blk.\1.attn_qkv",
        r"model\.layers\.(\d+)\.mlp\.gate_up_proj": r"blk.\1.ffn_up",
    },
    "gpt2": {
        r"transformer\.wte": "token_embd",
        r"transformer\.wpe": "position_embd",
        r"transformer\.ln_f": "output_norm",
        r"lm_head": "output",
        r"transformer\.h\.(\d+)\.ln_1": r"blk.\1.attn_norm",
        r"transformer\.h\.(\d+)\.ln_2": r"blk.\1.ffn_norm",
        r"transformer\.h\.(\d+)\.attn\.c_attn": r"blk.\1.attn_qkv",
        r"transformer\.h\.(\d+)\.attn\.c_proj": r"blk.\1.attn_output",
        r"transformer\.h\.(\d+)\.mlp\.c_fc": r"blk.\1.ffn_up",
        r"transformer\.h\.(\d+)\.mlp\.c_proj": r"blk.\1.ffn_down",
    },
}
ARCHITECTURES = tuple(_NAMES)

_COMMON = {
    "vocab_size": len(TOKENS),
    "hidden_size": D_MODEL,
    "intermediate_size": D_MLP,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_KV,
    "max_position_embeddings": N_CTX,
    "rope_theta": THETA,
    "rms_norm_eps": 2e-5,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **own: transformers.LlamaConfig(**{**_COMMON, **own}),
    "qwen2": lambda **own: transformers.Qwen2Config(**{**_COMMON, **own}),
    # Qwen3's heads are wider than the model is by their number.
    "qwen3": lambda **own: transformers.Qwen3Config(**{**_COMMON, "head_dim": 32, **own}),
    "gemma3": lambda **own: transformers.Gemma3TextConfig(
        **{
            **_COMMON,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 7,  # five with a window to one without
            "sliding_window": WINDOW,
            **own,
        }
    ),
    "phi3": lambda **own: transformers.Phi3Config(
        **{**_COMMON, "num_key_value_heads": N_HEADS, "sliding_window": WINDOW, **own}
    ),
    "gpt2": lambda **own: transformers.GPT2Config(
        vocab_size=len(TOKENS),
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_positions=N_CTX,
        layer_norm_epsilon=2e-5,
        bos_token_id=1,
        eos_token_id=0,
        **own,
    ),
}


@dataclass(frozen=True)
class Written:
    """A GGUF file and the model that it was made of, with the same rounded weights."""

    path: Path
    model: Any

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model(ids).logits


def write_gguf(
    architecture: str,
    path: Path,
    *,
    stored: str = "F32",
    tied: bool = False,
    facts: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    leave_out: str = "",
    says: str | None = None,
    **config: Any,
) -> Written:
    """Write a random model; gives the file and the model.

    `stored` is how its matrices are (F32, F16, Q8_0); `facts` and `extra` are facts (by their names
    without the architecture) and tensors beside the model's own; `leave_out` names a tensor that is
    not written; `says` is another architecture than the true one; the rest changes the
    configuration.
    """
    import gguf

    cfg = _CONFIGS[architecture](tie_word_embeddings=tied, attn_implementation="eager", **config)
    model = transformers.AutoModelForCausalLM.from_config(cfg, attn_implementation="eager").eval()
    randomise(model, seed=len(architecture))
    kind = gguf.GGMLQuantizationType[stored]
    writer = gguf.GGUFWriter(str(path), says or architecture)
    _write_facts(writer, architecture, cfg, facts or {})
    _write_tokenizer(writer, architecture)
    state = model.state_dict()
    for name, value in state.items():
        its_name = _gguf_name(architecture, name)
        if name == "lm_head.weight" and tied:
            continue
        there = _to_gguf(architecture, its_name, value.numpy(), cfg)
        of_matrix = kind if there.ndim == 2 and "position" not in its_name else kind.F32
        blocks = gguf.quants.quantize(there, of_matrix)
        rounded = gguf.quants.dequantize(blocks, of_matrix)
        value.copy_(torch.from_numpy(_from_gguf(architecture, its_name, rounded, cfg)))
        if its_name != leave_out:
            writer.add_tensor(its_name, blocks, raw_dtype=of_matrix)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(path, model)


def _gguf_name(architecture: str, name: str) -> str:
    stem, _, last = name.rpartition(".")
    for pattern, theirs in _NAMES[architecture].items():
        if re.fullmatch(pattern, stem):
            return f"{re.sub(pattern, theirs, stem)}.{last}"
    raise AssertionError(name)


def _to_gguf(architecture: str, name: str, value: np.ndarray, cfg: Any) -> np.ndarray:
    """What llama.cpp's converter makes of a weight."""
    if architecture == "llama" and re.search(r"attn_[qk]\.", name):
        n_heads = cfg.num_attention_heads if "attn_q" in name else cfg.num_key_value_heads
        halves = value.reshape(n_heads, 2, -1, *value.shape[1:])
        value = halves.swapaxes(1, 2).reshape(value.shape)
    if architecture == "gpt2" and re.search(r"(qkv|attn_output|ffn_up|ffn_down)\.weight", name):
        value = value.T
    if architecture == "gemma3" and name.endswith("norm.weight"):
        value = value + 1
    return np.ascontiguousarray(value)


def _from_gguf(architecture: str, name: str, value: np.ndarray, cfg: Any) -> np.ndarray:
    """The inverse of `_to_gguf`."""
    if architecture == "llama" and re.search(r"attn_[qk]\.", name):
        n_heads = cfg.num_attention_heads if "attn_q" in name else cfg.num_key_value_heads
        pairs = value.reshape(n_heads, -1, 2, *value.shape[1:])
        value = pairs.swapaxes(1, 2).reshape(value.shape)
    if architecture == "gpt2" and re.search(r"(qkv|attn_output|ffn_up|ffn_down)\.weight", name):
        value = value.T
    if architecture == "gemma3" and name.endswith("norm.weight"):
        value = value - 1
    return np.ascontiguousarray(value)


def _write_facts(writer: Any, architecture: str, cfg: Any, facts: dict[str, Any]) -> None:
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(D_MODEL)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_head_count(cfg.num_attention_heads)
    if architecture == "gpt2":
        writer.add_feed_forward_length(cfg.n_inner or 4 * D_MODEL)
        writer.add_layer_norm_eps(cfg.layer_norm_epsilon)
    else:
        head = getattr(cfg, "head_dim", None) or D_MODEL // N_HEADS
        writer.add_feed_forward_length(cfg.intermediate_size)
        writer.add_head_count_kv(cfg.num_key_value_heads)
        writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
        writer.add_rope_freq_base(THETA)
        writer.add_rope_dimension_count(int(head * facts.pop("turned", 1)))
        writer.add_vocab_size(cfg.vocab_size)
        if architecture in ("qwen3", "gemma3"):
            writer.add_key_length(head)
            writer.add_value_length(head)
        if architecture in ("phi3", "gemma3"):
            writer.add_sliding_window(cfg.sliding_window)
    for name, value in facts.items():
        write = writer.add_string if isinstance(value, str) else writer.add_float32
        write(f"{architecture}.{name}", value)


def _write_tokenizer(writer: Any, architecture: str) -> None:
    import gguf

    kind = gguf.TokenType
    if architecture in SENTENCE_PIECE:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(PIECES)
        writer.add_token_scores([-float(i) for i in range(len(PIECES))])
        special = {token: kind.CONTROL for token in SPECIAL} | {"<unk>": kind.UNKNOWN}
        writer.add_token_types([special.get(token, kind.NORMAL) for token in PIECES])
        writer.add_unk_token_id(PIECES.index("<unk>"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([kind.CONTROL if t in SPECIAL else kind.NORMAL for t in TOKENS])
        writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
