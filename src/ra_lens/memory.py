"""How much memory a run takes at least, and refusing what cannot fit before anything is computed.

    maps   Σ over layers of  kinds kept · examples · heads · queries · keys · 4 bytes
           + kinds of vectors kept · examples · tokens · d_model · 4 bytes
    graph  Σ over layers of  batch · heads · queries · keys · bytes of the model's dtype
           + batch · tokens · (5 · d_model + d_mlp) · bytes of the model's dtype

The graph holds each layer's pattern and what goes into its norms, products and MLP, from the first
layer collected on; with `recompute` that of one layer, and one residual stream per block. Maps
replace it layer by layer in the backward pass, so both together take about as much as the larger
one. That is what a run needs at least: a refusal is always meant.

Of a model over several devices each device is counted by itself: the graph of the layers on it, and
their maps, unless those are kept elsewhere, where all of them count. A layer whose weights
accelerate brings in when they are used counts where it computes; the weights brought in do not.

A batch that is to fit (`batch_size="auto"`) must leave room for what is not counted, such as the
tensors of one step and logits whose loss is being computed. As measured a run takes up to 1.5 times
what is counted, with `recompute`, which holds little else than one layer, up to 4.5 times; so its
graph may count up to a half, or a fifth, of what maps leave free.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import psutil
import torch
from torch import nn

from ra_lens.collect import Store
from ra_lens.errors import NotEnoughMemory
from ra_lens.model import Lens, Side, Site
from ra_lens.model.sites import STORED_KINDS, VectorKind
from ra_lens.prompts import Prompts

_LIBRARIES = 2**30  # bytes of a process that has imported them
# Kinds with as many heads as there are key/value heads.
_OF_SHARED = ("key", "value", "key_grad", "value_grad", "k_grad", "v_grad")
# What the graph of a batch may count of the free memory if it is to fit.
SAFE, SAFE_RECOMPUTED = 1 / 2, 1 / 5
# Logits, their logarithms and the gradient there are alive together.
OF_LOGITS = 3


@dataclass(frozen=True)
class Plan:
    """A run, by what decides how much memory it takes."""

    lens: Lens
    sites: Mapping[int, Site]
    prompts: Prompts
    encoded: Prompts | None  # what an encoder-decoder's encoder reads
    batch_size: int | None
    store: Store
    wanted: Callable[[str], bool]  # tells by full name which maps are kept
    device: torch.device | None  # where they are kept
    dtype: torch.dtype | None  # in what they are kept
    recompute: bool
    vectors: frozenset[VectorKind] = frozenset()
    rows: int | None = None  # queries of a layer that may run at a time (`in_rows`); None: all

    @property
    def batch(self) -> int:
        """Prompts that run at a time."""
        return min(len(self.prompts), self.batch_size or len(self.prompts))

    @property
    def widths(self) -> dict[Side, int]:
        """Tokens per prompt, padding included, on each side."""
        sides: dict[Side, Prompts] = {
            "input": self.encoded or self.prompts,
            "decoder": self.prompts,
        }
        return {side: max(prompts.lengths) for side, prompts in sides.items()}

    @property
    def in_rows(self) -> int | None:
        """Queries of a layer that run at a time; None: all, as where whole maps are kept."""
        norms_only = self.store == "norms" and self.recompute and not self.vectors
        return self.rows if norms_only else None

    @property
    def n_keys(self) -> int:
        """Most keys that a query has."""
        return max(self.widths[site.key_side] for site in self.sites.values())

    @property
    def devices(self) -> list[torch.device]:
        """Devices that something is counted on: those of the layers, and where maps are kept."""
        places = self.lens.layer_devices
        kept = [] if self.device is None else [_exact(self.device)]
        return list(dict.fromkeys([*(places[layer] for layer in self._later), *kept]))

    def n_layers_on(self, device: torch.device) -> int:
        """Layers collected that lie on a device."""
        return sum(self.lens.layer_devices[layer] == device for layer in self.sites)

    def maps_on(self, device: torch.device) -> int:
        """Bytes of the maps and vectors kept on a device."""
        lens, examples = self.lens, {"maps": len(self.prompts), "mean": 1, "norms": 0}[self.store]
        kept = None if self.device is None else _exact(self.device)
        sites = [
            site for i, site in self.sites.items() if (kept or lens.layer_devices[i]) == device
        ]
        made_in = torch.float64 if lens.dtype == torch.float64 else torch.float32
        entries = examples * sum(
            self._cells(site) * sum(self.wanted(site.map_name(kind)) for kind in STORED_KINDS)
            for site in sites
        )
        entries += len(self.prompts) * sum(map(self._vector_entries, sites))
        return (self.dtype or made_in).itemsize * entries

    def graph_on(self, device: torch.device) -> int:
        """Bytes of the graph that one batch leaves on a device for its backward pass, at least."""
        lens, widths = self.lens, self.widths
        later = [s for i, s in self._later.items() if lens.layer_devices[i] == device]
        if not later:
            return 0
        tokens = [widths[site.query_side] for site in later]
        at_a_time = [min(n, self.in_rows or n) for n in tokens]
        layers = [
            site.n_heads * n * self.widths[site.key_side] + n * (5 * lens.d_model + lens.d_mlp)
            for site, n in zip(later, at_a_time, strict=True)
        ]
        kept = max(layers) + sum(tokens) * lens.d_model if self.recompute else sum(layers)
        if self.in_rows is not None:  # keys and values
            shares = (site.n_key_value_heads / site.n_heads for site in later)
            kept += round(
                2 * lens.d_model * sum(n * s for n, s in zip(tokens, shares, strict=True))
            )
            if lens.kind == "TransformerBridge":  # Hugging Face's mask of queries and keys
                kept += max(tokens) * self.n_keys
        return self.batch * lens.dtype.itemsize * kept

    def need_on(self, device: torch.device) -> int:
        """Bytes needed on a device at least, beside the model."""
        return max(self.maps_on(device), self.graph_on(device))

    @property
    def need(self) -> int:
        """Bytes needed at least on all devices, beside the model."""
        return sum(map(self.need_on, self.devices))

    @property
    def _later(self) -> dict[int, Site]:
        """Layers that have a graph: from the first collected on."""
        return {i: site for i, site in self.lens.sites.items() if i >= min(self.sites)}

    def _vector_entries(self, site: Site) -> int:
        share = site.n_heads // site.n_key_value_heads
        of_shared = (self.lens.d_model // share for kind in self.vectors if kind in _OF_SHARED)
        rest = [kind for kind in self.vectors if kind not in _OF_SHARED]
        # One tensor where all three are asked for, but in cross-attention and few others.
        inputs = max(0, sum(kind.endswith("_in") for kind in rest) - 1)
        widest = self.widths[site.query_side]
        return widest * (sum(of_shared) + (len(rest) - inputs) * self.lens.d_model)

    def _cells(self, site: Site) -> int:
        return site.n_heads * self.widths[site.query_side] * self.widths[site.key_side]


def refuse_what_cannot_fit(plan: Plan) -> None:
    """Raise NotEnoughMemory, with what would fit, if a run needs more than a device has left."""
    free = {device: free_memory(device) for device in plan.devices}
    short = [device for device, n in free.items() if n is not None and plan.need_on(device) > n]
    if not short:
        return
    device = short[0]
    layers, several = f"{len(plan.sites)} layers", len(free) > 1
    if several:
        layers = f"{plan.n_layers_on(device)} of {layers}"
    raise NotEnoughMemory(
        f"this run needs at least {_spelled(plan.need_on(device))} of memory"
        f"{f' on {device}' * several} ({_spelled(plan.maps_on(device))} of maps, "
        f"{_spelled(plan.graph_on(device))} of graph, for {plan.batch} prompts of "
        f"{max(plan.widths.values())} tokens at a time and {layers}), and "
        f"{_spelled(free[device] or 0)} are free on {device}. {_advice(plan, device, free)}"
    )


def largest_batch(plan: Plan, *, n_read: int, n_kept: int) -> int | None:
    """Give the most prompts that may run at a time if the run is to fit; None where all may.

    Where not even one prompt is sure to fit, one; where no device says what is free, all.

    Args:
        plan: The run, with all prompts at once.
        n_read: Positions of a prompt at which logits are computed.
        n_kept: Those whose logits are kept beside the maps, of all prompts.
    """
    single, n = replace(plan, batch_size=1), len(plan.prompts)
    fitting = n
    for device in plan.devices:
        free, of_prompt = free_memory(device), single.graph_on(device)
        with_logits = device in plan.lens.logits_devices
        of_position = plan.lens.d_vocab * max(4, plan.lens.dtype.itemsize) * with_logits
        of_prompt += OF_LOGITS * n_read * of_position
        if free is not None and of_prompt:
            room = free - plan.maps_on(device) - n * n_kept * of_position
            safe = int(room * (SAFE_RECOMPUTED if plan.recompute else SAFE))
            fitting = min(fitting, max(1, safe // of_prompt))
    return None if fitting >= n else fitting


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where it does not say."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        unused = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        return int(torch.cuda.mem_get_info(index)[0]) + unused
    return None


def worker_memory(lens: Lens, prompts: Prompts, *, batch_size: int) -> int:
    """Bytes that a process needs that loads a model and runs it on batches of such prompts.

    Weights, what one run of the widest of these prompts needs at least, and a gigabyte for Python
    and the libraries.
    """
    weights = sum(parameter.nbytes for parameter in nn.Module.parameters(lens.module))
    widest = max(range(len(prompts)), key=lambda i: prompts.lengths[i])
    plan = Plan(
        lens=lens,
        sites=lens.sites,
        prompts=prompts.chosen([widest] * batch_size),
        encoded=None,
        batch_size=batch_size,
        store="norms",
        wanted=lambda _name: False,
        device=None,
        dtype=None,
        recompute=False,
    )
    return weights + plan.need + _LIBRARIES


def _exact(device: torch.device) -> torch.device:
    """A device with its index, as tensors on it tell it."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


