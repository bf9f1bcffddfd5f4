"""Asking a model questions and marking its answers, as the paper's experiments do.

By the first token (the paper's experiments): a question is read at its last position only, and its
answer is the first token that the answer would add to it: the rank of that token among all, its
probability, and its logit against the best other one. Accuracy top-k is the share of questions
whose answer is among the first k.

By the whole answer: it is appended to the question, and each of its tokens is marked where it is
predicted. Top-1 is then greedy exact match: a greedy decode gives the answer if and only if every
token of it comes first after the right ones before it, so that one forward pass tells. Top-k: every
token is among the first k. The probability is that of the whole, the logit difference the smallest
of its tokens, positive where a greedy decode is right.

Cost: one forward pass without gradients, unembedding one position per question or token of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ra_lens.errors import RALensWarning, UnsupportedModel
from ra_lens.fitting import rows_of_forward
from ra_lens.model import FwdHooks, Lens, PrependBos
from ra_lens.padding import together, watched
from ra_lens.prompts import Prompts, read_prompts
from ra_lens.shared_prefix import SharedPrefix, same_logits
from ra_lens.targets import ids_of
from ra_lens.tasks import Prompt

Accuracy = Literal["first token", "answer"]


@dataclass(frozen=True)
class Questions:
    """Prompts as token ids, each with the ids of its right answer.

    Attributes:
        prompts: What the model reads.
        answers: Ids of the whole answer, one list per question.
        wrong: First id of each wrong answer, that of the corrupted twin; None unless every prompt
            has a twin.
    """

    prompts: Prompts
    answers: tuple[tuple[int, ...], ...]
    wrong: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Give the number of questions."""
        return len(self.answers)

    @property
    def first_tokens(self) -> Int[Tensor, "question"]:
        """First token of each answer."""
        return torch.tensor([answer[0] for answer in self.answers])

    @property
    def with_answers(self) -> Prompts:
        """The prompts with their answers appended, but for the last token, which predicts none."""
        return self.prompts.extended([answer[:-1] for answer in self.answers])

    def repeated(self, times: int) -> Questions:
        """The same questions several times over."""
        prompts = replace(self.prompts, ids=self.prompts.ids * times, texts=None)
        wrong = None if self.wrong is None else self.wrong * times
        return Questions(prompts, self.answers * times, wrong)


def read_questions(
    lens: Lens, prompts: Sequence[Prompt], *, prepend_bos: PrependBos = None
) -> Questions:
    """Tokenise the prompts of a task, and their answers as they go on from them.

    Warns of words in the prompts that the model does not know.
    """
    _need_next_token(lens)
    read = read_prompts(lens, [prompt.text for prompt in prompts], prepend_bos=prepend_bos)
    _warn_of_unknown_words(lens, prompts, read)
    answers = [
        ids_of(lens, read, i, prompt.answer, f"an answer of {_name(prompt, i)}")
        for i, prompt in enumerate(prompts)
    ]
    twins = [prompt.corrupted for prompt in prompts if prompt.corrupted is not None]
    wrong = None
    if twins and len(twins) == len(prompts):
        wrong = tuple(
            ids_of(lens, read, i, twin.answer, f"the wrong answer of {_name(prompts[i], i)}")[0]
            for i, twin in enumerate(twins)
        )
    return Questions(read, tuple(map(tuple, answers)), wrong)


def _need_next_token(lens: Lens) -> None:
    if lens.reads == "both ways":
        raise UnsupportedModel(
            f"{lens.name} reads in both directions and predicts masked tokens: what comes out at "
            "the last token of a prompt is no answer. Ask a model that reads left to right."
        )


def _name(prompt: Prompt, i: int) -> str:
    return f"prompt {i}" if prompt.task is None else f"task {prompt.task.name!r}"


def _warn_of_unknown_words(lens: Lens, prompts: Sequence[Prompt], read: Prompts) -> None:
    texts: dict[str, str] = {}
    for i, (prompt, ids) in enumerate(zip(prompts, read.ids, strict=True)):
        name = _name(prompt, i)
        if lens.unknown_token_id in ids[bool(read.prepended) :] and name not in texts:
            # All words of a task, so that whichever of its prompts are read, it is one warning.
            pairs = () if prompt.task is None else prompt.task.pairs
            texts[name] = "\n".join([*(f"{p.input} {p.output}" for p in pairs), prompt.text])
    for name, text in texts.items():
        warnings.warn(
            f"{name}: {lens.name} does not know {lens.describe_unknown(text)}.",
            RALensWarning,
            stacklevel=3,
        )


