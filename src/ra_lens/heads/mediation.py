"""Causal mediation: what the answer's probability does when one head is changed.

    cm1[l, h] = mean over prompts of  p(answer) − p(answer | head zeroed)
    cm2[l, h] = mean over prompts of  p(answer | head := its mean) − p(answer)

p is that of the answer's first token at the last position of the prompt, in float64. CM1 is
positive for a head that matters; the published code gives it with the opposite sign. CM2 is meant
to be, too: shuffled labels take the answer away and the head's mean brings it back. Where they do
not take it away, the mean only overwrites what the head knew, and the heads that matter are
negative.

CM1 sets z of the head to zero at every position (`ra_lens.masking`); `cm1_last` at the last token
only, as section 5.2 of the paper may be read. CM2 follows Todd et al., "Function Vectors in Large
Language Models" (2024): z of each head at the last token is averaged over prompts whose labels are
right, and put at the last token of a prompt with shuffled labels. The mean is over all prompts but
the one it is put into ("left-out examples", as the paper has it; the code draws them anew), and a
shuffle never leaves the labels in place (in the code it may). With no or one demonstration there
is nothing to shuffle.

Cost per prompt: 1 forward pass for CM1 and 2 for CM2, and one row of a batch for every head, which
begins at the head's own layer (`ra_lens.heads.each_head`).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.answers import FwdHooks, last_logits
from ra_lens.errors import RALensWarning
from ra_lens.heads.each_head import Edit, Row, ask_each_head
from ra_lens.heads.registry import RankingContext, ranking_method
from ra_lens.masking import by_head, mask_hooks, need_heads
from ra_lens.numbers import Whole, whole
from ra_lens.padding import batches
from ra_lens.prompts import Prompts
from ra_lens.tasks import Pair, Prompt


@ranking_method("cm1", title="causal mediation, head zeroed")
def cm1_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """What the answer's probability loses when a head is zero at every position."""

    def edit(rows: Sequence[Row], _prompts: Prompts) -> FwdHooks:
        keep = torch.ones(len(rows), *context.shape, dtype=torch.bool)
        for row, (_, layer, head) in enumerate(rows):
            keep[row, layer, head] = False
        return mask_hooks(context.lens.sites, keep)

    return _lost(context, edit)


@ranking_method("cm1_last", title="causal mediation, last token zeroed")
def cm1_last_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """What the answer's probability loses when a head is zero at the last token of the prompt."""

    def edit(rows: Sequence[Row], prompts: Prompts) -> FwdHooks:
        return _set_last(context, rows, prompts, None)

    return _lost(context, edit)


@ranking_method("cm2", title="causal mediation, mean put into shuffled labels", split="valid")
def cm2_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """What the answer's probability gains when a head's last token gets its mean z."""
    _check(context)
    means = [_of_the_others(of_layer) for of_layer in _last_z(context)]
    shuffled = tuple(
        shuffle_labels(prompt, seed=context.seed, index=i)
        for i, prompt in enumerate(context.prompts)
    )
    questions = context.read(shuffled)

    def edit(rows: Sequence[Row], prompts: Prompts) -> FwdHooks:
        return _set_last(context, rows, prompts, means)

    before, after = ask_each_head(context, questions, edit)
    return (after - before[:, None, None]).mean(dim=0)


def shuffle_labels(prompt: Prompt, *, seed: Whole, index: Whole = 0) -> Prompt:
    """Give the outputs of a prompt's demonstrations to each other, in a seeded random order.

    The order of outputs is never the right one, unless it cannot be helped: with fewer than two
    demonstrations, or outputs that are all the same, the prompt stays as it is.

    Args:
        prompt: Of a task.
        seed: Another seed gives another order.
        index: Position in the list of prompts; another one gives another order too.

    Raises:
        BadInput: the prompt does not know its task, so it cannot be written anew.
    """
    right = [pair.output for pair in prompt.demonstrations]
    if len(set(right)) < 2:
        return prompt
    numbers = whole("seed", seed), whole("index", index)
    # As in the random order: only `random()` is the same on every version of Python.
    generator = random.Random("ra_lens shuffled labels {} {}".format(*numbers))
    outputs = right
    while outputs == right:
        keys = [generator.random() for _ in right]
        outputs = [right[i] for i in sorted(range(len(right)), key=keys.__getitem__)]
    pairs = zip(prompt.demonstrations, outputs, strict=True)
    return prompt.with_demonstrations([Pair(pair.input, output) for pair, output in pairs])


