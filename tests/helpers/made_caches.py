"""Caches made of random numbers, and what a figure shows of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ra_lens.cache import RACache
from ra_lens.model import Site, Sites
from ra_lens.run_info import RunInfo

LAYERS, HEADS = (0, 2), 3
ROWS = (("<|end|>", " Paris", "\n", " Paris", "<b>&$x$"), ("<|end|>", " a", " b"))


def sites() -> Sites:
    return Sites({i: Site(i, f"blocks.{i}.attn", HEADS, HEADS, 0.5) for i in LAYERS})


def make(rows=ROWS, *, side: str = "right", scale: float = 1.0) -> RACache:
    """A cache with random lower-triangular maps, zero in padding, as a run gives it."""
    width = max(map(len, rows))
    starts = [width - len(row) if side == "left" else 0 for row in rows]
    generator = torch.Generator().manual_seed(0)
    info = RunInfo(
        model_name="toy",
        objective="answer_nll",
        targets=tuple(" t" for _ in rows),
        str_tokens=tuple(rows),
        starts=tuple(starts),
        prepended="<|end|>",
    )
    ra = RACache(sites=sites(), loss=torch.arange(1.0, 1 + len(rows)), info=info)
    for layer in LAYERS:
        r = torch.randn(len(rows), HEADS, width, width, generator=generator).tril() * scale
        a = torch.rand(len(rows), HEADS, width, width, generator=generator).tril()
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            real = torch.zeros(width, dtype=torch.bool)
            real[start : start + len(row)] = True
            square = real[:, None] & real[None, :]
            r[i], a[i] = r[i] * square, a[i] * square
        ra._put(layer, "ra", r)
        ra._put(layer, "pattern", a)
    return ra


def attending(rows=ROWS, *, sharp: float = 1.0, objective: str = "answer_nll") -> RACache:
    """A cache whose patterns are a softmax's, with gradients G and the R that belongs to them."""
    ra = make(rows)
    ra.info = replace(ra.info, objective=objective)
    generator = torch.Generator().manual_seed(1)
    for layer in LAYERS:
        shape, there = ra["ra", layer].shape, ra["ra", layer] != 0
        scores = torch.randn(shape, generator=generator, dtype=torch.float64) * sharp
        scores = scores.masked_fill(~there, -torch.inf)
        a = scores.softmax(dim=-1).nan_to_num()  # rows of padding have nothing
        g = torch.randn(shape, generator=generator, dtype=torch.float64) * there
        r = ra.scale[layer] * a * (g - (a * g).sum(dim=-1, keepdim=True))
        for kind, value in (("ra", r), ("pattern", a), ("pattern_grad", g)):
            ra._put(layer, kind, value)
    return ra


def with_vectors(ra: RACache, *, d_head: int = 4, shared: int = 1, seed: int = 2) -> RACache:
    """The same with random queries and keys, and their gradients: sums over the cells of R.

    So many heads share a key. What is at padding is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    ra.sites = Sites(
        {i: replace(site, n_key_value_heads=HEADS // shared) for i, site in ra.sites.items()}
    )
    for layer in LAYERS:
        r = ra["ra", layer]
        n, _, width, _ = r.shape
        there = ra["pattern", layer].sum(dim=1).diagonal(dim1=-2, dim2=-1) != 0
        query = torch.randn(n, width, HEADS, d_head, generator=generator)
        key = torch.randn(n, width, HEADS // shared, d_head, generator=generator)
        query, key = (v * there[:, :, None, None] for v in (query, key))
        at_query, at_key = torch.zeros_like(query), torch.zeros_like(key)
        for head in range(HEADS):
            for i in range(width):
                for j in range(width):
                    cell = r[:, head, i, j, None]
                    at_query[:, i, head] += cell * key[:, j, head // shared]
                    at_key[:, j, head // shared] += cell * query[:, i, head]
        for kind, value in (
            ("query", query), ("key", key), ("query_grad", at_query), ("key_grad", at_key)
        ):  # fmt: skip
            ra._keep(layer, kind, value)
    return ra


def knocked_out(ra: RACache, layer: int) -> np.ndarray:
    """What each edge's removal does to a loss that is linear in A: done, not by the formula."""
    a, g = (ra[kind, layer].double().numpy() for kind in ("pattern", "pattern_grad"))
    found = np.zeros_like(a)
    for place in np.argwhere(a > 0):
        row = tuple(place[:-1])
        without = a[row].copy()
        without[place[-1]] = 0.0
        if without.any():
            found[tuple(place)] = (without / without.sum() - a[row]) @ g[row]
    return found


def z(figure: Any, i: int = 0) -> np.ndarray:
    return np.asarray(figure.data[i].z, dtype=float)


def lower(values: torch.Tensor) -> np.ndarray:
    """As shown: nothing above the diagonal."""
    shown = values.double().numpy().copy()
    shown[np.triu_indices(len(shown), k=1)] = np.nan
    return shown
