"""Asking questions with one head changed at a time: the machinery of all exact effects of heads.

Each head is changed in one row of a batch for each question. The rows of a batch all change heads
of one layer, so that the forward pass can begin at the block of that layer
(`ra_lens.model.blocks`). Every call checks this with its own prompts and hooks: it also runs one
row of each layer in full, and where the logits of that row come out otherwise, it runs all rows of
the layer in full.

Cost for n questions and L layers of H heads: n + L forward passes of one row, and n·L·H that begin
at the block of their layer; where the layers are alike these are half as long on average.

Questions after the same demonstrations: these run once for each head, from the block of its layer
on, and the questions go on from the keys and values that they leave (`ra_lens.shared_prefix`). A
change of later tokens alone leaves the demonstrations as they are. The proof is the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ra_lens.errors import RALensWarning
from ra_lens.heads.registry import RankingContext
from ra_lens.model import FwdHooks
from ra_lens.model.blocks import SkippedBlocks
from ra_lens.model.prefix import Prefix
from ra_lens.padding import together
from ra_lens.patching.masking import need_heads
from ra_lens.prompts import Prompts
from ra_lens.questions import Questions, by_length, logits_at, mark
from ra_lens.shared_prefix import SharedPrefix, same_logits

Row = tuple[int, int, int]
"""Which question, and which layer and head of it is changed, as indices of the scores."""

Edit = Callable[[Sequence[Row], Prompts, int], FwdHooks]
"""Gives the hooks that change the heads of a batch, one in each row.

