"""What heads give on the corrupted twins of prompts, and gradients on the way from these.

A twin is read with the answer of its prompt behind it, where the prompt is, so that all positions
correspond. On the way from a twin to its prompt, embeddings of tokens are moved in equal steps,

    x_k = x′ + k/m · (x − x′),   k = 1 … m

x being those of the prompt and x′ those of the twin; the last step is the prompt itself. They are
taken at `hook_embed`, before positions are added, which are the same in both.

Cost for n prompts: n forward passes without gradients for the twins; for m steps m − 1 forward and
backward passes each, beside that of the prompts themselves. These run in groups of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.model import Lens, PrependBos
from ra_lens.padding import of_one_length
from ra_lens.patching.masking import read_z
from ra_lens.prompts import Prompts, read_prompts
from ra_lens.run import run_with_ra
from ra_lens.targets import Objective
from ra_lens.tasks import Prompt, with_corrupted

EMBEDDING = "hook_embed"
ByLayer = Mapping[int, Tensor]


@dataclass(frozen=True)
class CorruptedRun:
    """What a method that needs corrupted twins reads, laid out as the cache of the prompts is.

    Attributes:
        z: What heads give on the twins, by layer, `[batch, pos, head, d_head]`.
        z_grad: ∂L/∂z, the mean over the steps from the twins to the prompts; with one step that of
            the prompts.
    """

    z: ByLayer
    z_grad: ByLayer


def read_twins(
    lens: Lens,
    prompts: Sequence[Prompt],
    clean: Prompts,
    *,
    prepend_bos: PrependBos = None,
    seed: int = 0,
) -> Prompts:
    """Tokenise the corrupted twins of prompts, drawing them (`with_corrupted`) where there is none.

    Args:
        lens: The model.
        prompts: The prompts.
        clean: The same as token ids.
        prepend_bos: What stands in front of each.
        seed: Of the twins that are drawn.

    Raises:
        BadInput: a twin of another length or of the same tokens, or none that could be drawn.
        UnsupportedModel: an encoder-decoder.
    """
    if lens.reads == "input, then answer":
        raise UnsupportedModel(
            f"{lens.name} is an encoder-decoder, of which corrupted prompts are not run. Use a "
            "method that needs none, such as 'atp'."
        )
    paired = with_corrupted(prompts, partial(lens.encode, prepend_bos=prepend_bos), seed=seed)
    texts = [one.corrupted.text for one in paired if one.corrupted is not None]
    twins = read_prompts(lens, texts, prepend_bos=prepend_bos)
    for i, (own, other) in enumerate(zip(clean.ids, twins.ids, strict=True)):
        if len(own) != len(other) or own == other:
            found = "the same tokens" if own == other else f"{len(other)} tokens"
            raise BadInput(
                f"the corrupted twin of prompt {i} ({prompts[i].text!r}, {len(own)} tokens) has "
                f"{found}. Give a twin as long that differs, or leave it away: "
                "ra_lens.tasks.with_corrupted draws one."
            )
    return twins


def corrupted_runs(
    lens: Lens,
    cache: RACache,
    clean: Prompts,
    twins: Prompts,
    answers: Sequence[Sequence[int]],
    objective_of: Callable[[Sequence[int]], Objective],
    steps: Sequence[int],
) -> dict[int, CorruptedRun]:
    """Run the twins of a batch, and prompts on the way from them.

    Args:
        lens: The model.
        cache: The run of the prompts themselves, with `z_grad`.
        clean: The prompts.
        twins: Their twins.
        answers: What the cache's prompts have behind them; empty where nothing is.
        objective_of: The loss of some of the prompts, which puts the answers behind them itself.
        steps: Numbers of steps asked for.

    Returns:
        By number of steps.

    Raises:
        UnsupportedModel: more than one step in a model without `hook_embed`.
    """
    own = {layer: cache["z_grad", layer] for layer in cache.layers}
    several = [n for n in steps if n > 1]
    if several and not lens.has(EMBEDDING):
        raise UnsupportedModel(
            f"{lens.name} has no hook point {EMBEDDING!r}, where embeddings could be moved. Use "
            "'nap', which moves none."
        )
    wide, twins = clean.extended(answers), twins.extended(answers)
    z = {layer: torch.zeros_like(grad) for layer, grad in own.items()}
    sums = {n: {layer: grad.clone() for layer, grad in own.items()} for n in several}
    for group in of_one_length(wide) if several else [range(len(wide))]:
        embeddings: list[Tensor] = []
        looking = lens.looking({EMBEDDING: embeddings.append}) if several else nullcontext()
        with looking:
            found = read_z(lens, twins.chosen(group).unpadded())
        _put(z, found, wide, group)
        for n, total in sums.items():
            for k in range(1, n):
                move = partial(_move, embeddings[0], k / n)
                _, run = run_with_ra(
                    lens.module,
                    clean.chosen(group).unpadded(),
                    target=objective_of(group),
                    fwd_hooks=[(EMBEDDING, move)],
                    store="norms",
                    vectors=["z_grad"],
                    progress=False,
                )
                grads = {layer: run["z_grad", layer] for layer in run.layers}
                _put(total, grads, wide, group)
    return {
        n: CorruptedRun(z, {layer: total / n for layer, total in sums[n].items()} if n > 1 else own)
        for n in steps
    }


def _move(
    corrupted: Float[Tensor, "batch pos d_model"],
    share: float,
    x: Float[Tensor, "batch pos d_model"],
    hook: Any,  # noqa: ARG001  TransformerLens passes it by name
) -> Float[Tensor, "batch pos d_model"]:
    return corrupted + share * (x - corrupted)


def _put(into: ByLayer, found: ByLayer, prompts: Prompts, group: Sequence[int]) -> None:
    """Add what was found of some prompts to the places of their tokens."""
    width = max(prompts.lengths[i] for i in group)
    left = prompts.padding_side == "left"
    for layer, values in found.items():
        for row, i in enumerate(group):
            n, start = prompts.lengths[i], prompts.starts[i]
            first = width - n if left else 0
            place = into[layer][i, start : start + n]
            place += values[row, first : first + n].to(place)
