"""How many rows run at a time, where rankings and experiments cut their own batches.

They are counted as `ra_lens.memory` counts a run that is to fit:

    with a backward pass   free / (maps, vectors and logits kept + 2 · (graph + 3 · logits read))
    without gradients      free / (kept of every layer + 5 · (one layer + 3 · logits read))

each of a row as long as the longest prompt. A pass without gradients holds one layer at a time, as
a run with `recompute` does, and leaves as much room. Measured peaks are a quarter to nine tenths of
what is free where so many rows run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ra_lens.memory import OF_LOGITS, SAFE, SAFE_RECOMPUTED, Plan, free_memory
from ra_lens.model import Lens, Site
from ra_lens.model.sites import VectorKind
from ra_lens.prompts import Prompts

_UNTOLD = 64  # rows where no device says what is free


def rows_of_run(
    lens: Lens,
    prompts: Prompts,
    *,
    n_read: int = 1,
    wanted: Callable[[str], bool] = lambda _name: False,
    vectors: frozenset[VectorKind] = frozenset(),
) -> int:
    """Give the rows that may run forwards and backwards at a time, if what is kept is to fit too.

    A row is counted as the widest of the prompts. What is kept is that of one batch: logits where
    the loss reads them, and maps and vectors. Where not even one row is sure to fit, one; where
    no device says what is free, 64.

    Args:
        lens: The model.
        prompts: What it is to read, answers included.
        n_read: Positions of a prompt at which logits are computed.
        wanted: Tells by full name which maps are kept of a batch. Default: norms alone.
        vectors: Kinds of vectors that are kept of a batch.
    """
    plan = _of_one_row(lens, prompts, wanted, vectors)

    def of_row(device: torch.device) -> int:
        logits = n_read * _of_position(lens, device)
        counted = plan.graph_on(device) + OF_LOGITS * logits
        return plan.maps_on(device) + logits + round(counted / SAFE)

    return _fitting(plan, of_row)


def rows_of_forward(
    lens: Lens,
    prompts: Prompts,
    *,
    n_read: int = 1,
    kept: int = 0,
    of_all: bool = False,
    added: int = 0,
) -> int:
    """Give the rows that may run forwards at a time, without gradients.

    Such a pass has the activations of one layer at a time, and logits where they are read. A row is
    counted as in `rows_of_run`.

    Args:
        lens: The model.
        prompts: What it is to read, answers included.
        n_read: Positions of a prompt at which logits are computed.
        kept: Tensors of the width of the model that stay of each layer, of the rows of a batch:
            one where what blocks return is kept, two where keys and values are.
        of_all: Whether as many stay of all prompts, too.
        added: Maps that hooks make at a layer of each row, beside its pattern.
    """
    plan = replace(_of_one_row(lens, prompts), recompute=True)
    widths, itemsize = plan.widths, lens.dtype.itemsize

    def sites_on(device: torch.device) -> list[Site]:
        return [site for i, site in lens.sites.items() if lens.layer_devices[i] == device]

    def of_each_layer(device: torch.device) -> int:
        tokens = sum(widths[site.query_side] for site in sites_on(device))
        return tokens * lens.d_model * itemsize

    def of_row(device: torch.device) -> int:
        every = of_each_layer(device)
        one_layer = plan.graph_on(device) - every  # with checkpoints: the inputs of all, and one
        sizes = (s.n_heads * widths[s.query_side] * widths[s.key_side] for s in sites_on(device))
        counted = one_layer + added * max(sizes) * itemsize
        counted += OF_LOGITS * n_read * _of_position(lens, device)
        return kept * every + round(counted / SAFE_RECOMPUTED)

    def held(device: torch.device) -> int:
        return len(prompts) * kept * of_each_layer(device) if of_all else 0

    return _fitting(plan, of_row, held)


def _fitting(
    plan: Plan,
    of_row: Callable[[torch.device], int],
    held: Callable[[torch.device], int] = lambda _device: 0,
) -> int:
    """The rows that fit on every device that says what is free."""
    free = {device: free_memory(device) for device in plan.devices}
    found = [(n - held(one)) // of_row(one) for one, n in free.items() if n is not None]
    return max(1, min(found)) if found else _UNTOLD


def _of_position(lens: Lens, device: torch.device) -> int:
    """Bytes of the logits at one position, on the device where they are computed."""
    return lens.d_vocab * max(4, lens.dtype.itemsize) * (device in lens.logits_devices)


def _of_one_row(
    lens: Lens,
    prompts: Prompts,
    wanted: Callable[[str], bool] = lambda _name: False,
    vectors: frozenset[VectorKind] = frozenset(),
) -> Plan:
    """A run of the widest of some prompts alone."""
    return Plan(
        lens=lens,
        sites=lens.sites,
        prompts=prompts.widest(),
        encoded=None,
        batch_size=None,
        store="maps",
        wanted=wanted,
        device=None,
        dtype=None,
        recompute=False,
        vectors=vectors,
    )
