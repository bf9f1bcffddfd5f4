"""What each architecture is expected to do, where it is not simply exact. The only such list.

Every entry is checked: what was expected to fail and works is as much a surprise as the other way
round. By generation of TransformerLens: "2", "3", "4"; a text stands for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

Status = Literal[
    "exact",
    "patches refused",
    "maps refused",
    "no attention",
    "logits differ",
    "does not run",
    "does not boot",
    "failing",
]

# What the statuses mean; in the order in which docs/models.md counts them.
MEANING: dict[Status, str] = {
    "exact": "maps and patches exact",
    "patches refused": "maps exact, patches refused with the reason",
    "maps refused": "refused with the reason",
    "no attention": "refused: TransformerLens shows no attention pattern of it",
    "logits differ": "TransformerLens computes other logits than Hugging Face",
    "does not run": "TransformerLens loads it, but its forward pass raises",
    "does not boot": "TransformerLens does not load it",
    "failing": "failing",
}


def generation() -> str:
    """Major version of the installed TransformerLens."""
    return version("transformer-lens").split(".")[0]


@dataclass(frozen=True)
class Expected:
    """What is expected of one architecture; texts are pieces of the reason given.

    Attributes:
        status: What comes of it.
        because: What the reason says.
        compat: Not None: compatibility mode raises this, or says that it changes the logits.
        precision: Not None: what a bfloat16 and a float16 model raise.
        by_length: Padded on which sides prompts run in groups of one length, as padding would
            change what the model computes.
        scale: Not None: why the softmax scale cannot be compared.
        heads: Not None: why masking a head cannot be compared.
        knockouts: Not None: why edges cannot be cut.
        no_vectors: Kinds of vectors that a run does not give.
    """

    status: Status = "exact"
    because: str = ""
    compat: str | None = None
    precision: str | None = None
    by_length: str = "neither"
    scale: str | None = None
    heads: str | None = None
    knockouts: str | None = None
    no_vectors: str = ""


_OF_PROJECTIONS = "q_grad, k_grad, v_grad, query_in, key_in, value_in"
# Latent attention (MLA): its queries, keys and values come through smaller vectors.
_LATENT = Expected(no_vectors=_OF_PROJECTIONS)
_NO_PATTERN = Expected("no attention", "no hook point")
_CHANGES = "changes the logits"

# TransformerBridge, by architecture; ("3", name) only on that generation.
_BRIDGE: dict[str | tuple[str, str], Expected] = {
    "gpt2_noscale": Expected("logits differ"),
    # Any mask makes it attend to later tokens.
    "openai_gpt": Expected(by_length="left and right"),
    # Their positions count from the first column.
    "bart": Expected(by_length="left"),
    "marian": Expected(by_length="left"),
    "gpt_bigcode_mha": Expected("does not boot", "multi_query=True"),
    "codegen": Expected(precision="same dtype"),
    "falcon_newdec_gqa": Expected("does not boot", "split_with_sizes"),
    "falcon_newdec_gqa_mqfalse": Expected("logits differ"),
    "phimoe": Expected("does not boot", "architecture"),
    "phi_gqa": Expected(compat="size of tensor"),
    "vaultgemma": Expected(compat="does not support compatibility mode"),
    "granitemoehybrid_nope": Expected("does not run", "rotary_emb"),
    "gpt_oss": Expected(compat=_CHANGES),
    "bitnet": Expected(compat=_CHANGES, heads="normalised together"),
    "falcon_h1": Expected(compat="size of tensor"),
    "deepseek_v4": _NO_PATTERN,
    "nemotron_h": _NO_PATTERN,
    "zamba2": _NO_PATTERN,
    "recurrent_gemma": _NO_PATTERN,
    "jetmoe": Expected(
        "patches refused",
        "mixture of experts",
        heads="no hook point",
        knockouts="mixture of experts",
        no_vectors=f"value, z, value_grad, z_grad, {_OF_PROJECTIONS}, attn_out_grad",
    ),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v3_yarn", "glm4_moe_lite", "glm_moe_dsa", "youtu"),
        _LATENT,
    ),
    ("3", "cohere"): Expected("logits differ"),
    ("3", "cohere2"): Expected("logits differ"),
    ("3", "hunyuan_v1_dense"): Expected("logits differ"),
    ("3", "cohere_qknorm"): Expected("does not boot", "q_norm"),
    ("3", "roberta_mlm"): Expected("does not boot", "architecture"),
    ("3", "t5"): Expected("does not run", "too many values"),
    ("3", "ernie4_5_moe"): Expected(compat="mlp.in.weight"),
}

_UNKNOWN_OPTION = Expected("does not boot", "unexpected keyword argument")

# HookedTransformer, by variant.
_HOOKED: dict[str | tuple[str, str], Expected] = {
    "shortformer": Expected(compat=_CHANGES),
    "logit_softcap": Expected(compat=_CHANGES),
    "gated_mlp": Expected(compat=_CHANGES),
    "experts": Expected(compat=_CHANGES),
    ("2", "experts"): Expected(compat="W_out"),
    "bidirectional": Expected(by_length="left and right"),  # ignores the mask
    "clip_qkv": Expected(compat=_CHANGES),
    "attention_sinks": Expected(compat=_CHANGES),
    ("2", "rotary_yarn"): _UNKNOWN_OPTION,
    ("2", "clip_qkv"): _UNKNOWN_OPTION,
    ("2", "attention_sinks"): _UNKNOWN_OPTION,
}


def expected(
    name: str, kind: Literal["TransformerBridge", "HookedTransformer"], major: str | None = None
) -> Expected:
    """What is expected of an architecture or variant on one generation (default: installed)."""
    table = _BRIDGE if kind == "TransformerBridge" else _HOOKED
    return table.get((major or generation(), name), table.get(name, Expected()))


def surprises(record: dict[str, object], what: Expected) -> list[str]:
    """Where a record is not as expected; empty where it is."""
    found: list[str] = []
    status, reason = record["status"], str(record["reason"])
    if status != what.status:
        found.append(f"{status}, expected {what.status}: {reason}")
    elif what.because not in reason:
        found.append(f"{status} because {reason}; expected because of {what.because!r}")
    groups = record.get("by_length") or what.by_length  # None: not checked in this run
    if groups != what.by_length:
        found.append(f"by length: {groups}, expected {what.by_length}")
    if status not in ("exact", "patches refused"):
        return found
    missing = record.get("no_vectors", "")
    if missing != what.no_vectors:
        found.append(f"no vectors: {missing}, expected {what.no_vectors!r}")
    beside = {
        "compat": what.compat,
        "bfloat16": what.precision,
        "float16": what.precision,
        "scale": what.scale,
        "heads": what.heads,
        "knockouts": what.knockouts,
    }
    for name, piece in beside.items():
        value = record.get(name)
        if value is None:
            continue  # not checked in this run
        if piece is None and not isinstance(value, float):
            found.append(f"{name}: {value}")
        elif piece is not None and piece not in str(value):
            found.append(f"{name}: {value}, expected {piece!r}")
    return found
