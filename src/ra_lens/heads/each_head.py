"""Asking questions with each head changed in turn: one row of a batch for each question and head.

The rows of a batch all change heads of one layer, so that the forward pass can begin at the block
of that layer (`ra_lens.prefix`). That is put to the proof in every call, with the prompts and hooks
of the call: one row of each layer is also run in full, and where its logits come out otherwise, all
rows of the layer are run in full.

Cost for n questions and L layers of H heads: n + L forward passes of one row, and n·L·H that begin
at the block of their layer; where the layers are alike these are half as long on average. Layers
may have different numbers of heads (`ra_lens.ragged`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.answers import FwdHooks, Questions, by_length, last_logits, mark
from ra_lens.heads.registry import RankingContext
from ra_lens.padding import together
from ra_lens.prefix import Prefix
from ra_lens.prompts import Prompts

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
        self._prefix = Prefix(context.lens)
        self._place: dict[int, int] = {}
        self._width = 0
        # By layer: whether to begin late, and the logits of the first row until it has been run.
        self._late = [True] * len(self._layers)
        self._expected: dict[int, Tensor] | None = None

    def begin(self, group: Sequence[int]) -> Float[Tensor, "question d_vocab"]:
        """Run the questions of a group as they are; from now on batches are made of them."""
        self._place = {question: i for i, question in enumerate(group)}
        self._width = max(self._prompts.lengths[question] for question in group)
        with self._prefix.recorded(len(group)):
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
            skipping = self._prefix.reused(self._layers[begin_at], examples)
        with skipping:
            return last_logits(self._context.lens, prompts, hooks)

    def _laid_out(self, questions: Sequence[int]) -> Prompts:
        """Prompts as wide as the group, so that what is recorded fits them."""
        chosen = self._prompts.chosen(questions)
        return replace(chosen, width=max(chosen.width, self._width))
