"""How much memory a run takes at least, and refusing what cannot fit before anything is computed.

    maps   Σ over layers of  kinds kept · examples · heads · queries · keys · 4 bytes
    graph  Σ over layers of  batch · heads · queries · keys · bytes of the model's dtype
           + batch · tokens · (5 · d_model + d_mlp) · bytes of the model's dtype

The graph holds each layer's pattern and what goes into its norms, products and MLP, from the first
layer collected on; with `recompute` that of one layer, and one residual stream per block. Maps
replace it layer by layer in the backward pass, so both together take about as much as the larger
one. That is what a run needs at least: a refusal is always meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import psutil
import torch

from ra_lens.collect import Store
from ra_lens.errors import NotEnoughMemory
from ra_lens.model import Lens, Side, Site


@dataclass(frozen=True)
class Plan:
    """What decides how much memory a run takes.

    Attributes:
        sites: Layers collected.
        kinds: How many kinds of map are kept of each.
        widths: Tokens per example, padding included, on each side.
        n_examples: All examples.
        batch: Examples that run at a time.
        store: What is kept of the maps.
        recompute: Whether one layer's graph is kept at a time.
        map_bytes: Bytes per entry of a map.
        maps_elsewhere: Whether maps are kept on another device than the model's.
    """

    sites: Mapping[int, Site]
    kinds: Mapping[int, int]
    widths: Mapping[Side, int]
    n_examples: int
    batch: int
    store: Store
    recompute: bool
    map_bytes: int
    maps_elsewhere: bool = False

    @property
    def maps(self) -> int:
        """Bytes of the maps kept on the model's device."""
        examples = {"maps": self.n_examples, "mean": 1, "norms": 0}[self.store]
        if self.maps_elsewhere:
            return 0
        return examples * self.map_bytes * sum(self.kinds[i] * self._cells(i) for i in self.sites)

    def graph(self, lens: Lens) -> int:
        """Bytes of the graph that one batch leaves for its backward pass, at least."""
        first = min(self.sites)
        later = {i: site for i, site in lens.sites.items() if i >= first}
        tokens = {i: self.widths[site.query_side] for i, site in later.items()}
        layers = [
            self._cells(i, site) + tokens[i] * (5 * lens.d_model + lens.d_mlp)
            for i, site in later.items()
        ]
        if self.recompute:
            inputs = sum(tokens[i] * lens.d_model for i in later)
            return self.batch * lens.dtype.itemsize * (max(layers) + inputs)
        return self.batch * lens.dtype.itemsize * sum(layers)

    def need(self, lens: Lens) -> int:
        """Bytes needed at least beside the model."""
        return max(self.maps, self.graph(lens))

    def _cells(self, layer: int, site: Site | None = None) -> int:
        site = site or self.sites[layer]
        return site.n_heads * self.widths[site.query_side] * self.widths[site.key_side]


def refuse_what_cannot_fit(lens: Lens, plan: Plan) -> None:
    """Raise if a run needs more memory than its device has left.

    Raises:
        NotEnoughMemory: says how much is needed and free, and which options would fit.
    """
    free = free_memory(lens.device)
    if free is None or plan.need(lens) <= free:
        return
    tokens = max(plan.widths.values())
    raise NotEnoughMemory(
        f"this run needs at least {_spelled(plan.need(lens))} of memory ({_spelled(plan.maps)} of "
        f"maps, {_spelled(plan.graph(lens))} of graph, for {plan.batch} prompts of {tokens} tokens "
        f"at a time and {len(plan.sites)} layers), and {_spelled(free)} are free on {lens.device}. "
        + _advice(lens, plan, free)
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where it does not say."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        unused = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        return int(torch.cuda.mem_get_info(index)[0]) + unused
    return None


def _advice(lens: Lens, plan: Plan, free: int) -> str:
    """Options that make it fit, the one that changes least first."""
    last = {max(plan.sites): plan.sites[max(plan.sites)]}
    smaller = {
        "batch_size=1": replace(plan, batch=1),
        "store='norms'": replace(plan, store="norms"),
        "recompute=True": replace(plan, recompute=True),
        "store='norms' and recompute=True": replace(plan, store="norms", recompute=True),
        "store='norms', recompute=True and batch_size=1": replace(
            plan, store="norms", recompute=True, batch=1
        ),
        f"layers={[*last]}, store='norms', recompute=True and batch_size=1": replace(
            plan, sites=last, store="norms", recompute=True, batch=1
        ),
    }
    needs = {option: other.need(lens) for option, other in smaller.items()}
    fitting = [f"{option} ({_spelled(n)})" for option, n in needs.items() if n <= free]
    if not fitting:
        return "Nor would one layer's norms of one prompt fit: shorten the prompt."
    return f"Use {' or '.join(fitting[:3])}; layers= collects fewer layers."


def _spelled(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
