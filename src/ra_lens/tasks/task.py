"""What a task is: pairs of words, the way to ask for them, and seeded prompts.

The text of a prompt follows the in-context learning format of Todd et al., "Function Vectors in
Large Language Models" (2024), and the templates of Hernandez et al., "Linearity of Relation
Decoding in Transformer Language Models" (2024), as used by Katz & Wolf, "Reversed Attention".
Nothing here adds a beginning-of-text token: that is the business of the model's tokenizer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ra_lens.errors import BadInput
from ra_lens.tasks._stable import draw, stable_int

TaskKind = Literal["icl", "natural"]


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
        query: the pair that is asked for.
        demonstrations: the solved pairs in front of the question, in order.
    """

    text: str
    answer: str
    query: Pair
    demonstrations: tuple[Pair, ...]


@dataclass(frozen=True)
class Task:
    """A relation between words, with the text that goes around a word to ask for it.

    Attributes:
        name: what `ra_lens.tasks.load_task` calls it; unique.
        kind: "icl" (the relation shows in demonstrations only) or "natural" (the text names it).
        pairs: every solved example.
        before_subject: text in front of the input.
        after_subject: text after the input; the answer follows it.
    """

    name: str
    kind: TaskKind
    pairs: tuple[Pair, ...]
    before_subject: str
    after_subject: str

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
        solved = (self._ask(pair.input) + self.answer(pair) + "\n\n" for pair in demonstrations)
        return "".join(solved) + self._ask(query.input if isinstance(query, Pair) else query)

    def sample(self, n: int, *, shots: int = 0, seed: int = 0) -> list[Prompt]:
        """Return `n` prompts, the same for the same arguments on every machine.

        Queries do not repeat until every pair was asked. Demonstrations are drawn anew for each
        prompt, without replacement, and never contain the query's input. The queries do not
        depend on `shots`.

        Args:
            n: how many prompts, at least 1.
            shots: how many demonstrations in front of each question.
            seed: another seed gives other queries in another order, with other demonstrations.

        Raises:
            BadInput: `n` or `shots` is out of range.
        """
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
        )

    def _ask(self, subject: str) -> str:
        return self.before_subject + subject + self.after_subject

    def _check_sizes(self, n: int, shots: int) -> None:
        if n < 1:
            raise BadInput(f"n={n} prompts were asked for; at least 1 is needed.")
        if shots < 0:
            raise BadInput(f"shots={shots}; the number of demonstrations is 0 or more.")
        if not self.pairs:
            raise BadInput(f"Task {self.name!r} has no pairs; at least 1 is needed to ask for.")
