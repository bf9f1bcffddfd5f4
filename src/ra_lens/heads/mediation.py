"""Causal mediation: what the answer's probability does when one head is changed.

    cm1[l, h] = mean over prompts of  p(answer) − p(answer | head zeroed)
    cm2[l, h] = mean over prompts of  p(answer | head := its mean) − p(answer)

p is that of the answer's first token at the last position of the prompt, in float64. CM1 is
positive for a head that matters; the published code gives it with the opposite sign. CM2 is meant
to be, too: shuffled labels take the answer away and the head's mean brings it back. Where they do
not take it away, the mean only overwrites what the head knew, and the heads that matter are
negative.

CM1 sets z of the head to zero at every position (`ra_lens.patching.masking`); `cm1_last` at the
last token only, as section 5.2 of the paper may be read. CM2 follows Todd et al., "Function Vectors
in Large Language Models" (2024): z of each head at the last token is averaged over prompts whose
labels are right, and put at the last token of a prompt with shuffled labels. The mean is over all
prompts but the one it is put into ("left-out examples", as the paper has it; the code draws them
anew), and a shuffle never leaves the labels in place (in the code it may). With no or one
demonstration there is nothing to shuffle.

How each head is changed, and at what cost: `ra_lens.heads.each_head`; CM2 costs n more forward
passes for its means.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.heads.each_head import Edit, Row, ask_each_head, check_changing, check_zeroing, kept
from ra_lens.heads.registry import Passes, RankingContext, ranking_method
from ra_lens.model import FwdHooks
from ra_lens.model.forward import at_columns
from ra_lens.numbers import Whole, whole
from ra_lens.padding import batches, watched
from ra_lens.patching.masking import by_head, mask_hooks
from ra_lens.prompts import Prompts
from ra_lens.questions import Questions
from ra_lens.tasks import Pair, Prompt


@ranking_method(
    "cm1",
    label="CM1",
    title="causal mediation, head zeroed",
    passes=Passes(1, forward_per_head=1),
)
def cm1_scores(context: RankingContext) -> Float[Tensor, "prompt layer head"]:
    """What the answer's probability loses when a head is zero at every position."""

    def edit(rows: Sequence[Row], _prompts: Prompts, _start: int) -> FwdHooks:
        return mask_hooks(context.lens.sites, kept(context, rows))

    return _lost(context, edit)


@ranking_method(
    "cm1_last",
    label="CM1 last",
    title="causal mediation, last token zeroed",
    passes=Passes(1, forward_per_head=1),
)
def cm1_last_scores(context: RankingContext) -> Float[Tensor, "prompt layer head"]:
    """What the answer's probability loses when a head is zero at the last token of the prompt."""

    def edit(rows: Sequence[Row], prompts: Prompts, _start: int) -> FwdHooks:
        return _set_last(context, rows, prompts, None)

    return _lost(context, edit, _last_positions(context.questions))


@ranking_method(
    "cm2",
    label="CM2",
    title="causal mediation, mean put into shuffled labels",
    split="valid",
    passes=Passes(2, forward_per_head=1),
)
def cm2_scores(context: RankingContext) -> Float[Tensor, "prompt layer head"]:
    """What the answer's probability gains when a head's last token gets its mean z."""
    check_changing(context)
    means = [_of_the_others(of_layer) for of_layer in _last_z(context)]
    shuffled = tuple(
        shuffle_labels(prompt, seed=context.seed, index=i)
        for i, prompt in enumerate(context.prompts)
    )
    questions = context.read(shuffled)

    def edit(rows: Sequence[Row], prompts: Prompts, _start: int) -> FwdHooks:
        return _set_last(context, rows, prompts, means)

    last = _last_positions(questions)
    before, after = ask_each_head(context, questions, edit, changed_from=last)
    return after.probability - before.probability[:, None, None]


def shuffle_labels(prompt: Prompt, *, seed: Whole, index: Whole = 0) -> Prompt:
    """Give the outputs of a prompt's demonstrations to each other, in a seeded random order.

    The order of outputs is never the right one, unless it cannot be helped: with fewer than two
    demonstrations, or outputs that are all the same, the prompt stays as it is. Another seed, or
    another index in a list of prompts, gives another order.
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


def _lost(
    context: RankingContext, edit: Edit, changed_from: Sequence[int] | None = None
) -> Float[Tensor, "prompt layer head"]:
    check_zeroing(context, stacklevel=5)
    before, after = ask_each_head(context, context.questions, edit, changed_from=changed_from)
    return before.probability[:, None, None] - after.probability


def _last_positions(questions: Questions) -> list[int]:
    return [n - 1 for n in questions.prompts.lengths]


def _set_last(
    context: RankingContext,
    rows: Sequence[Row],
    prompts: Prompts,
    values: Sequence[Tensor] | None,
) -> FwdHooks:
    """Hooks that set z of each row's head at its last token, to 0 or to the question's `values`."""
    columns = prompts.lay_out(context.lens).last[:, 0]
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


def _last_z(context: RankingContext) -> list[Float[Tensor, "question head d_head"]]:
    """z at the last token of each prompt, in float64, for each layer."""
    lens, order = context.lens, []
    found: list[list[Tensor]] = [[] for _ in lens.sites]
    for part, prompts in batches(lens, context.questions.prompts, context.batch_size):
        order += part
        batch = prompts.lay_out(lens)

        def last(n_heads: int, z: Tensor, columns: Tensor = batch.last) -> Tensor:
            return by_head(at_columns(z, columns), n_heads)[:, 0].cpu().double()

        keep = {site.z_name: partial(last, site.n_heads) for site in lens.sites.values()}
        with watched(lens, batch):
            shown, logits = lens.look(keep, *batch.model_input, batch.last)
        lens.refuse_nan(logits)
        for of_layer, name in zip(found, keep, strict=True):
            of_layer.append(shown[name])
    asked = torch.tensor(order).argsort()  # back to the order given
    return [torch.cat(of_layer)[asked] for of_layer in found]


def _of_the_others(z: Float[Tensor, "question head d_head"]) -> Tensor:
    """For each question the mean over all others; its own where there is no other."""
    n = z.shape[0]
    return z if n == 1 else (z.sum(dim=0) - z) / (n - 1)