def _lost(context: RankingContext, edit: Edit) -> Tensor:
    _check(context)
    if context.lens.value_biases_folded:
        warnings.warn(
            f"the value biases of {context.lens.name} are folded into its output biases, so a head "
            "set to zero still writes its value bias, unlike one whose rows of W_O are zero. Load "
            "the model without folding, as ra_lens.load_model does, to rank as in the paper.",
            RALensWarning,
            stacklevel=4,
        )
    before, after = ask_each_head(context, context.questions, edit)
    return (before[:, None, None] - after).mean(dim=0)


def _check(context: RankingContext) -> None:
    context.lens.refuse_dropout()
    need_heads(context.lens)


def _last_columns(context: RankingContext, prompts: Prompts) -> Tensor:
    batch = prompts.lay_out(context.lens)
    return batch.columns([[n - 1] for n in batch.lengths])[:, 0]


def _set_last(
    context: RankingContext,
    rows: Sequence[Row],
    prompts: Prompts,
    values: Sequence[Tensor] | None,
) -> FwdHooks:
    """Hooks that set z of each row's head at its last token, to 0 or to `values`.

    These are `[question, head, d_head]` for each layer.
    """
    columns = _last_columns(context, prompts)
    hooks: list[tuple[str, Callable[..., Any]]] = []
    for i, site in enumerate(context.lens.sites.values()):
        cells = [(row, head) for row, (_, layer, head) in enumerate(rows) if layer == i]
        if cells:
            where = torch.tensor(cells)
            questions = torch.tensor([rows[row][0] for row, _ in cells])
            new = None if values is None else values[i][questions, where[:, 1]]
            hooks.append((site.z_name, partial(_set_heads, where, columns, new, site.n_heads)))
    return hooks


def _set_heads(
    cells: Tensor,
    columns: Tensor,
    values: Tensor | None,
    n_heads: int,
    z: Tensor,
    hook: Any,  # noqa: ARG001  TransformerLens passes it by name
) -> Tensor:
    rows, heads = cells.unbind(dim=1)
    new = by_head(z, n_heads).clone()
    index = tuple(t.to(z.device) for t in (rows, columns[rows], heads))
    new[index] = 0.0 if values is None else values.to(new)
    return new.reshape(z.shape)


@torch.no_grad()
def _last_z(context: RankingContext) -> list[Float[Tensor, "question head d_head"]]:
    """z at the last token of each prompt, in float64, for each layer."""
    sites = list(context.lens.sites.values())
    found: list[list[Tensor]] = [[] for _ in sites]
    order: list[int] = []
    for part, prompts in batches(context.lens, context.questions.prompts, context.batch_size):
        order += part
        columns = _last_columns(context, prompts)

        def look(layer: int, n_heads: int, columns: Tensor = columns) -> Callable[..., None]:
            def at_z(z: Tensor, hook: Any) -> None:  # noqa: ARG001  TransformerLens passes it by name
                rows = torch.arange(z.shape[0], device=z.device)
                found[layer].append(by_head(z, n_heads)[rows, columns.to(z.device)].cpu().double())

            return at_z

        hooks = [(site.z_name, look(i, site.n_heads)) for i, site in enumerate(sites)]
        last_logits(context.lens, prompts, hooks)
    asked = torch.tensor(order).argsort()  # back to the order given
    return [torch.cat(of_layer)[asked] for of_layer in found]


def _of_the_others(z: Float[Tensor, "question head d_head"]) -> Tensor:
    """For each question the mean over all others; its own where there is no other."""
    n = z.shape[0]
    return z if n == 1 else (z.sum(dim=0) - z) / (n - 1)
