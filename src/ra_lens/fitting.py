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

from ra_lens.memory import OF_LOGITS, SAFE, SAFE_RECOMPUTED, Plan, free_memory
from ra_lens.model import Lens
from ra_lens.model.sites import VectorKind
from ra_lens.prompts import Prompts

_UNTOLD = 64  # rows where the device does not say what is free


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
    the device does not say what is free, 64.

    Args:
        lens: The model.
        prompts: What it is to read, answers included.
        n_read: Positions of a prompt at which logits are computed.
        wanted: Tells by full name which maps are kept of a batch. Default: norms alone.
        vectors: Kinds of vectors that are kept of a batch.
    """
    plan = _of_one_row(lens, prompts, wanted, vectors)
    logits = n_read * _of_position(lens)
    counted = plan.graph + OF_LOGITS * logits
    return _fitting(lens, plan.maps + logits + round(counted / SAFE))


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
    widths, sites, itemsize = plan.widths, lens.sites.values(), lens.dtype.itemsize
    of_each_layer = sum(widths[site.query_side] for site in sites) * lens.d_model * itemsize
    one_layer = plan.graph - of_each_layer  # a run with checkpoints has the inputs of all, and one
    maps = (site.n_heads * widths[site.query_side] * widths[site.key_side] for site in sites)
    one_layer += added * max(maps) * itemsize
    logits = n_read * _of_position(lens)
    counted = one_layer + OF_LOGITS * logits
    of_row = kept * of_each_layer + round(counted / SAFE_RECOMPUTED)
    return _fitting(lens, of_row, held=len(prompts) * kept * of_each_layer if of_all else 0)


def _fitting(lens: Lens, of_row: int, *, held: int = 0) -> int:
    free = free_memory(lens.device)
    return _UNTOLD if free is None else max(1, (free - held) // of_row)


def _of_position(lens: Lens) -> int:
    """Bytes of the logits at one position."""
    return lens.d_vocab * max(4, lens.dtype.itemsize)


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