@dataclass(frozen=True, eq=False)
class Marks:
    """How a model answered: one value per question.

    Attributes:
        above: How many tokens have a larger logit than the right one; from `ask`, for each token
            that it marks of the answer (0 beyond its end).
        tied: How many others have the same logit: many in bfloat16, or where nothing is left.
        logit_diff: Logit of the right answer minus that of the best other token.
        probability: Of the right answer, in float64.
        answer_diff: Logit of the first token of the right answer minus that of the wrong one, the
            corrupted twin's; None where there is none.
    """

    above: Int[Tensor, "question *token"]
    tied: Int[Tensor, "question *token"]
    logit_diff: Float[Tensor, "question"]
    probability: Float[Tensor, "question"]
    answer_diff: Float[Tensor, "question"] | None = None

    def __len__(self) -> int:
        """Give the number of questions."""
        return len(self.logit_diff)

    def part(self, questions: slice | Tensor) -> Marks:
        """The marks of some of the questions."""
        *of_answers, against = self._columns
        cut = None if against is None else against[questions]
        return Marks(*(values[questions] for values in of_answers), answer_diff=cut)

    @staticmethod
    def joined(parts: Sequence[Marks]) -> Marks:
        """The marks of several batches that `ask` ran, whose longest answers may differ."""
        width = max(part.above.shape[1] for part in parts)

        def joined(column: Sequence[Tensor | None]) -> Any:
            some = [values for values in column if values is not None]
            missing = [width - values.shape[1] if values.ndim > 1 else 0 for values in some]
            wide = [torch.nn.functional.pad(v, (0, n)) for v, n in zip(some, missing, strict=True)]
            return torch.cat(wide) if wide else None

        return Marks(*map(joined, zip(*(part._columns for part in parts), strict=True)))

    @property
    def _columns(self) -> tuple[Any, ...]:
        return self.above, self.tied, self.logit_diff, self.probability, self.answer_diff

    def accuracy(self, k: int = 1) -> float:
        """Share of the questions whose answer is among the top `k`, with each of its tokens.

        Where it ties with others, it counts by the chance of being there if ties are broken at
        random, so that coarse logits bias nothing.
        """
        chance = ((k - self.above).double() / (1 + self.tied)).clamp(0, 1)
        return float((chance if chance.ndim == 1 else chance.prod(dim=1)).mean())


@torch.no_grad()
def last_logits(
    lens: Lens, prompts: Prompts, fwd_hooks: FwdHooks = ()
) -> Float[Tensor, "question d_vocab"]:
    """Run the model once on all prompts and give the logits at the last position of each."""
    return logits_at(lens, prompts, [[n - 1] for n in prompts.lengths], fwd_hooks)[:, 0]


@torch.no_grad()
def logits_at(
    lens: Lens, prompts: Prompts, positions: Sequence[Sequence[int]], fwd_hooks: FwdHooks = ()
) -> Float[Tensor, "question read d_vocab"]:
    """Run the model once on all prompts and give the logits at as many positions of each.

    All run in one batch; `ra_lens.padding` says which may. NaN, which ranks nothing, is refused.
    """
    _need_next_token(lens)
    batch = prompts.lay_out(lens)
    columns = batch.columns(positions)
    with watched(lens, batch):
        logits = lens.logits_at(*batch.model_input, columns, fwd_hooks)
    lens.refuse_nan(logits)
    return logits


