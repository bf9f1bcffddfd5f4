"""The weights of the heads of an attention layer, checked against what the layer computes.

    q = x W_Q + b_Q,  k = x W_K + b_K,  v = x W_V + b_V,  out = Σ_h z W_O + b_O

Where a module keeps them differs; where they mean something else (latent attention, adapters that
are not merged, quantised integers) what is read would be wrong. So one short run compares: the
difference of two tokens' x, times the weight, must be that of what the layer made of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from ra_lens.errors import UnsupportedModel
from ra_lens.model.gains import Gain, gain_in, no_norm
from ra_lens.model.lens import Lens
from ra_lens.model.projections import Projections
from ra_lens.model.short_run import Seen, fits, same, short_run
from ra_lens.model.sites import WEIGHTS, Site, Weight
from ra_lens.model.values import attention_output

_READS: dict[Weight, Literal["query_in", "key_in", "value_in"]] = {
    "W_Q": "query_in",
    "W_K": "key_in",
    "W_V": "value_in",
}


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of the heads of one layer, in float32 at least; only those that were asked for.

    Attributes:
        weights: W_Q, W_K and W_V `[head, d_model, d_head]`, of keys and values for each key/value
            head, and W_O `[head, d_head, d_model]`.
        biases: b_Q, b_K, b_V, `[head, d_head]`, by the name of the weight.
        norms: What the norm in front of the layer does to a direction of the residual stream,
            by the name of the weight that reads behind it.
    """

    weights: dict[Weight, Tensor]
    biases: dict[Weight, Tensor]
    norms: dict[Weight, Gain]

    def __getitem__(self, name: Weight) -> Tensor:
        """Give a weight."""
        return self.weights[name]


def head_weights(
    lens: Lens,
    site: Site,
    names: Iterable[Weight] = WEIGHTS,
    *,
    applied_to_values: bool = False,
) -> Weights:
    """Read weights of the heads of a layer, and check them in one run of a few tokens.

    Args:
        lens: The model.
        site: The layer.
        names: Which weights.
        applied_to_values: Whether to check too that what W_O reads is A·v and nothing more.

    Raises:
        UnsupportedModel: one is not there as a plain matrix of each head, the layer does something
            else, or another module than a norm in front stands between it and the residual stream.
    """
    refuse = partial(_unsupported, lens, site)
    if not site.prefix.startswith("blocks.") or site.cross or site.repeated:
        raise refuse("it is not one of a single stack of blocks, each of which runs once")
    at, block = Projections(lens, site), lens.module.get_submodule(site.block)
    found = dict[Weight, Tensor]()
    for name in names:
        found[name] = _read(at.module, site, name, refuse)
    around = _around(block, at.module)
    points: dict[Weight, tuple[nn.Module | None, nn.Module | None]] = {
        "W_Q": (at.reads("query_in"), at.gives("q")),
        "W_K": (at.reads("key_in"), at.gives("k")),
        "W_V": (at.reads("value_in"), at.gives("v")),
        "W_O": (at.z, at.out),
    }
    start = lens.hook_points[lens.block_input_name(site)]
    pattern, values = (lens.hook_points.get(n) for n in (site.pattern_name, site.value_name))
    asked = [start, at.module, pattern, values, *sum(points.values(), ()), *around]
    seen, _ = short_run(lens, [module for module in asked if module is not None])
    stream = _of(seen, start).gave
    biases: dict[Weight, Tensor] = {}
    norms: dict[Weight, Gain] = {}
    for name, weight in found.items():
        reads, gives = (_of(seen, module) for module in points[name])
        into, out = reads.gave, gives.gave
        if name != "W_O" and at.reads_by_name:
            into = _of(seen, at.module).named.get(f"{_READS[name]}put")
        if into is None or out is None or stream is None or (name != "W_O" and into.ndim != 3):
            raise refuse(f"no hook shows what {name} reads and what it gives")
        if name == "W_O":
            _check_output(weight, into, out, refuse)
            _refuse_behind(around, seen, out, refuse)
            continue
        per_head = rearrange(out, "b t ... -> b t (...)").unflatten(-1, (weight.shape[0], -1))
        made = einsum(into, weight, "b t d_model, head d_model d_head -> b t head d_head")
        if per_head.shape != made.shape or not fits(_steps(made), _steps(per_head)):
            raise refuse(f"{name} is not what it multiplies with")
        biases[name] = (per_head - made).mean(dim=(0, 1))
        norms[name] = _norm_in_front(lens, site, around, seen, into, stream, refuse)
    if applied_to_values:
        _check_heads(seen, pattern, values, at.z, refuse)
    return Weights(found, biases, norms)


