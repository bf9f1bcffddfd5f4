"""Asking questions with each head changed in turn: one row of a batch for each question and head.

The rows of a batch all change heads of one layer, so that the forward pass can begin at the block
of that layer (`ra_lens.model.blocks`). Every call checks this with its own prompts and hooks: it
also runs one row of each layer in full, and where the logits of that row come out otherwise, it
runs all rows of the layer in full.

Cost for n questions and L layers of H heads: n + L forward passes of one row, and n·L·H that begin
at the block of their layer; where the layers are alike these are half as long on average. Layers
may have different numbers of heads (`ra_lens.model.sites`).

Causal mediation: what the answer's probability does when one head is changed.

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
prompts but
the one it is put into ("left-out examples", as the paper has it; the code draws them anew), and a
shuffle never leaves the labels in place (in the code it may). With no or one demonstration there
is nothing to shuffle.

Cost per prompt: 1 forward pass for CM1 and 2 for CM2, and one row of a batch for every head, which
begins at the head's own layer (`ra_lens.heads.mediation`).
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.errors import RALensWarning
from ra_lens.heads.ranking import RankingContext, ranking_method
from ra_lens.model import FwdHooks
from ra_lens.model.blocks import SkippedBlocks
from ra_lens.model.forward import at_columns
from ra_lens.numbers import Whole, whole
from ra_lens.padding import batches, together, watched
from ra_lens.patching.masking import by_head, mask_hooks, need_heads
from ra_lens.prompts import Prompts
from ra_lens.questions import Questions, by_length, last_logits, mark
from ra_lens.tasks import Pair, Prompt

Row = tuple[int, int, int]
"""Which question, and which layer and head of it is changed, as indices of the scores."""

Edit = Callable[[Sequence[Row], Prompts], FwdHooks]
"""Gives the hooks that change the heads of a batch, one in each row."""


def ask_each_head(
    context: RankingContext, questions: Questions, edit: Edit
) -> tuple[Float[Tensor, "question"], Float[Tensor, "question layer head"]]:
    """Give the probability of each answer, in float64: as the model is, and for each head changed.

    It is NaN at heads that do not exist, where layers have different numbers.

    Args:
        context: The model and the size of a batch.
        questions: What to ask.
        edit: How a head is changed. Nothing may change before the block that the head is in.
    """
    from tqdm.auto import tqdm

    n_rows = len(questions) * sum(context.n_heads)
    before = torch.zeros(len(questions), dtype=torch.float64)
    after = torch.full((len(questions), *context.shape), float("nan"), dtype=torch.float64)
    first_tokens = questions.first_tokens
    runner = _Runner(context, questions, edit)
    shown = context.progress and n_rows > context.batch_size
    with tqdm(
        total=n_rows, desc="Causal mediation", unit="row", disable=not shown, leave=False
    ) as bar:
        for group in _groups(context, questions):
            before[group] = mark(runner.begin(group), first_tokens[group]).probability
            for layer, n_heads in enumerate(context.n_heads):
                rows = [(question, layer, head) for question in group for head in range(n_heads)]
                for start in range(0, len(rows), context.batch_size):
                    part = rows[start : start + context.batch_size]
                    which, _, heads = (list(column) for column in zip(*part, strict=True))
                    marks = mark(runner.changed(part, layer), first_tokens[which])
                    after[which, layer, heads] = marks.probability
                    bar.update(len(part))
    return before, after


def _groups(context: RankingContext, questions: Questions) -> Iterator[list[int]]:
    """Questions of like length that may run together, as many as go into a batch."""
    for some in together(context.lens, questions.prompts):
        order = by_length(questions.prompts, some)
        for first in range(0, len(order), context.batch_size):
            yield order[first : first + context.batch_size]


class _Runner:
    """Runs the batches of one group of questions after the other."""

    def __init__(self, context: RankingContext, questions: Questions, edit: Edit) -> None:
        self._context = context
        self._prompts = questions.prompts
        self._edit = edit
        self._layers = list(context.lens.sites)
        self._skipped = SkippedBlocks(context.lens)
        self._place: dict[int, int] = {}
        self._width = 0
        # By layer: whether to begin late, and the logits of the first row until it has been run.
        self._late = [True] * len(self._layers)
        self._expected: dict[int, Tensor] | None = None

    def begin(self, group: Sequence[int]) -> Float[Tensor, "question d_vocab"]:
        """Run the questions of a group as they are; from now on batches are made of them."""
        self._place = {question: i for i, question in enumerate(group)}
        self._width = max(self._prompts.lengths[question] for question in group)
        with self._skipped.recorded(len(group)):
            logits = last_logits(self._context.lens, self._laid_out(group))
        if self._expected is None:
            rows = [(group[0], layer, 0) for layer in range(len(self._layers))]
            size = self._context.batch_size
            parts = [self._run(rows[i : i + size], None) for i in range(0, len(rows), size)]
            self._expected = dict(enumerate(torch.cat(parts)))
        return logits

    def changed(self, rows: Sequence[Row], layer: int) -> Float[Tensor, "row d_vocab"]:
        """Run rows that all change a head of `layer`."""
        if self._late[layer]:
            try:
                logits = self._run(rows, layer)
            except Exception:
                # If it was not the skipped blocks that were missed, it is raised again below.
                logits = None
            if logits is not None and self._proven(layer, logits[0]):
                return logits
            self._late[layer] = False
        return self._run(rows, None)

    def _proven(self, layer: int, first: Tensor) -> bool:
        """Whether the first row of a layer came out as in full; later ones need no proof."""
        expected = (self._expected or {}).pop(layer, None)
        if expected is None:
            return True
        # Batches of another shape round otherwise; half of the digits are the same.
        allowed = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().max()
        return bool((first - expected).abs().max() <= allowed)

    def _run(self, rows: Sequence[Row], begin_at: int | None) -> Tensor:
        prompts = self._laid_out([question for question, _, _ in rows])
        hooks = self._edit(rows, prompts)
        if begin_at is None:
            skipping = nullcontext()
        else:
            examples = torch.tensor([self._place[question] for question, _, _ in rows])
            skipping = self._skipped.reused(self._layers[begin_at], examples)
        with skipping:
            return last_logits(self._context.lens, prompts, hooks)

    def _laid_out(self, questions: Sequence[int]) -> Prompts:
        """Prompts as wide as the group, so that what is recorded fits them."""
        chosen = self._prompts.chosen(questions)
        return replace(chosen, width=max(chosen.width, self._width))


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


def _set_last(
    context: RankingContext,
    rows: Sequence[Row],
    prompts: Prompts,
    values: Sequence[Tensor] | None,
) -> FwdHooks:
    """Hooks that set z of each row's head at its last token, to 0 or to `values`.

    These are `[question, head, d_head]` for each layer.
    """
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
