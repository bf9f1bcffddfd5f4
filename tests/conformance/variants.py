"""Variants of HookedTransformer: what each adds to one small configuration."""

from __future__ import annotations

from typing import Any

D_VOCAB, N_HEADS, D_HEAD = 30, 4, 6

BASE: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 16,
    "d_head": D_HEAD,
    "n_heads": N_HEADS,
    "d_mlp": 20,
    "d_vocab": D_VOCAB,
    "n_ctx": 16,
    "act_fn": "gelu",
}
_ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": D_HEAD}
_GROUPED = {"n_key_value_heads": 2}

VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {},
    "grouped_query": _GROUPED,
    "multi_query": {"n_key_value_heads": 1},
    "grouped_query_ungrouped": {**_GROUPED, "ungroup_grouped_query_attention": True},
    "grouped_query_split_qkv": {**_GROUPED, "use_split_qkv_input": True},
    "rotary": _ROTARY,
    "rotary_partial": {**_ROTARY, "rotary_dim": 4},
    "rotary_adjacent_pairs": {**_ROTARY, "rotary_adjacent_pairs": True},
    "rotary_by_parts": {**_ROTARY, "use_NTK_by_parts_rope": True, "NTK_original_ctx_len": 8},
    "rotary_yarn": {
        **_ROTARY,
        "use_yarn_rope": True,
        "yarn_factor": 4.0,
        "yarn_original_max_position_embeddings": 8,
    },
    "rotary_grouped_query": {**_ROTARY, **_GROUPED, "normalization_type": "RMS"},
    "alibi": {"positional_embedding_type": "alibi"},
    "shortformer": {"positional_embedding_type": "shortformer"},
    "parallel": {"parallel_attn_mlp": True},
    "attention_only": {"attn_only": True, "d_mlp": None, "act_fn": None},
    "local_windows": {
        "use_local_attn": True,
        "window_size": 3,
        "attn_types": ["global", "local"],
    },
    "inverse_layer_scale": {"scale_attn_by_inverse_layer_idx": True},
    "no_scale": {"use_attn_scale": False},
    "scale_of_its_own": {"attn_scale": 3.0},
    "score_softcap": {"attn_scores_soft_cap": 2.0},
    "logit_softcap": {"output_logits_soft_cap": 3.0},
    "split_qkv": {"use_split_qkv_input": True},
    "attn_in": {"use_attn_in": True},
    "result": {"use_attn_result": True},
    "mlp_in": {"use_hook_mlp_in": True},
    "bidirectional": {"attention_dir": "bidirectional"},
    "qk_norm": {"use_qk_norm": True, "normalization_type": "RMS"},
    "norm_before_and_after": {
        "use_normalization_before_and_after": True,
        "normalization_type": "RMS",
    },
    "no_norm": {"normalization_type": None},
    "gated_mlp": {"gated_mlp": True},
    "experts": {"num_experts": 4, "experts_per_token": 2, "gated_mlp": True, "act_fn": "silu"},
    "clip_qkv": {"clip_qkv": 0.5},
    "attention_sinks": {"use_attention_sinks": True},
    "post_embedding_norm": {"post_embedding_ln": True, "positional_embedding_type": "alibi"},
}
