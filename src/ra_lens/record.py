"""What is kept of a run: all maps, norms only, or a running mean; where and in what dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ra_lens.cache import RACache, Store
from ra_lens.cache_info import RunInfo
from ra_lens.collect import MAP_KINDS, MapKind
from ra_lens.errors import BadInput
from ra_lens.mean import RunningMean
from ra_lens.prompts import Batch
from ra_lens.sites import Side, Site

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


def keeps(names_filter: NamesFilter, sites: Mapping[int, Site]) -> Callable[[str], bool]:
    """Turn a TransformerLens names_filter into a predicate on full names of maps of `sites`.

    Raises:
        BadInput: a name that is not that of a map of these layers.
    """
    if names_filter is None:
        return lambda _name: True
    if callable(names_filter):
        return names_filter
    names = {names_filter} if isinstance(names_filter, str) else set(names_filter)
    collected = {site.map_name(kind) for site in sites.values() for kind in MAP_KINDS}
    unknown = sorted(names - collected)
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
        sites: dict[int, Site],
        store: Store,
        keeps: Callable[[str], bool],
        device: str | torch.device | None,
        dtype: torch.dtype | None,
        *,
        again: bool = False,
    ) -> None:
        """Keep `store` of the maps whose full name `keeps` accepts.

        Args:
            sites: The layers.
            store: Whole maps, norms only, or a running mean.
            keeps: Tells which maps, by full name.
            device: Where to keep them.
            dtype: In what to keep them.
            again: Whether a batch may be begun again, so that its sums are held apart until it
                ends.
        """
        self.sites = sites
        self.store: Store = store
        self._keeps = keeps
        self.device = device
        self._dtype = dtype
        self._running = RunningMean(sites, dtype=dtype) if store == "mean" else None
        self._caches: list[RACache] = []
        self._again = again
        self._cache = RACache(sites=sites, store=store)
        self._sums = self._running
        self._largest: dict[int, Tensor] = {}
        self._n = 0

    def begin(
        self, batch: Batch, encoded: Batch | None = None
    ) -> Callable[[Site, dict[MapKind, Tensor]], None]:
        """Start a batch; gives the function that receives its maps, layer by layer.

        Args:
            batch: What is read; what the decoder reads in an encoder-decoder.
            encoded: What an encoder-decoder's encoder reads.
        """
        self._cache = cache = RACache(sites=self.sites, store=self.store)
        self._n, self._largest = len(batch.lengths), {}
        largest = self._largest
        if self._again and self._running is not None:
            self._sums = RunningMean(self.sites)
        sums = self._sums
        sides: dict[Side, Batch] = {"input": encoded or batch, "decoder": batch}
        padded = any(not bool(side.attention_mask.all()) for side in sides.values())

        def deliver(site: Site, maps: dict[MapKind, Tensor]) -> None:
            queries, keys = sides[site.query_side], sides[site.key_side]
            for kind, value in maps.items():
                value = keys.spread(queries.spread(value, -2), -1)
                if padded:
                    rows = queries.attention_mask.to(value.device)[:, None, :, None]
                    columns = keys.attention_mask.to(value.device)[:, None, None, :]
                    value = value.where(rows & columns, 0.0)
                name = site.map_name(kind)
                norms = cache.put_norms(site.layer, kind, value, device=self.device)
                if kind == "pattern_grad":
                    largest[site.layer] = norms.max()
                if not self._keeps(name):
                    continue
                if self.store == "maps":
                    cache.keep(site.layer, kind, self._placed(value))
                elif sums is not None:
                    cut = value[..., queries.first_span, keys.first_span]
                    sums.add(name, cut.to(device=self.device))

        return deliver

    def regroup(self, n_groups: int, order: Sequence[int]) -> None:
        """Make one batch of the last ones, which were groups of it, its examples in `order`."""
        parts, self._caches = self._caches[-n_groups:], self._caches[:-n_groups]
        self._caches.append(RACache.joined(parts, order=order))

    def largest_gradients(self) -> dict[int, float]:
        """Largest norm of a head's gradient at each layer, in the batch that has begun."""
        return {layer: float(norm) for layer, norm in self._largest.items()}

    def end(self) -> None:
        """Keep the batch that has begun."""
        self._caches.append(self._cache)
        if self._running is not None:
            self._running.count += self._n
            if self._sums is not None and self._sums is not self._running:
                self._running.include(self._sums)

    @property
    def kinds_kept(self) -> dict[int, int]:
        """How many kinds of map are kept of each layer."""
        return {
            layer: sum(self._keeps(site.map_name(kind)) for kind in MAP_KINDS)
            for layer, site in self.sites.items()
        }

    def map_bytes(self, model_dtype: torch.dtype) -> int:
        """Bytes per entry of a map of a model of this dtype."""
        made_in = torch.float64 if model_dtype == torch.float64 else torch.float32
        return (self._dtype or made_in).itemsize

    def result(self, *, loss: Tensor, info: RunInfo) -> RACache:
        """Join the batches into one cache."""
        joined = RACache.joined(self._caches, running=self._running)
        joined.loss, joined.info = loss, info
        return joined

    def _placed(self, value: Tensor) -> Tensor:
        return value.to(device=self.device, dtype=self._dtype)
