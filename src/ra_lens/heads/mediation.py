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

Each head is changed in one row of a batch for each question. The rows of a batch all change heads
of one layer, so that the forward pass can begin at the block of that layer
(`ra_lens.model.blocks`). Every call checks this with its own prompts and hooks: it also runs one
row of each layer in full, and where the logits of that row come out otherwise, it runs all rows of
the layer in full.

Cost for n questions and L layers of H heads: n + L forward passes of one row (n more for CM2), and
n·L·H that begin at the block of their layer; where the layers are alike these are half as long on
average.

Questions after the same demonstrations: these run once for each head, from the block of its layer
on, and the questions go on from the keys and values that they leave (`ra_lens.shared_prefix`). A
change of the last token leaves the demonstrations as they are. The proof is the same.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.errors import RALensWarning
from ra_lens.heads.ranking import RankingContext, ranking_method
from ra_lens.model import FwdHooks
from ra_lens.model.blocks import SkippedBlocks
from ra_lens.model.forward import at_columns
from ra_lens.model.prefix import Prefix
from ra_lens.numbers import Whole, whole
from ra_lens.padding import batches, together, watched
from ra_lens.patching.masking import by_head, mask_hooks, need_heads
from ra_lens.prompts import Prompts
from ra_lens.questions import Questions, by_length, last_logits, mark
from ra_lens.shared_prefix import SharedPrefix, same_logits
from ra_lens.tasks import Pair, Prompt

Row = tuple[int, int, int]
"""Which question, and which layer and head of it is changed, as indices of the scores."""

Edit = Callable[[Sequence[Row], Prompts], FwdHooks]
"""Gives the hooks that change the heads of a batch, one in each row."""


def ask_each_head(
    context: RankingContext, questions: Questions, edit: Edit, *, at: Literal["all", "last"]
) -> tuple[Float[Tensor, "question"], Float[Tensor, "question layer head"]]:
    """Give the probability of each answer, in float64: as the model is, and for each head changed.

    It is NaN at heads that do not exist. `edit` may change nothing before the block of the head;
    it changes the head at all tokens or at the last one.
    """
    from tqdm.auto import tqdm

    n_rows = len(questions) * sum(context.n_heads)
    before = torch.zeros(len(questions), dtype=torch.float64)
    after = torch.full((len(questions), *context.shape), float("nan"), dtype=torch.float64)
    first_tokens = questions.first_tokens
    shown = context.progress and n_rows > context.batch_size
    with tqdm(
        total=n_rows, desc="Causal mediation", unit="row", disable=not shown, leave=False
    ) as bar:
        for runner, group, unchanged in _begun(context, questions, edit, at):
            before[group] = mark(unchanged, first_tokens[group]).probability
            for layer, n_heads in enumerate(context.n_heads):
                rows = [(question, layer, head) for question in group for head in range(n_heads)]
                for start in range(0, len(rows), context.batch_size):
                    part = rows[start : start + context.batch_size]
                    which, _, heads = (list(column) for column in zip(*part, strict=True))
                    marks = mark(runner.changed(part, layer), first_tokens[which])
                    after[which, layer, heads] = marks.probability
                    bar.update(len(part))
    return before, after


def _begun(
    context: RankingContext, questions: Questions, edit: Edit, at: Literal["all", "last"]
) -> Iterator[tuple[_Runner, list[int], Float[Tensor, "question d_vocab"]]]:
    """Give groups of questions with what runs them, and their logits as the model is."""
    in_full, rest = _Runner(context, questions, edit), list(range(len(questions)))
    shared = _shared_demonstrations(context, questions)
    if shared is not None:
        runner = _AfterPrefix(context, questions, edit, shared, at)
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
        self._prompts = questions.prompts
        self._edit = edit
        self._layers = list(context.lens.sites)
        self._skipped = SkippedBlocks(context.lens)
        self._place: dict[int, int] = {}
        self._width = 0
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

    def begin(self, group: Sequence[int]) -> Float[Tensor, "question d_vocab"]:
        """Run the questions of a group as they are; from now on batches are made of them."""
        self._place = {question: i for i, question in enumerate(group)}
        self._width = max(self._prompts.lengths[question] for question in group)
        with self._skipped.recorded(len(group)):
            logits = last_logits(self._context.lens, self._laid_out(group))
        self._expect(group)
        return logits

    def _expect(self, group: Sequence[int]) -> None:
        """Run one row of each layer in full, once, to compare with."""
        if self._expected is None:
            rows = [(group[0], layer, 0) for layer in range(len(self._layers))]
            size = self._context.batch_size
            parts = [self._run(rows[i : i + size], None) for i in range(0, len(rows), size)]
            self._expected = dict(enumerate(torch.cat(parts)))

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
        return same_logits(first, expected)

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


