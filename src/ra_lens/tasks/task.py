"""What a task is: pairs of words, the way to ask for them, seeded prompts, and parts.

The text of a prompt follows the in-context learning format of Todd et al., "Function Vectors in
Large Language Models" (2024), and the templates of Hernandez et al., "Linearity of Relation
Decoding in Transformer Language Models" (2024), as used by Katz & Wolf, "Reversed Attention".
Nothing here adds a beginning-of-text token: that is the business of the model's tokenizer.

What is drawn is the same on every machine and every version of Python. Only `random.Random.random`
draws: its sequence for an integer seed is guaranteed, while `shuffle`, `sample` and `choice` have
changed between versions. `hash` differs from process to process, so keys are digested instead.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Literal, TypeVar, get_args

from ra_lens.errors import BadInput
from ra_lens.numbers import Whole, whole, whole_or_none
from ra_lens.text import whole_text

TaskKind = Literal["icl", "natural"]
SplitRule = Literal["code", "text"]
Part = Literal["train", "valid", "test"]
Demonstrations = Literal["own", "shared"]
T = TypeVar("T")


def stable_int(*parts: object) -> int:
    """Return a 64-bit integer that depends on the text of `parts` alone."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """Return one of `items`."""
    return items[int(rng.random() * len(items))]


def draw(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """Return `count` of `items` without replacement, in random order."""
    rest = list(items)
    for i in range(count):
        j = i + int(rng.random() * (len(rest) - i))
        rest[i], rest[j] = rest[j], rest[i]
    return rest[:count]


def read_table(name: str) -> list[list[str]]:
    """Return the rows of a table that lies beside this module, without its heading."""
    text = (resources.files("ra_lens.tasks") / name).read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()[1:]]


def no_task(what: str, name: str, names: Iterable[str], instead: str) -> BadInput:
    """Say that there is no task of this name, which names are close, and what there is."""
    wanted = name.lower().replace(" ", "-")
    close = difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.5)
    hint = f"Close names: {', '.join(close)}. " if close else ""
    return BadInput(f"There is no {what}. {hint}{instead}")


@dataclass(frozen=True)
class Pair:
    """One solved example of a task: `output` is the answer to `input`."""

    input: str
    output: str


@dataclass(frozen=True)
class Unseen:
    """What the embedded model did not see of a built-in task in training.

    Attributes:
        step: Whether a question never follows directly on a demonstration.
        query: Whether a question never occurs; None where every one does.
    """

    step: Callable[[Pair, Pair], bool]
    query: Callable[[Pair], bool] | None = None


@dataclass(frozen=True)
class Prompt:
    """A question with solved demonstrations in front, ready to be given to a model.

    Attributes:
        text: what the model reads; it ends where the answer has to begin, without a space.
        answer: what the model has to produce next, with its leading space.
        query: the pair that is asked for; None for a text that is of no task.
        demonstrations: the solved pairs in front of the question, in order.
        task: the task that asks; None for a text that is of no task. Not part of equality.
        corrupted: the same question with something replaced that the answer hangs on, as long in
            tokens and with another answer, for what patches or resamples one run from the other.
    """

    text: str
    answer: str
    query: Pair | None = None
    demonstrations: tuple[Pair, ...] = ()
    task: Task | None = field(default=None, repr=False, compare=False)
    corrupted: Prompt | None = field(default=None, repr=False)

    def with_demonstrations(self, demonstrations: Sequence[Pair]) -> Prompt:
        """Return the prompt that asks the same after other solved pairs.

        The pairs need not be the task's own, so that labels can be shuffled, for example.

        Raises:
            BadInput: the prompt does not know the task or the pair it asks for.
        """
        if self.task is None or self.query is None:
            missing = "task" if self.task is None else "query"
            raise BadInput(
                f"the prompt {self.text!r} has no {missing}, so it cannot be asked after other "
                "demonstrations. Make it with Task.build, Task.sample or Split.prompts."
            )
        return self.task.build(self.query, demonstrations)


@dataclass(frozen=True)
class Task:
    """A relation between words, with the text that goes around a word to ask for it.

    Attributes:
        name: what `ra_lens.tasks.load_task` calls it; unique within a source.
        kind: "icl" (the relation shows in demonstrations only) or "natural" (the text names it).
        pairs: every solved example; an input may occur more than once.
        before_subject: text in front of the input.
        after_subject: text after the input; one space and the answer follow it.
        separator: text after the answer of each solved example.
        opening: text in front of the whole prompt.
        source: where the pairs are from: "builtin", "download:" and a commit, the folder, or "own".
        unseen: for a built-in task: what the embedded model never saw, which `split` and
            `Split.prompts` keep to. Not part of equality.

    Raises:
        BadInput: a text with half a character (a lone surrogate).
    """

    name: str
    kind: TaskKind
    pairs: tuple[Pair, ...]
    before_subject: str
    after_subject: str
    separator: str = "\n\n"
    opening: str = ""
    source: str = "own"
    unseen: Unseen | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse texts that no tokenizer reads and no file can hold."""
        own = ("name", "before_subject", "after_subject", "separator", "opening", "source")
        for what in own:
            whole_text(f"{what} of task {self.name!r}", getattr(self, what))
        for i, pair in enumerate(self.pairs):
            for side, text in (("input", pair.input), ("output", pair.output)):
                whole_text(f"task {self.name!r}, pair {i}: its {side}", text)

    def answer(self, pair: Pair) -> str:
        """Return the text a model has to produce for `pair`: its output after one space."""
        return f" {pair.output}"

    def prompt(self, query: str | Pair, demonstrations: Sequence[Pair] = ()) -> str:
        """Return the text that asks for `query` after the solved `demonstrations`.

        Args:
            query: the pair asked for, or only its input (which need not be one of the task's).
            demonstrations: solved pairs to put in front, in this order.

        Returns:
            A text that ends right where the answer has to begin, without a trailing space.
        """
        solved = "".join(
            self._ask(pair.input) + self.answer(pair) + self.separator for pair in demonstrations
        )
        return self.opening + solved + self._ask(query.input if isinstance(query, Pair) else query)

    def with_format(
        self,
        *,
        before_subject: str | None = None,
        after_subject: str | None = None,
        separator: str | None = None,
        opening: str | None = None,
    ) -> Task:
        """Return the same pairs asked for in another way; what is None stays as it is.

        The prompts that the text of the paper shows begin with a line break and have single ones
        between examples: ``opening="\\n", separator="\\n"``. A natural question in the frame of an
        ICL one: ``before_subject=f"Q: {task.before_subject}"`` and
        ``after_subject=f"{task.after_subject}\\nA:"``. As an answer brings its own space,
        `after_subject` should not end in one.

        Args:
            before_subject: text in front of the input.
            after_subject: text after the input.
            separator: text after the answer of each solved example.
            opening: text in front of the whole prompt.
        """
        return replace(
            self,
            before_subject=self.before_subject if before_subject is None else before_subject,
            after_subject=self.after_subject if after_subject is None else after_subject,
            separator=self.separator if separator is None else separator,
            opening=self.opening if opening is None else opening,
        )

    def sample(
        self,
        n: Whole,
        *,
        shots: Whole = 0,
        seed: Whole = 0,
        demonstrations: Demonstrations = "own",
    ) -> list[Prompt]:
        """Return `n` prompts, the same for the same arguments on every machine.

        Queries do not repeat until every pair was asked. Demonstrations are drawn anew for each
        prompt, without replacement, and never contain the query's input. The queries do not
        depend on `shots`.

        Args:
            n: how many prompts, at least 1.
            shots: how many demonstrations in front of each question.
            seed: another seed gives other queries in another order, with other demonstrations.
            demonstrations: "own": as above. "shared": the same ones before every question, drawn
                once from the pairs whose input no question of these has.

        Raises:
            BadInput: `n` or `shots` is out of range, or one of the three is no whole number; too
                few pairs beside the questions to share; no such `demonstrations`.
        """
        n, shots, seed = whole("n", n), whole("shots", shots), whole("seed", seed)
        _check_sizes(n, shots)
        check_demonstrations(demonstrations)
        if not self.pairs:
            raise BadInput(f"Task {self.name!r} has no pairs; at least 1 is needed to ask for.")
        order: list[Pair] = []
        while len(order) < n:
            rng = random.Random(stable_int(self.name, seed, "queries", len(order)))
            order += draw(rng, self.pairs, len(self.pairs))
        if demonstrations == "shared":
            rng = random.Random(stable_int(self.name, seed, shots, "shared demonstrations"))
            others = _shared_others(f"task {self.name!r}", self.pairs, order[:n], shots)
            shown = draw(rng, others, shots)
            return [self.build(query, shown) for query in order[:n]]
        prompts: list[Prompt] = []
        for i, query in enumerate(order[:n]):
            rng = random.Random(stable_int(self.name, seed, "demonstrations", i))
            others = _others(f"task {self.name!r}", self.pairs, query, shots)
            prompts.append(self.build(query, draw(rng, others, shots)))
        return prompts

    def build(self, query: Pair, demonstrations: Sequence[Pair] = ()) -> Prompt:
        """Return the `Prompt` that asks for `query` after `demonstrations`."""
        return Prompt(
            text=self.prompt(query, demonstrations),
            answer=self.answer(query),
            query=query,
            demonstrations=tuple(demonstrations),
            task=self,
        )

    def split(self, rule: SplitRule = "code", *, seed: Whole = 42) -> Split:
        """Divide the pairs into three parts.

        The pairs are shuffled, and each part is a slice of the shuffled list:

        * rule "code", what the code of Katz & Wolf does: scikit-learn's ``train_test_split`` with
          ``test_size=0.3`` and one seed, twice. Of n pairs, the first ⌈0.3 n⌉ are set aside and the
          others are `train`; of those set aside, shuffled again, the first 30 % (rounded up) are
          `valid` and the others are `test`. That is 70 %, 9 % and 21 %.
        * rule "text", what their paper says: the first ⌈n / 3⌉ of the same first shuffle are
          `test`. The text does not say how the rest was divided; here the next ⌈0.09 n⌉ are
          `valid`, the share that they have in the code, and the others are `train`.

        The shuffle is ``numpy.random.RandomState(seed).permutation``, which numpy keeps as it is
        for good, so the parts are the published ones on every machine.

        A built-in task whose questions the embedded model has not all seen (they are lists of three
        words) has parts of the same sizes at most, made so that the model is measured on what it
        never saw: `test` takes only such questions, in the order of the first shuffle, and is
        smaller where there are too few; the next ones of the others are `valid`, and all that
        remain are `train`.

        Args:
            rule: "code" for the parts that the paper's code makes or "text" for those that its text
                describes (a third test).
            seed: of the permutation; 42 gives the published parts.

        Raises:
            BadInput: too few pairs for three parts, or no such rule or seed.
        """
        seed, n = whole("seed", seed), len(self.pairs)
        if rule not in get_args(SplitRule):
            raise BadInput(
                f"rule={rule!r}; needed is 'code' (70/9/21, as published) or 'text' (a third test)."
            )
        if not 0 <= seed < 2**32:
            raise BadInput(f"seed={seed}; the seed of a split is a number from 0 to {2**32 - 1}.")
        if rule == "text":
            n_valid, n_test = math.ceil(9 * n / 100), math.ceil(n / 3)
        else:  # in floating point, as scikit-learn does it: 0.3 n is not always what it is on paper
            aside = math.ceil(0.3 * n)
            n_valid = math.ceil(0.3 * aside)
            n_test = aside - n_valid
        first = n_valid + n_test
        if min(n - first, n_valid, n_test) < 1:
            raise BadInput(
                f"Task {self.name!r} has {n} pairs; a train, a valid and a test part by the "
                f"rule {rule!r} need at least {4 if rule == 'code' else 3}."
            )
        order = _shuffled(self.pairs, seed)
        if self.unseen is not None and self.unseen.query is not None:
            held = [pair for pair in order if self.unseen.query(pair)]
            seen = [pair for pair in order if not self.unseen.query(pair)]
            if not held or len(seen) <= n_valid:
                raise BadInput(
                    f"Task {self.name!r} has {len(held)} pairs that the embedded model never saw "
                    f"and {len(seen)} others; its split needs at least 1 and {n_valid + 1}. Take "
                    "more pairs."
                )
            train, valid = [*seen[n_valid:], *held[n_test:]], seen[:n_valid]
            test = held[:n_test]
        elif rule == "text":
            train, valid, test = order[first:], order[n_test:first], order[:n_test]
        else:
            rest = _shuffled(order[:first], seed)
            train, valid, test = order[first:], rest[:n_valid], rest[n_valid:]
        return Split(self, tuple(train), tuple(valid), tuple(test))

    def _ask(self, subject: str) -> str:
        return self.before_subject + subject + self.after_subject


