"""Which heads, layers and rows of the maps are added."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from typing import SupportsIndex

import torch
from jaxtyping import Bool
from torch import Tensor

from ra_lens.cache_info import HeadScore
from ra_lens.errors import BadInput
from ra_lens.sites import Layers, Site, spell_layers

Head = HeadScore | str | tuple[SupportsIndex, SupportsIndex]
Heads = Head | Iterable[Head] | None
Rows = SupportsIndex | Iterable[SupportsIndex] | slice | None

_LABEL = re.compile(r"L(\d+)H(\d+)")


def choose_heads(
    sites: Mapping[int, Site], *, heads: Heads, layers: Layers, n_layers: int
) -> dict[int, Bool[Tensor, "head"]]:
    """The heads asked for, in the layers asked for; layers left without a head are left out.

    Args:
        sites: The layers there is a map for.
        heads: `(layer, head)` pairs (negative: from the end), `HeadScore`s or labels like
            `"L3H5"`; one or several. None: all.
        layers: Layers, negative from the model's end. None: all. With `heads`: those of the heads
            that lie in these layers.
        n_layers: Layers of the model, from which negative layers count.

    Raises:
        BadInput: a head or layer there is no map for, or none left.
    """
    allowed = _choose_layers(sites, layers, n_layers)
    if heads is None:
        return {layer: torch.ones(sites[layer].n_heads, dtype=torch.bool) for layer in allowed}
    chosen: dict[int, Tensor] = {}
    for head in _as_list(heads):
        layer, index = _read_head(head, sites, n_layers)
        if layer in allowed:
            empty = torch.zeros(sites[layer].n_heads, dtype=torch.bool)
            chosen.setdefault(layer, empty)[index] = True
    if not chosen:
        raise BadInput(
            f"found heads={heads!r} with layers={layers!r}, which leaves no head to patch. Give at "
            "least one head in these layers, or leave one of the two out."
        )
    return dict(sorted(chosen.items()))


def choose_rows(rows: Rows, n: int) -> Bool[Tensor, "query"]:
    """Query rows of a map of `n` tokens: ints (negative from its end) or a slice.

    Raises:
        BadInput: a row that the map does not have, or none.
    """
    chosen = torch.zeros(n, dtype=torch.bool)
    if rows is None:
        return ~chosen
    if isinstance(rows, slice):
        chosen[rows] = True
    else:
        given = list(rows) if isinstance(rows, Iterable) else [rows]
        for row in map(operator.index, given):
            if not -n <= row < n:
                raise BadInput(
                    f"found row {row} in rows={rows!r}, but the maps have {n} query rows: 0 to "
                    f"{n - 1}, or -{n} to -1 from their end."
                )
            chosen[row] = True
    if not bool(chosen.any()):
        raise BadInput(
            f"found rows={rows!r}, which is none of the maps' {n} query rows. Give at least one, "
            "or leave rows out."
        )
    return chosen


def _choose_layers(sites: Mapping[int, Site], layers: Layers, n_layers: int) -> list[int]:
    if layers is None:
        return sorted(sites)
    given = list(layers) if isinstance(layers, Iterable) else [layers]
    wanted = [operator.index(layer) for layer in given]
    chosen = [layer + n_layers if layer < 0 else layer for layer in wanted]
    unknown = [w for w, layer in zip(wanted, chosen, strict=True) if layer not in sites]
    if unknown or not chosen:
        raise BadInput(
            f"found layers={unknown or wanted}; there are maps for layers "
            f"{spell_layers(sorted(sites))}. Give one or several of these; negative counts from "
            f"the end of the model's {n_layers}."
        )
    return sorted(set(chosen))


def _as_list(heads: object) -> list[object]:
    if isinstance(heads, (str, HeadScore)):
        return [heads]
    if not isinstance(heads, Iterable):
        return [heads]  # what it should have been is said where it is read
    parts: list[object] = list(heads)
    is_pair = len(parts) == 2 and all(isinstance(part, SupportsIndex) for part in parts)
    return [tuple(parts)] if isinstance(heads, tuple) and is_pair else parts


def _read_head(head: object, sites: Mapping[int, Site], n_layers: int) -> tuple[int, int]:
    layer, index = _layer_and_index(head)
    layer = layer + n_layers if layer < 0 else layer
    if layer not in sites:
        raise BadInput(
            f"found head {_spell(head)}, but there are maps for layers "
            f"{spell_layers(sorted(sites))} only."
        )
    n_heads = sites[layer].n_heads
    if not -n_heads <= index < n_heads:
        raise BadInput(
            f"found head {_spell(head)}, but layer {layer} has heads 0 to {n_heads - 1}."
        )
    return layer, index % n_heads


def _layer_and_index(head: object) -> tuple[int, int]:
    if isinstance(head, HeadScore):
        return head.layer, head.head
    if isinstance(head, str):
        match = _LABEL.fullmatch(head)
        if match is not None:
            return int(match.group(1)), int(match.group(2))
    elif isinstance(head, tuple) and len(head) == 2:
        layer, index = head
        if isinstance(layer, SupportsIndex) and isinstance(index, SupportsIndex):
            return operator.index(layer), operator.index(index)
    raise BadInput(
        f"found {head!r} among heads. Give (layer, head) pairs, labels like 'L3H5', or the "
        "HeadScores of a ranking's top(k)."
    )


def _spell(head: object) -> str:
    return head.label if isinstance(head, HeadScore) else str(head)