It is told which rows these are, what they read, and the position of the first token of that in the
questions: 0, or what comes after where shared demonstrations have run before.
"""


@dataclass(frozen=True)
class Answered:
    """How questions were answered, one value for each, or for each question and head; in float64.

    Attributes:
        probability: Of the answer's first token.
        logit_diff: Logit of the answer's first token minus that of the best other token.
        loss: Mean of −log p over the tokens of the answer that were read.
    """

    probability: Float[Tensor, "question *head"]
    logit_diff: Float[Tensor, "question *head"]
    loss: Float[Tensor, "question *head"]

    @staticmethod
    def unknown(*shape: int) -> Answered:
        """NaN throughout."""
        nan = float("nan")
        return Answered(*(torch.full(shape, nan, dtype=torch.float64) for _ in range(3)))

    def put(self, index: Any, logits: Tensor, answers: Sequence[Sequence[int]]) -> None:
        """Note what logits at the tokens of some answers say, `[row, token, d_vocab]`."""
        first = mark(logits[:, 0], torch.tensor([answer[0] for answer in answers]))
        self.probability[index] = first.probability
        self.logit_diff[index] = first.logit_diff.double()
        exact = (logits.cpu() if logits.device.type == "mps" else logits).double()
        log_p = exact.log_softmax(dim=-1)
        sums = [
            log_p[row, range(len(answer)), list(answer)].mean()
            for row, answer in enumerate(answers)
        ]
        self.loss[index] = -torch.stack(sums).cpu()


def ask_each_head(
    context: RankingContext,
    questions: Questions,
    edit: Edit,
    *,
    changed_from: Sequence[int] | None = None,
    whole_answer: bool = False,
) -> tuple[Answered, Answered]:
    """Ask every question: of the model as it is, and with each head changed.

    Args:
        context: What model it is, and how many rows run at a time.
        questions: What is asked.
        edit: Makes the change; it may change nothing before the block of the head.
        changed_from: The first position of each question that is changed; None: every token is,
            and what questions begin with alike is changed alike in all.
        whole_answer: Read all tokens of an answer, after the question and those before; else the
            first one.

    Returns:
        The answers as the model is, `[question]`, and with each head changed, `[question, layer,
        head]`, NaN at heads that do not exist.
    """
    from tqdm.auto import tqdm

    n_rows = len(questions) * sum(context.n_heads)
    before = Answered.unknown(len(questions))
    after = Answered.unknown(len(questions), *context.shape)
    answers = [row if whole_answer else row[:1] for row in questions.answers]
    read = replace(questions, answers=tuple(answers))
    shown = context.progress and n_rows > context.batch_size
    with tqdm(total=n_rows, desc="Each head", unit="row", disable=not shown, leave=False) as bar:
        for runner, group, unchanged in _begun(context, read, edit, changed_from):
            before.put(group, unchanged, [answers[i] for i in group])
            for layer, n_heads in enumerate(context.n_heads):
                rows = [(question, layer, head) for question in group for head in range(n_heads)]
                for start in range(0, len(rows), context.batch_size):
                    part = rows[start : start + context.batch_size]
                    which, _, heads = (list(column) for column in zip(*part, strict=True))
                    logits = runner.changed(part, layer)
                    after.put((which, layer, heads), logits, [answers[i] for i in which])
                    bar.update(len(part))
    return before, after


def _begun(
    context: RankingContext,
    questions: Questions,
    edit: Edit,
    changed_from: Sequence[int] | None,
) -> Iterator[tuple[_Runner, list[int], Float[Tensor, "question token d_vocab"]]]:
    """Give groups of questions with what runs them, and their logits as the model is."""
    in_full, rest = _Runner(context, questions, edit), list(range(len(questions)))
    shared = _shared_demonstrations(context, questions)
    if shared is not None and changed_from is not None:
        # Where a change begins before the questions do, it need not be the same in all.
        n_shared = len(shared.ids)
        shared = shared if all(changed_from[i] >= n_shared for i in shared.members) else None
    if shared is not None:
        runner = _AfterPrefix(context, questions, edit, shared, changed=changed_from is None)
        for group in runner.groups():
            try:
                unchanged = runner.begin(group)
            except Exception:
                break  # if it was not the prefix that failed, it is raised again in full
            if not runner.as_in_full(group, unchanged):
                break
            rest = [i for i in rest if i not in group]
            yield runner, group, unchanged
    for group in in_full.groups(rest):
        yield in_full, group, in_full.begin(group)


def _shared_demonstrations(context: RankingContext, questions: Questions) -> SharedPrefix | None:
    """The tokens that questions begin with, if they are asked after the same demonstrations."""
    shown = {prompt.demonstrations for prompt in context.prompts}
    if len(questions) < 2 or len(shown) > 1 or not all(shown):
        return None
    return SharedPrefix.of(context.lens, questions.prompts)


class _Runner:
    """Runs the batches of one group of questions after the other."""

    def __init__(self, context: RankingContext, questions: Questions, edit: Edit) -> None:
        self._context = context
        self._prompts = questions.with_answers
        self._lengths = list(map(len, questions.answers))
        self._edit = edit
        self._layers = list(context.lens.sites)
        self._skipped = SkippedBlocks(context.lens)
        self._place: dict[int, int] = {}
        self._width = 0
        self._n_read = 1  # tokens of the longest answer of the group
        # By layer: whether to begin late, and the logits of the first row until it has been run.
        self._late = [True] * len(self._layers)
        self._expected: dict[int, Tensor] | None = None

    def groups(self, some: Sequence[int]) -> Iterator[list[int]]:
        """Questions of like length that may run together.

        They are as many groups as make no more batches than one does: its rows are padded to its
        longest question.
        """
        if not some:
            return
        for part in together(self._context.lens, self._prompts.chosen(some)):
            order = torch.tensor(by_length(self._prompts, [some[i] for i in part]))
            for group in order.tensor_split(self._n_groups(len(order))):
                yield group.tolist()

    def _n_groups(self, n: int) -> int:
        """Into how many groups to split `n` questions, of at most as many as a batch takes."""
        heads, size = max(self._context.n_heads), self._context.batch_size

        def n_batches(n_groups: int) -> int:
            sizes = [(n + i) // n_groups for i in range(n_groups)]
            return sum(-(-group * heads // size) for group in sizes)

        least = -(-n // size)
        enough = (k for k in range(n, least, -1) if n_batches(k) <= n_batches(least))
        return next(enough, least)

    def begin(self, group: Sequence[int]) -> Float[Tensor, "question token d_vocab"]:
        """Run the questions of a group as they are; from now on batches are made of them."""
        self._place = {question: i for i, question in enumerate(group)}
        self._width = max(self._prompts.lengths[question] for question in group)
        self._n_read = max(self._lengths[question] for question in group)
        with self._skipped.recorded(len(group)):
            logits = self._logits_in_full(group, self._laid_out(group))
        self._expect(group)
        return logits

    def _expect(self, group: Sequence[int]) -> None:
        """Run one row of each layer in full, once, to compare with."""
        if self._expected is None:
            rows = [(group[0], layer, 0) for layer in range(len(self._layers))]
            size = self._context.batch_size
            parts = [self._run(rows[i : i + size], None) for i in range(0, len(rows), size)]
            self._expected = dict(enumerate(torch.cat(parts)))

    def changed(self, rows: Sequence[Row], layer: int) -> Float[Tensor, "row token d_vocab"]:
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
        return same_logits(first, expected)

    def _positions(self, prompts: Prompts, questions: Sequence[int]) -> list[list[int]]:
        """Where each token of the answers is predicted; shorter ones repeat their last token."""
        first = [n - self._lengths[i] for n, i in zip(prompts.lengths, questions, strict=True)]
        return [
            [start + min(step, self._lengths[i] - 1) for step in range(self._n_read)]
            for start, i in zip(first, questions, strict=True)
        ]

    def _logits_in_full(
        self, questions: Sequence[int], prompts: Prompts, fwd_hooks: FwdHooks = ()
    ) -> Float[Tensor, "row token d_vocab"]:
        positions = self._positions(prompts, questions)
        return logits_at(self._context.lens, prompts, positions, fwd_hooks)

    def _run(self, rows: Sequence[Row], begin_at: int | None) -> Tensor:
        questions = [question for question, _, _ in rows]
        prompts = self._laid_out(questions)
        hooks = self._edit(rows, prompts, 0)
        if begin_at is None:
            skipping = nullcontext()
        else:
            examples = torch.tensor([self._place[question] for question in questions])
            skipping = self._skipped.reused(self._layers[begin_at], examples)
        with skipping:
            return self._logits_in_full(questions, prompts, hooks)

    def _laid_out(self, questions: Sequence[int]) -> Prompts:
        """Prompts as wide as the group, so that what is recorded fits them."""
        chosen = self._prompts.chosen(questions)
        return replace(chosen, width=max(chosen.width, self._width))


class _AfterPrefix(_Runner):
    """Runs questions from the keys and values that shared demonstrations leave."""

    def __init__(
        self,
        context: RankingContext,
        questions: Questions,
        edit: Edit,
        shared: SharedPrefix,
        *,
        changed: bool,
    ) -> None:
        super().__init__(context, questions, edit)
        self._shared = shared
        self._is_changed = changed  # whether the shared tokens are
        self._rests = shared.rest(self._prompts)  # those of other prompts are never read
        self._skipped_of_prefix = SkippedBlocks(context.lens)
        self._base: Prefix | None = None
        # The prefix with each head of one layer changed.
        self._changed: tuple[int, Prefix] | None = None

    def groups(self, some: Sequence[int] | None = None) -> Iterator[list[int]]:
        """Questions that begin with the shared tokens, shorter ones first."""
        order = by_length(self._rests, self._shared.members if some is None else some)
        n_batches = -(-len(order) // self._context.batch_size)
        yield from (group.tolist() for group in torch.tensor(order).tensor_split(n_batches))

    def begin(self, group: Sequence[int]) -> Float[Tensor, "question token d_vocab"]:
        """Run the shared tokens and the rests of a group as they are."""
        if self._base is None:
            with self._skipped_of_prefix.recorded(1):
                self._base = self._shared.read()
        self._place = {question: i for i, question in enumerate(group)}
        self._width = max(self._rests.lengths[question] for question in group)
        self._n_read = max(self._lengths[question] for question in group)
        with self._skipped.recorded(len(group)):
            logits = self._logits(self._base, [0] * len(group), group, self._rest(group), ())
        self._expect(group)
        return logits

    def as_in_full(
        self, group: Sequence[int], logits: Float[Tensor, "question token d_vocab"]
    ) -> bool:
        """Whether a group as it is comes out as in full: its shortest question and its longest."""

        def compare() -> bool:
            ends = [0, len(group) - 1]
            wanted = [
                self._logits_in_full([group[i]], self._prompts.chosen([group[i]])) for i in ends
            ]
            return same_logits(logits[ends], torch.cat(wanted))

        return self._shared.proven(self._rests.chosen(group), (), compare)

    def _run(self, rows: Sequence[Row], begin_at: int | None) -> Tensor:
        questions = [question for question, _, _ in rows]
        if begin_at is None:
            prompts = self._prompts.chosen(questions)
            return self._logits_in_full(questions, prompts, self._edit(rows, prompts, 0))
        layer = self._layers[begin_at]
        rest = self._rest(questions)
        prefix, of_head = self._prefix(begin_at)
        examples = torch.tensor([self._place[question] for question in questions])
        with self._skipped.reused(layer, examples):
            which = [of_head[head] for _, _, head in rows]
            hooks = self._edit(rows, rest, len(self._shared.ids))
            return self._logits(prefix, which, questions, rest, hooks)

    def _prefix(self, begin_at: int) -> tuple[Prefix, Sequence[int]]:
        """The shared tokens with heads of a layer changed, and the row of each head."""
        n_heads = self._context.n_heads[begin_at]
        if self._base is None or not self._is_changed:
            return cast("Prefix", self._base), [0] * n_heads
        if self._changed is None or self._changed[0] != begin_at:
            question = self._shared.members[0]
            rows = [(question, begin_at, head) for head in range(n_heads)]
            tokens = self._shared.tokens(self._prompts, n_heads)
            first = torch.zeros(n_heads, dtype=torch.long)
            with self._skipped_of_prefix.reused(self._layers[begin_at], first):
                hooks = self._edit(rows, tokens, 0)
                prefix = self._shared.read(n_heads, hooks, base=self._base)
            self._changed = begin_at, prefix
        return self._changed[1], range(n_heads)

    def _rest(self, questions: Sequence[int]) -> Prompts:
        """Rests as wide as the group, so that what is recorded fits them."""
        return replace(self._rests.chosen(questions), width=self._width)

    def _logits(
        self,
        prefix: Prefix,
        rows: Sequence[int],
        questions: Sequence[int],
        rest: Prompts,
        fwd_hooks: FwdHooks,
    ) -> Float[Tensor, "row token d_vocab"]:
        positions = self._positions(rest, questions)
        return self._shared.logits_at(prefix, rows, rest, positions, fwd_hooks)


def kept(context: RankingContext, rows: Sequence[Row]) -> Bool[Tensor, "row layer head"]:
    """Mark the heads that are not changed, in each row."""
    keep = torch.ones(len(rows), *context.shape, dtype=torch.bool)
    for row, (_, layer, head) in enumerate(rows):
        keep[row, layer, head] = False
    return keep


def check_changing(context: RankingContext) -> None:
    """Refuse a model whose heads cannot be changed one by one."""
    context.lens.refuse_dropout()
    need_heads(context.lens)


def check_zeroing(context: RankingContext, *, stacklevel: int) -> None:
    """Refuse a model whose heads cannot be changed, and warn of one where zero is not nothing.

    The warning is of the line so many calls above.
    """
    check_changing(context)
    if context.lens.value_biases_folded:
        warnings.warn(
            f"the value biases of {context.lens.name} are folded into its output biases, so a head "
            "set to zero still writes its value bias, unlike one whose rows of W_O are zero. Load "
            "the model without folding, as ra_lens.load_model does, to rank as in the paper.",
            RALensWarning,
            stacklevel=stacklevel + 1,
        )