@dataclass(frozen=True)
class Split:
    """The pairs of a task in three parts, each in the order in which it is used.

    Attributes:
        task: the task; the prompts are asked in its format.
        train: pairs to learn from; every demonstration is one of these.
        valid: pairs to choose with.
        test: pairs to measure on.
    """

    task: Task
    train: tuple[Pair, ...]
    valid: tuple[Pair, ...]
    test: tuple[Pair, ...]

    def prompts(
        self,
        part: Part,
        *,
        shots: Whole = 0,
        n: Whole | None = None,
        seed: Whole = 0,
        with_replacement: bool = False,
        demonstrations: Demonstrations = "own",
    ) -> list[Prompt]:
        """Return prompts that ask for the pairs of one part, after demonstrations from `train`.

        The first `n` pairs are asked for, in the order of the part. Demonstrations are drawn anew
        for each query, without replacement, and never have the query's input. They depend on the
        task's name, the part, `seed`, `shots` and the query's place, so that a smaller `n` gives
        the first prompts of a larger one.

        The last demonstration of a test prompt of a built-in task is one that the embedded model
        never saw in front of that query, wherever `train` has one: see
        `ra_lens.tasks.is_held_out_adjacency`.

        With `demonstrations="shared"` the same ones stand in front of every query. They are drawn
        once, from the pairs of `train` whose input no query has: no pair of the part for "valid"
        and "test", which makes them the same for every `n`, and none of the `n` asked for "train".
        The last one before the test queries of a built-in task is one that was never seen in front
        of as many of the part's pairs as can be.

        Args:
            part: "train", "valid" or "test".
            shots: how many demonstrations in front of each question.
            n: how many prompts; None for as many as the part has pairs.
            seed: another seed gives other demonstrations (and queries, where they are drawn).
            with_replacement: draw the queries at random, so that one may come twice and `n` may be
                larger than the part. The queries do not depend on `shots`.
            demonstrations: "own": drawn anew for each query; "shared": the same for all.

        Raises:
            BadInput: there is no such part, `n` or `shots` is out of range, or a number is no
                whole one; too few pairs beside the queries to share; no such `demonstrations`.
        """
        check_demonstrations(demonstrations)
        shots, n, seed = whole("shots", shots), whole_or_none("n", n), whole("seed", seed)
        if part not in get_args(Part):
            raise BadInput(f"part={part!r}; needed is 'train', 'valid' or 'test'.")
        task = self.task
        pairs: tuple[Pair, ...] = getattr(self, part)
        if not pairs:
            raise BadInput(
                f"The {part} part of task {task.name!r} is empty; it cannot be asked for."
            )
        count = len(pairs) if n is None else n
        _check_sizes(count, shots)
        queries = pairs[:count]
        if with_replacement:
            rng = random.Random(stable_int(task.name, part, seed, "queries"))
            queries = [pick(rng, pairs) for _ in range(count)]
        elif count > len(pairs):
            raise BadInput(
                f"n={n} prompts were asked for, but the {part} part of task {task.name!r} has "
                f"{len(pairs)} pairs. Ask for at most {len(pairs)}, leave n out for all of them, "
                "or draw them with_replacement=True."
            )
        unseen = task.unseen if part == "test" and shots else None
        # Where test questions are unseen themselves, so is every step to them.
        step = None if unseen is None or unseen.query is not None else unseen.step
        if demonstrations == "shared":
            asked = queries if part == "train" else pairs
            shown = self._shared(part, asked, shots, seed, step)
            return [task.build(query, shown) for query in queries]
        prompts: list[Prompt] = []
        for i, query in enumerate(queries):
            others = _others(f"the train part of task {task.name!r}", self.train, query, shots)
            rng = random.Random(stable_int(task.name, part, seed, shots, i))
            last_ones = [
                j for j, pair in enumerate(others) if step is not None and step(pair, query)
            ]
            if last_ones:
                last = pick(rng, last_ones)
                rest = [*others[:last], *others[last + 1 :]]
                shown = [*draw(rng, rest, shots - 1), others[last]]
            else:
                shown = draw(rng, others, shots)
            prompts.append(task.build(query, shown))
        return prompts

    def _shared(
        self,
        part: Part,
        asked: Sequence[Pair],
        shots: int,
        seed: int,
        step: Callable[[Pair, Pair], bool] | None,
    ) -> list[Pair]:
        """Draw the demonstrations that stand in front of every query."""
        name = self.task.name
        others = _shared_others(f"the train part of task {name!r}", self.train, asked, shots)
        rng = random.Random(stable_int(name, part, seed, shots, "shared demonstrations"))
        if step is None:
            return draw(rng, others, shots)
        unseen = [sum(step(pair, query) for query in asked) for pair in others]
        last = pick(rng, [i for i, n in enumerate(unseen) if n == max(unseen)])
        rest = [*others[:last], *others[last + 1 :]]
        return [*draw(rng, rest, shots - 1), others[last]]


