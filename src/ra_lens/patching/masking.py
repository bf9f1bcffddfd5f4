"""Masking heads: what they write is set to zero, at every position.

Zeroing z (what a head gives to W_O) is zeroing the head's rows of W_O, which is how the paper masks
heads; the output bias stays. The two differ where value biases have been folded into the output
bias (`Lens.value_biases_folded`): zeroing z then leaves behind what the head's value bias wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.head_names import Heads
from ra_lens.model import Lens, Site, Sites, as_lens


def mask_hooks(
    sites: Mapping[int, Site],
    keep: Bool[Tensor, "layer head"] | Bool[Tensor, "batch layer head"],
) -> list[tuple[str, Callable[..., Any]]]:
    """Forward hooks that set z of the heads not kept to zero, at every position.

    Args:
        sites: The attention layers, by layer.
        keep: True for the heads left as they are; rows of layers in the order of `sites`, as wide
            as the layer with the most heads. With a batch dimension, each example has heads of its
            own.

    Returns:
        `(hook name, hook)` pairs for `model.hooks(fwd_hooks=...)`; layers all of whose heads are
        kept get none.

    Raises:
        BadInput: `keep` is not of the shape of the model's heads.
    """
    n_heads = Sites(sites).shape[1]
    if tuple(keep.shape[-2:]) != (len(sites), n_heads):
        raise BadInput(
            f"found a mask of shape {tuple(keep.shape)} for {len(sites)} layers of {n_heads} heads."
            f" Give [layer, head] = [{len(sites)}, {n_heads}], or that for each example."
        )
    hooks: list[tuple[str, Callable[..., Any]]] = []
    for i, site in enumerate(sites.values()):
        of_layer = keep[..., i, : site.n_heads]
        if not bool(of_layer.all()):
            hooks.append((site.z_name, partial(_zero_heads, of_layer)))
    return hooks


def mask_heads(model: nn.Module, heads: Heads) -> list[tuple[str, Callable[..., Any]]]:
    """Forward hooks that mask some heads, the same in every example.

        with model.hooks(fwd_hooks=mask_heads(model, trace.heads())):
            model("...")

    Args:
        model: A HookedTransformer or TransformerBridge.
        heads: Labels like `"L3H5"`, `(layer, head)` pairs (negative: from the end), or
            `HeadScore`s, such as a ranking's `top(k)`; one or several.

    Returns:
        `(hook name, hook)` pairs.

    Raises:
        BadInput: a head that the model does not have, or none.
        UnsupportedModel: a model whose heads cannot be reached.
    """
    lens = as_lens(model)
    need_heads(lens)
    chosen = lens.sites.choose_heads(heads)
    return [
        (lens.sites[layer].z_name, partial(_zero_heads, ~masked))
        for layer, masked in chosen.items()
    ]


def by_head(z: Float[Tensor, "batch pos *rest"], n_heads: int) -> Tensor:
    """Give z as `[batch, pos, head, d_head]`, heads as the pattern counts them.

    TransformerBridge splits z of models with latent attention (MLA) into another number of heads.
    """
    return z.reshape(z.shape[0], z.shape[1], n_heads, -1)


def need_heads(lens: Lens) -> None:
    """Raise if what the heads give to W_O cannot be reached.

    Raises:
        UnsupportedModel: a layer without hook_z, whose hooks TransformerBridge would ignore.
    """
    missing = [site.z_name for site in lens.sites.values() if site.z_name not in lens.hook_points]
    if missing:
        raise UnsupportedModel(
            f"{lens.name} has no hook point {missing[0]!r}, so single heads can be neither zeroed "
            "nor replaced. Use a method that reads maps only, such as 'ra'."
        )


def _zero_heads(
    keep: Tensor,
    z: Tensor,
    hook: Any,  # noqa: ARG001  TransformerLens passes it by name
) -> Tensor:
    # [head] or [batch, head] to [1 or batch, 1, head, 1]
    n_heads = keep.shape[-1]
    factors = keep.reshape(-1, 1, n_heads, 1).to(z.device)
    # Not a product with 0, which would keep NaN and infinities.
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    return torch.where(factors, by_head(z, n_heads), zero).reshape(z.shape)
