"""What is differentiated: one loss per example, from logits.

Sign: every objective here is a *loss*, something that descent lowers. Reversed Attention is its
gradient, so a negative entry is attention that would make the target more likely:

* `answer_nll(token)`: −log p(token) at one position.
* `sequence_nll(answer)`: the answer is appended to the prompt (teacher forcing); the loss is the
  mean of −log p over its tokens. This is the loss of the paper's experiments.
* `logit_diff(correct, wrong)`: logit(wrong) − logit(correct), *minus* the usual logit difference.
* `top_prediction()`: −log p of whatever the model itself ranks first.
* `custom(metric)`: any function of the logits, differentiated as it is.

An objective is made without a model. `run_with_ra` binds it to a model and prompts, which is where
text becomes tokens and mistakes become errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.inputs import answers_given
from ra_lens.numbers import Wholes, as_whole

Token = str | SupportsIndex
Answers = Token | Iterable[Any]
Metric = Callable[[Tensor], Tensor]
Position = Wholes


@dataclass(frozen=True)
class Objective:
    """A loss that is not yet bound to a model; make one with the functions of this module.

    Objectives whose tokens are ids are also plain functions of logits, reading the last position,
    for people who run their own backward pass: `answer_nll(5)(logits)`.
    """

    kind: Literal["answer_nll", "sequence_nll", "logit_diff", "top_prediction", "custom"]
    tokens: Answers | None = None
    wrong: Answers | None = None
    metric: Metric | None = None

    def __call__(
        self, logits: Float[Tensor, "batch pos d_vocab"]
    ) -> Float[Tensor, "batch"] | Float[Tensor, ""]:
        """Loss of each example, read at the last position of `logits`.

        Raises:
            BadInput: the tokens are text, which only a run with a model can turn into ids.
        """
        if self.metric is not None:
            return self.metric(logits)
        last = logits[:, -1:]
        n = logits.shape[0]
        if self.kind == "top_prediction":
            return Bound(self.kind, positions=None).loss(last)
        if self.kind == "sequence_nll":
            raise BadInput(
                "found sequence_nll called on logits; it reads several positions, which it knows "
                "only in a run. Pass it as run_with_ra(..., target=sequence_nll(answer))."
            )
        ids = _ids_without_model(self.tokens, n)
        wrong = None if self.wrong is None else _ids_without_model(self.wrong, n)
        return Bound(self.kind, None, [[i] for i in ids], wrong).loss(last)


def answer_nll(token: Answers) -> Objective:
    """−log p(token) at the position read (the last real token unless a position is given).

    Args:
        token: A string that is one token, an id, or one of either per example; ids also as
            `model.to_tokens(text, prepend_bos=False)` or the tokenizer gives them.
    """
    return Objective("answer_nll", answers_given("target", token))


def sequence_nll(answer: Answers) -> Objective:
    """Mean of −log p over the answer's tokens, with the answer appended to the prompt.

    The maps then cover prompt and answer, (n+k)×(n+k); the row of the answer's last token is zero,
    as no loss is read there. Protocol of the paper's experiments.

    Args:
        answer: The answer as text, one per example, or its token ids per example.
    """
    return Objective("sequence_nll", answers_given("target", answer))


def logit_diff(correct: Answers, wrong: Answers) -> Objective:
    """logit(wrong) − logit(correct): descent raises the correct answer over the wrong one.

    Args:
        correct: One-token string, id, or one of either per example.
        wrong: Likewise.
    """
    right = answers_given("correct answer", correct)
    return Objective("logit_diff", right, answers_given("wrong answer", wrong))


def top_prediction() -> Objective:
    """−log p of the token that the model ranks first at the position read."""
    return Objective("top_prediction")


def custom(metric: Metric) -> Objective:
    """Any function of the logits (`[batch, pos, d_vocab]` to `[batch]` or a scalar), as it is."""
    return Objective("custom", metric=metric)


@dataclass
class Bound:
    """An objective bound to prompts: where it reads and what it expects there.

    Attributes:
        kind: The objective's kind.
        positions: Positions read, within each example; None for all of a batch's columns.
        targets: Expected ids per example: one for each of the last positions read.
        wrong: The id that a logit difference compares with.
        metric: The function of a custom objective.
    """

    kind: str
    positions: list[list[int]] | None
    targets: list[list[int]] | None = None
    wrong: list[int] | None = None
    metric: Metric | None = None

    @property
    def answer_lengths(self) -> tuple[int, ...] | None:
        """Number of tokens appended to each example; None where no answer is appended."""
        appended = self.kind == "sequence_nll" and self.targets is not None
        return tuple(map(len, self.targets or ())) if appended else None

    def part(self, examples: slice | Sequence[int]) -> Bound:
        """The same objective for some of the examples."""

        def cut(values: list[Any] | None) -> list[Any] | None:
            if values is None:
                return None
            chosen = range(len(values))[examples] if isinstance(examples, slice) else examples
            return [values[i] for i in chosen]

        return Bound(
            self.kind, cut(self.positions), cut(self.targets), cut(self.wrong), self.metric
        )

    def loss(self, logits: Tensor) -> Tensor:
        """Loss per example from the logits at the positions read (`[batch, read, d_vocab]`)."""
        if self.metric is not None:
            return self.metric(logits)
        # In float32 whatever the model's dtype; float64 stays.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.targets is None:  # the model's own top prediction
            self.targets = [[int(i)] for i in logits[:, -1].argmax(dim=-1)]
        device = logits.device
        if self.wrong is not None:
            right = torch.tensor([row[-1] for row in self.targets], device=device)
            wrong = torch.tensor(self.wrong, device=device)
            last = logits[:, -1]
            return (_pick(last, wrong) - _pick(last, right)).squeeze(-1)
        width = max(map(len, self.targets))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in self.targets], device=device)
        counts = torch.tensor([len(row) for row in self.targets], device=device)
        log_probs = logits[:, -width:].log_softmax(dim=-1)
        nll = -log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        # Shorter answers are aligned to the right; what lies left of them is not theirs.
        theirs = torch.arange(width, device=device) >= (width - counts).unsqueeze(1)
        return nll.where(theirs, 0.0).sum(dim=1) / counts


def as_objective(
    target: Answers | Objective | None,
    metric: Metric | Objective | None,
) -> Objective:
    """Read the `target=` and `metric=` of a run.

    Raises:
        BadInput: both are given, or metric is not callable.
    """
    if target is not None and metric is not None:
        raise BadInput("found both target and metric. Give one: each says what is differentiated.")
    if isinstance(target, Objective):
        return target
    if isinstance(metric, Objective):
        return metric
    if metric is not None:
        if not callable(metric):
            raise BadInput(
                f"metric is a {type(metric).__name__}; it must be a function of the logits, such "
                "as lambda logits: logits[:, -1, 5] or ra_lens.targets.logit_diff(' a', ' b')."
            )
        return custom(metric)
    return top_prediction() if target is None else answer_nll(target)


def one_each(answers: object, n: int) -> list[object]:
    """List `n` answers: one for all repeated, or one per example as given."""
    return list(cast("list[object]", answers)) if isinstance(answers, list) else [answers] * n


def _ids_without_model(tokens: object, n: int) -> list[int]:
    # A row of one id, as model.to_tokens(text, prepend_bos=False) gives it, is that id.
    rows = [t if isinstance(t, list) else [t] for t in one_each(tokens, n)]
    given = [token for row in rows for token in cast("list[object]", row)]
    ids = [t for t in map(as_whole, given) if t is not None]
    if not len(ids) == len(given) == len(rows) == n:
        raise BadInput(
            f"found tokens {tokens!r} for logits of {n} examples; outside a run an objective "
            "needs token ids, one or one per example: answer_nll(model.to_single_token(' Paris'))."
        )
    return ids


def _pick(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids.unsqueeze(-1))
