"""Vectors and gradients of weights, against autograd at what other code multiplies.

Queries, keys and values are what Hugging Face's own code multiplies, and their gradients autograd's
there; the paper's equations are held to the same. The gradients of W_Q, W_K, W_V and W_O are
autograd's for the weights of the model's modules, in a backward pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oracle import Loss, Oracle, Seen, nll
from ra_lens import RACache, run_with_ra, vjp
from ra_lens.model import Site
from ra_lens.model.sites import VECTOR_KINDS
from ra_lens.model.values import attention_output

from .build import hf_model
from .record import VECTORS_LIMIT, relative
from .scale import measured_scale

if TYPE_CHECKING:
    from .subject import Subject

Errors = dict[str, float]
Wanted = dict[str, Tensor]
_MODULES: dict[vjp.Weight, str] = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o"}


def vector_errors(subject: Subject, targets: tuple[int, ...]) -> tuple[Errors, str, list[str]]:
    """Relative errors, worst layer, by what was compared; what a run does not give; and what fails.

    A gradient is a sum of terms that cancel: where it is over the limit, it may be three times as
    far off as that of Hugging Face's model in float32 is.
    """
    _, ra = run_with_ra(subject.model, subject.ids, **subject.options, vectors=True)
    loss, sites = nll(*targets), list(ra.sites.values())

    def of(oracle: Oracle) -> list[Wanted]:
        total, seen = oracle.with_graph(subject.ids, loss, **subject.hf_inputs)
        return wanted_vectors(sites, seen, total, subject.softcap)

    wanted = of(subject.oracle)
    errors, allowed = errors_of(ra, wanted, subject.softcap), Errors()
    if any(error > VECTORS_LIMIT for error in errors.values()):
        narrow = of(Oracle(hf_model(subject.architecture, subject.folder), wide=False))
        for theirs, exact in zip(narrow, wanted, strict=True):
            for kind, value in theirs.items():
                allowed[kind] = max(allowed.get(kind, 0.0), 3 * relative(value, exact[kind]))
    if not any(site.repeated for site in sites):
        errors |= weight_errors(ra, _weights(subject.model, sites), _gradients(subject, loss))
    missing = [kind for kind in VECTOR_KINDS if any((kind, i) not in ra for i in ra.layers)]
    over = [
        f"{what} {error:.1e}"
        for what, error in errors.items()
        if not error <= max(VECTORS_LIMIT, allowed.get(_OF_EQUATION.get(what, what), 0.0))
    ]
    return errors, ", ".join(missing), over


_OF_EQUATION = {"eq. 18": "query_grad", "eq. 19": "key_grad", "eq. 13": "value_grad"}


def wanted_vectors(
    sites: Iterable[Site], seen: Sequence[Seen], total: Tensor, softcap: float | None
) -> list[Wanted]:
    """What other code multiplies at each site, laid out as a cache does, and autograd there."""
    every = list[Wanted]()
    for site, one in zip(sites, seen, strict=True):
        found, n = Wanted(), len(one.pattern)
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
        every.append({kind: value.detach() for kind, value in found.items()})
    return every


def errors_of(ra: RACache, wanted: Sequence[Wanted], softcap: float | None) -> Errors:
    """Relative errors of a cache's vectors, and of the equations where they hold as written."""
    errors = Errors()

    def compare(what: str, found: Tensor, right: Tensor) -> None:
        errors[what] = max(errors.get(what, 0.0), relative(found, right))

    for (layer, site), right in zip(ra.sites.items(), wanted, strict=True):
        for kind, value in right.items():
            if (kind, layer) in ra:
                compare(kind, ra[kind, layer], value)
        groups = site.n_key_value_heads
        if "query" in right and not softcap:
            r = ra["ra", layer]
            compare("eq. 18", vjp.query_grad(r, ra["key", layer]), right["query_grad"])
            compare("eq. 19", vjp.key_grad(r, ra["query", layer], groups), right["key_grad"])
        if "value" in right and ("z", layer) in ra and _is_product(ra, layer):
            e, a = ra["z_grad", layer], ra["pattern", layer]
            compare("eq. 13", vjp.value_grad(a, e, groups), right["value_grad"])
            g = vjp.pattern_grad(e, ra["value", layer])
            compare("eq. 14", g * (a > 0), ra["pattern_grad", layer] * (a > 0))
    return errors


def _heads(x: Tensor, n: int) -> Tensor:
    return x.reshape(n, -1, *x.shape[-2:])


def _of_groups(site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of `[batch, pos, head, d_head]` the first head of each group, and the sum of each group."""
    grouped = x.reshape(*x.shape[:2], site.n_key_value_heads, -1, x.shape[-1])
    return grouped[:, :, :, 0], grouped.sum(3)


def _is_product(ra: RACache, layer: int) -> bool:
    """Whether z is A·v, without a gate or a norm after it."""
    product = attention_output(ra["pattern", layer], ra["value", layer])
    return relative(product, ra["z", layer]) < 1e-4


# ---- weights -------------------------------------------------------------------------------------

Weights = dict[tuple[vjp.Weight, int], Any]


def weight_errors(ra: RACache, weights: Weights, gradients: Any) -> Errors:
    """Errors of gradients of weights; `gradients` gives autograd's, as one matrix `[into, out]`."""
    kept = {
        key: weight
        for key, weight in weights.items()
        if all((kind, key[1]) in ra for kind in vjp.FACTORS[key[0]])
    }
    errors = Errors()
    for (name, layer), right in (gradients(kept) if kept else {}).items():
        error = relative(_whole(ra, name, layer), right)
        errors[name] = max(errors.get(name, 0.0), error)
    return errors


def _weights(model: Any, sites: Sequence[Site]) -> Weights:
    """The modules whose weights they are, of a bridge."""
    found = Weights()
    for site in sites:
        for name, part in _MODULES.items():
            try:
                module = model.get_submodule(f"{site.prefix}.{part}")
            except AttributeError:
                continue
            module = getattr(module, "original_component", module)
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.is_floating_point():
                found[name, site.layer] = module
    return found


def _gradients(subject: Subject, loss: Loss) -> Any:
    def of(modules: Weights) -> dict[tuple[vjp.Weight, int], Tensor]:
        weights = [module.weight for module in modules.values()]
        was = [weight.requires_grad for weight in weights]
        try:
            for weight in weights:
                weight.requires_grad_()
            with torch.enable_grad():
                total = loss(subject.model(subject.ids, **subject.inputs))
                found = torch.autograd.grad(total, weights)
        finally:
            for weight, flag in zip(weights, was, strict=True):
                weight.requires_grad_(flag)
        as_written = [
            gradient if type(module).__name__ == "Conv1D" else gradient.T
            for module, gradient in zip(modules.values(), found, strict=True)
        ]
        return dict(zip(modules, as_written, strict=True))

    return of


def _whole(ra: RACache, weight: vjp.Weight, layer: int) -> Tensor:
    """∂L/∂W of all heads and examples, `[into, out]` as one matrix."""
    site = ra.sites[layer]
    shared = weight in ("W_K", "W_V")
    step = site.n_heads // site.n_key_value_heads if shared else 1

    def of_head(head: int) -> Tensor:
        parts = [
            vjp.weight_gradient(ra, weight, (layer, head), example=i).matrix
            for i in range(ra.batch_size)
        ]
        return torch.stack(parts).sum(0)

    matrices = [of_head(head) for head in range(0, site.n_heads, step)]
    return torch.cat(matrices, dim=0 if weight == "W_O" else 1)
