"""Parts of a task and the prompts they give: by hand, by a second MT19937, and as published."""

import itertools
import json
import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from other_process import printed_by
from ra_lens.errors import BadInput
from ra_lens.tasks import (
    Pair,
    Prompt,
    Split,
    Task,
    is_held_out_adjacency,
    is_held_out_query,
    load_task,
    task_names,
)
from ra_lens.tasks.builtin import LIST_TASKS

PUBLISHED = Path(__file__).parents[3] / "shared" / "tasks"
PARTS = ("train", "valid", "test")

# Pairs and sizes of the parts, as the paper's authors have them.
SIZES = {
    197: (137, 18, 42),
    205: (143, 19, 43),
    225: (157, 21, 47),
    293: (205, 27, 61),
    318: (222, 29, 67),
    814: (569, 74, 171),
    836: (585, 76, 175),
    1000: (700, 90, 210),
    2398: (1678, 216, 504),
    4698: (3288, 423, 987),
}


def numbered(n: int, name: str = "own") -> Task:
    return Task(name, "icl", tuple(Pair(str(i), f"w{i}") for i in range(n)), "Q: ", "\nA:")


def positions(pairs: tuple[Pair, ...]) -> list[int]:
    return [int(pair.input) for pair in pairs]


def shuffled(n: int, seed: int) -> list[int]:
    """numpy's legacy permutation, from the definition of MT19937 and of its seeding by a number."""
    state = [seed]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + i) & 0xFFFFFFFF)
    twister = random.Random()
    twister.setstate((3, (*state, 624), None))
    items = list(range(n))
    for i in reversed(range(1, n)):
        mask = 2 ** i.bit_length() - 1
        while (j := twister.getrandbits(32) & mask) > i:
            pass
        items[i], items[j] = items[j], items[i]
    return items


@pytest.mark.parametrize("n", SIZES)
def test_the_parts_have_the_published_sizes_and_share_nothing(n: int) -> None:
    split = numbered(n).split()
    assert (len(split.train), len(split.valid), len(split.test)) == SIZES[n]
    assert sorted(map(int, (p.input for p in split.train + split.valid + split.test))) == [
        *range(n)
    ]


def test_ten_pairs_by_hand() -> None:
    # numpy's best known permutation: RandomState(42).permutation(10).
    order = [8, 1, 5, 0, 7, 2, 9, 4, 3, 6]
    assert shuffled(10, 42) == order
    split = numbered(10).split()
    assert positions(split.train) == order[3:]
    # Three are set aside; shuffled again, ceil(0.9) = 1 of them is valid.
    assert shuffled(3, 42) == [0, 1, 2]
    assert positions(split.valid) == [8]
    assert positions(split.test) == [1, 5]
    text = numbered(10).split("text")
    assert positions(text.test) == [8, 1, 5, 0]
    assert positions(text.valid) == [7]
    assert positions(text.train) == [2, 9, 4, 3, 6]