class _AfterPrefix(_Runner):
    """Runs questions from the keys and values that shared demonstrations leave."""

    def __init__(
        self,
        context: RankingContext,
        questions: Questions,
        edit: Edit,
        shared: SharedPrefix,
        at: Literal["all", "last"],
    ) -> None:
        super().__init__(context, questions, edit)
        self._shared = shared
        self._at = at
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

    def begin(self, group: Sequence[int]) -> Float[Tensor, "question d_vocab"]:
        """Run the shared tokens and the rests of a group as they are."""
        if self._base is None:
            with self._skipped_of_prefix.recorded(1):
                self._base = self._shared.read()
        self._place = {question: i for i, question in enumerate(group)}
        self._width = max(self._rests.lengths[question] for question in group)
        with self._skipped.recorded(len(group)):
            logits = self._logits(self._base, [0] * len(group), self._rest(group), ())
        self._expect(group)
        return logits

    def as_in_full(self, group: Sequence[int], logits: Float[Tensor, "question d_vocab"]) -> bool:
        """Whether a group as it is comes out as in full: its shortest question and its longest."""

        def compare() -> bool:
            ends = [0, len(group) - 1]
            wanted = [
                last_logits(self._context.lens, self._prompts.chosen([group[i]])) for i in ends
            ]
            return same_logits(logits[ends], torch.cat(wanted))

        return self._shared.proven(self._rests.chosen(group), (), compare)

    def _run(self, rows: Sequence[Row], begin_at: int | None) -> Tensor:
        if begin_at is None:
            return last_logits(self._context.lens, *self._in_full(rows))
        layer = self._layers[begin_at]
        rest = self._rest([question for question, _, _ in rows])
        prefix, of_head = self._prefix(begin_at)
        examples = torch.tensor([self._place[question] for question, _, _ in rows])
        with self._skipped.reused(layer, examples):
            which = [of_head[head] for _, _, head in rows]
            return self._logits(prefix, which, rest, self._edit(rows, rest))

    def _in_full(self, rows: Sequence[Row]) -> tuple[Prompts, FwdHooks]:
        prompts = self._prompts.chosen([question for question, _, _ in rows])
        return prompts, self._edit(rows, prompts)

    def _prefix(self, begin_at: int) -> tuple[Prefix, Sequence[int]]:
        """The shared tokens with heads of a layer changed, and the row of each head."""
        n_heads = self._context.n_heads[begin_at]
        if self._base is None or self._at == "last":
            return cast("Prefix", self._base), [0] * n_heads
        if self._changed is None or self._changed[0] != begin_at:
            question = self._shared.members[0]
            rows = [(question, begin_at, head) for head in range(n_heads)]
            tokens = self._shared.tokens(self._prompts, n_heads)
            first = torch.zeros(n_heads, dtype=torch.long)
            with self._skipped_of_prefix.reused(self._layers[begin_at], first):
                prefix = self._shared.read(n_heads, self._edit(rows, tokens), base=self._base)
            self._changed = begin_at, prefix
        return self._changed[1], range(n_heads)

    def _rest(self, questions: Sequence[int]) -> Prompts:
        """Rests as wide as the group, so that what is recorded fits them."""
        return replace(self._rests.chosen(questions), width=self._width)

    def _logits(
        self, prefix: Prefix, rows: Sequence[int], rest: Prompts, fwd_hooks: FwdHooks
    ) -> Float[Tensor, "row d_vocab"]:
        last = [[n - 1] for n in rest.lengths]
        return self._shared.logits_at(prefix, rows, rest, last, fwd_hooks)[:, 0]


@ranking_method("cm1", label="CM1", title="causal mediation, head zeroed")
def cm1_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """What the answer's probability loses when a head is zero at every position."""

    def edit(rows: Sequence[Row], _prompts: Prompts) -> FwdHooks:
        keep = torch.ones(len(rows), *context.shape, dtype=torch.bool)
        for row, (_, layer, head) in enumerate(rows):
            keep[row, layer, head] = False
        return mask_hooks(context.lens.sites, keep)

    return _lost(context, edit, "all")


@ranking_method("cm1_last", label="CM1 last", title="causal mediation, last token zeroed")
def cm1_last_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """What the answer's probability loses when a head is zero at the last token of the prompt."""

    def edit(rows: Sequence[Row], prompts: Prompts) -> FwdHooks:
        return _set_last(context, rows, prompts, None)

    return _lost(context, edit, "last")


@ranking_method(
    "cm2",
    label="CM2",
    title="causal mediation, mean put into shuffled labels",
    split="valid",
)
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

    before, after = ask_each_head(context, questions, edit, at="last")
    return (after - before[:, None, None]).mean(dim=0)


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


def _lost(context: RankingContext, edit: Edit, at: Literal["all", "last"]) -> Tensor:
    _check(context)
    if context.lens.value_biases_folded:
        warnings.warn(
            f"the value biases of {context.lens.name} are folded into its output biases, so a head "
            "set to zero still writes its value bias, unlike one whose rows of W_O are zero. Load "
            "the model without folding, as ra_lens.load_model does, to rank as in the paper.",
            RALensWarning,
            stacklevel=4,
        )
    before, after = ask_each_head(context, context.questions, edit, at=at)
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
