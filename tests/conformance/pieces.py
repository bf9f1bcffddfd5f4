"""Sizes, and pieces of configurations that several architectures share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

D_VOCAB, D_MODEL, N_HEADS, N_KV, D_HEAD, N_CTX, WINDOW = 50, 32, 4, 2, 8, 32, 4
PAD, BOS, EOS = 0, 1, 2
FIRST_WORD = 3

# As a value: an option of the family that this architecture does not know.
LEAVE_OUT = object()

IDS = {"vocab_size": D_VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
BASE = {
    **IDS,
    "hidden_size": D_MODEL,
    "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": N_CTX,
}
LLAMA = {**BASE, "num_key_value_heads": N_KV}
GPT2 = {**IDS, "n_layer": 2, "n_embd": D_MODEL, "n_head": N_HEADS, "n_positions": N_CTX}
ENCODER_DECODER = {
    **IDS,
    "d_model": D_MODEL,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": N_HEADS,
    "decoder_attention_heads": N_HEADS,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": N_CTX,
    "decoder_start_token_id": EOS,
}

# Pieces that several architectures share.
WIDE = {"head_dim": 2 * D_HEAD}
HEAD = {"head_dim": D_HEAD}
SLIDING = {"sliding_window": WINDOW}
ALTERNATING = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {**EXPERTS, "moe_intermediate_size": 16}
SHARED_EXPERT = {**SMALL_EXPERTS, "shared_expert_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MLA = {
    "num_key_value_heads": N_HEADS,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
INDEXER = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8}
LINEAR_THEN_FULL = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 6, "mamba_n_groups": 1}
GRANITE_HYBRID = {
    **LOCAL_EXPERTS,
    **MAMBA,
    "mamba_d_head": 16,
    "attention_multiplier": 0.11,
    "layer_types": ["mamba", "attention"],
    "shared_intermediate_size": 24,
}


@dataclass(frozen=True)
class Architecture:
    """One model to build: its Hugging Face classes and what its configuration is made of."""

    name: str
    config: str
    model: str
    options: dict[str, Any] = field(hash=False)


def family(defaults: dict[str, Any], *rows: tuple[Any, ...]) -> list[Architecture]:
    """Rows are (name, stem of the classes, options) or (name, config class, model class, options).

    With a stem `Xyz` the classes are `XyzConfig` and `XyzForCausalLM`.
    """
    found: list[Architecture] = []
    for name, *classes, options in rows:
        config, model = classes if len(classes) == 2 else (classes[0] + "Config", None)
        model = model or classes[0] + "ForCausalLM"
        merged = {k: v for k, v in {**defaults, **options}.items() if v is not LEAVE_OUT}
        found.append(Architecture(name, config, model, merged))
    return found
