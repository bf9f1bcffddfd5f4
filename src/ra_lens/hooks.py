"""`get_ra_caching_hooks`: the hooks themselves, for people who run their own backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.cache_info import RunInfo
from ra_lens.collect import Collector, MapKind
from ra_lens.errors import BadInput
from ra_lens.numbers import Real
from ra_lens.record import NamesFilter, keeps
from ra_lens.sites import Layers, Site, as_lens, with_scales
from ra_lens.tensors import read_device, read_dtype

HookList = list[tuple[str, Callable[..., Any]]]


def get_ra_caching_hooks(
    model: nn.Module,
    *,
    layers: Layers = None,
    names_filter: NamesFilter = None,
    store: Literal["maps", "norms"] = "maps",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    softmax_scale: Real | Mapping[int, Real] | None = None,
) -> tuple[RACache, HookList, HookList]:
    """Hooks that fill a cache during the user's own forward and backward pass.

    The twin of TransformerLens's `get_caching_hooks(incl_bwd=True)`:

        ra, fwd_hooks, bwd_hooks = get_ra_caching_hooks(model)
        with model.hooks(fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks):
            loss = my_loss(model(tokens))
            loss.backward()

    Put these before hooks of your own that edit the pattern: R is taken where they stand in the
    order. A loss averaged over the batch gives maps divided by its size. What is padding is not
    known here: its rows and columns are zero only if your mask and loss make them so, and not every
    model obeys a mask (`check_model` tells). The backward pass is yours: unless parameters are
    frozen it also fills their `.grad`. Another one, through the same graph (`retain_graph=True`) or
    the next, replaces the maps. A loss over several forward passes (clean and corrupted) needs one
    set of hooks for each of them.

    Args:
        model: A HookedTransformer or TransformerBridge.
        layers: Layers to collect, as in `run_with_ra`.
        names_filter: Which maps to keep, as in `run_with_ra`.
        store: `"maps"` or `"norms"`.
        device: Where to keep the maps.
        dtype: In what to keep them, a floating-point dtype.
        softmax_scale: As in `run_with_ra`.

    Returns:
        The cache, filled when the backward pass has run; forward hooks; backward hooks (none; the
        gradient is taken from the tensors that the forward hooks see, because backward hooks never
        fire on models that only show their pattern).

    Raises:
        BadInput: unknown layers or names.
        UnsupportedModel: no hook_pattern, an unknown softmax scale, or active dropout.
    """
    lens = as_lens(model)
    if store not in ("maps", "norms"):
        raise BadInput(f"found store={store!r}; give 'maps' or 'norms'.")
    device, dtype = read_device(device), read_dtype(dtype)
    lens.refuse_meta()
    lens.refuse_dropout()
    lens.refuse_checkpointing()
    sites = with_scales(lens.choose_layers(layers), softmax_scale)
    for site in sites.values():
        site.need_scale()
    kept = keeps(names_filter, sites)
    cache = RACache(
        sites=sites, store=store, info=RunInfo(model_name=lens.name, n_layers=lens.n_layers)
    )

    def deliver(site: Site, maps: dict[MapKind, Tensor]) -> None:
        lens.forget_patterns()  # which have a graph now, even where every parameter is frozen
        for kind, value in maps.items():
            cache.put_norms(site.layer, kind, value, device=device)
            if store == "maps" and kept(site.map_name(kind)):
                cache.keep(site.layer, kind, value.to(device=device, dtype=dtype))

    collector = Collector(lens, sites, deliver, retained=True)

    def root(residual: Tensor, hook: Any) -> Tensor:  # noqa: ARG001  TransformerLens passes it by name
        return collector.root(residual)

    def at_pattern(layer: int) -> Callable[..., Any]:
        def observe(pattern: Tensor, hook: Any) -> Tensor:  # noqa: ARG001  TransformerLens passes it by name
            return collector.observe(layer, pattern)

        return observe

    fwd_hooks: HookList = []
    for layer, site in sites.items():
        if site.observe_only is not False:
            fwd_hooks.append((lens.block_input_name(site), root))
        fwd_hooks.append((site.pattern_name, at_pattern(layer)))
    return cache, fwd_hooks, []
