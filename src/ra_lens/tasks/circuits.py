"""Prompts that known circuits answer, each with a corrupted twin: from templates of our own.

* `ioi_prompts`, indirect object identification: "After Mary and James met at the park, James handed
  the ring to" → " Mary". Half of the prompts name the indirect object first (ABBA), half the
  subject (BABA). The task is that of Wang et al., "Interpretability in the Wild" (2022).
* `greater_than_prompts`: "The siege lasted from the year 1743 to the year 17" → a later year, such
  as "85". The task is that of Hanna et al., "How does GPT-2 compute greater-than?" (2023).
* `induction_prompts`: some words in a row, then a part of them again, up to the word before the
  answer: "… A B … A" → " B". The task is that of Olsson et al., "In-context Learning and Induction
  Heads" (2022).

A twin (`Prompt.corrupted`) has as many tokens and another answer, which is the wrong answer of the
prompt: what a head gives in the twin's run can stand in for what it gives, and the logit difference
between the two answers says what that did. So the replacement is symmetric (Zhang & Nanda, "Towards
Best Practices of Activation Patching", 2023): both are prompts of the same kind.

Whether a twin is as long depends on the tokenizer, which is given as `encode`. A draw that does not
fit is drawn anew; where many in a row do not fit, that is refused with what is wrong. Prompts do
not repeat, and the first ones do not depend on how many are asked for.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from ra_lens.errors import BadInput
from ra_lens.numbers import Whole, whole
from ra_lens.tasks.builtin import word_pools
from ra_lens.tasks.task import Pair, Prompt, draw, no_task, pick, read_table, stable_int

Encode = Callable[[str], Sequence[int]]
"""Turns a text into token ids, as the model reads it: with BOS where the model gets one."""

IOITwin = Literal["swap", "third"]

_IOI = (
    "After {first} and {second} met at the {place}, {giver} handed the {object} to",
    "While {first} and {second} were waiting at the {place}, {giver} passed the {object} to",
    "On Sunday {first} and {second} walked to the {place}. Later {giver} offered the {object} to",
    "When the {place} closed, {first} and {second} went home, and {giver} gave the {object} to",
)
_GREATER_THAN = "The {event} lasted from the year {start} to the year {century}"
_CENTURIES = range(11, 18)
_TRIES = 100  # draws for one prompt before it is given up


def ioi_prompts(
    n: Whole, encode: Encode, *, seed: Whole = 0, twin: IOITwin = "swap"
) -> list[Prompt]:
    """Return prompts that ask to whom something was given: indirect object identification.

    The answer is the one of two names that the last clause does not repeat. `Prompt.query` is the
    pair of the name repeated (the subject) and the answer.

    Args:
        n: how many prompts, at least 1.
        encode: turns a text into token ids, with BOS where the model gets one.
        seed: another seed gives other prompts.
        twin: "swap": the last clause repeats the other name, so that the answer is the subject;
            "third": a third name stands in the place of the answer, and is the twin's answer.

    Raises:
        BadInput: `n` is below 1, there is no such `twin`, or too few prompts fit the tokenizer.
    """
    if twin not in get_args(IOITwin):
        raise BadInput(f"found twin={twin!r}; give 'swap' or 'third'.")
    words = _words()

    def one(rng: random.Random, i: int) -> Prompt:
        template = pick(rng, _IOI)
        answer, subject, third = draw(rng, words["name"], 3)
        chosen = {"place": pick(rng, words["place"]), "object": pick(rng, words["object"])}

        def asked(answer: str, subject: str, *, answer_first: bool) -> Prompt:
            first, second = (answer, subject) if answer_first else (subject, answer)
            text = template.format(first=first, second=second, giver=subject, **chosen)
            return Prompt(text, f" {answer}", Pair(subject, answer))

        answer_first = i % 2 == 0
        return _with_twin(
            asked(answer, subject, answer_first=answer_first),
            # Names stay where they are, so that of swapped ones the answer comes second.
            asked(subject, answer, answer_first=not answer_first)
            if twin == "swap"
            else asked(third, subject, answer_first=answer_first),
        )

    return _drawn("ioi", n, encode, (seed, twin), one)


def greater_than_prompts(n: Whole, encode: Encode, *, seed: Whole = 0) -> list[Prompt]:
    """Return prompts that ask for a year after another one: greater-than.

    Many years are right. The answer is one of them, and the twin's answer one that is wrong for the
    prompt: the twin starts earlier, and its answer lies between the two starts. So
    logit(answer) − logit(twin's answer) falls where the model takes the twin's start for the
    prompt's. The source's own measure takes all years: `year_tokens` gives them, and
    `ra_lens.targets.probability_diff` scores them. `Prompt.query` is the pair of the year of the
    start, four digits, and the answer, two.

    All four decades (both starts, both answers) differ and are in that order, so that the first
    digit alone decides, as it does for tokenizers that make each digit a token.

    Args:
        n: how many prompts, at least 1.
        encode: turns a text into token ids, with BOS where the model gets one.
        seed: another seed gives other prompts.

    Raises:
        BadInput: `n` is below 1, or too few prompts fit the tokenizer.
    """
    events = _words()["event"]

    def one(rng: random.Random, _i: int) -> Prompt:
        event, century = pick(rng, events), pick(rng, _CENTURIES)
        decades = sorted(draw(rng, range(10), 4))
        # Not the first two years of a century, whose names are tokens of their own kind.
        years = [f"{decade}{pick(rng, range(2, 10))}" for decade in decades]
        earlier, wrong, start, right = years

        def asked(start: str, answer: str) -> Prompt:
            year = f"{century}{start}"
            text = _GREATER_THAN.format(event=event, start=year, century=century)
            return Prompt(text, answer, Pair(year, answer))

        return _with_twin(asked(start, right), asked(earlier, wrong))

    return _drawn("greater_than", n, encode, (seed,), one)


def year_tokens(prompt: Prompt, encode: Encode) -> tuple[list[int], list[int]]:
    """Return the first tokens of the years that are right for a greater-than prompt, and wrong.

    Right are those from the year after the start to 99, wrong those from 00 to the start. A token
    that begins years of both kinds is in neither, as the digit of the start's own decade where a
    tokenizer makes each digit a token.

    Args:
        prompt: one of `greater_than_prompts`.
        encode: as there.

    Raises:
        BadInput: another prompt.
    """
    start = "" if prompt.query is None else prompt.query.input[-2:]
    if not start.isdecimal():
        raise BadInput(
            f"the prompt {prompt.text!r} does not say in which year it starts. Give one of "
            "greater_than_prompts()."
        )
    n = len(encode(prompt.text))
    first = {year: encode(f"{prompt.text}{year:02}")[n] for year in range(100)}
    right = {token for year, token in first.items() if year > int(start)}
    wrong = {token for year, token in first.items() if year <= int(start)}
    return sorted(right - wrong), sorted(wrong - right)


def induction_prompts(
    n: Whole,
    encode: Encode,
    *,
    seed: Whole = 0,
    length: Whole = 12,
    repeated: Whole = 3,
    words: Sequence[str] | None = None,
) -> list[Prompt]:
    """Return rows of random words of which a part comes again: what follows is the answer.

    In the twin another word stands where the answer stood before. `Prompt.query` is the pair of the
    last word and the answer.

    Args:
        n: how many prompts, at least 1.
        encode: turns a text into token ids, with BOS where the model gets one.
        seed: another seed gives other prompts.
        length: how many different words come first.
        repeated: how many of them come again.
        words: what to draw from, at least one more than `length`. Default: those of the built-in
            list tasks, which the embedded model knows.

    Raises:
        BadInput: `n` or `repeated` is below 1, too few words for the answer to stand among, or too
            few prompts fit the tokenizer.
    """
    length, repeated = whole("length", length), whole("repeated", repeated, least=1)
    pool = _pool_words() if words is None else tuple(dict.fromkeys(words))
    if not repeated + 2 <= length < len(pool):
        raise BadInput(
            f"found length={length} with repeated={repeated} and {len(pool)} words; give a length "
            f"of at least {repeated + 2} (repeated + 2), and more words than that."
        )

    def one(rng: random.Random, _i: int) -> Prompt:
        *row, other = draw(rng, pool, length + 1)
        # Not the first word, which many tokenizers read otherwise than those after a space.
        start = 1 + int(rng.random() * (length - repeated - 1))
        again, at = row[start : start + repeated], start + repeated

        def asked(answer: str) -> Prompt:
            first = [*row[:at], answer, *row[at + 1 :]]
            return Prompt(" ".join([*first, *again]), f" {answer}", Pair(again[-1], answer))

        return _with_twin(asked(row[at]), asked(other))

    key = (seed, length, repeated, *(() if words is None else pool))
    return _drawn("induction", n, encode, key, one)


@dataclass(frozen=True)
class Circuit:
    """A kind of prompt that a known circuit answers.

    Attributes:
        name: what `circuit_prompts` calls it.
        prompts: makes prompts: `prompts(n, encode, seed=0)`.
        seen: where in the text stands what heads have to look at, as its first character and the
            one after its last: the earlier place of the answer, or the last two digits of the year
            of the start.
    """

    name: str
    prompts: Callable[..., list[Prompt]]
    seen: Callable[[Prompt], tuple[int, int]]


def _seen_answer(prompt: Prompt) -> tuple[int, int]:
    # As a word of its own, not as the beginning of a longer one.
    found = re.search(rf"{re.escape(prompt.answer)}\b", prompt.text)
    if found is None:
        raise BadInput(
            f"the answer {prompt.answer!r} does not stand in the prompt {prompt.text!r}. Give one "
            "of circuit_prompts()."
        )
    return found.span()


def _seen_year(prompt: Prompt) -> tuple[int, int]:
    year = "" if prompt.query is None else prompt.query.input
    end = prompt.text.index(year) + len(year)
    return end - 2, end


CIRCUITS: Mapping[str, Circuit] = {
    one.name: one
    for one in (
        Circuit("ioi", ioi_prompts, _seen_answer),
        Circuit("greater_than", greater_than_prompts, _seen_year),
        Circuit("induction", induction_prompts, _seen_answer),
    )
}
"""The kinds of prompt by name."""


def find_circuit(name: str) -> Circuit:
    """Return a kind of prompt by its name.

    Raises:
        BadInput: there is none of that name.
    """
    if name not in CIRCUITS:
        what = f"circuit {name!r}"
        raise no_task(what, name, CIRCUITS, f"There are {', '.join(map(repr, CIRCUITS))}.")
    return CIRCUITS[name]


def circuit_prompts(name: str, n: Whole, encode: Encode, *, seed: Whole = 0) -> list[Prompt]:
    """Return prompts of a known circuit by its name: "ioi", "greater_than" or "induction".

    Raises:
        BadInput: there is no such circuit, `n` is below 1, or too few prompts fit the tokenizer.
    """
    return find_circuit(name).prompts(n, encode, seed=seed)


def seen_tokens(name: str, prompt: Prompt, encode: Encode) -> range:
    """Return the places of the tokens that heads of a circuit have to look at, in the prompt.

    They are the earlier place of the answer ("ioi": the name of the indirect object), or for
    "greater_than" the last two digits of the year of the start.
    """
    start, end = find_circuit(name).seen(prompt)
    return range(len(encode(prompt.text[:start])), len(encode(prompt.text[:end])))


# ---- drawing ------------------------------------------------------------------------------------


@cache
def _words() -> dict[str, tuple[str, ...]]:
    return {kind: tuple(words.split(" ")) for kind, words in read_table("words/circuits.tsv")}


@cache
def _pool_words() -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for pool in word_pools().values() for word in pool))


def _with_twin(prompt: Prompt, twin: Prompt) -> Prompt:
    return Prompt(prompt.text, prompt.answer, prompt.query, corrupted=twin)


def _drawn(
    name: str,
    n: Whole,
    encode: Encode,
    key: Sequence[object],
    one: Callable[[random.Random, int], Prompt],
) -> list[Prompt]:
    """Draw `n` different prompts whose twins fit; `one` makes the prompt at a place."""
    n = whole("n", n, least=1)
    prompts: list[Prompt] = []
    texts: set[str] = set()
    for i in range(n):
        problem = ""
        for attempt in range(_TRIES):
            rng = random.Random(stable_int("circuit", name, *key, i, attempt))
            prompt = one(rng, i)
            problem = "it repeats an earlier one" if prompt.text in texts else _problem(
                prompt, encode
            )  # fmt: skip
            if not problem:
                prompts.append(prompt)
                texts.add(prompt.text)
                break
        else:
            raise BadInput(
                f"found no prompt {i} of {name!r} in {_TRIES} draws: of the last one, {problem}. "
                "Ask for fewer prompts, or take a model whose tokenizer reads these words and "
                "numbers in like numbers of tokens."
            )
    return prompts


def _problem(prompt: Prompt, encode: Encode) -> str:
    """Say why a prompt cannot be used with its twin; nothing where it can."""
    twin = prompt.corrupted
    if twin is None:
        return "it has no twin"
    asked, other = list(encode(prompt.text)), list(encode(twin.text))
    if len(asked) != len(other):
        return f"{prompt.text!r} has {len(asked)} tokens and its twin {twin.text!r} {len(other)}"
    answers: list[list[int]] = []
    for of_one, ids in ((prompt, asked), (twin, other)):
        solved = list(encode(of_one.text + of_one.answer))
        if solved[: len(ids)] != ids or len(solved) == len(ids):
            return f"the answer {of_one.answer!r} does not go on from {of_one.text!r}"
        answers.append(solved[len(ids) :])
    right, wrong = answers
    if len(right) != len(wrong):
        return (
            f"the answers {prompt.answer!r} and {twin.answer!r} have {len(right)} and {len(wrong)} "
            "tokens"
        )
    if right[0] == wrong[0]:
        return f"the answers {prompt.answer!r} and {twin.answer!r} begin with the same token"
    return ""