def check_demonstrations(demonstrations: Demonstrations) -> None:
    """Refuse another word than the two there are."""
    if demonstrations not in get_args(Demonstrations):
        raise BadInput(
            f"found demonstrations={demonstrations!r}; give 'own' (drawn anew for every question) "
            "or 'shared' (the same before every question)."
        )


def _shared_others(
    where: str, pairs: Sequence[Pair], queries: Sequence[Pair], shots: int
) -> list[Pair]:
    """Give the pairs that may be shown in front of all queries: those with another input."""
    inputs = {query.input for query in queries}
    others = [pair for pair in pairs if pair.input not in inputs]
    if shots > len(others):
        raise BadInput(
            f"shots={shots} with demonstrations='shared', but {where} has {len(others)} pairs "
            f"beside the {len(inputs)} that are asked. Ask for fewer shots or fewer questions, or "
            "take demonstrations='own'."
        )
    return others


def _check_sizes(n: int, shots: int) -> None:
    if n < 1:
        raise BadInput(f"n={n} prompts were asked for; at least 1 is needed.")
    if shots < 0:
        raise BadInput(f"shots={shots}; the number of demonstrations is 0 or more.")


def _others(where: str, pairs: Sequence[Pair], query: Pair, shots: int) -> list[Pair]:
    """Give the pairs that may be shown in front of a query: those with another input."""
    others = [pair for pair in pairs if pair.input != query.input]
    if shots > len(others):
        raise BadInput(
            f"shots={shots}, but {where} has {len(others)} pairs beside the query {query.input!r}. "
            f"Ask for at most {len(others)} shots."
        )
    return others


