"""Between `RACache` and what other libraries hold: ActivationCache, DataFrame."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.cache_info import RunInfo
from ra_lens.collect import reversed_attention
from ra_lens.errors import NotStored
from ra_lens.ragged import every_head, head_places, heads_of
from ra_lens.sites import as_lens


def from_activation_cache(cache: Any, model: nn.Module) -> RACache:
    """See `RACache.from_activation_cache`."""
    lens = as_lens(model)
    entries: dict[str, Tensor] = dict(cache.items())
    sites = {
        layer: replace(site, observe_only=False)  # else there were no gradients
        for layer, site in lens.sites.items()
        if site.pattern_name in entries and f"{site.pattern_name}_grad" in entries
    }
    if not sites:
        seen = any(site.pattern_name in entries for site in lens.sites.values())
        raise NotStored(
            f"found {'patterns but no pattern gradients' if seen else 'no patterns'} in the "
            "activation cache. Run model.run_with_cache(..., incl_bwd=True) with a loss; on models "
            "whose hook_pattern is observe-only that gives no gradients: use run_with_ra instead."
        )
    has_batch = bool(getattr(cache, "has_batch_dim", True))
    new = RACache(sites=sites, info=RunInfo(model_name=lens.name, n_layers=lens.n_layers))
    for layer, site in sites.items():
        pattern, grad = entries[site.pattern_name], entries[f"{site.pattern_name}_grad"]
        dtype = torch.float64 if pattern.dtype == torch.float64 else torch.float32
        pattern, grad = pattern.detach().to(dtype), grad.detach().to(dtype)
        if not has_batch:
            pattern, grad = pattern.unsqueeze(0), grad.unsqueeze(0)
        new.put(layer, "ra", reversed_attention(pattern, grad, site.need_scale()))
        new.put(layer, "pattern", pattern)
        new.put(layer, "pattern_grad", grad)
    return new if has_batch else new.remove_batch_dim()


def to_dataframe(cache: RACache) -> pd.DataFrame:
    """See `RACache.to_dataframe`."""
    n, counts = cache.batch_size, heads_of(cache.sites)
    norms = {
        f"{kind}_norm": cache.norms(kind)[..., head_places(counts)].flatten().tolist()
        for kind in cache.norm_kinds()
    }
    losses = cache.loss.detach().flatten().tolist()
    losses = losses if len(losses) == n else losses * n  # a scalar holds for every row
    targets = cache.info.targets or (None,) * n
    every = [(prompt, *head) for prompt in range(n) for head in every_head(cache.layers, counts)]
    index = pd.MultiIndex.from_tuples(every, names=["prompt", "layer", "head"])
    frame = pd.DataFrame(norms, index=index).reset_index()
    frame["loss"] = [losses[i] for i in frame["prompt"]]
    frame["target"] = [targets[i] for i in frame["prompt"]]
    return frame
