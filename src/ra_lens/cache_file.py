"""Caches on disk: one safetensors file, tensors plus a JSON description in its header.

Nothing is pickled, so a file from elsewhere cannot run code. A file is written beside its
destination and renamed when complete.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ra_lens.errors import BadFile
from ra_lens.files import FileKind, check_input, user_path, whole_file

if TYPE_CHECKING:
    from ra_lens.cache import RACache

FORMAT = 1


def _is_cache(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return "ra_lens" in (file.metadata() or {})
    except SafetensorError:
        return False


CACHE = FileKind("a cache of ra_lens", _is_cache)


def save_cache(cache: RACache, path: str | Path) -> None:
    """Write `cache` to `path`, replacing another cache only when the file is complete.

    Raises:
        BadInput: the path cannot be written, or holds something that is no cache.
    """
    from safetensors.torch import save_file

    running = cache.running_mean
    tensors: dict[str, Tensor] = {"loss": cache.loss}
    tensors.update({f"map/{name}": value for name, value in cache.items()})
    tensors.update({f"norm/{kind}/{layer}": v for (kind, layer), v in cache.norm_items()})
    if running is not None:
        tensors.update({f"sum/{name}": value for name, value in running.items()})
    description = {
        "format": FORMAT,
        "store": cache.store,
        "has_batch_dim": cache.has_batch_dim,
        "info": asdict(cache.info),
        "sites": [asdict(site) for site in cache.sites.values()],
        "mean": None
        if running is None
        else {"count": running.count, "dtype": _named(running.dtype)},
    }
    with whole_file(path, CACHE) as temporary, _system_errors():
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()},
            temporary,
            metadata={"ra_lens": json.dumps(description)},
        )


def load_cache(path: str | Path) -> RACache:
    """Read a cache written by `save_cache`.

    Raises:
        BadFile: missing, truncated, or not written by ra_lens.
    """
    from safetensors import SafetensorError, safe_open

    source = user_path(path)
    check_input(source, "Give a path written by RACache.save.")
    try:
        with safe_open(source, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise BadFile(
            f"{source} is damaged or not a safetensors file ({error}). "
            "Give a file written by RACache.save, or make it again."
        ) from error
    if "ra_lens" not in header:
        raise BadFile(
            f"{source} is a safetensors file, but not one written by RACache.save (it has no "
            "ra_lens description)."
        )
    try:
        description: dict[str, Any] = json.loads(header["ra_lens"])
        version = description["format"]
        if version == FORMAT:
            return _rebuilt(description, tensors)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(
            f"the description in {source} is damaged ({type(error).__name__}: {error}). Make the "
            "cache again."
        ) from error
    raise BadFile(
        f"{source} has cache format {version}; this ra_lens reads {FORMAT}. Make the cache again, "
        "or install the version that wrote it."
    )


@contextmanager
def _system_errors() -> Generator[None, None, None]:
    # safetensors has a class of its own for what the system says, "... (os error 28)".
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _rebuilt(description: dict[str, Any], tensors: dict[str, Tensor]) -> RACache:
    from ra_lens.cache import RACache
    from ra_lens.cache_info import RunInfo
    from ra_lens.mean import RunningMean
    from ra_lens.sites import Site

    sites = [Site(**fields) for fields in description["sites"]]
    by_layer = {site.layer: site for site in sites}
    mean = description.get("mean")
    running = None if mean is None else RunningMean(by_layer, mean["count"], _dtype(mean["dtype"]))
    cache = RACache(
        sites=by_layer,
        loss=tensors["loss"],
        info=RunInfo(**{name: _tuples(value) for name, value in description["info"].items()}),
        store=description["store"],
        has_batch_dim=description["has_batch_dim"],
        _running=running,
    )
    for name, value in tensors.items():
        if name != "loss":
            cache.restore(name, value)
    return cache


def _named(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value  # pyright: ignore[reportUnknownArgumentType,reportUnknownVariableType]
