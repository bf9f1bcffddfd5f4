"""Masking heads: what they write is set to zero, or to something else, at every position.

Zeroing z (what a head gives to W_O) is zeroing the head's rows of W_O, which is how the paper masks
heads; the output bias stays. The two differ where value biases have been folded into the output
bias (`Lens.value_biases_folded`): zeroing z then leaves behind what the head's value bias wrote.

In place of 0 a head may get z of another run, such as that of a corrupted prompt, or a mean; what
value biases write is in both then, so that folding does not matter. `read_z` reads z of all heads
in the columns in which the hooks put it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.fitting import rows_of_forward
from ra_lens.head_names import Heads
from ra_lens.model import Lens, Site, Sites, as_lens, spell_layers
from ra_lens.padding import batches, watched
from ra_lens.prompts import Prompts


def mask_hooks(
    sites: Mapping[int, Site],
    keep: Bool[Tensor, "layer head"] | Bool[Tensor, "batch layer head"],
    *,
    instead: Mapping[int, Float[Tensor, "#batch #pos _heads _d_head"]] | None = None,
) -> list[tuple[str, Callable[..., Any]]]:
    """Forward hooks that set z of the heads not kept to zero, at every position, or to `instead`.

    Args:
        sites: The attention layers, by layer.
        keep: True for the heads left as they are; rows of layers in the order of `sites`, as wide
            as the layer with the most heads. With a batch dimension, each example has heads of its
            own.
        instead: What the heads not kept get in place of 0, by layer, as `read_z` gives it: a row
            for each example of the batch and a column for each of its columns, padding included;
            one row, or one column, is for all. Layers all of whose heads are kept need none. NaN
            at heads that are kept goes nowhere.

    Returns:
        `(hook name, hook)` pairs for `model.hooks(fwd_hooks=...)`; layers all of whose heads are
        kept get none.

    Raises:
        BadInput: `keep` is not of the shape of the model's heads, or `instead` lacks a layer or is
            of another number of heads; when the hooks run, of other rows, columns or width.
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
            new = None if instead is None else _instead(instead, site)
            hooks.append((site.z_name, partial(_set_heads, of_layer, new)))
    return hooks


def _instead(instead: Mapping[int, Tensor], site: Site) -> Tensor:
    if site.layer not in instead:
        raise BadInput(
            f"found no values in instead= for {site.label}, of which not all heads are kept; there "
            f"are some for layers {spell_layers(list(instead)) or 'none'}. Give "
            "[batch, pos, head, d_head] for each such layer, as ra_lens.patching.masking.read_z "
            "does."
        )
    values = instead[site.layer]
    if values.ndim != 4 or values.shape[2] != site.n_heads:
        raise BadInput(
            f"found instead= of shape {tuple(values.shape)} for {site.label}, which has "
            f"{site.n_heads} heads. Give [batch, pos, head, d_head], with 1 in the place of batch "
            "or pos for what is the same in all."
        )
    return values


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
        (lens.sites[layer].z_name, partial(_set_heads, ~masked, None))
        for layer, masked in chosen.items()
    ]


def by_head(z: Float[Tensor, "batch pos *rest"], n_heads: int) -> Tensor:
    """Give z as `[batch, pos, head, d_head]`, heads as the pattern counts them.

    TransformerBridge splits z of models with latent attention (MLA) into another number of heads.
    """
    return z.reshape(z.shape[0], z.shape[1], n_heads, -1)


def need_heads(lens: Lens) -> None:
    """Refuse a model with a layer without hook_z, whose hooks TransformerBridge would ignore."""
    missing = [site.z_name for site in lens.sites.values() if site.z_name not in lens.hook_points]
    if missing:
        raise UnsupportedModel(
            f"{lens.name} has no hook point {missing[0]!r}, so single heads can be neither zeroed "
            "nor replaced. Use a method that reads maps only, such as 'ra'."
        )


@torch.no_grad()
def read_z(
    lens: Lens, prompts: Prompts, *, batch_size: int | Literal["auto"] | None = None
) -> dict[int, Float[Tensor, "prompt pos head d_head"]]:
    """Read what every head gives to W_O at every token, without gradients.

    It is laid out as one batch of all prompts is (`Prompts.lay_out`), so that `mask_hooks` can put
    it into a batch of prompts that are as long each, padded on the same side; 0 at padding. z is
    read after all hooks on the model; of a layer that runs several times, that of the last time.

    Args:
        lens: The model.
        prompts: What it reads.
        batch_size: Prompts per forward pass; `"auto"`: as many as fit; None: all of one length
            together, or all.

    Returns:
        z by layer, in the model's data type, on the device of the layer. That is layers · prompts ·
        tokens · heads · d_head numbers.

    Raises:
        UnsupportedModel: a layer without hook_z, or a model in train mode with dropout.
        NothingToDifferentiate: NaN in the logits at the last tokens.
    """
    need_heads(lens)
    lens.refuse_dropout()
    keep = {site.z_name: partial(by_head, n_heads=site.n_heads) for site in lens.sites.values()}
    if batch_size == "auto":
        batch_size = rows_of_forward(lens, prompts, kept=1, of_all=True)
    starts, found = prompts.starts, dict[int, Tensor]()
    for part, some in batches(lens, prompts, batch_size):
        batch = some.lay_out(lens)
        with watched(lens, batch):
            shown, logits = lens.look(keep, *batch.model_input, batch.last)
        lens.refuse_nan(logits)
        for layer, site in lens.sites.items():
            z = shown[site.z_name]
            shape = (len(prompts), prompts.padded_width, *z.shape[2:])
            of_layer = found.setdefault(layer, z.new_zeros(shape))
            for row, i in enumerate(part):
                own = slice(starts[i], starts[i] + batch.lengths[row])
                of_layer[i, own] = z[row, batch.span(row)]
    return found


def _set_heads(
    keep: Tensor,
    instead: Tensor | None,
    z: Tensor,
    hook: Any,  # noqa: ARG001  TransformerLens passes it by name
) -> Tensor:
    # [head] or [batch, head] to [1 or batch, 1, head, 1]
    n_heads = keep.shape[-1]
    factors = keep.reshape(-1, 1, n_heads, 1).to(z.device)
    own = by_head(z, n_heads)
    # Not a product with 0, which would keep NaN and infinities.
    new = torch.zeros((), dtype=z.dtype, device=z.device) if instead is None else instead.to(own)
    if new.ndim and any(n not in (1, m) for n, m in zip(new.shape, own.shape, strict=True)):
        raise BadInput(
            f"found instead= of shape {tuple(new.shape)} where z is {tuple(own.shape)}, "
            "[batch, pos, head, d_head]. Give values of prompts that are as many and as long, "
            "padded on the same side."
        )
    return torch.where(factors, own, new).reshape(z.shape)
