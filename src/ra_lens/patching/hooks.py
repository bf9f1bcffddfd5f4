"""`patch_hooks`: `(hook name, hook)` pairs that add maps, D = scale · map, to the pattern A.

    add           A' = A + D, the paper's; not renormalised
    renormalise   A' = max(A + D, 0) · rowsum(A) / rowsum(max(A + D, 0))
    scores        A' = A · e^D · rowsum(A) / rowsum(A · e^D), which is softmax(S + D)

The last two keep the sum of every row as it was: 1, or 0 at padding, or less than 1 with attention
sinks (which then keep their share). A row in which the addition leaves nothing above 0 becomes 0.
Only rows that the map reaches are changed at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.errors import BadInput, UnsupportedModel, one_of
from ra_lens.head_names import Heads
from ra_lens.model import Layers, Site, Sites
from ra_lens.numbers import Real, real
from ra_lens.patching.place import (
    ALIGNMENTS,
    Addition,
    Align,
    Placed,
    Placer,
    Rows,
    choose_rows,
    read_mask,
)
from ra_lens.patching.through_z import Difference, ThroughZ, need_values

HookPairs = list[tuple[str, Callable[..., Any]]]
Where = Literal["pattern", "scores"]


class PatchOptions(TypedDict, total=False):
    """The options of `patch_hooks`, whose text says what they are."""

    heads: Heads
    layers: Layers
    rows: Rows
    align: Align
    renormalise: bool
    at: Where
    attention_mask: Tensor | None


def patch_hooks(
    maps: Mapping[int, Tensor],
    sites: Mapping[int, Site],
    *,
    scale: Real,
    heads: Heads = None,
    layers: Layers = None,
    rows: Rows = None,
    align: Align = "exact",
    renormalise: bool = False,
    at: Where = "pattern",
    attention_mask: Tensor | None = None,
) -> HookPairs:
    """Forward hooks that add `scale` times a map to the pattern of each layer.

    Keys after the query get nothing where attention is causal. In `model.generate`, what newly
    generated tokens get depends on `align`. `"left"`: nothing, with and without a key/value cache.
    `"right"`: the map ends at the newest token. Without a cache the whole map moves along at every
    step; with one, each new token gets the last row of the map when it is generated, and what
    earlier tokens got stays with them; so the two generate different texts. `"exact"`: a BadInput
    at the first of them.

    Where an edit of hook_pattern is discarded (`site.observe_only`: OPT, GPT-J and others on the
    TransformerBridge), the same addition is made through z, which costs two products of a pattern
    with the values, and is checked in every forward pass. It needs all values in that pass:
    with a key/value cache only tokens that get nothing can follow, as with RA maps and
    `align="left"`; else it raises, and `generate` needs `use_past_kv_cache=False`.

    Args:
        maps: By layer, `[head, query, key]` (the same for all examples) or with a batch dimension.
        sites: The attention layers, by layer.
        scale: Factor; negative for RA, whose descent lowers the loss.
        heads: Labels like `"L3H5"`, `(layer, head)` pairs (negative: from the end), or
            `HeadScore`s, such as a ranking's `top(k)`; one or several. Default: all.
        layers: Layers; negative counts from the end of the model, as `Sites` knows it, else of
            `sites`. Default: all. Together with `heads`: the heads given that lie in these layers.
        rows: Query rows of the maps to add, counted in the map: ints (negative: from its end) or
            a slice. Default: all.
        align: Where a map of N tokens goes in a prompt of n. `"exact"`: n must be N. `"left"`:
            row and column i go to position i; positions beyond the map get nothing, and a longer
            map is cropped at its end. `"right"`: the ends lie on each other; a longer map is
            cropped at its beginning.
        renormalise: Set negative entries of A' to 0 and give each row the sum it had (1; padding
            rows of 0 stay 0; a row in which nothing is left becomes 0).
        at: `"pattern"`, or `"scores"`: the addition is made to the softmax input instead, in
            units of the scores. Computed from the pattern, so it stays where hook_pattern is in
            the order of hooks; entries of A that are 0 stay 0. With attention sinks, the share
            that goes to the sink is kept.
        attention_mask: `[batch, pos]`, 1 at real tokens, for batches with padding: positions are
            then counted within each example, and padding gets nothing. Tokens generated beyond
            its width count as real. Without it maps are placed by column, whatever is in it: with
            padding, `"left"` and `"exact"` (padding on the left) or `"right"` (on the right)
            would lay the map on padding. Not for encoder-decoders.

    Returns:
        `(hook name, hook)` pairs for `model.hooks(fwd_hooks=...)`, `run_with_hooks` or
        `run_with_ra`; they compose with other hooks in the order of registration. Where the
        addition is made through z, they must come before other hooks that change z. A hook raises
        BadInput when the pattern it meets does not fit, and UnsupportedModel where the addition
        cannot be made exactly.

    Raises:
        BadInput: options that cannot be used, or heads, layers or rows there are no maps for.
        UnsupportedModel: a layer of which it is not known whether an edit changes anything, or
            `renormalise` or `at="scores"` where the pattern is only observed.
    """
    if isinstance(scale, str):
        raise BadInput(
            f"found scale={scale!r}; a patch adds a number times a map. Which number lowers the "
            "loss depends on prompts and targets, which are not known here: "
            "ra_lens.best_scale(model, maps, prompts, targets).scale finds it."
        )
    return scaled_hooks(
        maps,
        sites,
        real("scale", scale),
        heads=heads,
        layers=layers,
        rows=rows,
        align=align,
        renormalise=renormalise,
        at=at,
        attention_mask=attention_mask,
    )


def scaled_hooks(
    maps: Mapping[int, Tensor],
    sites: Mapping[int, Site],
    factor: float | Float[Tensor, "example"],
    *,
    heads: Heads = None,
    layers: Layers = None,
    rows: Rows = None,
    align: Align = "exact",
    renormalise: bool = False,
    at: Where = "pattern",
    attention_mask: Tensor | None = None,
) -> HookPairs:
    """`patch_hooks`, with a factor for all examples of a batch or one for each."""
    one_of("align", align, ALIGNMENTS)
    check_variant(at, renormalise=renormalise)
    _check_maps(maps, sites)
    present = Sites({layer: sites[layer] for layer in sorted(maps)}, Sites(sites).n_layers)
    chosen = present.choose_heads(heads, layers)
    _check_sides([sites[layer] for layer in chosen], align, attention_mask)
    _check_routes([sites[layer] for layer in chosen], variant=renormalise or at == "scores")
    rows = list(rows) if isinstance(rows, Iterator) else rows  # which every layer reads
    placer = Placer(align, read_mask(attention_mask))
    pairs: HookPairs = []
    for layer, of_layer in chosen.items():
        addition = Addition(
            maps[layer],
            factor,
            site=sites[layer],
            heads=of_layer,
            rows=choose_rows(rows, maps[layer].shape[-2]),
            placer=placer,
        )
        if sites[layer].observe_only:
            pairs += ThroughZ(sites[layer], "patch", _adding(addition)).pairs()
        else:
            hook = _editing(sites[layer], addition, at=at, renormalise=renormalise)
            pairs.append((sites[layer].pattern_name, hook))
    return pairs


def _adding(addition: Addition) -> Difference:
    def difference(shape: Sequence[int], device: torch.device, _pattern: object) -> Tensor | None:
        placed = addition.on(shape, device)
        return None if placed is None else placed.addition

    return difference


def check_variant(at: str, *, renormalise: bool) -> None:
    """Refuse an unknown place of the addition, and what keeps the sum of rows twice."""
    one_of("at", at, ("pattern", "scores"))
    if renormalise and at == "scores":
        raise BadInput(
            "found renormalise=True with at='scores', which keeps the sum of every row by itself. "
            "Leave renormalise out."
        )


def _editing(site: Site, addition: Addition, *, at: Where, renormalise: bool) -> Callable[..., Any]:
    def add_map(pattern: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001  TransformerLens passes it by name
        n_queries, n_keys = pattern.shape[-2:]
        if site.drops_keys(n_queries, n_keys):
            if addition.ends_before(n_keys - n_queries):
                return None
            site.refuse_dropped_keys()
        placed = addition.on(pattern.shape, pattern.device)
        if placed is None:
            return None
        return _edited(pattern, placed, at=at, renormalise=renormalise)

    return add_map


def _edited(
    pattern: Float[Tensor, "batch head query key"], placed: Placed, *, at: Where, renormalise: bool
) -> Float[Tensor, "batch head query key"]:
    """A'; see the module's text."""
    addition, reached = placed
    if at == "pattern" and not renormalise:
        return pattern + addition.to(pattern.dtype)
    wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    if at == "pattern":
        after = (wide + addition.to(wide.dtype)).clamp(min=0)
    else:
        # Relative to the largest exponent that any attention goes to: e^D cannot overflow, and the
        # row cannot vanish.
        exponent = addition.to(wide.dtype).expand_as(wide).masked_fill(wide <= 0, -torch.inf)
        highest = exponent.amax(dim=-1, keepdim=True)
        after = wide * (exponent - highest.clamp(min=torch.finfo(wide.dtype).min)).exp()
    total = after.sum(dim=-1, keepdim=True)
    after = after * (wide.sum(dim=-1, keepdim=True) / torch.where(total > 0, total, 1.0))
    return torch.where(reached, after.to(pattern.dtype), pattern)


def _check_maps(maps: Mapping[int, Tensor], sites: Mapping[int, Site]) -> None:
    if not maps:
        raise BadInput("found no maps to add. Give one for each layer to patch.")
    for layer, value in maps.items():
        if layer not in sites:
            raise BadInput(
                f"found a map for layer {layer}, but sites has layers {sorted(sites)}. Give both "
                "from the same model."
            )
        square = value.ndim in (3, 4) and value.shape[-1] == value.shape[-2]
        fits = square or (value.ndim in (3, 4) and sites[layer].cross)
        if not fits or value.shape[-3] != sites[layer].n_heads:
            raise BadInput(
                f"found a map of shape {tuple(value.shape)} for layer {layer}; [head, query, key] "
                f"or [batch, head, query, key] with {sites[layer].n_heads} heads and as many "
                "queries as keys is needed."
            )


def _check_sides(sites: list[Site], align: str, attention_mask: Tensor | None) -> None:
    crossing = [site.label for site in sites if site.cross]
    if crossing and align != "exact":
        raise BadInput(
            f"found align={align!r} with maps of cross-attention ({crossing[0]}), whose rows and "
            "columns are tokens of two texts. Leave align out, or choose layers= without them."
        )
    if attention_mask is not None and any(s.cross or s.query_side == "decoder" for s in sites):
        raise BadInput(
            "found attention_mask with maps of an encoder-decoder, of which it could mean the "
            "encoder's tokens or the decoder's. Patch prompts of one length, without padding."
        )


def _check_routes(sites: list[Site], *, variant: bool) -> None:
    unknown = [site.layer for site in sites if site.observe_only is None]
    if unknown:
        raise UnsupportedModel(
            f"it is not known whether an edit of hook_pattern at layers {unknown} changes anything "
            "in this model. Get the maps from run_with_ra, which finds out."
        )
    for site in sites:
        if site.observe_only:
            need_values(
                site,
                "nothing can be added to the pattern",
                "Leave these layers out with layers=, if others remain.",
            )
    observed = [site.layer for site in sites if site.observe_only]
    if observed and variant:
        raise UnsupportedModel(
            f"hook_pattern of layers {observed} is observe-only in this model: an edit there is "
            "discarded. Maps can be added through z, but renormalise=True and at='scores' need "
            "the pattern before it is used. Leave them out, or load the model as a "
            "HookedTransformer (TransformerLens 2 or 3)."
        )