@settings(deadline=None, max_examples=30)
@given(n=st.integers(4, 700), seed=st.integers(0, 2**32 - 1))
def test_the_parts_are_slices_of_permutations_of_their_own_mersenne_twister(
    n: int, seed: int
) -> None:
    order = shuffled(n, seed)
    aside = -(-3 * n // 10)
    again = [order[i] for i in shuffled(aside, seed)]
    n_valid = -(-3 * aside // 10)
    split = numbered(n).split(seed=seed)
    assert positions(split.train) == order[aside:]
    assert positions(split.valid) == again[:n_valid]
    assert positions(split.test) == again[n_valid:]
    text = numbered(n).split("text", seed=seed)
    third = -(-n // 3)
    assert positions(text.test + text.valid + text.train) == order
    assert len(text.test) == third
    assert len(text.valid) == -(-9 * n // 100)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published files in ../shared/tasks")
def test_every_published_task_is_split_as_published() -> None:
    splits = json.loads((PUBLISHED / "splits_seed42.json").read_text(encoding="utf-8"))["splits"]
    names = [f"{kind}/{name}" for kind in ("icl", "natural") for name in published_names(kind)]
    assert len(names) == 23
    assert set(names) == set(splits)
    for name in names:
        task = load_task(name, PUBLISHED)
        assert len(task.pairs) == splits[name]["n"]
        split = task.split()
        for part in PARTS:
            wanted = [task.pairs[i] for i in splits[name][part]]
            assert list(getattr(split, part)) == wanted, (name, part)


def published_names(kind: str) -> list[str]:
    return sorted(path.stem for path in (PUBLISHED / kind).glob("*.json"))


def test_too_few_pairs_are_refused() -> None:
    for rule, least in (("code", 4), ("text", 3)):
        split = numbered(least).split(rule)
        assert min(len(split.train), len(split.valid), len(split.test)) == 1
        with pytest.raises(BadInput) as info:
            numbered(least - 1).split(rule)
        assert str(info.value) == (
            f"Task 'own' has {least - 1} pairs; a train, a valid and a test part by the rule "
            f"'{rule}' need at least {least}."
        )
    with pytest.raises(BadInput, match="Task 'own' has 0 pairs"):
        numbered(0).split()
    with pytest.raises(BadInput, match=r"seed=-1; the seed of a split is a number from 0 to 42949"):
        numbered(9).split(seed=-1)
    # Where calls are type-checked, as in these tests, the checker refuses it first.
    with pytest.raises(BadInput, match="rule"):
        numbered(9).split("paper")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("rule", ["code", "text"])
@pytest.mark.parametrize("name", LIST_TASKS)
def test_list_tasks_are_tested_on_triples_that_training_never_had(name: str, rule) -> None:
    task = load_task(name)
    split, plain = task.split(rule), replace(task, unseen=None).split(rule)
    held = {pair for pair in task.pairs if is_held_out_query(task, pair)}
    assert len(split.test) == min(len(held), len(plain.test)) >= 20
    assert set(split.test) <= held
    assert not held & set(split.valid)
    assert len(split.valid) == len(plain.valid)
    assert sorted(split.train + split.valid + split.test, key=repr) == sorted(task.pairs, key=repr)
    # A task of which nothing is known to be unseen is split as published, whatever its name.
    assert not set(plain.test) <= held


def test_a_same_length_set_of_a_list_task_is_tested_on_held_out_triples_too() -> None:
    task = load_task("choose_middle_of_3")
    part = replace(task, name="choose_middle_of_3_len_11_1", pairs=task.pairs[:200])
    assert all(is_held_out_query(task, pair) for pair in part.split().test)
    few = replace(task, pairs=tuple(p for p in task.pairs if not is_held_out_query(task, p)))
    with pytest.raises(BadInput, match=r"has 0 pairs that the embedded model never saw and 2"):
        few.split()


@pytest.mark.parametrize("name", sorted(set(task_names()) - set(LIST_TASKS)))
def test_other_built_in_tasks_are_split_as_published(name: str) -> None:
    task = load_task(name)
    order = shuffled(len(task.pairs), 42)
    split = task.split()
    assert list(split.train) == [task.pairs[i] for i in order[-len(split.train) :]]


@pytest.mark.parametrize("name", task_names())
def test_test_prompts_of_built_in_tasks_end_in_a_step_that_training_never_had(name: str) -> None:
    task = load_task(name)
    split = task.split()
    for shots in (1, 5):
        prompts = split.prompts("test", shots=shots, n=15)
        assert [prompt.query for prompt in prompts] == list(split.test[:15])
        for prompt in prompts:
            last, query = prompt.demonstrations[-1], prompt.query
            assert query is not None
            possible = [p for p in split.train if is_held_out_adjacency(task, p, query)]
            assert is_held_out_adjacency(task, last, query) or not possible
            assert len(set(prompt.demonstrations)) == shots


def test_only_test_prompts_of_built_in_tasks_choose_their_last_demonstration() -> None:
    def held(asked: Task, part) -> float:
        prompts = asked.split().prompts(part, shots=1)
        return sum(
            is_held_out_adjacency(task, prompt.demonstrations[0], prompt.query)
            for prompt in prompts
            if prompt.query is not None
        ) / len(prompts)

    task = load_task("synonym")
    assert held(task, "test") > 0.9
    assert held(task, "train") < 0.3
    assert held(replace(task, unseen=None), "test") < 0.4


@settings(deadline=None, max_examples=40)
@given(
    part=st.sampled_from(PARTS),
    shots=st.integers(0, 6),
    seed=st.integers(0, 10**6),
    with_replacement=st.booleans(),
    built_in=st.booleans(),
)
def test_demonstrations_come_from_train_and_never_have_the_querys_input(
    part, shots: int, seed: int, with_replacement: bool, built_in: bool
) -> None:
    pairs = tuple(Pair(str(i // 2), f"w{i}") for i in range(40))  # every input twice
    task = load_task("antonym") if built_in else Task("twice", "icl", pairs, "Q: ", "\nA:")
    split = task.split()
    options = {"shots": shots, "seed": seed, "with_replacement": with_replacement}
    prompts = split.prompts(part, **options)
    pairs = getattr(split, part)
    assert len(prompts) == len(pairs)
    for prompt in prompts:
        assert prompt.query in pairs
        assert set(prompt.demonstrations) <= set(split.train)
        assert len(set(prompt.demonstrations)) == shots
        assert prompt.query.input not in [pair.input for pair in prompt.demonstrations]
        assert prompt == task.build(prompt.query, prompt.demonstrations)
        assert prompt.task is task
    assert split.prompts(part, n=3, **options) == prompts[:3]
    others = split.prompts(part, **options | {"seed": seed + 1})
    assert others != prompts or (shots == 0 and not with_replacement)
    if not with_replacement:
        assert [prompt.query for prompt in prompts] == list(pairs)


def test_every_query_gets_demonstrations_of_its_own() -> None:
    split = numbered(400).split()
    prompts = split.prompts("train", shots=5, n=25)
    assert [prompt.query for prompt in prompts] == list(split.train[:25])
    assert len({prompt.demonstrations for prompt in prompts}) == 25
    for part, other in itertools.permutations(PARTS, 2):
        here, there = split.prompts(part, shots=2, n=9), split.prompts(other, shots=2, n=9)
        assert [p.demonstrations for p in here] != [p.demonstrations for p in there]
    # All of train is drawn from, about evenly: 120 x 5 draws from 279 pairs.
    shown = {p for prompt in split.prompts("train", shots=5) for p in prompt.demonstrations}
    assert len(shown) == len(split.train)


@pytest.mark.parametrize("part", PARTS)
def test_shared_demonstrations_are_the_same_for_every_query_and_none_of_them(part) -> None:
    pairs = tuple(Pair(str(i // 2), f"w{i}") for i in range(80))  # every input twice
    split = Task("twice", "icl", pairs, "Q: ", "\nA:").split()
    options = {"shots": 4, "n": 5, "demonstrations": "shared"}
    prompts = split.prompts(part, **options)
    assert [prompt.query for prompt in prompts] == list(getattr(split, part)[:5])
    (shown,) = {prompt.demonstrations for prompt in prompts}
    assert len(set(shown)) == 4
    assert set(shown) <= set(split.train)
    assert not {pair.input for pair in shown} & {prompt.query.input for prompt in prompts}
    assert split.prompts(part, **options) == prompts
    others = [split.prompts(part, **options, seed=seed)[0].demonstrations for seed in range(20)]
    assert others[0] == shown
    assert len(set(others)) == 20
    if part != "train":  # of train those are shown that are not asked
        assert split.prompts(part, **{**options, "n": 2}) == prompts[:2]
        every = {pair.input for pair in getattr(split, part)}
        assert not {pair.input for pair in shown} & every


def test_shared_demonstrations_of_a_sample_are_none_of_its_queries() -> None:
    task = numbered(12)
    prompts = task.sample(8, shots=4, seed=3, demonstrations="shared")
    assert [p.query for p in prompts] == [p.query for p in task.sample(8, seed=3)]
    (shown,) = {prompt.demonstrations for prompt in prompts}
    assert set(shown) == set(task.pairs) - {prompt.query for prompt in prompts}
    assert task.sample(8, shots=4, seed=3) != prompts


@pytest.mark.parametrize("name", ["antonym", "country-capital"])
def test_shared_demonstrations_of_built_in_tests_end_in_a_step_rarely_seen(name: str) -> None:
    task = load_task(name)
    split = task.split()
    prompts = split.prompts("test", shots=5, demonstrations="shared")
    (shown,) = {prompt.demonstrations for prompt in prompts}
    unseen = [
        sum(is_held_out_adjacency(task, pair, query) for query in split.test)
        for pair in split.train
    ]
    assert unseen[split.train.index(shown[-1])] == max(unseen)
    assert len(set(unseen)) > 1


def test_shared_demonstrations_that_cannot_be_are_refused() -> None:
    task = numbered(20)
    for make, where in (
        (lambda: task.sample(18, shots=3, demonstrations="shared"), "task 'own' has 2 pairs"),
        (
            lambda: task.split().prompts("train", shots=3, n=12, demonstrations="shared"),
            "the train part of task 'own' has 2 pairs",
        ),
    ):
        with pytest.raises(BadInput) as info:
            make()
        assert where in str(info.value)
        assert "Ask for fewer shots or fewer questions, or take demonstrations='own'" in str(
            info.value
        )
    for call in (task.sample, task.split().prompts):
        with pytest.raises(BadInput, match="found demonstrations='mine'; give 'own'"):
            call(*([3] if call == task.sample else ["test"]), demonstrations="mine")


def test_queries_drawn_with_replacement_repeat_and_do_not_depend_on_the_shots() -> None:
    split = numbered(60).split()
    drawn = split.prompts("valid", n=200, seed=3, with_replacement=True)
    queries = [prompt.query for prompt in drawn]
    assert set(queries) == set(split.valid)
    assert len(split.valid) == 6
    counts = [queries.count(pair) for pair in split.valid]
    assert 15 < min(counts) <= max(counts) < 60
    again = split.prompts("valid", n=200, shots=4, seed=3, with_replacement=True)
    assert [prompt.query for prompt in again] == queries
    same = [prompt for prompt in again if prompt.query == queries[0]]
    assert len({prompt.demonstrations for prompt in same}) == len(same)


def test_prompts_are_the_same_in_another_process() -> None:
    code = (
        "from ra_lens.tasks import load_task as t;"
        "s = t('synonym').split();"
        "print([p.text for p in s.prompts('test', shots=2, n=3, seed=5)])"
    )
    here = load_task("synonym").split().prompts("test", shots=2, n=3, seed=5)
    assert printed_by(code) == str([prompt.text for prompt in here])


def test_what_cannot_be_asked_is_refused() -> None:
    split = numbered(20).split()
    assert (len(split.train), len(split.valid), len(split.test)) == (14, 2, 4)
    with pytest.raises(BadInput) as info:
        split.prompts("valid", n=25)
    assert str(info.value) == (
        "n=25 prompts were asked for, but the valid part of task 'own' has 2 pairs. Ask for at "
        "most 2, leave n out for all of them, or draw them with_replacement=True."
    )
    assert len(split.prompts("valid", n=25, with_replacement=True)) == 25
    with pytest.raises(BadInput) as info:
        split.prompts("train", shots=14)
    assert str(info.value) == (
        "shots=14, but the train part of task 'own' has 13 pairs beside the query "
        f"{split.train[0].input!r}. Ask for at most 13 shots."
    )
    assert len(split.prompts("test", shots=14)[0].demonstrations) == 14
    with pytest.raises(BadInput, match=r"n=0 prompts were asked for; at least 1 is needed\."):
        split.prompts("test", n=0)
    with pytest.raises(BadInput, match=r"shots=-1; the number of demonstrations is 0 or more\."):
        split.prompts("test", shots=-1)
    with pytest.raises(BadInput, match=r"The test part of task 'own' is empty"):
        Split(split.task, split.train, split.valid, ()).prompts("test")
    with pytest.raises(BadInput, match="part"):
        split.prompts("all")  # pyright: ignore[reportArgumentType]


def test_a_prompt_can_be_asked_after_other_demonstrations() -> None:
    task = load_task("country-capital")
    prompt = task.split().prompts("train", shots=2, n=1)[0]
    wrong = [Pair("France", "Tokyo")]
    other = prompt.with_demonstrations(wrong)
    assert prompt.query is not None
    assert other.text == f"Q: France\nA: Tokyo\n\nQ: {prompt.query.input}\nA:"
    assert other.answer == prompt.answer
    assert other.demonstrations == (Pair("France", "Tokyo"),)
    assert other.with_demonstrations(prompt.demonstrations) == prompt
    assert task.sample(1)[0].with_demonstrations(wrong).task is task
    with pytest.raises(BadInput, match=r"the prompt 'Hello' has no task, so it cannot be asked"):
        Prompt("Hello", " you").with_demonstrations(wrong)
    with pytest.raises(BadInput, match=r"the prompt 'Hello' has no query"):
        Prompt("Hello", " you", task=task).with_demonstrations(wrong)


def test_other_formats() -> None:
    task = load_task("country-capital")
    shown = [Pair("France", "Paris")]
    paper = task.with_format(opening="\n", separator="\n")
    assert paper.prompt("Italy", shown) == "\nQ: France\nA: Paris\nQ: Italy\nA:"
    assert task.prompt("Italy", shown) == "Q: France\nA: Paris\n\nQ: Italy\nA:"
    assert paper.split().prompts("test")[0].text.startswith("\nQ: ")
    natural = load_task("person-plays-pro-sport")
    framed = natural.with_format(
        before_subject=f"Q: {natural.before_subject}", after_subject=f"{natural.after_subject}\nA:"
    )
    assert framed.prompt("Messi") == "Q: Messi plays the sport of\nA:"
    assert natural.with_format(before_subject=" ").prompt("Messi") == " Messi plays the sport of"
    assert natural.with_format(after_subject="").prompt("Messi") == "Messi"
    assert natural.with_format() == natural
    assert paper.split().train == task.split().train


def test_a_task_that_is_copied_keeps_what_is_unseen_of_it() -> None:
    for task in (load_task("antonym"), load_task("choose_middle_of_3")):
        copies = (pickle.loads(pickle.dumps(task)), task.with_format(opening="\n"))
        for copy in copies:
            split = copy.split()
            assert split.test == task.split().test
            prompt = split.prompts("test", shots=2)[0]
            assert is_held_out_adjacency(task, prompt.demonstrations[-1], prompt.query)
        assert copies[0] == task
        assert "unseen" not in repr(task)
