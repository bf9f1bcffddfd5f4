"""When a run goes through a layer's queries block by block, and the proof that it may.

How it is done says `ra_lens.model.rows`. Which models can is found by looking, not by name: before
a model's first such run, a short prompt runs both ways, and all maps must agree.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from ra_lens.collect import Collector
from ra_lens.errors import BadInput, RALensWarning, UnsupportedModel
from ra_lens.memory import Plan
from ra_lens.model import Lens, Site
from ra_lens.model.rows import learn_layout
from ra_lens.model.sites import StoredKind
from ra_lens.numbers import Whole, whole_or_none

LARGEST = 2**26
"""Entries of a block of a map, of all heads and prompts of a batch, where nothing else is said."""

_TOKENS, _ROWS = 7, 3  # of the prompt that runs both ways
_WITHIN = 1e-4  # of the largest entry of a map; in half precision some roundings
_seen: weakref.WeakKeyDictionary[nn.Module, dict[object, str]] = weakref.WeakKeyDictionary()


def read_rows(plan: Plan, query_rows: Whole | None, *, edited: bool) -> int | None:
    """Tell how many queries of a layer run at a time where norms are all that is kept; None: all.

    Without a number from the user: all where their maps are small, or where the model, its hooks
    (`edited`) or padding do not allow less.

    Raises:
        BadInput: a number with options that need whole maps, or with padding.
        UnsupportedModel: a number, and a model or hooks on it that need whole maps.
    """
    given = whole_or_none("query_rows", query_rows, least=1)
    padded = len(set(plan.prompts.lengths)) > 1
    if given is not None:
        _check(plan, given, edited=edited, padded=padded)
        return given
    per_row = max(plan.batch * site.n_heads for site in plan.sites.values()) * plan.n_keys
    if padded or per_row * plan.n_keys <= LARGEST:
        return None
    rows = max(1, LARGEST // per_row)
    if edited:
        if replace(plan, rows=rows).in_rows:
            warnings.warn(
                f"hooks on {plan.lens.name} may need whole maps, so layers run with all queries at "
                "once. Without hooks they would run block by block, in less memory.",
                RALensWarning,
                stacklevel=3,
            )
        return None
    return None if _problem(plan.lens) else rows


def _check(plan: Plan, given: int, *, edited: bool, padded: bool) -> None:
    if padded or replace(plan, rows=given).in_rows is None:
        found = f"store={plan.store!r}, recompute={plan.recompute}" + " and vectors" * bool(
            plan.vectors
        )
        raise BadInput(
            f"found query_rows={given} with "
            f"{'prompts of different lengths' if padded else found}. Blocks of rows need "
            "store='norms' and recompute=True, without vectors, and prompts of one length."
        )
    problem = "hooks on it may need whole maps" if edited else _problem(plan.lens)
    if problem:
        raise UnsupportedModel(
            f"attention of {plan.lens.name} cannot run in blocks of rows: {problem}. Leave "
            "query_rows away."
        )


def _problem(lens: Lens) -> str:
    """Why a model's attention cannot run in blocks of rows; empty if it can."""
    known = _seen.setdefault(lens.module, {})
    if lens.state not in known:
        known[lens.state] = _compare(lens)
    return known[lens.state]


def _compare(lens: Lens) -> str:
    if lens.reads != "left to right" or not all(site.causal for site in lens.sites.values()):
        return "not all of it is causal"
    tokens = torch.arange(_TOKENS, device=lens.device).unsqueeze(0) % lens.d_vocab
    try:
        learn_layout(lens)
        plain, blockwise = (_maps(lens, tokens, rows) for rows in (None, _ROWS))
    except UnsupportedModel as error:
        return str(error).rstrip(".")
    except Exception as error:  # the model's own, for which it was not made
        if _of_memory(error):  # this moment's, which says nothing of the model
            raise
        return f"its forward pass raises {type(error).__name__} so ({error})"
    within = max(_WITHIN, 8 * torch.finfo(lens.dtype).eps)
    for name, whole in plain.items():
        # Only G is a number at later keys, which a block's queries do not meet.
        off = float((blockwise[name] - whole).tril().abs().max())
        if not off <= within * float(whole.abs().max()):
            return f"on {_TOKENS} tokens {name} comes out otherwise, by {off:.2g}"
    return ""


def _of_memory(error: Exception) -> bool:
    """Whether there was no room; PyTorch says so in words where the device is no GPU."""
    named = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
    return named or "out of memory" in str(error) or "allocate memory" in str(error)


def _maps(lens: Lens, tokens: Tensor, rows: int | None) -> Mapping[str, Tensor]:
    """All maps of a short prompt, for a loss that reads every logit, put together from blocks."""
    found: dict[str, Tensor] = {}
    arrived: dict[str, int] = {}

    def deliver(site: Site, maps: dict[StoredKind, Tensor]) -> None:
        for kind, piece in maps.items():
            name = site.map_name(kind)
            whole = found.setdefault(name, piece.new_zeros(*piece.shape[:2], _TOKENS, _TOKENS))
            end = _TOKENS - arrived.get(name, 0)  # the last ones come first
            arrived[name] = arrived.get(name, 0) + piece.shape[-2]
            whole[:, :, end - piece.shape[-2] : end, : piece.shape[-1]] = piece

    collector = Collector(lens, lens.sites.with_scales(1.0), deliver, edited=False)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(lens.parameters_frozen())
        stack.enter_context(lens.tensors_put_back())
        stack.enter_context(lens.running(None))
        past = stack.enter_context(collector.attached(recompute=rows is not None, rows=rows))
        logits = lens.forward(tokens, torch.ones_like(tokens, dtype=torch.bool), past=past)
        collector.backward(logits.log_softmax(dim=-1).square().mean())
    return found
