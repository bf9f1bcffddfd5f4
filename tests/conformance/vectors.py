"""Vectors and gradients of weights, against autograd: Hugging Face's products, the bridge's weights.

Queries, keys and values are what Hugging Face's own code multiplies, and their gradients autograd's
there. The gradients of W_Q, W_K, W_V and W_O are autograd's for the weights of the bridge's modules,
which is another backward pass than that of a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oracle import Seen, nll
from ra_lens import RACache, run_with_ra, vjp
from ra_lens.model import Site
from ra_lens.model.sites import VECTOR_KINDS

from .record import relative
from .scale import measured_scale

if TYPE_CHECKING:
    from .subject import Subject

OF_PRODUCTS = ("query", "key", "value", "query_grad", "key_grad", "value_grad")
_MODULES: dict[vjp.Weight, str] = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o"}


def vector_errors(subject: Subject, targets: tuple[int, ...]) -> tuple[dict[str, float], str]:
    """Relative errors, worst layer, by what was compared; and what a run does not give."""
    _, ra = run_with_ra(subject.model, subject.ids, **subject.options, vectors=True)
    total, seen = subject.oracle.with_graph(subject.ids, nll(*targets), **subject.hf_inputs)
    errors = dict[str, float]()
    for (layer, site), one in zip(subject.sites.items(), seen, strict=True):
        for kind, wanted in _wanted(site, one, total, subject.softcap).items():
            if (kind, layer) in ra:
                error = relative(ra[kind, layer], wanted)
                errors[kind] = max(errors.get(kind, 0.0), error)
    errors |= _weight_errors(subject, ra, targets)
    missing = [k for k in VECTOR_KINDS if any((k, layer) not in ra for layer in subject.sites)]
    return errors, ", ".join(missing)


def _wanted(site: Site, one: Seen, total: Tensor, softcap: float | None) -> dict[str, Tensor]:
    """What Hugging Face's own code multiplies, laid out as a cache does, and autograd there."""
    found = dict[str, Tensor]()
    n = len(one.pattern)
    if one.factors is not None:
        query, key = one.factors
        after = measured_scale(one, softcap=softcap)
        before = 1.0 if after is None else after / site.need_scale()
        grads = torch.autograd.grad(total, [query, key], retain_graph=True)
        found["query"] = before * _heads(query, n).transpose(1, 2)
        found["query_grad"] = _heads(grads[0], n).transpose(1, 2) / before
        found["key"] = _of_groups(site, _heads(key, n).permute(0, 3, 1, 2))[0]
        found["key_grad"] = _of_groups(site, _heads(grads[1], n).permute(0, 3, 1, 2))[1]
    if one.values is not None:
        (grad,) = torch.autograd.grad(total, [one.values], retain_graph=True)
        found["value"] = _of_groups(site, _heads(one.values, n).transpose(1, 2))[0]
        found["value_grad"] = _of_groups(site, _heads(grad, n).transpose(1, 2))[1]
    return found


def _heads(x: Tensor, n: int) -> Tensor:
    return x.reshape(n, -1, *x.shape[-2:])


def _of_groups(site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of `[batch, pos, head, d_head]` the first head of each group, and the sum of each group."""
    grouped = x.reshape(*x.shape[:2], site.n_key_value_heads, -1, x.shape[-1])
    return grouped[:, :, :, 0], grouped.sum(3)


def _weight_errors(subject: Subject, ra: RACache, targets: tuple[int, ...]) -> dict[str, float]:
    errors = dict[str, float]()
    for weight, name in _MODULES.items():
        modules = {
            layer: _linear(subject.model, f"{site.prefix}.{name}")
            for layer, site in subject.sites.items()
        }
        read, grad = vjp.FACTORS[weight]
        there = [i for i, m in modules.items() if m is not None and (read, i) in ra and (grad, i) in ra]
        if not there:
            continue
        weights = [modules[layer].weight for layer in there]
        was = [w.requires_grad for w in weights]
        try:
            for w in weights:
                w.requires_grad_()
            with torch.enable_grad():
                total = nll(*targets)(subject.model(subject.ids, **subject.inputs))
                wanted = torch.autograd.grad(total, weights)
        finally:
            for w, flag in zip(weights, was, strict=True):
                w.requires_grad_(flag)
        for layer, module, gradient in zip(there, map(modules.get, there), wanted, strict=True):
            transposed = type(module).__name__ != "Conv1D"
            found = _whole(ra, weight, layer)
            error = relative(found, gradient.T if transposed else gradient)
            errors[weight] = max(errors.get(weight, 0.0), error)
    return errors


def _linear(model: Any, name: str) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    module = getattr(module, "original_component", module)
    weight = getattr(module, "weight", None)
    return module if isinstance(weight, Tensor) and weight.is_floating_point() else None


def _whole(ra: RACache, weight: vjp.Weight, layer: int) -> Tensor:
    """∂L/∂W of all heads and examples, `[into, out]` as one matrix."""
    site = ra.sites[layer]
    shared = weight in ("W_K", "W_V")
    step = site.n_heads // site.n_key_value_heads if shared else 1
    one_by_one = [
        sum(
            vjp.weight_gradient(ra, weight, (layer, head), example=i).matrix
            for i in range(ra.batch_size)
        )
        for head in range(0, site.n_heads, step)
    ]
    return torch.cat(one_by_one, dim=0 if weight == "W_O" else 1)
