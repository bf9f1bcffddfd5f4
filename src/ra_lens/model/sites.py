"""Where attention lives: `Site`, one layer with its hook names, heads and scale, and all `Sites`.

The softmax scale c is the factor between the products q·k and the softmax input, S = c·q·k. The
paper's Reversed Attention is the gradient with respect to q·k, hence R = c·dL/dS (paper eq. 15 and
17, where c = 1/√d_head).

Layers may have different numbers of heads. A table `[…, layer, head]` is then as wide as the layer
with the most. The places beyond the heads of a layer hold NaN and are no heads: no order, figure or
list has them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NoReturn, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ra_lens.errors import BadInput, NotStored, UnsupportedModel
from ra_lens.head_names import Heads, layer_and_index, list_heads, spell_head
from ra_lens.numbers import Real, Wholes, as_whole, real, wholes

Layers = Wholes | None
StoredKind = Literal["ra", "pattern", "pattern_grad"]
STORED_KINDS: tuple[StoredKind, ...] = ("ra", "pattern", "pattern_grad")
MapKind = Literal["ra", "pattern", "pattern_grad", "knockout", "cut"]
MAP_KINDS: tuple[MapKind, ...] = (*STORED_KINDS, "knockout", "cut")
"""All kinds; the last two are made from those that are stored."""
VectorKind = Literal[
    "query", "key", "value", "z", "query_grad", "key_grad", "value_grad", "z_grad",
    "q_grad", "k_grad", "v_grad", "query_in", "key_in", "value_in", "attn_out_grad",
]  # fmt: skip
VECTOR_KINDS: tuple[VectorKind, ...] = get_args(VectorKind)
"""What a run keeps of each token beside maps; see `ra_lens.vectors`."""
Weight = Literal["W_Q", "W_K", "W_V", "W_O"]
WEIGHTS: tuple[Weight, ...] = get_args(Weight)
"""The matrices of an attention layer."""
_OF_KEYS = ("key", "value", "key_grad", "value_grad", "k_grad", "v_grad", "key_in", "value_in")
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

    def side_of(self, kind: VectorKind) -> Side:
        """Whose tokens a kind of vector is of."""
        return self.key_side if kind in _OF_KEYS else self.query_side

    def map_name(self, kind: str) -> str:
        """Full name of a map or of vectors: `{prefix}.hook_ra`, `….hook_query` and so on."""
        return f"{self.prefix}.hook_{kind}"

    def kv_group(self, head: int) -> int:
        """Index of the key/value head that query head `head` reads (grouped queries)."""
        return head // (self.n_heads // self.n_key_value_heads)

    def drops_keys(self, n_queries: int, n_keys: int) -> bool:
        """Whether a key/value cache may have dropped keys, in a pattern of so many of both."""
        return self.window is not None and n_queries < n_keys and n_keys >= self.window

    def refuse_dropped_keys(self) -> NoReturn:
        """Say that positions are lost where a cache `drops_keys`.

        Raises:
            UnsupportedModel: always.
        """
        raise UnsupportedModel(
            f"{self.label} attends to the last {self.window} tokens, and its key/value "
            "cache has dropped earlier ones, so positions cannot be told. Generate with "
            "use_past_kv_cache=False."
        )

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


class Sites(dict[int, Site]):
    """Attention layers of a model, all or some, by layer, in the order in which they run."""

    def __init__(
        self,
        sites: Mapping[int, Site],
        n_layers: int | None = None,
        *,
        noun: str = "there are maps for",
    ) -> None:
        """Hold `sites`.

        Args:
            sites: The layers, by layer.
            n_layers: Layers of the model, those without attention included, from which negative
                layers count. Default: those of `sites` if they know, or up to the last of them.
            noun: What is said of these layers where another one is asked for.
        """
        super().__init__(sites)
        known = sites.n_layers if isinstance(sites, Sites) else max(sites, default=-1) + 1
        self.n_layers = n_layers or known
        self.noun = noun

    # ---- choosing -------------------------------------------------------------------------------

    def choose(self, layers: Layers) -> Sites:
        """Give the layers asked for, in the order of the model; None: all.

        Raises:
            BadInput: a layer that is not here, or none.
        """
        if layers is None:
            return Sites(self)
        given = wholes("layers", layers)
        chosen = sorted({self._from_the_start(layer) for layer in given})
        unknown = [layer for layer in given if self._from_the_start(layer) not in self]
        if unknown:
            raise BadInput(  # a hundred thousand are not spelled out
                f"found layers={reprlib.repr(unknown)}; {self.noun} layers {self.spell()}. Give "
                "one or several of these; negative counts from the end of the model's "
                f"{self.n_layers}."
            )
        return Sites({layer: self[layer] for layer in chosen}, self.n_layers)

    def choose_heads(self, heads: Heads, layers: Layers = None) -> dict[int, Bool[Tensor, "head"]]:
        """Mark the heads asked for, by layer; layers left without a head are left out.

        Args:
            heads: Labels like `"L3H5"`, `(layer, head)` pairs (negative: from the end) or
                `HeadScore`s; one or several. None: all.
            layers: Layers. None: all. With `heads`: those of the heads that lie in these layers.

        Raises:
            BadInput: a head or layer that is not here, or none left.
        """
        allowed = self.choose(layers)
        if heads is None:
            return {i: torch.ones(site.n_heads, dtype=torch.bool) for i, site in allowed.items()}
        chosen: dict[int, Tensor] = {}
        for layer, index in map(self._read_head, list_heads(heads)):
            if layer in allowed:
                none = torch.zeros(self[layer].n_heads, dtype=torch.bool)
                chosen.setdefault(layer, none)[index] = True
        if not chosen:
            raise BadInput(
                f"found heads={heads!r} with layers={layers!r}, which leaves no head to patch. "
                "Give at least one head in these layers, or leave one of the two out."
            )
        return dict(sorted(chosen.items()))

    def _read_head(self, head: object) -> tuple[int, int]:
        given, index = layer_and_index(head)
        layer, found = self._from_the_start(given), f"found head {spell_head(head)}, but"
        if layer not in self:
            raise BadInput(f"{found} {self.noun} layers {self.spell()} only.")
        n_heads = self[layer].n_heads
        if not -n_heads <= index < n_heads:
            raise BadInput(f"{found} layer {layer} has heads 0 to {n_heads - 1}.")
        return layer, index % n_heads

    def _from_the_start(self, layer: int) -> int:
        return layer + self.n_layers if layer < 0 else layer

    # ---- names of maps --------------------------------------------------------------------------

    def name(self, key: object) -> str:
        """Give the full name of a map asked for by that, or as `(kind, layer)`.

        Raises:
            NotStored: there is no such kind of map, or it is neither form of name.
        """
        match key:
            case str():
                return key
            case (str() as given, number) if (layer := as_whole(number)) is not None:
                kind, layer = _read_any_kind(given), self._from_the_start(layer)
                site = self.get(layer)
                return f"blocks.{layer}.attn.hook_{kind}" if site is None else site.map_name(kind)
            case _:
                raise NotStored(
                    f"found {key!r}; ask for a map by kind and number of the layer, as "
                    "ra['ra', 0], or by its full name."
                )

    def map_names(self) -> list[str]:
        """List the full names of all maps that a run may store, layer by layer."""
        return [site.map_name(kind) for site in self.values() for kind in STORED_KINDS]

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Sort full names of maps and vectors by layer, then by kind."""
        present, kinds = set(names), (*MAP_KINDS, *VECTOR_KINDS)
        every = (site.map_name(kind) for site in self.values() for kind in kinds)
        return [name for name in every if name in present]

    # ---- heads ----------------------------------------------------------------------------------

    @property
    def n_heads(self) -> tuple[int, ...]:
        """Number of heads of each layer."""
        return tuple(site.n_heads for site in self.values())

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of a table of all heads: layers, and heads of the layer with the most."""
        return len(self), max(self.n_heads)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Every head as (layer, head), in the order of the model."""
        return every_head(self, self.n_heads)

    @property
    def places(self) -> Bool[Tensor, "layer head"]:
        """Which places of a table are heads; they are those of `heads`, in its order."""
        return head_places(self.n_heads)

    # ---- the rest -------------------------------------------------------------------------------

    def with_scales(self, given: Real | Mapping[int, Real] | None) -> Sites:
        """Put the softmax scales that the user gave in place of the model's.

        Raises:
            BadInput: a scale for a layer that is not here, or one that is no number.
        """
        if given is None:
            return self
        by_layer = given if isinstance(given, Mapping) else dict.fromkeys(self, given)
        unknown = [layer for layer in by_layer if layer not in self]
        if unknown:
            raise BadInput(
                f"found softmax_scale for layers {unknown}; the layers collected are {list(self)}."
            )
        scales = {layer: real("softmax_scale", scale) for layer, scale in by_layer.items()}
        scaled = {layer: replace(self[layer], scale=scale) for layer, scale in scales.items()}
        return Sites({**self, **scaled}, self.n_layers)

    def spell(self) -> str:
        """Spell the layers: `0…11`, or `0, 3, 7` where they are not consecutive."""
        return spell_layers(list(self))


