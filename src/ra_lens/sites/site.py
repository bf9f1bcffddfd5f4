"""One attention layer of one model: its hook names, its heads and its softmax scale.

The softmax scale c is the factor between the products q·k and the softmax input, S = c·q·k. The
paper's Reversed Attention is the gradient with respect to q·k, hence R = c·dL/dS (paper eq. 15 and
17, where c = 1/√d_head).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ra_lens.errors import UnsupportedModel

Gate = Literal["sigmoid", "softplus"]
Side = Literal["input", "decoder"]


@dataclass(frozen=True)
class Site:
    """One attention layer.

    Attributes:
        layer: Its key among the sites: the index of the block in a model of one stack. In an
            encoder-decoder, and other models of several stacks, they are counted through: the
            encoder's, then self- and cross-attention of each decoder block.
        prefix: Hook prefix, such as `blocks.{layer}.attn` or `decoder_blocks.1.cross_attn`.
        n_heads: Query heads.
        n_key_value_heads: Key/value heads; fewer than `n_heads` with grouped queries.
        scale: Softmax scale c, so that the softmax input is c·q·k; None if the model does not say.
        observe_only: True where hook_pattern only shows a copy of what the model has already used:
            an edit there changes nothing. None until a run has shown which it is.
        window: Keys that a query reaches, itself included, where attention is local; a key/value
            cache drops what lies outside.
        causal: Whether a query reaches no keys after it.
        cross: Whether the decoder attends to the encoder here: maps are [query, key] with as many
            keys as the encoder has tokens.
        values: Hook point below `prefix` that shows what the pattern is multiplied with,
            `[batch, key, key/value head, d_head]`; None if there is none.
        gate: What is applied to `gate.hook_out` and then multiplied with z, before `hook_z`, in
            the models whose pattern is only observed. None: nothing.
        repeated: Whether the layer runs several times in one forward pass (HRM-Text). Maps are
            then those of the last time: the earlier ones run without gradient in part, so that
            backward does not give theirs. What is added to the pattern is added each time.
    """

    layer: int
    prefix: str
    n_heads: int
    n_key_value_heads: int
    scale: float | None
    observe_only: bool | None = None
    window: int | None = None
    causal: bool = True
    cross: bool = False
    values: str | None = "hook_v"
    gate: Gate | None = None
    repeated: bool = False

    @property
    def label(self) -> str:
        """`layer 5`, `encoder 0`, `decoder 1` or `decoder 1 cross`."""
        stack, index, _ = self.prefix.split(".", 2)
        kind = stack.removesuffix("blocks").removesuffix("_") or "layer"
        return f"{kind} {index}{' cross' * self.cross}"

    @property
    def block(self) -> str:
        """Hook prefix of the block that it is in."""
        return self.prefix.rpartition(".")[0]

    @property
    def pattern_name(self) -> str:
        """Full hook name of the pattern."""
        return f"{self.prefix}.hook_pattern"

    @property
    def scores_name(self) -> str:
        """Full hook name of the scores; where the pattern is only observed they are a copy too."""
        return f"{self.prefix}.hook_attn_scores"

    @property
    def value_name(self) -> str:
        """Full hook name of the values."""
        return f"{self.prefix}.{self.values}"

    @property
    def gate_name(self) -> str:
        """Full hook name of what the gate is made from."""
        return f"{self.prefix}.gate.hook_out"

    @property
    def z_name(self) -> str:
        """Full hook name of what the heads give to W_O, `[batch, pos, head, d_head]`."""
        return f"{self.prefix}.hook_z"

    @property
    def block_output_name(self) -> str:
        """Full hook name of the residual stream after the block (TransformerBridge)."""
        return f"{self.block}.hook_out"

    @property
    def query_side(self) -> Side:
        """What the queries are made from: the input, or what the decoder reads."""
        return "decoder" if self.prefix.startswith("decoder_") else "input"

    @property
    def key_side(self) -> Side:
        """What the keys are made from."""
        return "input" if self.cross else self.query_side

    def map_name(self, kind: str) -> str:
        """Full name of a map: `{prefix}.hook_ra`, `….hook_pattern` or `….hook_pattern_grad`."""
        return f"{self.prefix}.hook_{kind}"

    def kv_group(self, head: int) -> int:
        """Index of the key/value head that query head `head` reads (grouped queries)."""
        return head // (self.n_heads // self.n_key_value_heads)

    def need_scale(self) -> float:
        """The softmax scale.

        Raises:
            UnsupportedModel: it is not known.
        """
        if self.scale is None:
            raise UnsupportedModel(
                f"the softmax scale of {self.label} is unknown: its attention module does not say "
                "by which factor q·k is multiplied before the softmax. Reversed Attention is "
                "defined with it (R = scale · dL/dscores). Give it as softmax_scale=, one number "
                "or {layer: number}; softmax_scale=1.0 gives dL/dscores itself."
            )
        return self.scale


def spell_layers(layers: Sequence[int]) -> str:
    """Spell layer indices: `0…11`, or `0, 3, 7` where they are not consecutive."""
    consecutive = list(layers) == list(range(layers[0], layers[-1] + 1))
    if consecutive and len(layers) > 1:
        return f"{layers[0]}…{layers[-1]}"
    return ", ".join(map(str, layers))
