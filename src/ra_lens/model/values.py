"""What a head gives to W_O, and what it writes for each token that it looks at: v_k W_O^h.

z = A·v and the layer adds Σ_h z_h W_O^h + b_O; both are checked in every run that reads them, so a
model that does something else in between (a gate, a norm after attention, latent values) is refused
rather than misread.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from ra_lens.errors import UnsupportedModel
from ra_lens.model.lens import Lens
from ra_lens.model.sites import Site

_INSTEAD = "Follow the pattern instead (follow='pattern'), or Reversed Attention (follow='more')."


def attention_output(
    pattern: Float[Tensor, "some head query key"],
    values: Float[Tensor, "batch key kv_head d_head"],
    gate: Float[Tensor, "batch query width"] | None = None,
) -> Float[Tensor, "batch query head d_head"]:
    """A·V of every head, in float32 at least, times a gate.

    The gate has one number per head, or one per entry of the result.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    z = einsum(
        pattern.to(wide).expand(len(values), -1, -1, -1),
        by_query_head(values.to(wide), pattern.shape[1]),
        "batch head query key, batch key head d_head -> batch query head d_head",
    )
    if gate is None:
        return z
    per_head = "batch query (head d_head) -> batch query head d_head"
    return z * rearrange(gate, per_head, head=z.shape[2])


def by_query_head(
    values: Float[Tensor, "batch key kv_head d_head"], n_heads: int
) -> Float[Tensor, "batch key head d_head"]:
    """Values of every query head: those of one group come after each other and share theirs."""
    per_head = "batch key kv_head d_head -> batch key (kv_head share) d_head"
    return repeat(values, per_head, share=n_heads // values.shape[2])


def writing_names(lens: Lens, site: Site) -> dict[str, str]:
    """Hook names of values, z and the layer's output, as `{"v": …, "z": …, "out": …}`.

    Raises:
        UnsupportedModel: there are none.
    """
    block = site.prefix.rpartition(".")[0]
    outputs = (f"{site.prefix}.hook_out", f"{block}.hook_attn_out")
    names = {"v": site.value_name, "z": site.z_name}
    names["out"] = next((name for name in outputs if name in lens.hook_points), outputs[-1])
    missing = [name for name in names.values() if name not in lens.hook_points]
    if site.values is None or missing:
        raise UnsupportedModel(
            f"{lens.name} does not show {'values' if site.values is None else missing[0]} at layer "
            f"{site.layer}, so the norm of what its heads write is not known. {_INSTEAD}"
        )
    return names


def written_norms(
    lens: Lens, site: Site, pattern: Float[Tensor, "batch head query key"], seen: dict[str, Tensor]
) -> Float[Tensor, "batch head key"]:
    """‖v_k W_O^h‖ of every head and key; keys of padding included.

    Args:
        lens: The model.
        site: The layer.
        pattern: A, as the model used it.
        seen: What the hooks of `writing_names` saw.

    Raises:
        UnsupportedModel: z is not A·v, or the layer's output is not Σ z W_O + b_O.
    """
    attn: Any = lens.module.get_submodule(site.prefix)
    try:
        weights: Any = getattr(attn, "W_O", None)
    except (ValueError, RuntimeError):  # TransformerBridge, where layers differ in their heads
        weights = None
    d_head = 0 if not isinstance(weights, Tensor) or weights.ndim != 3 else weights.shape[1]
    if not d_head or weights.shape[0] != site.n_heads:
        raise UnsupportedModel(
            f"{lens.name} has no {site.prefix}.W_O of shape [head, d_head, d_model], so the norm "
            f"of what its heads write is not known. {_INSTEAD}"
        )
    dtype = torch.float64 if pattern.dtype == torch.float64 else torch.float32
    n, length = pattern.shape[0], pattern.shape[-1]
    values = seen["v"].detach().to(dtype).reshape(n, length, -1, d_head)
    z = seen["z"].detach().to(dtype).reshape(n, -1, site.n_heads, d_head)
    weights = weights.detach().to(dtype=dtype, device=values.device)
    _same(lens, site, attention_output(pattern.to(dtype), values), z, "z is not A·v")
    out = seen["out"].detach().to(dtype)
    bias = getattr(attn, "b_O", None)
    bias = bias.detach().to(out) if isinstance(bias, Tensor) else torch.zeros(()).to(out)
    into = "head d_head d_model"
    total = einsum(z, weights, f"batch query head d_head, {into} -> batch query d_model") + bias
    _same(lens, site, total, out, "its output is not the sum of what the heads write")
    values = by_query_head(values, site.n_heads)
    written = einsum(values, weights, f"batch key head d_head, {into} -> batch head key d_model")
    return written.norm(dim=-1)


def _same(lens: Lens, site: Site, found: Tensor, wanted: Tensor, what: str) -> None:
    # Models in half precision round each on its own way.
    if float((found - wanted).norm()) > 0.03 * float(wanted.norm()) + 1e-6:
        raise UnsupportedModel(
            f"layer {site.layer} of {lens.name} does not fit: {what}, so the norm of what its "
            f"heads write is not known. {_INSTEAD}"
        )
