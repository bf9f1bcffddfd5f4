"""What a task is: pairs of words, the way to ask for them, and seeded prompts.

The text of a prompt follows the in-context learning format of Todd et al., "Function Vectors in
Large Language Models" (2024), and the templates of Hernandez et al., "Linearity of Relation
Decoding in Transformer Language Models" (2024), as used by Katz & Wolf, "Reversed Attention".
Nothing here adds a beginning-of-text token: that is the business of the model's tokenizer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ra_lens.errors import BadInput
from ra_lens.numbers import Whole, whole, whole_or_none
from ra_lens.tasks._stable import draw, stable_int
from ra_lens.text import whole_text

TaskKind = Literal["icl", "natural"]
SplitRule = Literal["code", "text"]
Part = Literal["train", "valid", "test"]

# What `ra_lens.tasks.same_length_sets` appends to the name of the task it takes pairs from.
_LENGTH_SUFFIX = re.compile(r"_len_\d+_\d+$")


@dataclass(frozen=True)
class Pair:
    """One solved example of a task: `output` is the answer to `input`."""

    input: str
    output: str


@dataclass(frozen=True)
class Prompt:
    """A question with solved demonstrations in front, ready to be given to a model.

    Attributes:
        text: what the model reads; it ends where the answer has to begin, without a space.
        answer: what the model has to produce next, with its leading space.
        query: the pair that is asked for; None for a text that is of no task.
        demonstrations: the solved pairs in front of the question, in order.
        task: the task that asks; None for a text that is of no task. Not part of equality.
    """

    text: str
    answer: str
    query: Pair | None = None
    demonstrations: tuple[Pair, ...] = ()
    task: Task | None = field(default=None, repr=False, compare=False)

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

    def __post_init__(self) -> None:
        """Refuse texts that no tokenizer reads and no file can hold."""
        own = ("name", "before_subject", "after_subject", "separator", "opening", "source")
        for what in own:
            whole_text(f"{what} of task {self.name!r}", getattr(self, what))
        for i, pair in enumerate(self.pairs):
            for side, text in (("input", pair.input), ("output", pair.output)):
                whole_text(f"task {self.name!r}, pair {i}: its {side}", text)

    @property
    def base_name(self) -> str:
        """Name of the task that a same-length set was taken from; else the task's own name."""
        return _LENGTH_SUFFIX.sub("", self.name)

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

    def sample(self, n: Whole, *, shots: Whole = 0, seed: Whole = 0) -> list[Prompt]:
        """Return `n` prompts, the same for the same arguments on every machine.

        Queries do not repeat until every pair was asked. Demonstrations are drawn anew for each
        prompt, without replacement, and never contain the query's input. The queries do not
        depend on `shots`.

        Args:
            n: how many prompts, at least 1.
            shots: how many demonstrations in front of each question.
            seed: another seed gives other queries in another order, with other demonstrations.

        Raises:
            BadInput: `n` or `shots` is out of range, or one of the three is no whole number.
        """
        n, shots, seed = whole("n", n), whole("shots", shots), whole("seed", seed)
        self._check_sizes(n, shots)
        order: list[Pair] = []
        while len(order) < n:
            rng = random.Random(stable_int(self.name, seed, "queries", len(order)))
            order += draw(rng, self.pairs, len(self.pairs))
        prompts: list[Prompt] = []
        for i, query in enumerate(order[:n]):
            rng = random.Random(stable_int(self.name, seed, "demonstrations", i))
            others = [pair for pair in self.pairs if pair.input != query.input]
            if shots > len(others):
                raise BadInput(
                    f"shots={shots}, but task {self.name!r} has {len(others)} pairs beside the "
                    f"query {query.input!r}. Ask for at most {len(others)} shots."
                )
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
        """Divide the pairs into three parts; `ra_lens.tasks.split` says how.

        Args:
            rule: "code" for the parts that the paper's code makes (70 % train, 9 % valid, 21 %
                test) or "text" for those that its text describes (a third test).
            seed: of the permutation; 42 gives the published parts.

        Raises:
            BadInput: too few pairs for three parts, or no such rule or seed.
        """
        from ra_lens.tasks.split import divide

        train, valid, test = divide(self, rule, whole("seed", seed))
        return Split(self, train, valid, test)

    def _ask(self, subject: str) -> str:
        return self.before_subject + subject + self.after_subject

    def _check_sizes(self, n: int, shots: int) -> None:
        if n < 1:
            raise BadInput(f"n={n} prompts were asked for; at least 1 is needed.")
        if shots < 0:
            raise BadInput(f"shots={shots}; the number of demonstrations is 0 or more.")
        if not self.pairs:
            raise BadInput(f"Task {self.name!r} has no pairs; at least 1 is needed to ask for.")


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
    ) -> list[Prompt]:
        """Return prompts that ask for the pairs of one part, after demonstrations from `train`.

        The first `n` pairs are asked for, in the order of the part. Demonstrations are drawn anew
        for each query, without replacement, and never have the query's input. They depend on the
        task's name, the part, `seed`, `shots` and the query's place, so that a smaller `n` gives
        the first prompts of a larger one.

        The last demonstration of a test prompt of a built-in task is one that the embedded model
        never saw in front of that query, wherever `train` has one; see `ra_lens.tasks.held_out`.

        Args:
            part: "train", "valid" or "test".
            shots: how many demonstrations in front of each question.
            n: how many prompts; None for as many as the part has pairs.
            seed: another seed gives other demonstrations (and queries, where they are drawn).
            with_replacement: draw the queries at random, so that one may come twice and `n` may be
                larger than the part. The queries do not depend on `shots`.

        Raises:
            BadInput: there is no such part, `n` or `shots` is out of range, or a number is no
                whole one.
        """
        from ra_lens.tasks.split import ask

        numbers = whole("shots", shots), whole_or_none("n", n), whole("seed", seed)
        return ask(self, part, *numbers, with_replacement)