def _shuffled(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    from numpy.random import RandomState  # late: tasks can be loaded without numpy

    return [pairs[i] for i in RandomState(seed).permutation(len(pairs))]


def same_length_sets(
    task: Task,
    encode: Callable[[str], Sequence[int]],
    *,
    answer_tokens: Whole = 1,
    at_least: Whole = 100,
) -> dict[int, Task]:
    """Return the sets of pairs that are asked and answered in the same number of tokens.

    A map of attention can be added to another one where both have the same size. The rule of Katz &
    Wolf, "Reversed Attention", for GPT-2's tokenizer: of a task, keep the pairs whose answer is one
    token, put together those whose question and answer have the same number of tokens, and keep the
    sets of at least 100 pairs. Here it is for any tokenizer, which reads each pair twice, and for
    answers of any number of tokens.

    A pair is kept where its answer goes on from the question: the ids of question and answer are
    those of the question without demonstrations and `answer_tokens` more. (A tokenizer that joins
    the end of the question to the answer gives other ids.) The sets are disjoint.

    Questions with n demonstrations of the same set have one length too, for each n, as long as the
    tokenizer reads every solved example alike wherever it stands: nothing is joined across
    `Task.separator`, and what stands in front of an example (nothing or a BOS token for the first
    one, a line break for the others) changes its number of tokens for all pairs or for none. That
    holds for GPT-2, OPT and Llama with the default format, and may fail for a natural question that
    begins with its subject; count the tokens to be sure.

    Args:
        task: the task to take pairs from, in the format in which it will be asked.
        encode: turns a text into token ids, with BOS where the model gets one, since the lengths
            count whatever it gives.
        answer_tokens: number of tokens of the answer with its leading space.
        at_least: number of pairs that a set needs to be kept.

    Returns:
        By number of tokens of question and answer together, smallest first, a task with those
        pairs in the order of `task`, named `{name}_len_{tokens}_{answer_tokens}`. Its `split` is
        the published one for that set. Empty where no set is large enough.

    Raises:
        BadInput: `answer_tokens` or `at_least` is below 1, or no whole number.
    """
    answer_tokens = whole("answer_tokens", answer_tokens, least=1)
    at_least = whole("at_least", at_least, least=1)
    groups: dict[int, list[Pair]] = {}
    for pair in task.pairs:
        question = task.prompt(pair)
        asked = list(encode(question))
        solved = list(encode(question + task.answer(pair)))
        if solved[: len(asked)] == asked and len(solved) - len(asked) == answer_tokens:
            groups.setdefault(len(solved), []).append(pair)
    return {
        length: replace(
            task, name=f"{task.name}_len_{length}_{answer_tokens}", pairs=tuple(groups[length])
        )
        for length in sorted(groups)
        if len(groups[length]) >= at_least
    }