def mark(logits: Float[Tensor, "question d_vocab"], answers: Int[Tensor, "question"]) -> Marks:
    """Mark tokens, each by its id, against the logits at the position that predicts it."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    ids = answers.to(wide.device).unsqueeze(1)
    right = wide.gather(1, ids)
    others = wide.scatter(1, ids, float("-inf"))
    exact = wide.cpu() if wide.device.type == "mps" else wide  # which has no float64
    return Marks(
        above=(others > right).sum(dim=1).cpu(),
        tied=(others == right).sum(dim=1).cpu(),
        logit_diff=(right.squeeze(1) - others.amax(dim=1)).cpu(),
        probability=exact.double().softmax(dim=1).gather(1, ids.to(exact.device)).squeeze(1).cpu(),
    )


def ask(
    lens: Lens,
    questions: Questions,
    hooks_of: HooksOf | None = None,
    *,
    accuracy: Accuracy = "first token",
    batch_size: int | Literal["auto"] = 32,
    variants: Sequence[int] | None = None,
) -> Marks:
    """Ask every question and mark the first token of each answer, or the whole.

    Questions of like length are asked together, so that little is padded. `hooks_of` gives the
    hooks of a batch, told which questions are in it.

    With `variants` the tokens that questions begin with run once for each variant: it tells, for
    each question, which of several changed models is asked. The hooks of all questions of a variant
    are then the same, and in a batch each row has those of its question. Where the logits come out
    otherwise than in full, or it cannot be done, all questions run in full.

    A batch has `batch_size` rows, or `"auto"`: as many as fit.
    """
    whole = accuracy == "answer"
    prompts = questions.with_answers if whole else questions.prompts
    answers = [answer if whole else answer[:1] for answer in questions.answers]
    if batch_size == "auto":
        kept = 0 if variants is None else 2  # keys and values of the shared tokens
        batch_size = rows_of_forward(lens, prompts, n_read=max(map(len, answers)), kept=kept)
    asked = _Asked(
        lens,
        prompts,
        answers,
        hooks_of or (lambda _part: ()),
        batch_size,
        questions.wrong,
    )
    shared = None if variants is None else SharedPrefix.of(lens, questions.prompts)
    found = None if shared is None else asked.after(shared, variants or ())
    done = set(shared.members) if shared is not None and found is not None else set[int]()
    found = [*(found or ()), *asked.in_full([i for i in range(len(questions)) if i not in done])]
    order = torch.tensor([i for part, _ in found for i in part]).argsort()  # as they were given
    return Marks.joined([marks for _, marks in found]).part(order)


HooksOf = Callable[[list[int]], FwdHooks]
Part = tuple[list[int], Marks]
"""Which questions were asked in a batch, and how they were answered."""


@dataclass(frozen=True)
class _Asked:
    """What is asked; `prompts` hold the answers but for their last token."""

    lens: Lens
    prompts: Prompts
    answers: Sequence[tuple[int, ...]]
    hooks_of: HooksOf
    batch_size: int
    wrong: Sequence[int] | None = None

    def in_full(self, which: Sequence[int]) -> list[Part]:
        """Ask questions, of which all tokens run."""
        if not which:
            return []
        groups = together(self.lens, self.prompts.chosen(which))
        return [
            (part, self._marked(part, self._logits(part)))
            for group in groups
            for part in self._batches(self.prompts, [which[i] for i in group])
        ]

    def after(self, shared: SharedPrefix, variants: Sequence[int]) -> list[Part] | None:
        """Ask the questions that begin with shared tokens, which run once for each variant.

        None where that cannot be done, or comes out otherwise than in full.
        """
        rest, found, n = shared.rest(self.prompts), list[Part](), len(shared.ids)
        by_variant: dict[int, list[int]] = {}
        for i in shared.members:
            by_variant.setdefault(variants[i], []).append(i)
        names = list(by_variant)
        try:
            for start in range(0, len(names), self.batch_size):
                row = {name: k for k, name in enumerate(names[start : start + self.batch_size])}
                prefix = shared.read(len(row), self.hooks_of([by_variant[name][0] for name in row]))
                for part in self._batches(rest, [i for name in row for i in by_variant[name]]):
                    rows = [row[variants[i]] for i in part]
                    positions = [[at - n for at in of_one] for of_one in self._positions(part)]
                    hooks = self.hooks_of(part)
                    logits = shared.logits_at(prefix, rows, rest.chosen(part), positions, hooks)
                    compare = partial(self._as_in_full, part, logits)
                    if not shared.proven(rest.chosen(part), hooks, compare):
                        return None
                    found.append((part, self._marked(part, logits)))
        except Exception:
            # If it was not the prefix that failed, it is raised again in full.
            return None
        return found

    def _as_in_full(self, part: Sequence[int], logits: Tensor) -> bool:
        """Whether the shortest and the longest question of a batch come out as in full."""
        return all(
            same_logits(
                logits[row : row + 1, : self._width([part[row]])], self._logits([part[row]])
            )
            for row in sorted({0, len(part) - 1})
        )

    def _batches(self, prompts: Prompts, some: Sequence[int]) -> Iterator[list[int]]:
        """Split questions into batches of like length.

        They are as few as can be, of like size: a small last one would pad the others for nothing.
        """
        order = torch.tensor(by_length(prompts, some))
        for batch in order.tensor_split(-(-len(order) // self.batch_size)):
            yield batch.tolist()

    def _logits(self, part: Sequence[int]) -> Float[Tensor, "question token d_vocab"]:
        hooks = self.hooks_of(list(part))
        return logits_at(self.lens, self.prompts.chosen(part), self._positions(part), hooks)

    def _width(self, part: Sequence[int]) -> int:
        return max(len(self.answers[i]) for i in part)

    def _steps(self, part: Sequence[int]) -> list[list[int]]:
        # Shorter answers repeat their last token, whose marks are then left out.
        lengths, width = [len(self.answers[i]) for i in part], self._width(part)
        return [[min(step, n - 1) for step in range(width)] for n in lengths]

    def _positions(self, part: Sequence[int]) -> list[list[int]]:
        """Where each token of the answers is predicted."""
        first = [self.prompts.lengths[i] - len(self.answers[i]) for i in part]
        steps = self._steps(part)
        return [[n + step for step in row] for n, row in zip(first, steps, strict=True)]

    def _marked(
        self, part: Sequence[int], logits: Float[Tensor, "question token d_vocab"]
    ) -> Marks:
        """Mark each token of the answers by the logits where it is predicted."""
        answers, width = [self.answers[i] for i in part], self._width(part)
        ids = [
            [answer[step] for step in row]
            for answer, row in zip(answers, self._steps(part), strict=True)
        ]
        marks = mark(logits.flatten(0, 1), torch.tensor(ids).flatten())
        theirs = torch.arange(width) < torch.tensor([len(own) for own in answers]).unsqueeze(1)

        def by_token(values: Tensor, beyond: int | float) -> Tensor:
            return values.reshape(theirs.shape).where(theirs, torch.tensor(beyond).to(values))

        return Marks(
            above=by_token(marks.above, 0),
            tied=by_token(marks.tied, 0),
            logit_diff=by_token(marks.logit_diff, float("inf")).amin(dim=1),
            probability=by_token(marks.probability, 1).prod(dim=1),
            answer_diff=self._answer_diff(part, logits[:, 0]),
        )

    def _answer_diff(
        self, part: Sequence[int], logits: Float[Tensor, "question d_vocab"]
    ) -> Tensor | None:
        """Logit of the right answer minus that of the wrong one, where their first token is."""
        if self.wrong is None:
            return None
        pairs = torch.tensor([[self.answers[i][0], self.wrong[i]] for i in part])
        wide = logits if logits.dtype == torch.float64 else logits.float()
        right, wrong = wide.gather(1, pairs.to(wide.device)).unbind(dim=1)
        return (right - wrong).cpu()


def by_length(prompts: Prompts, some: Iterable[int] | None = None) -> list[int]:
    """Give the indices of all prompts or of some, shorter prompts first."""
    return sorted(range(len(prompts)) if some is None else some, key=prompts.lengths.__getitem__)


def marked(marks: Marks) -> dict[str, Any]:
    """Accuracy and logit difference of some answers, mean of all, as columns of a table."""
    against = marks.answer_diff
    diff = {} if against is None else {"answer_diff": float(against.double().mean())}
    return {
        "top1": marks.accuracy(1),
        "top2": marks.accuracy(2),
        "top3": marks.accuracy(3),
        "logit_diff": float(marks.logit_diff.double().mean()),
        **diff,
    }


Metric = Literal["top1", "top2", "top3", "logit_diff", "answer_diff"]

METRICS: dict[str, str] = {
    "top1": "accuracy (answer ranked first)",
    "top2": "accuracy (answer among the first 2)",
    "top3": "accuracy (answer among the first 3)",
    "logit_diff": "logit of the answer − best other logit",
    "answer_diff": "logit of the answer − logit of the wrong answer",
}
