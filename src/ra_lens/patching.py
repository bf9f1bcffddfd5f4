"""Attention patching: add scaled maps to the pattern, without touching weights (paper section 5.3).

    A' = A + scale · map

after the softmax, in every head and row, and not renormalised: rows of R sum to 0, so rows of A'
still sum to 1; with a forward pattern added they do not. RA's scale is negative, a descent step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.sites import Site


def patch_hooks(
    maps: Mapping[int, Tensor], sites: Mapping[int, Site], *, scale: int | float
) -> list[tuple[str, Callable[..., Any]]]:
    """Forward hooks that add `scale` times a map to the pattern of each layer.

    Args:
        maps: By layer, `[head, query, key]` (the same for all examples) or with a batch dimension.
        sites: The layers, by layer.
        scale: Factor.

    Returns:
        `(hook name, hook)` pairs for `model.hooks(fwd_hooks=...)`; they compose with other hooks.
        A hook raises BadInput when the pattern it meets has another shape than its map.

    Raises:
        UnsupportedModel: a layer where an edit of hook_pattern changes nothing.
    """
    silent = [layer for layer in maps if sites[layer].observe_only]
    if silent:
        raise UnsupportedModel(
            f"hook_pattern of layers {silent} is observe-only in this model: an edit there is "
            "discarded, so the patch would do nothing. Load the model as a HookedTransformer "
            "(TransformerLens 2 or 3), whose hook_pattern is used by the model."
        )
    unknown = [layer for layer in maps if sites[layer].observe_only is None]
    if unknown:
        raise UnsupportedModel(
            f"it is not known whether an edit of hook_pattern at layers {unknown} changes anything "
            "in this model. Get the maps from run_with_ra, which finds out."
        )
    return [
        (sites[layer].pattern_name, _adder(value, scale, layer)) for layer, value in maps.items()
    ]


def _adder(value: Tensor, scale: int | float, layer: int) -> Callable[..., Any]:
    def add_map(pattern: Tensor, hook: Any) -> Tensor:  # noqa: ARG001  TransformerLens passes it by name
        if pattern.shape[-3:] != value.shape[-3:]:
            raise BadInput(
                f"found a pattern of {pattern.shape[-2]}×{pattern.shape[-1]} tokens and "
                f"{pattern.shape[-3]} heads at layer {layer}, but the map to add has "
                f"{value.shape[-2]}×{value.shape[-1]} and {value.shape[-3]}. "
                "Use prompts of the length that the maps were made on."
            )
        return pattern + (scale * value).to(device=pattern.device, dtype=pattern.dtype)

    return add_map
