"""Tiny random models of architectures that need something of their own, and their oracle.

As in `tiny_models`: saved as Hugging Face folders with a word-level tokenizer. The oracle is a
Hugging Face eager model of its own whose attention softmax is open: every softmax of a four-
dimensional tensor with one row per example, in the order in which the model runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

D_VOCAB, MASK, PAD = 60, 58, 59
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": D_VOCAB,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": PAD,
    "eos_token_id": PAD,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
ENCODER_DECODER = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": D_VOCAB,
    "max_position_embeddings": 32,
    "decoder_start_token_id": PAD,
    "pad_token_id": PAD,
    "bos_token_id": PAD,
    "eos_token_id": PAD,
}
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", SIZES),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 24,
            "d_kv": 6,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": D_VOCAB,
            "decoder_start_token_id": PAD,
            "pad_token_id": PAD,
            "eos_token_id": PAD,
        },
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", ENCODER_DECODER),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **GROUPED,
            "head_dim": 6,
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": D_VOCAB,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 4,
        },
    ),
    "afmoe": (
        "AfmoeConfig",
        "AfmoeForCausalLM",
        {
            **GROUPED,
            "head_dim": 6,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "num_dense_layers": 2,
            "sliding_window": 4,
        },
    ),
    # Layers with different numbers of heads.
    "laguna": (
        "LagunaConfig",
        "LagunaForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 3,
            "num_attention_heads_per_layer": [2, 6, 4],
            "head_dim": 6,
            "mlp_layer_types": ["dense"] * 3,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "jetmoe": (
        "JetMoeConfig",
        "JetMoeForCausalLM",
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "vocab_size": D_VOCAB,
            "pad_token_id": PAD,
            "bos_token_id": PAD,
            "eos_token_id": PAD,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **GROUPED,
            "head_dim": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
        },
    ),
    "bitnet": ("BitNetConfig", "BitNetForCausalLM", GROUPED),
    "gpt2_unscaled": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "n_layer": 2,
            "n_embd": 24,
            "n_head": 4,
            "n_positions": 32,
            "vocab_size": D_VOCAB,
            "bos_token_id": PAD,
            "eos_token_id": PAD,
            "scale_attn_weights": False,
        },
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "num_layers": 2,
            "hidden_size": 24,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 32,
            "vocab_size": D_VOCAB,
            "bos_token_id": PAD,
            "eos_token_id": PAD,
        },
    ),
    "openai_gpt": (
        "OpenAIGPTConfig",
        "OpenAIGPTLMHeadModel",
        {"n_layer": 2, "n_embd": 24, "n_head": 4, "n_positions": 32, "vocab_size": D_VOCAB},
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"n_layer": 2, "hidden_size": 24, "n_head": 4, "vocab_size": D_VOCAB},
    ),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        {
            "n_layers": 2,
            "d_model": 24,
            "n_heads": 4,
            "max_seq_len": 32,
            "expansion_ratio": 2,
            "vocab_size": D_VOCAB,
        },
    ),
    # TransformerLens does not load it without multi_query.
    "gpt_bigcode": (
        "GPTBigCodeConfig",
        "GPTBigCodeForCausalLM",
        {
            "n_layer": 2,
            "n_embd": 24,
            "n_head": 4,
            "n_positions": 32,
            "vocab_size": D_VOCAB,
            "multi_query": False,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **SIZES,
            "num_key_value_heads": 4,
            "q_lora_rank": 10,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
            "first_k_dense_replace": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": 24,
            "word_embed_proj_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 32,
            "max_position_embeddings": 32,
            "vocab_size": D_VOCAB,
            "pad_token_id": PAD,
            "bos_token_id": PAD,
            "eos_token_id": PAD,
        },
    ),
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "vocab_size": D_VOCAB},
    ),
    "hrm_text": (
        "HrmTextConfig",
        "HrmTextForCausalLM",
        {**GROUPED, "num_key_value_heads": 4, "head_dim": 6},
    ),
}


def has(arch: str) -> bool:
    """Whether the installed transformers knows the architecture."""
    return hasattr(transformers, CONFIGS[arch][1])


def write(arch: str, where: Path) -> Path:
    """Save a random model and its tokenizer; gives the folder."""
    config, model_class, options = CONFIGS[arch]
    torch.manual_seed(len(arch))
    model = getattr(transformers, model_class)(getattr(transformers, config)(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            gain = parameter.ndim == 1 and name.endswith("weight")
            width = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(1 + 0.1 * noise if gain else width * noise)
    model.save_pretrained(str(where))
    words = [f"w{i}" for i in range(MASK)] + ["[MASK]", "<pad>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<pad>",
        eos_token="<pad>",
        pad_token="<pad>",
        unk_token="<pad>",
        mask_token="[MASK]",
    ).save_pretrained(str(where))
    return where


class OpenModel:
    """Hugging Face's own eager model, its attention softmax open to the tests."""

    def __init__(self, arch: str, folder: Path) -> None:
        cls = getattr(transformers, CONFIGS[arch][1])
        self.model: Any = cls.from_pretrained(str(folder), attn_implementation="eager").eval()

    @contextmanager
    def _open(
        self, n: int, deltas: dict[int, Tensor], score_deltas: dict[int, Tensor] | None = None
    ) -> Iterator[tuple[list[Any], list[Any]]]:
        original = nn.functional.softmax
        scores: list[Tensor] = []
        patterns: list[Tensor] = []

        def softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if x.ndim != 4 or x.shape[0] != n:
                return original(x, *args, **kwargs)
            moved = (score_deltas or {}).get(len(scores))
            x = x if moved is None else x + moved
            scores.append(x)
            result = original(x, *args, **kwargs)
            patterns.append(result.detach())
            delta = deltas.get(len(scores) - 1)
            return result if delta is None else result + delta

        nn.functional.softmax = softmax
        try:
            yield scores, patterns
        finally:
            nn.functional.softmax = original

    def logits(self, ids: Tensor, deltas: dict[int, Tensor] | None = None, **inputs: Any) -> Tensor:
        with torch.no_grad(), self._open(len(ids), deltas or {}):
            return self.model(ids, **inputs).logits

    def score_gradients(
        self, ids: Tensor, loss: Callable[[Tensor], Tensor], **inputs: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """dL/dS and A of every attention softmax, in the order in which they are run."""
        with self._open(len(ids), {}) as (scores, patterns):
            total = loss(self.model(ids, **inputs).logits)
            return list(torch.autograd.grad(total, scores)), patterns

    # ---- models that run their layers several times ----

    def last_score_gradients(
        self, ids: Tensor, loss: Callable[[Tensor], Tensor], n: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """dL/dS and A of the last `n` attention softmaxes."""
        with self._open(len(ids), {}) as (scores, patterns):
            total = loss(self.model(ids).logits)
            return list(torch.autograd.grad(total, scores[-n:])), patterns[-n:]

    def moved_last(self, ids: Tensor, n: int, which: int, delta: Tensor) -> Tensor:
        """Logits with `delta` added to the input of one of the last `n` attention softmaxes."""
        with torch.no_grad(), self._open(len(ids), {}) as (scores, _):
            self.model(ids)
        place = len(scores) - n + which
        with torch.no_grad(), self._open(len(ids), {}, {place: delta}):
            return self.model(ids).logits

    def order_of_calls(self, ids: Tensor) -> list[str]:
        """Names of the blocks whose attention is called, in order."""
        order: list[str] = []
        handles = [
            module.register_forward_pre_hook(
                lambda _module, _args, name=name: order.append(
                    name[len("model.") : -len(".self_attn")]
                )
            )
            for name, module in self.model.named_modules()
            if name.endswith(".self_attn")
        ]
        with torch.no_grad():
            self.model(ids)
        for handle in handles:
            handle.remove()
        return order
