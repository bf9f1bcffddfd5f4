"""Corrupted twins: what they share with their prompt, what not, and where there is none."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from ra_lens import load_demo_model, load_task
from ra_lens.errors import BadInput
from ra_lens.tasks import Pair, Prompt, Task, with_corrupted

PAIRS = (("ab", "x"), ("cd", "y"), ("e", "z"), ("fg", "xyz"), ("hi", "w"), ("cd", "v"))
TASK = Task("own", "icl", tuple(Pair(*pair) for pair in PAIRS), "Q:", "\nA:")


def letters(text: str) -> list[int]:
    """One token per character, a space going with the next one."""
    return [ord(letter) for letter in re.sub(" (.)", lambda m: chr(0x100 + ord(m[1])), text)]


def test_a_twin_asks_for_another_pair_of_its_length_after_the_same_demonstrations() -> None:
    prompt = TASK.build(Pair("ab", "x"), [Pair("hi", "w")])
    found = {
        twin.query
        for seed in range(20)
        for one in with_corrupted([prompt], letters, seed=seed)
        if (twin := one.corrupted) is not None
    }
    # "e" is shorter, "hi" is demonstrated, " xyz" begins as " x" does.
    assert found == {Pair("cd", "y"), Pair("cd", "v")}


def test_twins_are_as_long_and_answer_otherwise_whatever_list_they_are_in() -> None:
    model, task = load_demo_model(), load_task("antonym")
    prompts = task.sample(12, shots=2)

    def encode(text: str) -> list[int]:
        return model.to_tokens(text)[0].tolist()

    found = with_corrupted(prompts, encode, seed=3)
    assert [replace(one, corrupted=None) for one in found] == prompts
    for one in found:
        twin = one.corrupted
        assert twin is not None and twin.query is not None and twin.query in task.pairs
        assert twin.demonstrations == one.demonstrations
        assert twin.query not in one.demonstrations
        assert len(encode(twin.text)) == len(encode(one.text))
        ends = [encode(p.text + p.answer)[len(encode(p.text))] for p in (one, twin)]
        assert ends[0] != ends[1]
    assert with_corrupted(prompts[::-1], encode, seed=3) == found[::-1]
    assert with_corrupted(found, encode, seed=4) == found  # they keep what they have
    assert with_corrupted(prompts, encode, seed=4) != found


def test_a_prompt_without_a_twin_says_which_and_what_to_do() -> None:
    with pytest.raises(BadInput, match=r"prompt 1 \('no task'\) is of no task.*corrupted=Prompt"):
        with_corrupted([TASK.build(Pair("ab", "x")), Prompt("no task", " y")], letters)
    alone = TASK.build(Pair("e", "z"))
    needed = r"prompt 0 \('Q:e\\nA:'\) has 6 tokens, and none of the 5 other pairs of task 'own'"
    with pytest.raises(BadInput, match=needed + r".*same_length_sets.*corrupted=Prompt"):
        with_corrupted([alone], letters)
    own = replace(alone, corrupted=Prompt("Q:f\nA:", " y"))
    assert with_corrupted([own], letters) == [own]


def test_the_draw_is_the_same_everywhere() -> None:
    prompts = [TASK.build(Pair("ab", "x")), TASK.build(Pair("hi", "w"))]
    drawn = [one.corrupted for one in with_corrupted(prompts, letters, seed=0)]
    assert [twin.query for twin in drawn if twin] == [Pair("cd", "v"), Pair("cd", "v")]
