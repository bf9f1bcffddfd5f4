"""Which heads, layers and rows of the maps are added."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.head_names import Heads, layer_and_index, list_heads, spell_head
from ra_lens.numbers import Wholes, places, wholes
from ra_lens.sites import Layers, Site, spell_layers

Rows = Wholes | slice | None


def choose_heads(
    sites: Mapping[int, Site], *, heads: Heads, layers: Layers, n_layers: int
) -> dict[int, Bool[Tensor, "head"]]:
    """The heads asked for, in the layers asked for; layers left without a head are left out.

    Args:
        sites: The layers there is a map for.
        heads: Labels like `"L3H5"`, `(layer, head)` pairs (negative: from the end) or
            `HeadScore`s; one or several. None: all.
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
    for head in list_heads(heads):
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
    """Query rows of a map of `n` tokens: ints (negative from its end), a slice, or `n` bools.

    Raises:
        BadInput: a row that the map does not have, or none.
    """
    of_map = torch.ones(n, dtype=torch.bool)
    if rows is not None:
        of_map[:] = False
        of_map[places("rows", rows, n, "query rows of the maps")] = True
    return of_map


def _choose_layers(sites: Mapping[int, Site], layers: Layers, n_layers: int) -> list[int]:
    if layers is None:
        return sorted(sites)
    wanted = wholes("layers", layers)
    chosen = [layer + n_layers if layer < 0 else layer for layer in wanted]
    unknown = [w for w, layer in zip(wanted, chosen, strict=True) if layer not in sites]
    if unknown:
        raise BadInput(
            f"found layers={reprlib.repr(unknown)}; there are maps for layers "
            f"{spell_layers(sorted(sites))}. Give one or several of these; negative counts from "
            f"the end of the model's {n_layers}."
        )
    return sorted(set(chosen))


def _read_head(head: object, sites: Mapping[int, Site], n_layers: int) -> tuple[int, int]:
    layer, index = layer_and_index(head)
    layer = layer + n_layers if layer < 0 else layer
    if layer not in sites:
        raise BadInput(
            f"found head {spell_head(head)}, but there are maps for layers "
            f"{spell_layers(sorted(sites))} only."
        )
    n_heads = sites[layer].n_heads
    if not -n_heads <= index < n_heads:
        raise BadInput(
            f"found head {spell_head(head)}, but layer {layer} has heads 0 to {n_heads - 1}."
        )
    return layer, index % n_heads
