"""What is differentiated: one loss per example, from logits.

Sign: every objective here is a *loss*, something that descent lowers. Reversed Attention is its
gradient, so a negative entry is attention that would make the target more likely:

* `answer_nll(token)`: −log p(token) at one position.
* `sequence_nll(answer)`: the answer is appended to the prompt (teacher forcing); the loss is the
  mean of −log p over its tokens. This is the loss of the paper's experiments.
* `logit_diff(correct, wrong)`: logit(wrong) − logit(correct), *minus* the usual logit difference.
* `probability_diff(right, wrong)`: p(wrong tokens) − p(right tokens), where several are right.
* `top_prediction()`: −log p of whatever the model itself ranks first.
* `custom(metric)`: any function of the logits, differentiated as it is.

An objective is made without a model. `run_with_ra` binds it to a model and prompts, which is where
text becomes tokens, answers are appended and mistakes become errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Literal, SupportsIndex, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.inputs import answers_given
from ra_lens.model import Lens
from ra_lens.numbers import Wholes, as_whole, wholes
from ra_lens.prompts import Prompts, special_id
from ra_lens.tensors import sent
from ra_lens.text import isolated, whole_text

Token = str | SupportsIndex
Answers = Token | Iterable[Any]
Metric = Callable[[Tensor], Tensor]
TokenSets = tuple[tuple[int, ...], tuple[int, ...]]
"""The ids that are right for an example, and those that are wrong."""
Position = Wholes


@dataclass(frozen=True)
class Objective:
    """A loss that is not yet bound to a model; make one with the functions of this module.

    Objectives whose tokens are ids are also plain functions of logits, reading the last position,
    for people who run their own backward pass: `answer_nll(5)(logits)`.
    """

    kind: Literal[
        "answer_nll", "sequence_nll", "logit_diff", "probability_diff", "top_prediction", "custom"
    ]
    tokens: Answers | None = None
    wrong: Answers | None = None
    sets: tuple[TokenSets, ...] = ()
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
        if self.kind == "sequence_nll":
            raise BadInput(
                "found sequence_nll called on logits; it reads several positions, which it knows "
                "only in a run. Pass it as run_with_ra(..., target=sequence_nll(answer))."
            )
        n, loss = logits.shape[0], Loss(self.kind)
        if self.kind == "probability_diff":
            loss.sets = self._sets(n, logits.shape[-1], "these logits")
        elif self.kind != "top_prediction":
            loss.targets = [[i] for i in _ids_without_model(self.tokens, n)]
        if self.kind == "logit_diff":
            loss.wrong = _ids_without_model(self.wrong, n)
        return loss(logits[:, -1:])

    def bind(
        self, lens: Lens, prompts: Prompts, position: Position | None = None
    ) -> tuple[Loss, Prompts]:
        """Turn text into ids, append answers where the objective has them, place the reading.

        A target of several tokens becomes `sequence_nll`.

        Args:
            lens: The model.
            prompts: What it reads.
            position: Where to read, within each example (negative: from its end). Default: its last
                token, or its mask token in a model that reads in both directions.

        Returns:
            The loss, and the prompts with answers appended.

        Raises:
            BadInput: a number of targets that is not the number of prompts, an id out of the
                vocabulary, text that is not one token where one is needed, a position outside the
                prompt or where none applies.
        """
        if self.kind == "custom":
            if position is not None:
                raise BadInput(
                    "found position together with a metric of your own, which gets all logits. "
                    "Index them in the metric, or use ra_lens.targets.answer_nll / logit_diff."
                )
            return Loss("custom", metric=self.metric), prompts
        reading = [[p] for p in _positions(lens, position, prompts)]
        if self.kind == "top_prediction":
            return Loss(self.kind, reading), prompts
        if self.kind == "probability_diff":
            sets = self._sets(len(prompts), lens.d_vocab, lens.name)
            return Loss(self.kind, reading, sets=sets), prompts
        targets = _token_ids(lens, prompts, self.tokens, "target")
        if self.kind == "logit_diff":
            _need_one_token(lens, targets, "the correct answer of a logit difference")
            wrong = _token_ids(lens, prompts, self.wrong, "wrong answer")
            _need_one_token(lens, wrong, "the wrong answer of a logit difference")
            return Loss(self.kind, reading, targets, [row[0] for row in wrong]), prompts
        longest = max(targets, key=len)
        if self.kind != "sequence_nll" and len(longest) == 1:
            return Loss(self.kind, reading, targets), prompts
        answer = f"an answer of {len(longest)} tokens ({_show(lens, longest)})"
        if lens.reads == "both ways":
            raise BadInput(
                f"found {answer}; {lens.name} reads in both directions, so nothing can be appended "
                "for it to predict. Give a target of one token and the position of its mask."
            )
        if position is not None:
            raise BadInput(
                f"found position together with {answer}, which is read where it is appended, after "
                "the prompt. Leave position out, or give a target of one token."
            )
        # Row i reads positions n−1 … n+k−2; shorter answers repeat the first of them on the left.
        positions = [
            [n - 1] * (len(longest) - len(row)) + list(range(n - 1, n - 1 + len(row)))
            for n, row in zip(prompts.lengths, targets, strict=True)
        ]
        return Loss("sequence_nll", positions, targets), prompts.extended(targets)

    def _sets(self, n: int, d_vocab: int, where: str) -> list[TokenSets]:
        """Give the right and the wrong tokens of each example, if they are for as many."""
        if len(self.sets) != n:
            raise BadInput(
                f"found sets of tokens for {len(self.sets)} prompts, and {n} prompts. Give "
                "probability_diff a list of ids for each."
            )
        largest = max(max(right + wrong) for right, wrong in self.sets)
        if largest >= d_vocab:
            raise BadInput(
                f"token {largest} is not in the vocabulary of {where}, which has ids 0 to "
                f"{d_vocab - 1}."
            )
        return list(self.sets)


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


def probability_diff(right: Iterable[Wholes], wrong: Iterable[Wholes]) -> Objective:
    """Probability of any wrong token minus that of any right one: descent raises the right ones.

    For questions with several right answers, such as those for a later year (Hanna et al. 2023):
    minus their measure, the probability of the years that are greater minus that of the others.

    Args:
        right: The ids of the right tokens, a list for each prompt.
        wrong: The ids of the wrong ones, likewise.

    Raises:
        BadInput: not as many lists of right tokens as of wrong ones, or an empty one; what is no
            id, or a token that is both.
    """
    ids = [
        [tuple(wholes("token", some, least=0)) for some in of_kind] for of_kind in (right, wrong)
    ]
    if len(ids[0]) != len(ids[1]):
        raise BadInput(
            f"found {len(ids[0])} lists of right tokens and {len(ids[1])} of wrong ones; give one "
            "of each for every prompt."
        )
    sets = tuple(zip(*ids, strict=True))
    for i, (rights, wrongs) in enumerate(sets):
        both = sorted(set(rights) & set(wrongs))
        if both:
            raise BadInput(
                f"found token {both[0]} as right and as wrong for prompt {i}; leave it out, since "
                "it tells neither."
            )
    return Objective("probability_diff", sets=sets)


def top_prediction() -> Objective:
    """−log p of the token that the model ranks first at the position read."""
    return Objective("top_prediction")


def custom(metric: Metric) -> Objective:
    """Any function of the logits (`[batch, pos, d_vocab]` to `[batch]` or a scalar), as it is."""
    return Objective("custom", metric=metric)


@dataclass
class Loss:
    """An objective bound to prompts: where it reads and what it expects there."""

    kind: str
    positions: list[list[int]] | None = None  # within each example; None: all columns of a batch
    targets: list[list[int]] | None = None  # expected ids, one for each of the last positions read
    wrong: list[int] | None = None  # the id that a logit difference compares with
    sets: list[TokenSets] | None = None  # the right and the wrong ids of a probability difference
    metric: Metric | None = None  # of a custom objective

    @property
    def answer_lengths(self) -> tuple[int, ...] | None:
        """Number of tokens appended to each example; None where no answer is appended."""
        appended = self.kind == "sequence_nll" and self.targets is not None
        return tuple(map(len, self.targets or ())) if appended else None

    def part(self, examples: Sequence[int]) -> Loss:
        """The same loss of some of the examples."""

        def cut(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in examples]

        return replace(
            self,
            positions=cut(self.positions),
            targets=cut(self.targets),
            wrong=cut(self.wrong),
            sets=cut(self.sets),
        )

    def __call__(self, logits: Tensor) -> Tensor:
        """Loss per example from the logits at the positions read (`[batch, read, d_vocab]`)."""
        if self.metric is not None:
            return self.metric(logits)
        # In float32 whatever the model's dtype; float64 stays.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.sets is not None:
            p = logits[:, -1].softmax(dim=-1)
            signs = torch.zeros_like(p)
            for row, (right, wrong) in zip(signs, self.sets, strict=True):
                row[list(right)], row[list(wrong)] = -1, 1
            return (p * signs).sum(dim=-1)
        if self.targets is None:  # the model's own top prediction
            self.targets = logits[:, -1:].argmax(dim=-1).tolist()

        def here(ids: list[Any]) -> Tensor:
            return sent(torch.tensor(ids), logits.device)

        if self.wrong is not None:
            right, wrong = here([row[-1] for row in self.targets]), here(self.wrong)
            last = logits[:, -1]
            return (_pick(last, wrong) - _pick(last, right)).squeeze(-1)
        width = max(map(len, self.targets))
        ids = here([[0] * (width - len(row)) + row for row in self.targets])
        counts = here([len(row) for row in self.targets])
        log_probs = logits[:, -width:].log_softmax(dim=-1)
        nll = -log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        # Shorter answers are aligned to the right; what lies left of them is not theirs.
        theirs = torch.arange(width, device=logits.device) >= (width - counts).unsqueeze(1)
        return nll.where(theirs, 0.0).sum(dim=1) / counts


def as_objective(
    target: Answers | Objective | None,
    metric: Metric | Objective | None,
) -> Objective:
    """Read the `target=` and `metric=` of a run, at most one of which is given."""
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


def _positions(lens: Lens, position: Position | None, prompts: Prompts) -> list[int]:
    n = len(prompts)
    if position is None:
        if lens.reads == "both ways":
            return [_the_mask(lens, i, row) for i, row in enumerate(prompts.ids)]
        return [length - 1 for length in prompts.lengths]
    no_list = isinstance(position, str | bytes | Mapping | Set)
    asked = [None] if no_list else one_each(answers_given("position", position), n)
    given = [p for p in map(as_whole, asked) if p is not None]
    if len(given) != len(asked):
        raise BadInput(f"found position={position!r}. Give one integer, or one per prompt.")
    if len(given) != n:
        raise BadInput(
            f"found {len(given)} positions for {n} prompts. Give one integer, or one per prompt."
        )
    for i, (p, length) in enumerate(zip(given, prompts.lengths, strict=True)):
        if not -length <= p < length:
            raise BadInput(
                f"position {p} lies outside prompt {i}, which has {length} tokens (BOS included). "
                f"Give {-length} to {length - 1}."
            )
    return [p % length for p, length in zip(given, prompts.lengths, strict=True)]


def _the_mask(lens: Lens, i: int, row: Sequence[int]) -> int:
    mask = special_id(lens, "mask")
    where = [place for place, token in enumerate(row) if token == mask]
    if len(where) == 1:
        return where[0]
    raise BadInput(
        f"{lens.name} reads in both directions and predicts each token where it stands; prompt {i} "
        f"has {len(where)} mask tokens. Say with position= which token is predicted, or "
        "write one mask token into the prompt."
    )


def _token_ids(lens: Lens, prompts: Prompts, tokens: object, what: str) -> list[list[int]]:
    n = len(prompts)
    given = one_each(answers_given(what, tokens), n)
    if len(given) != n:
        with_bos = bool(given) and as_whole(given[0]) in _never_predicted(lens)
        raise BadInput(
            f"found {len(given)} {what}{'s' * (len(given) != 1)} for {n} prompt{'s' * (n != 1)}. "
            "Give one for all, or one per prompt; for one answer of several token ids use "
            "ra_lens.targets.sequence_nll([[id, id, ...]])."
            + " The first is BOS: model.to_tokens(text, prepend_bos=False) leaves it out."
            * with_bos
        )
    rows = [ids_of(lens, prompts, i, token, f"{what} {i}") for i, token in enumerate(given)]
    for row in rows:
        for token in row:
            if not 0 <= token < lens.d_vocab:
                raise BadInput(
                    f"{what} {token} is not in the vocabulary of {lens.name}, which has ids 0 to "
                    f"{lens.d_vocab - 1}. Give an id in that range, or the text of the token."
                )
    as_ids = [(i, row) for i, row in enumerate(rows) if not isinstance(given[i], str)]
    _refuse_special_tokens(lens, as_ids, what)
    return rows


def _never_predicted(lens: Lens) -> set[int | None]:
    """BOS, which no answer begins with; there are decoders that are trained to begin with it."""
    if lens.reads == "input, then answer":
        return set()
    return {special_id(lens, "bos")} - {None}


def _refuse_special_tokens(lens: Lens, rows: list[tuple[int, list[int]]], what: str) -> None:
    """Refuse ids that were made as those of a prompt are: with BOS in front, or padded.

    One token alone is what it is: a model may well predict the end of a text.
    """
    several = [(i, row) for i, row in rows if len(row) > 1]
    for i, row in several:
        if row[0] in _never_predicted(lens):
            raise BadInput(
                f"{what} {i} begins with the BOS token ({_show(lens, row)}), which would count as "
                "part of the answer. Make ids with model.to_tokens(text, prepend_bos=False), or "
                "give the text."
            )
    pad = special_id(lens, "pad")
    ends = [i for i, row in several if pad in (row[0], row[-1])]
    # Where pad is also a token to predict: the longest answer of a padded tensor has none.
    special = {special_id(lens, "bos"), special_id(lens, "eos")}
    padded = len({len(row) for _, row in rows}) == 1 and len(ends) < len(rows)
    if pad is not None and ends and (padded or pad not in special):
        raise BadInput(
            f"{what} {ends[0]} begins or ends with {lens.decode(pad)!r}, which shorter rows are "
            "padded with. Give texts, or the ids of each answer without padding: [[5], [6, 7]]."
        )


def ids_of(lens: Lens, prompts: Prompts, i: int, answer: object, where: str) -> list[int]:
    """Token ids, at least one and all known, of an answer to prompt `i`, called `where`."""
    one = as_whole(answer)
    if one is not None:
        return [one]
    if isinstance(answer, list | tuple):
        ids = [as_whole(token) for token in cast("Sequence[object]", answer)]
        if not ids or None in ids:
            raise BadInput(
                f"{where} is {answer!r}; a list inside a list holds the token ids of one answer, "
                "at least one. Give text as text: [' New York', ' Paris']."
            )
        return [t for t in ids if t is not None]
    if not isinstance(answer, str):
        raise BadInput(f"{where} is a {type(answer).__name__}; give text or a token id.")
    if answer == "":
        raise BadInput(f"{where} is empty text. Give at least one token, such as ' Paris'.")
    ids = _continuation(lens, prompts, i, whole_text(where, answer))
    unknown = lens.unknown_token_id
    if unknown is not None and unknown in ids:
        raise BadInput(
            f"{where}: {answer!r} is not a word that {lens.name} knows: its tokenizer reads it as "
            f"{lens.decode(unknown)!r}. Give a token of its vocabulary."
        )
    return ids


def _continuation(lens: Lens, prompts: Prompts, i: int, answer: str) -> list[int]:
    # Tokenised as one string with the prompt, as in the paper; SentencePiece tokenizers would
    # otherwise put a space of their own in front. Where the two merge into one token at the seam,
    # the prompt must stay what it was, so the answer is tokenised alone.
    if prompts.texts is not None:
        n = len(prompts.ids[i])
        joint = lens.encode(prompts.texts[i] + answer, prepend_bos=prompts.prepended or False)
        if tuple(joint[:n]) == prompts.ids[i] and len(joint) > n:
            return joint[n:]
    return lens.encode_fragment(answer)


def _need_one_token(lens: Lens, rows: list[list[int]], what: str) -> None:
    for row in rows:
        if len(row) != 1:
            raise BadInput(
                f"{what} must be one token; found {len(row)}: {_show(lens, row)}. Choose a word "
                "that is one token (mind the leading space), or use a target of several tokens."
            )


def _show(lens: Lens, ids: Sequence[int]) -> str:
    return " + ".join(isolated(repr(text)) for text in lens.decode_each(ids))
