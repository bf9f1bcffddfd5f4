"""The file of an `RACache`: its fields as tensors and a JSON description, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ra_lens.collect import Store
from ra_lens.errors import BadFile
from ra_lens.files import read_tensors, write_tensors
from ra_lens.model import Site, Sites
from ra_lens.model.sites import StoredKind, read_stored_kind
from ra_lens.patching.mean import RunningMean
from ra_lens.run_info import RunInfo

_FORMAT = 2  # 1 told only whether BOS was in front, not which token


def write_cache(
    path: str | Path,
    *,
    sites: Sites,
    loss: Tensor,
    info: RunInfo,
    store: Store,
    has_batch_dim: bool,
    _maps: Mapping[str, Tensor],
    _norms: Mapping[tuple[StoredKind, int], Tensor],
    _running: RunningMean | None,
) -> None:
    """Write the fields of a cache to one safetensors file, in place of another cache only."""
    tensors: dict[str, Tensor] = {"loss": loss}
    tensors.update({f"map/{name}": _maps[name] for name in sites.in_order(_maps)})
    tensors.update({f"norm/{kind}/{layer}": value for (kind, layer), value in _norms.items()})
    mean = None
    if _running is not None:
        tensors.update({f"sum/{name}": value for name, value in _running.items()})
        dtype = _running.dtype
        named = None if dtype is None else str(dtype).removeprefix("torch.")
        mean = {"count": _running.count, "dtype": named}
    description = {
        "format": _FORMAT,
        "store": store,
        "has_batch_dim": has_batch_dim,
        "info": asdict(info),
        "sites": [asdict(site) for site in sites.values()],
        "mean": mean,
    }
    write_tensors(path, tensors, description)


def read_cache(path: str | Path) -> dict[str, Any]:
    """Give the fields of a cache; BadFile if missing, truncated, or of something else."""
    with read_tensors(path) as (source, tensors, description):
        if description["format"] not in (1, _FORMAT):
            raise BadFile(
                f"{source} has cache format {description['format']}; this ra_lens reads 1 and "
                f"{_FORMAT}. Make the cache again, or install the version that wrote it."
            )
        found = [Site(**fields) for fields in description["sites"]]
        facts = {name: _tuples(value) for name, value in description["info"].items()}
        if description["format"] == 1:
            bos = facts.pop("bos_prepended", None)
            facts["prepended"] = facts["str_tokens"][0][0] if bos else None if bos is None else ""
        info = RunInfo(**facts)
        sites = Sites({site.layer: site for site in found}, info.n_layers)
        running, mean = None, description.get("mean")
        if mean is not None:
            dtype = None if mean["dtype"] is None else getattr(torch, mean["dtype"])
            running = RunningMean(sites, mean["count"], dtype)
        loss = tensors.pop("loss")
        maps, norms = dict[str, Tensor](), dict[tuple[StoredKind, int], Tensor]()
        for entry, value in tensors.items():
            group, _, name = entry.partition("/")
            if group == "map":
                maps[name] = value
            elif group == "sum" and running is not None:
                running.add(name, value.unsqueeze(0))
            else:
                kind, _, layer = name.partition("/")
                norms[read_stored_kind(kind), int(layer)] = value
        return {
            "sites": sites,
            "loss": loss,
            "info": info,
            "store": description["store"],
            "has_batch_dim": description["has_batch_dim"],
            "_maps": maps,
            "_norms": norms,
            "_running": running,
        }


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType,reportUnknownVariableType]