# ---- advice --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Offer:
    """What the user can choose where a run was not called by the user."""

    options: frozenset[str]
    one_batch: bool
    typed: bool


_offer: ContextVar[_Offer | None] = ContextVar("ra_lens offer", default=None)


@contextmanager
def offering(
    *options: str, one_batch: bool = False, typed: bool = False
) -> Generator[None, None, None]:
    """Let advice of runs in the context name only options that whoever calls them has as well.

    Within another such context they are those of both.

    Args:
        *options: Names of arguments of `run_with_ra`; none: nothing can be chosen.
        one_batch: Whether the prompts of a run are one batch, cut by the caller's `batch_size`.
        typed: Whether they are options of the command line.
    """
    outer, own = _offer.get(), frozenset(options)
    if outer is not None:
        own, typed = own & outer.options, typed or outer.typed
        one_batch = one_batch or outer.one_batch
    before = _offer.set(_Offer(own, one_batch, typed))
    try:
        yield
    finally:
        _offer.reset(before)


def _advice(plan: Plan, device: torch.device, free: Mapping[torch.device, int | None]) -> str:
    """Options that make it fit on all devices, the one that changes least first.

    Beside each, what it needs on the one that was found short.
    """
    offer = _offer.get()
    alone = replace(plan, batch_size=1)
    if offer is not None and offer.one_batch:
        alone = replace(alone, prompts=plan.prompts.widest())
    norms = replace(plan, store="norms")
    both = replace(norms, recompute=True)
    all_three = replace(alone, store="norms", recompute=True)
    last = max(plan.sites)
    one_layer = {last: plan.sites[last]}
    of_last = f"layers={[last]}"
    smaller: dict[tuple[str, ...], Plan] = {
        ("batch_size=1",): alone,
        ("store='norms'",): norms,
        ("recompute=True",): replace(plan, recompute=True),
        ("store='norms'", "recompute=True"): both,
        ("store='norms'", "recompute=True", "batch_size=1"): all_three,
        (of_last, "store='norms'", "recompute=True", "batch_size=1"): replace(
            all_three, sites=one_layer
        ),
    }
    if offer is not None:
        smaller[of_last,] = replace(plan, sites=one_layer)
        if plan.batch > 1:
            smaller[of_last, "batch_size=1"] = replace(alone, sites=one_layer)

    def fits(other: Plan) -> bool:
        left = ((other.need_on(one), free.get(one)) for one in other.devices)
        return all(n is None or need <= n for need, n in left)

    fitting = [
        f"{_listed(options, offer)} ({_spelled(other.need_on(device))})"
        for options, other in smaller.items()
        if fits(other) and _has(offer, options)
    ]
    if not fitting and offer is None:
        return "Nor would one layer's norms of one prompt fit: shorten the prompt."
    if not fitting:
        return "Nothing that can be chosen here makes it fit: shorten the prompts."
    fewer = f"; {_as_typed('layers=', offer)} collects fewer layers" * _has(offer, ["layers="])
    return f"Use {' or '.join(fitting[:3])}{fewer}."


def _has(offer: _Offer | None, options: Iterable[str]) -> bool:
    return offer is None or {one.partition("=")[0] for one in options} <= offer.options


def _listed(options: Iterable[str], offer: _Offer | None) -> str:
    *others, last = (_as_typed(option, offer) for option in options)
    return f"{', '.join(others)} and {last}" if others else last


def _as_typed(option: str, offer: _Offer | None) -> str:
    """An argument as the user gives it: `batch_size=1`, or `--batch-size 1`."""
    if offer is None or not offer.typed:
        return option
    name, _, value = option.partition("=")
    return f"--{name.replace('_', '-')} {value.strip('[]')}".rstrip()


def _spelled(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
