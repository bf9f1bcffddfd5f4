"""`get_ra_caching_hooks`, and what is kept of a run: all maps, norms only, or a running mean.

The hooks themselves are for people who run their own backward pass.
"""

# pyright: reportPrivateUsage=false
# A run fills its cache; nobody else does.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.collect import Collector, Deliver, Store
from ra_lens.errors import BadInput, one_of
from ra_lens.model import Layers, Side, Site, Sites, as_lens
from ra_lens.model.sites import StoredKind, VectorKind
from ra_lens.numbers import Real
from ra_lens.patching.mean import RunningMean
from ra_lens.prompts import Batch
from ra_lens.run_info import RunInfo
from ra_lens.tensors import read_device, read_dtype

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


def wanted(names_filter: NamesFilter, sites: Sites) -> Callable[[str], bool]:
    """Turn a TransformerLens names_filter into a predicate on full names of maps of `sites`."""
    if names_filter is None:
        return lambda _name: True
    if callable(names_filter):
        return names_filter
    names = {names_filter} if isinstance(names_filter, str) else set(names_filter)
    unknown = sorted(names.difference(sites.map_names()))
    if unknown:
        raise BadInput(
            f"names_filter has {unknown[0]!r}, which is no map of the layers collected; these are "
            f"named {next(iter(sites.values())).prefix}.hook_ra, ….hook_pattern and "
            "….hook_pattern_grad, and so on."
        )
    return names.__contains__


class Recorder:
    """Receives maps, batch by batch, and keeps what was asked for."""

    def __init__(
        self,
        sites: Sites,
        store: Store,
        wanted: Callable[[str], bool],
        device: str | torch.device | None,
        dtype: torch.dtype | None,
        *,
        again: bool = False,
    ) -> None:
        """Keep `store` of the maps whose full name is `wanted`, on this device and in this dtype.

        Where a batch may be begun `again`, its sums are held apart until it ends.
        """
        self.sites = sites
        self.store: Store = store
        self.wanted = wanted
        self.device = device
        self.cache = RACache(sites=sites, store=store)
        self._dtype = dtype
        self._again = again
        self._caches: list[RACache] = []
        self._running = RunningMean(sites, dtype=dtype) if store == "mean" else None
        self._sums = self._running
        self._largest: dict[int, Tensor] = {}
        self._n = 0

    def begin(
        self, batch: Batch, encoded: Batch | None = None, *, in_rows: bool = False
    ) -> Deliver:
        """Start a batch; gives the function that receives its maps, layer by layer.

        In an encoder-decoder `batch` is what the decoder reads, `encoded` what the encoder does.
        Where they come block by block, some rows at a time, their norms are those of all blocks.
        """
        self.cache = RACache(sites=self.sites, store=self.store)
        self._n, self._largest = len(batch.lengths), {}
        if self._again and self._running is not None:
            self._sums = RunningMean(self.sites)
        sides: dict[Side, Batch] = {"input": encoded or batch, "decoder": batch}

        def deliver(site: Site, maps: dict[StoredKind, Tensor]) -> None:
            queries, keys = sides[site.query_side], sides[site.key_side]
            if in_rows:
                for kind, value in maps.items():
                    self._receive_norms(site, kind, value, add=True)
                return
            for kind, value in maps.items():
                laid_out = _laid_out(value, queries, keys)
                self.receive(site, kind, laid_out, (queries.first_span, keys.first_span))

        return deliver

    def receive(
        self, site: Site, kind: StoredKind, value: Tensor, tokens: tuple[slice, ...] = ()
    ) -> None:
        """Keep what was asked for of a map; a mean is that of its rows and columns of `tokens`."""
        self._receive_norms(site, kind, value)
        name = site.map_name(kind)
        if not self.wanted(name):
            return
        if self.store == "maps":
            self.cache._keep(site.layer, kind, value.to(device=self.device, dtype=self._dtype))
        elif self._sums is not None:
            self._sums.add(name, value[(..., *tokens)], self.device)

    def _receive_norms(
        self, site: Site, kind: StoredKind, value: Tensor, *, add: bool = False
    ) -> None:
        norms = self.cache._put_norms(site.layer, kind, value, device=self.device, add=add)
        if kind == "pattern_grad":
            before = self._largest.get(site.layer, norms.new_zeros(()))
            self._largest[site.layer] = torch.maximum(before, norms.max())  # NaN stays

    def receive_vectors(
        self, site: Site, vectors: dict[VectorKind, Tensor], read: dict[Side, Batch]
    ) -> None:
        """Keep vectors of a layer, as their tokens lie in the batch `read`."""
        for kind, value in vectors.items():
            batch = read[site.side_of(kind)]
            laid_out = batch.spread(value, 1)
            if batch.is_padded:
                real = batch.attention_mask.to(value.device)
                laid_out = laid_out.where(real.reshape(*real.shape, *[1] * (value.ndim - 2)), 0.0)
            self.cache._keep(site.layer, kind, laid_out.to(device=self.device, dtype=self._dtype))

    def regroup(self, n_groups: int, order: Sequence[int]) -> None:
        """Make one batch of the last ones, which were groups of it, its examples in `order`."""
        parts, self._caches = self._caches[-n_groups:], self._caches[:-n_groups]
        self._caches.append(RACache._joined(parts, order=order))

    def largest_gradients(self) -> dict[int, Tensor]:
        """Largest norm of a head's gradient at each layer, in the batch that has begun."""
        return dict(self._largest)

    def end(self) -> None:
        """Keep the batch that has begun."""
        self._caches.append(self.cache)
        if self._running is not None:
            self._running.count += self._n
            if self._sums is not None and self._sums is not self._running:
                self._running.include(self._sums)

    def result(self, *, loss: Tensor, info: RunInfo) -> RACache:
        """Join the batches into one cache."""
        joined = RACache._joined(self._caches, running=self._running)
        joined.loss, joined.info = loss, info
        return joined


def _laid_out(value: Tensor, queries: Batch, keys: Batch) -> Tensor:
    """A map as it lies in its batch, with zeros at padding."""
    value = keys.spread(queries.spread(value, -2), -1)
    if not queries.is_padded and not keys.is_padded:
        return value
    rows = queries.attention_mask.to(value.device)[:, None, :, None]
    columns = keys.attention_mask.to(value.device)[:, None, None, :]
    return value.where(rows & columns, 0.0)


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
    one_of("store", store, ("maps", "norms"))
    device, dtype = read_device(device), read_dtype(dtype)
    lens.refuse_meta()
    lens.refuse_dropout()
    lens.refuse_checkpointing()
    sites = lens.sites.choose(layers).with_scales(softmax_scale)
    for site in sites.values():
        site.need_scale()
    recorder = Recorder(sites, store, wanted(names_filter, sites), device, dtype)
    recorder.cache.info = RunInfo(model_name=lens.name, n_layers=sites.n_layers)

    def deliver(site: Site, maps: dict[StoredKind, Tensor]) -> None:
        lens.forget_patterns()  # which have a graph now, even where every parameter is frozen
        for kind, value in maps.items():
            recorder.receive(site, kind, value)

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
    return recorder.cache, fwd_hooks, []