def read_kind(kind: str) -> MapKind:
    """Read the name of a kind of map, with or without `hook_`.

    Raises:
        NotStored: there is no such kind of map.
    """
    for known in MAP_KINDS:
        if kind.removeprefix("hook_") == known:
            return known
    raise NotStored(f"found kind {kind!r}; a cache gives {', '.join(MAP_KINDS)}.")


def _read_any_kind(kind: str) -> MapKind | VectorKind:
    for known in VECTOR_KINDS:
        if kind.removeprefix("hook_") == known:
            return known
    return read_kind(kind)


def read_vectors(vectors: bool | str | Sequence[str]) -> frozenset[VectorKind]:
    """Read which vectors a run is to keep: all, none, or those named.

    Raises:
        BadInput: there is no such kind of vector.
    """
    if isinstance(vectors, bool):
        return frozenset(VECTOR_KINDS) if vectors else frozenset()
    names = [vectors] if isinstance(vectors, str) else list(vectors)
    if unknown := [name for name in names if name not in VECTOR_KINDS]:
        raise BadInput(
            f"found vectors={unknown[0]!r}; give True, or some of {', '.join(VECTOR_KINDS)}."
        )
    return frozenset(kind for kind in VECTOR_KINDS if kind in names)


def read_stored_kind(kind: str) -> StoredKind:
    """Read the name of a kind of map that is stored.

    Raises:
        NotStored: there is no such kind of map, or it is made from others.
    """
    for known in STORED_KINDS:
        if kind.removeprefix("hook_") == known:
            return known
    raise NotStored(f"found kind {kind!r}; give one that is stored: {', '.join(STORED_KINDS)}.")


def spell_layers(layers: Sequence[int]) -> str:
    """Spell layer indices: `0…11`, or `0, 3, 7` where they are not consecutive."""
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}…{layers[-1]}"
    return ", ".join(map(str, layers))


def every_head(layers: Iterable[int], counts: Iterable[int]) -> list[tuple[int, int]]:
    """List every head of layers with so many heads as (layer, head)."""
    return [(layer, h) for layer, n in zip(layers, counts, strict=True) for h in range(n)]


def head_places(counts: Sequence[int]) -> Bool[Tensor, "layer head"]:
    """Mark the places of a table that are heads; they are those of `every_head`, in its order."""
    return torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)


def table(rows: Sequence[Float[Tensor, "*batch _heads"]]) -> Float[Tensor, "*batch layer head"]:
    """Lay one row for each layer out as a table."""
    width = max(row.shape[-1] for row in rows)
    nan = float("nan")
    wide = [torch.nn.functional.pad(row, (0, width - row.shape[-1]), value=nan) for row in rows]
    return torch.stack(wide, dim=-2)


def spell_counts(counts: Sequence[int]) -> str:
    """Spell how many heads layers have: `8`, or `2 to 6` where they differ."""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
