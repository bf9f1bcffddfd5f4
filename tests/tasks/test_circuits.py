"""Prompts of known circuits: what is right for each, twins, seeds, and three kinds of tokenizer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import ra_lens
from ra_lens.errors import BadInput
from ra_lens.tasks import (
    CIRCUITS,
    Prompt,
    circuit_prompts,
    greater_than_prompts,
    induction_prompts,
    ioi_prompts,
    seen_tokens,
    year_tokens,
)
from real_model import needs_real_model, real_folder

BOS = -1


def words(text: str) -> list[int]:
    """As GPT-2 reads these texts: a token a word, a sign, or two digits; with BOS."""
    parts = re.findall(r" ?[A-Za-z]+| ?\d{1,2}|[^\w\s]", text)
    return [BOS, *(int.from_bytes(part.encode(), "big") for part in parts)]


def digits(text: str) -> list[int]:
    """As Llama reads them: the same, but a token for each digit."""
    parts = re.findall(r" ?[A-Za-z]+| (?=\d)|\d|[^\w\s]", text)
    return [int.from_bytes(part.encode(), "big") for part in parts]


TOKENIZERS = [words, digits]


def names(text: str) -> Counter[str]:
    # No other word of the templates begins with a capital, but the first and the day.
    return Counter(re.findall(r"[A-Z][a-z]+", text.split(" ", 1)[1])) - Counter(["Sunday", "Later"])


@pytest.mark.parametrize("encode", TOKENIZERS)
@pytest.mark.parametrize("name", CIRCUITS)
def test_twins_are_as_long_and_have_another_answer(name: str, encode: Callable[..., list[int]]):
    prompts = circuit_prompts(name, 40, encode)
    assert len({prompt.text for prompt in prompts}) == 40
    for prompt in prompts:
        twin = prompt.corrupted
        assert twin is not None and twin.corrupted is None
        asked, other = encode(prompt.text), encode(twin.text)
        assert len(asked) == len(other) and asked != other
        right, wrong = encode(prompt.text + prompt.answer), encode(prompt.text + twin.answer)
        assert right[: len(asked)] == asked == wrong[: len(asked)]
        assert right[len(asked)] != wrong[len(asked)]


@pytest.mark.parametrize("twin", ["swap", "third"])
def test_the_indirect_object_is_named_once(twin: str):
    prompts = ioi_prompts(60, words, seed=1, twin=twin)
    first = Counter()
    for prompt in prompts:
        counts = names(prompt.text)
        subject, answer = prompt.query.input, prompt.query.output
        assert counts == {subject: 2, answer: 1} and prompt.answer == f" {answer}"
        first[
            "answer" if prompt.text.index(answer) < prompt.text.index(subject) else "subject"
        ] += 1
        other = prompt.corrupted
        counts, last = names(other.text), other.query
        assert counts == {last.input: 2, last.output: 1} and other.answer == f" {last.output}"
        changed = [
            (a, b) for a, b in zip(prompt.text.split(), other.text.split(), strict=True) if a != b
        ]
        if twin == "swap":
            assert changed == [(subject, answer)] and other.answer == f" {subject}"
        else:
            assert changed == [(answer, last.output)] and last.input == subject
            assert last.output not in (subject, answer)
    assert first == {"answer": 30, "subject": 30}


def test_the_year_is_later_and_the_wrong_one_is_not():
    for prompt in greater_than_prompts(60, words, seed=2):
        century, start, end = re.fullmatch(
            r"The \w+ lasted from the year (\d\d)(\d\d) to the year (\d\d)", prompt.text
        ).groups()
        assert century == end and prompt.query.input == century + start
        twin = prompt.corrupted
        earlier = twin.query.input[2:]
        # By the first digit alone, as tokenizers of single digits decide it.
        assert earlier[0] < twin.answer[0] < start[0] < prompt.answer[0]
        right, wrong = year_tokens(prompt, words)
        text = prompt.text
        assert set(right) == {words(f"{text}{y:02}")[-1] for y in range(int(start) + 1, 100)}
        assert set(wrong) == {words(f"{text}{y:02}")[-1] for y in range(int(start) + 1)}
        right, wrong = year_tokens(prompt, digits)
        assert set(right) == {ord(str(d)) for d in range(int(start[0]) + 1, 10)}
        # The digit of the start's own decade begins years of both kinds, unless it is its last.
        assert set(wrong) == {ord(str(d)) for d in range(int(start[0]) + (start[1] == "9"))}
    with pytest.raises(
        BadInput, match=r"does not say in which year it starts. Give one of greater"
    ):
        year_tokens(Prompt("The", " war"), words)


def test_the_answer_followed_its_word_before():
    for prompt in induction_prompts(60, words, seed=3, length=10, repeated=4):
        row = prompt.text.split()
        assert len(row) == 14 and len(set(row)) == 10
        first, again = row[:10], row[10:]
        at = first.index(again[0])
        assert at > 0 and first[at : at + 4] == again
        assert prompt.answer == f" {first[at + 4]}"
        assert (again[-1], first[at + 4]) == (prompt.query.input, prompt.query.output)
        other = prompt.corrupted.text.split()
        changed = [i for i in range(14) if row[i] != other[i]]
        assert changed == [at + 4] and prompt.corrupted.answer == f" {other[at + 4]}"


def test_what_heads_have_to_look_at_is_found_among_the_tokens():
    for name, wanted in (("ioi", None), ("induction", None), ("greater_than", "year")):
        for prompt in circuit_prompts(name, 20, words):
            ids = words(prompt.text)
            [place] = seen_tokens(name, prompt, words)
            text = prompt.query.input[2:] if wanted else prompt.answer
            assert ids[place] == int.from_bytes(text.encode(), "big")
            assert place < len(ids) - 1
    [prompt] = circuit_prompts("greater_than", 1, digits)
    two = [digits(prompt.text)[place] for place in seen_tokens("greater_than", prompt, digits)]
    assert "".join(map(chr, two)) == prompt.query.input[2:]
    # A word that begins a longer one is not taken for it.
    prompt = Prompt("an artist and art then", " art")
    assert list(seen_tokens("induction", prompt, words)) == [4]


def test_the_first_prompts_are_those_of_any_number_and_seeds_differ():
    for name in CIRCUITS:
        five = circuit_prompts(name, 5, words)
        assert five == circuit_prompts(name, 12, words)[:5]
        assert not set(five) & set(circuit_prompts(name, 5, words, seed=1))
    # As everything drawn: the same on every machine and version of Python.
    assert ioi_prompts(1, words)[0].text == IOI_TEXT
    assert greater_than_prompts(1, words)[0].text == GREATER_THAN_TEXT
    assert induction_prompts(1, words)[0].text == INDUCTION_TEXT


IOI_TEXT = "After Rose and Henry met at the theater, Henry handed the basket to"
GREATER_THAN_TEXT = "The dispute lasted from the year 1682 to the year 16"
INDUCTION_TEXT = (
    "envelope rabbit obey penguin rope visible honest fox hammer goat door candle"
    " visible honest fox"
)


def unequal(text: str) -> list[int]:
    """A token for each letter, a space with the one after it: few words have as many."""
    parts = re.findall(r" ?\w|[^\w\s]", text)
    return [int.from_bytes(part.encode(), "big") for part in parts]


def test_twins_that_are_not_as_long_are_left_out_and_too_few_are_refused():
    for name in ("ioi", "induction"):
        for prompt in circuit_prompts(name, 10, unequal):
            assert len(prompt.text) == len(prompt.corrupted.text)
            assert len(prompt.answer) == len(prompt.corrupted.answer)
    uneven = ["a", "bb", "ccc", "dddd", "eeeee"]
    with pytest.raises(BadInput, match=r"no prompt 0 of 'induction' in 100 draws.* has \d+ tokens"):
        induction_prompts(2, unequal, length=4, repeated=1, words=uneven)
    with pytest.raises(BadInput, match=r"prompt \d+ of 'induction'.*it repeats an earlier one"):
        induction_prompts(500, words, length=3, repeated=1, words=list("abcd"))
    with pytest.raises(BadInput, match=r"does not go on from 'The .*like numbers of tokens"):
        greater_than_prompts(1, lambda text: [len(text)])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ioi_prompts(0, words), "n=0"),
        (lambda: ioi_prompts(2, words, twin="none"), "twin='none'; give 'swap' or 'third'"),
        (lambda: induction_prompts(2, words, length=4), r"at least 5 \(repeated \+ 2\)"),
        (lambda: induction_prompts(2, words, words=list("ab")), "2 words"),
        (lambda: circuit_prompts("io", 1, words), "circuit 'io'.*Close names: ioi.*'induction'"),
    ],
)
def test_what_cannot_be_made_is_refused(call: Callable[[], object], said: str):
    with pytest.raises(BadInput, match=said):
        call()


@pytest.mark.every_model
def test_the_embedded_model_reads_every_word_of_an_induction_prompt():
    folder = Path(ra_lens.__file__).parent / "demo" / "model"
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    prompts = induction_prompts(30, lambda text: tokenizer(text)["input_ids"])
    for prompt in prompts:
        ids = tokenizer(prompt.text + prompt.answer)["input_ids"]
        assert tokenizer.unk_token_id not in ids and len(ids) == 16
    with pytest.raises(BadInput, match="begin with the same token"):  # names it does not know
        ioi_prompts(1, lambda text: tokenizer(text)["input_ids"])


@needs_real_model
@pytest.mark.every_model
@pytest.mark.parametrize("name", CIRCUITS)
def test_a_real_tokenizer_reads_twins_alike(name: str):
    tokenizer = AutoTokenizer.from_pretrained(str(real_folder()))

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for prompt in circuit_prompts(name, 60, encode):
        asked, other = (encode(one.text) for one in (prompt, prompt.corrupted))
        assert len(asked) == len(other)
        right, wrong = (encode(one.answer) for one in (prompt, prompt.corrupted))
        assert right[0] != wrong[0] and len(right) == len(wrong)