def _read(attention: nn.Module, site: Site, name: Weight, refuse: Any) -> Tensor:
    try:
        weight: Any = getattr(attention, name, None)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError):  # latent attention
        weight = None
    if not isinstance(weight, Tensor) or weight.ndim != 3 or not weight.is_floating_point():
        raise refuse(f"it has no {name} of one matrix for each head")
    heads = site.n_key_value_heads if name in ("W_K", "W_V") else site.n_heads
    share = weight.shape[0] // heads
    if share * heads != weight.shape[0]:
        raise refuse(f"its {name} has {weight.shape[0]} heads, not {heads}")
    weight = weight.detach()[::share]  # HookedTransformer repeats those of a group
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _around(block: nn.Module, attention: nn.Module) -> list[nn.Module]:
    """Modules of a block that are outside of its attention."""
    inside = set(attention.modules())
    return [module for module in block.modules() if module not in inside and module is not block]


def _steps(tokens: Tensor) -> Tensor:
    """Differences between tokens, in which biases drop out."""
    return tokens[:, 1:] - tokens[:, :1]


def _check_output(weight: Tensor, z: Tensor, out: Tensor, refuse: Any) -> None:
    by_head = rearrange(z, "b t ... -> b t (...)").unflatten(-1, (weight.shape[0], -1))
    if by_head.shape[-1] != weight.shape[1]:
        raise refuse(f"z has {by_head.shape[-1]} numbers per head, W_O {weight.shape[1]}")
    made = einsum(by_head, weight, "b t head d_head, head d_head d_model -> b t d_model")
    if not fits(_steps(made), _steps(out)):
        raise refuse("its output is not the sum of what the heads write")


def _check_heads(
    seen: dict[nn.Module, Seen],
    pattern: nn.Module | None,
    values: nn.Module | None,
    z: nn.Module | None,
    refuse: Any,
) -> None:
    """Check that z = A·v."""
    a, v, given = (_of(seen, module).gave for module in (pattern, values, z))
    if a is None or v is None or given is None:
        raise refuse("no hook shows its values")
    per_head = rearrange(given, "b t ... -> b t (...)").unflatten(-1, (a.shape[1], -1))
    v = rearrange(v, "b t ... -> b t (...)").unflatten(-1, (-1, per_head.shape[-1]))
    if a.shape[1] % v.shape[2] or not fits(per_head, attention_output(a, v)):
        raise refuse("what its heads give is not A·v")


def _norm_in_front(
    lens: Lens,
    site: Site,
    around: list[nn.Module],
    seen: dict[nn.Module, Seen],
    into: Tensor,
    stream: Tensor,
    refuse: Any,
) -> Gain:
    if same(into, stream):
        return no_norm(stream)
    for module in around:
        at = _of(seen, module)
        if at.taken is not None and at.gave is not None and same(at.gave, into):
            if same(at.taken, stream):
                return gain_in(lens, module, at.taken, f"before {site.label}")
            if not same(at.taken, at.gave):
                break
    raise refuse("what it reads is not the residual stream behind one norm")


def _refuse_behind(
    around: list[nn.Module], seen: dict[nn.Module, Seen], out: Tensor, refuse: Any
) -> None:
    """Refuse a layer behind which something changes its output before it is added to the stream."""
    for module in around:
        at = _of(seen, module)
        if at.taken is None or at.gave is None or not same(at.taken, out):
            continue
        if not same(at.gave, at.taken):
            raise refuse(f"a {type(module).__name__} stands between it and the residual stream")


_NOTHING = Seen(None, {}, None, 0)


def _of(seen: dict[nn.Module, Seen], module: nn.Module | None) -> Seen:
    return _NOTHING if module is None else seen.get(module, _NOTHING)


def _unsupported(lens: Lens, site: Site, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"the weights of the heads of {site.label} of {lens.name} are not known: {why}. What its "
        "vectors mean in the residual stream cannot be said; ra holds the vectors themselves."
    )
