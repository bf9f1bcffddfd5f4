"""From maps to the weights of steps.

One layer, heads put together by mean, by maximum, or one head taken:

* `pattern`: w = A.
* `more`: (−R)₊, where descent wants more attention; `less`: (R)₊; `abs`: |R|. The part is taken
  head by head, so that heads which want opposite things do not cancel. Gradients have no scale of
  their own: they are divided by the largest sum of a row, so that w is a share of the strongest
  pull on any token, and a path does not depend on a factor in the loss.
* `knockout`: (−R~ / (1 − A))₊, edges whose cut raises the loss, taken and divided in the same way.

Across layers, per head, with the residual connection beside them (ρ):

* `value_norm`: s = A·‖v_k W_O^h‖ and ‖x_q‖, the norm of the stream, divided by their sum.
* `pattern`: A / heads, ρ = ½: what attention rollout takes (Abnar & Zuidema 2020).
* `more`, `less`, `abs`, `knockout`: divided by the largest sum of any token in any layer; ρ is what
  is missing to 1. A token that the gradient does not move keeps what it has.

`residual=` gives ρ a fixed value instead; heads then share 1 − ρ in proportion. So what arrives at
a node is divided among where it came from: weights sum to 1.

Steps to attention sinks are taken out first, so that what is left is shared in the same way: of one
layer w = A stays as it is and the gradients' largest sum is one without sinks; across layers all
sums are without them, and weights sum to 1 again. A token that looked at nothing but sinks keeps
what it has. A sink that looks at itself is no step to a sink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ra_lens.errors import BadInput
from ra_lens.paths.result import GRADIENT, REVERSED, Follow


def part(follow: Follow, maps: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """Give what is followed of a map, not negative: A itself, or a part of R or of a knockout."""
    if follow == "more":
        return np.maximum(-maps, 0.0)
    if follow in ("less", "knockout"):
        return np.maximum(maps, 0.0)
    return np.abs(maps) if follow == "abs" else maps


def signed(follow: Follow, maps: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """Give what is told of a step: A, a knockout, or −R (positive where descent wants more)."""
    return -maps if follow in REVERSED else maps


def aggregate(
    maps: Float[np.ndarray, "head query key"],
    follow: Follow,
    agg_heads: str | int,
    sinks: Sequence[int] = (),
) -> tuple[Float[np.ndarray, "query key"], Float[np.ndarray, "query key"]]:
    """Put the heads of a layer together by `mean` or `max`, or take one by its index.

    Gives the weights of steps, not negative, and what is told of them: A, or the heads' part of a
    knockout or of −R, the sign of −R that of the heads together.
    """
    parts, shown = _without(sinks, part(follow, maps)), signed(follow, maps)
    if isinstance(agg_heads, int):
        if not -len(maps) <= agg_heads < len(maps):
            raise BadInput(
                f"found agg_heads={agg_heads}; this layer has heads 0 to {len(maps) - 1}."
            )
        weights, values = parts[agg_heads], shown[agg_heads]
    elif agg_heads == "mean":
        weights, values = parts.mean(axis=0), shown.mean(axis=0)
    else:
        winner = parts.argmax(axis=0)[None]
        weights, values = (np.take_along_axis(x, winner, axis=0)[0] for x in (parts, shown))
    if follow in GRADIENT:
        want_less = values < 0 if follow == "abs" else follow == "less"
        strongest = float(np.tril(weights, k=-1).sum(axis=1).max(initial=0.0))
        weights, values = weights / (strongest or 1.0), np.where(want_less, -weights, weights)
    return weights, values


@dataclass(frozen=True)
class LayerMaps:
    """What one layer did with one prompt.

    Attributes:
        maps: A, R, or what cutting each edge does to the loss.
        written: ‖v_k W_O^h‖, for `value_norm`.
        stream: ‖x_q‖ in front of the layer, for `value_norm`.
    """

    maps: Float[np.ndarray, "head query key"]
    written: Float[np.ndarray, "head key"] | None = None
    stream: Float[np.ndarray, "pos"] | None = None


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer's steps; from each query they sum to 1.

    Attributes:
        heads: Through the heads.
        residual: Along the residual connection.
        values: What the map says, for each step through a head.
    """

    heads: Float[np.ndarray, "head query key"]
    residual: Float[np.ndarray, "pos"]
    values: Float[np.ndarray, "head query key"]


def across_layers(
    layers: Sequence[LayerMaps],
    follow: Follow,
    residual: float | None,
    sinks: Sequence[int] = (),
) -> list[LayerWeights]:
    """Weights of all layers' steps, those to `sinks` left out."""
    if residual is not None and not 0.0 <= residual < 1.0:
        raise BadInput(
            f"found residual={residual}; give the share of the residual connection, at least 0 "
            "and below 1, or None for what the measure itself says."
        )
    raw = [_without(sinks, _strength(layer, follow)) for layer in layers]
    sums = [strength.sum(axis=(0, 2)) for strength in raw]
    largest = max(float(total.max(initial=0.0)) for total in sums)
    if largest <= 0.0:
        raise BadInput(
            f"found nothing to follow: follow={follow!r} is 0 in every head of these layers. Take "
            "other layers, another target, or follow='pattern'."
        )
    found: list[LayerWeights] = []
    for layer, strength, total in zip(layers, raw, sums, strict=True):
        if residual is None and follow == "value_norm" and layer.stream is not None:
            whole = total + layer.stream
        elif residual is None and follow in GRADIENT:
            whole = np.full_like(total, largest)
        else:
            share = 0.5 if residual is None else residual
            whole = total / (1.0 - share)
        with np.errstate(divide="ignore", invalid="ignore"):
            heads = np.where(total[:, None] > 0, strength / whole[:, None], 0.0)
            stays = np.where(total > 0, 1.0 - total / whole, 1.0)
        values = strength if follow == "value_norm" else signed(follow, layer.maps)
        found.append(LayerWeights(heads, np.clip(stays, 0.0, 1.0), values))
    return found


def _strength(layer: LayerMaps, follow: Follow) -> Float[np.ndarray, "head query key"]:
    if follow == "value_norm" and layer.written is not None:
        return layer.maps * layer.written[:, None, :]
    strength = part(follow, layer.maps)
    return strength / len(strength) if follow == "pattern" else strength


def _without(
    sinks: Sequence[int], strength: Float[np.ndarray, "head query key"]
) -> Float[np.ndarray, "head query key"]:
    """Take out the steps to sinks from other tokens."""
    left = strength.copy() if sinks else strength
    for sink in sinks:
        own = left[:, sink, sink].copy()
        left[:, :, sink] = 0.0
        left[:, sink, sink] = own
    return left
