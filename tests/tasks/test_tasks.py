"""The built-in tasks: facts, sharing of words, texts of prompts, seeds and what is held out."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from other_process import printed_by
from ra_lens.errors import BadInput
from ra_lens.tasks import (
    Pair,
    Task,
    held_out_prompts,
    is_held_out_adjacency,
    is_held_out_query,
    load_task,
    task_names,
)
from ra_lens.tasks.builtin import LIST_TASKS, list_pairs, word_pools

ICL = task_names("icl")
NATURAL = task_names("natural")
ALL = task_names()
any_task = st.sampled_from([load_task(name) for name in ALL])

# Written by hand, from knowledge of the world and not from the tables.
FACTS = {
    "antonym": {"hot": "cold", "cold": "hot", "buy": "sell", "alive": "dead", "tiny": "huge"},
    "synonym": {"big": "large", "quick": "fast", "angry": "furious", "begin": "start"},
    "country-capital": {
        "France": "Paris",
        "Japan": "Tokyo",
        "Brazil": "Brasília",
        "Kenya": "Nairobi",
    },
    "english-french": {"dog": "chien", "egg": "œuf", "Germany": "Allemagne", "Monday": "lundi"},
    "next_item": {"Monday": "Tuesday", "December": "January", "nine": "ten", "c": "d", "9": "10"},
    "prev_item": {"Monday": "Sunday", "January": "December", "one": "zero", "third": "second"},
    "person-sport": {
        "Messi": "soccer",
        "Gretzky": "hockey",
        "Federer": "tennis",
        "Ichiro": "baseball",
    },
    "present-past": {"go": "went", "buy": "bought", "walk": "walked", "eat": "ate", "pay": "paid"},
    "singular-plural": {"child": "children", "knife": "knives", "city": "cities", "fox": "foxes"},
    "company-hq": {"Nintendo": "Kyoto", "Volkswagen": "Wolfsburg", "Starbucks": "Seattle"},
    "landmark-in-country": {"Colosseum": "Italy", "Petra": "Jordan", "Stonehenge": "England"},
    "product-by-company": {"iPhone": "Apple", "PlayStation": "Sony", "Photoshop": "Adobe"},
}


def as_dict(name: str) -> dict[str, str]:
    return {pair.input: pair.output for pair in load_task(name).pairs}


def test_there_are_the_fifteen_and_the_six_tasks_of_the_paper() -> None:
    assert len(ICL) == 15
    assert len(NATURAL) == 6
    assert ALL == ICL + NATURAL
    assert len(set(ALL)) == 21


@pytest.mark.parametrize("name", FACTS)
def test_facts_checked_by_hand(name: str) -> None:
    pairs = as_dict(name)
    assert {word: pairs[word] for word in FACTS[name]} == FACTS[name]


@pytest.mark.parametrize("name", ALL)
def test_a_task_knows_its_name_and_has_at_least_sixty_pairs_with_different_inputs(
    name: str,
) -> None:
    task = load_task(name)
    assert task.name == name
    assert task.kind == ("icl" if name in ICL else "natural")
    assert len(task.pairs) >= 60
    assert len({pair.input for pair in task.pairs}) == len(task.pairs)


@pytest.mark.parametrize("name", ALL)
def test_every_input_and_output_is_a_single_word(name: str) -> None:
    for pair in load_task(name).pairs:
        words = pair.input.split(", ") if name in LIST_TASKS else [pair.input]
        assert len(words) == (3 if name in LIST_TASKS else 1)
        for word in (*words, pair.output):
            assert word.isalnum(), pair
            assert word.isdecimal() or word.isalpha(), pair


def test_next_item_and_prev_item_are_inverse() -> None:
    following, preceding = as_dict("next_item"), as_dict("prev_item")
    assert {after: before for before, after in following.items()} == preceding
    assert "twenty" not in following
    assert "zero" not in preceding


@pytest.mark.parametrize("cycle", ["Friday", "August"])
def test_days_and_months_come_back_to_where_they_started(cycle: str) -> None:
    following, seen = as_dict("next_item"), [cycle]
    while (word := following[seen[-1]]) != cycle:
        seen.append(word)
    assert len(seen) == {"Friday": 7, "August": 12}[cycle]


def test_alphabetically_first_is_the_first_in_the_alphabet() -> None:
    for pair in load_task("alphabetically_first_3").pairs:
        assert sorted(pair.input.split(", "))[0] == pair.output


def test_the_middle_is_the_second_of_three() -> None:
    for pair in load_task("choose_middle_of_3").pairs:
        assert pair.input.split(", ")[1] == pair.output


@pytest.mark.parametrize(
    ("name", "wanted", "other"),
    [("animal_v_object_3", "animal", "object"), ("adjective_v_verb_3", "adjective", "verb")],
)
def test_the_answer_is_the_only_word_of_its_pool(name: str, wanted: str, other: str) -> None:
    pools = word_pools()
    places: Counter[int] = Counter()
    for pair in load_task(name).pairs:
        words = pair.input.split(", ")
        places[words.index(pair.output)] += 1
        assert [word for word in words if word in pools[wanted]] == [pair.output]
        assert sum(word in pools[other] for word in words) == 2
    assert min(places.values()) > 60  # every place is about as frequent as the others


def test_pools_are_disjoint_and_of_equal_size() -> None:
    pools = word_pools()
    assert set(pools) == {"animal", "object", "adjective", "verb"}
    words = [word for pool in pools.values() for word in pool]
    assert len(set(words)) == len(words) == 96
    assert {len(pool) for pool in pools.values()} == {24}


def test_pool_words_belong_to_tasks_that_say_what_they_are() -> None:
    pools = word_pools()
    assert set(pools["verb"]) <= set(as_dict("present-past"))
    assert set(pools["animal"]) | set(pools["object"]) <= set(as_dict("singular-plural"))
    described = set(as_dict("antonym")) | set(as_dict("synonym"))
    assert set(pools["adjective"]) <= described


def test_capitals_agree_with_str_methods() -> None:
    for word, answer in as_dict("capitalize").items():
        assert word.islower()
        assert answer == word.capitalize()
    for word, answer in as_dict("capitalize_first_letter").items():
        assert answer == word[0].upper()


def test_plurals_and_pasts_differ_from_what_they_are_made_of() -> None:
    for name in ("singular-plural", "present-past", "antonym", "synonym", "english-french"):
        assert all(word != answer for word, answer in as_dict(name).items()), name


@pytest.mark.parametrize("name", ["antonym", "synonym"])
def test_opposites_and_synonyms_hold_in_both_directions(name: str) -> None:
    pairs = as_dict(name)
    assert all(pairs[b] == a for a, b in pairs.items() if b in pairs)


def test_natural_tasks_reuse_the_pairs_of_the_tasks_they_share_a_name_with() -> None:
    assert load_task("natural/country-capital").pairs == load_task("country-capital").pairs
    assert load_task("natural/present-past").pairs == load_task("present-past").pairs


def test_nearly_all_inputs_of_the_pair_tasks_serve_several_tasks() -> None:
    uses = Counter(word for name in ICL if name not in LIST_TASKS for word in as_dict(name))
    shared = sum(count >= 2 for count in uses.values())
    assert shared / len(uses) > 0.9
    for name in set(ICL) - set(LIST_TASKS):
        own = as_dict(name)
        assert sum(uses[word] >= 2 for word in own) / len(own) > 0.9, name


def test_a_triple_alone_does_not_tell_the_task() -> None:
    pools = word_pools()
    for name in ("alphabetically_first_3", "choose_middle_of_3"):
        forms: Counter[tuple[str, ...]] = Counter()
        for pair in load_task(name).pairs:
            words = pair.input.split(", ")
            forms[tuple(sorted(next(k for k in pools if w in pools[k]) for w in words))] += 1
        assert forms["adjective", "verb", "verb"] > 90
        assert forms["animal", "object", "object"] > 90


def test_list_pairs_extend_what_a_shorter_list_had() -> None:
    pools = word_pools()
    for name in LIST_TASKS:
        assert list_pairs(name, pools, 40)[:25] == list_pairs(name, pools, 25)
        assert list_pairs(name, pools, 25, seed=1) != list_pairs(name, pools, 25)


def test_the_text_of_icl_prompts() -> None:
    task = load_task("country-capital")
    shown = [Pair("France", "Paris"), Pair("Japan", "Tokyo")]
    assert task.prompt("Italy") == "Q: Italy\nA:"
    assert (
        task.prompt(Pair("Italy", "Rome"), shown)
        == "Q: France\nA: Paris\n\nQ: Japan\nA: Tokyo\n\nQ: Italy\nA:"
    )
    assert task.answer(Pair("Italy", "Rome")) == " Rome"
    triple = Pair("axe, owl, key", "owl")
    assert (
        load_task("choose_middle_of_3").prompt("fox, door, cow", [triple])
        == "Q: axe, owl, key\nA: owl\n\nQ: fox, door, cow\nA:"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("company-hq", "Sony is headquartered in the city of"),
        ("landmark-in-country", "Sony is in the country of"),
        ("person-plays-pro-sport", "Sony plays the sport of"),
        ("product-by-company", "Sony was created by"),
        ("natural/country-capital", "The capital city of Sony is"),
        ("natural/present-past", "The past tense of Sony is"),
    ],
)
def test_the_text_of_natural_prompts(name: str, text: str) -> None:
    task = load_task(name)
    assert task.prompt("Sony") == text
    assert task.prompt("Sony", [Pair("Sony", "blue")]) == f"{text} blue\n\n{text}"


@settings(deadline=None)  # a busy machine is no failure
@given(task=any_task, shots=st.integers(0, 12), seed=st.integers(0, 10**6))
def test_demonstrations_never_contain_the_query(task: Task, shots: int, seed: int) -> None:
    for prompt in task.sample(3, shots=shots, seed=seed):
        inputs = [pair.input for pair in prompt.demonstrations]
        assert len(set(inputs)) == len(inputs) == shots
        assert prompt.query.input not in inputs
        assert set(prompt.demonstrations) <= set(task.pairs)
        assert prompt.text == task.prompt(prompt.query, prompt.demonstrations)
        assert prompt.answer == " " + prompt.query.output


def test_a_repeated_input_is_not_shown_either() -> None:
    pairs = (Pair("a", "1"), Pair("a", "2"), Pair("b", "3"))
    task = Task("own", "icl", pairs, "Q: ", "\nA:")
    for prompt in task.sample(30, shots=1):
        assert prompt.demonstrations[0].input != prompt.query.input


def test_sampling_is_seeded_and_asks_every_pair_before_one_twice() -> None:
    task = load_task("antonym")
    n = len(task.pairs)
    assert task.sample(9, shots=3, seed=4) == task.sample(9, shots=3, seed=4)
    assert task.sample(9, shots=3, seed=4) == task.sample(20, shots=3, seed=4)[:9]
    assert task.sample(9, shots=3, seed=4) != task.sample(9, shots=3, seed=5)
    queries = [prompt.query for prompt in task.sample(2 * n, shots=1)]
    assert set(queries[:n]) == set(queries[n:]) == set(task.pairs)
    assert queries[:n] != queries[n:]
    assert queries == [prompt.query for prompt in task.sample(2 * n)]


def test_samples_are_the_same_in_another_process() -> None:
    code = (
        "from ra_lens.tasks import load_task as t, held_out_prompts as h;"
        "print([p.text for p in t('synonym').sample(4, shots=2, seed=3)]"
        " + [p.text for p in h(t('choose_middle_of_3'), 4, shots=2, seed=3)])"
    )
    here = load_task("synonym").sample(4, shots=2, seed=3)
    here += held_out_prompts(load_task("choose_middle_of_3"), 4, shots=2, seed=3)
    assert printed_by(code) == str([prompt.text for prompt in here])


@settings(deadline=None)  # a busy machine is no failure
@given(task=any_task, shots=st.integers(1, 10), seed=st.integers(0, 10**6))
def test_held_out_prompts_end_in_what_training_never_has(task: Task, shots: int, seed: int) -> None:
    for prompt in held_out_prompts(task, 3, shots=shots, seed=seed):
        inputs = [pair.input for pair in prompt.demonstrations]
        assert len(set(inputs)) == len(inputs) == shots
        assert prompt.query.input not in inputs
        assert is_held_out_adjacency(task, prompt.demonstrations[-1], prompt.query)
        assert is_held_out_query(task, prompt.query) == (task.name in LIST_TASKS)


def test_held_out_triples_are_a_seventh_whatever_their_order_or_task() -> None:
    task, other = load_task("alphabetically_first_3"), load_task("choose_middle_of_3")
    held = [is_held_out_query(task, pair) for pair in task.pairs]
    assert 0.08 < sum(held) / len(held) < 0.2
    for pair, is_held in zip(task.pairs, held, strict=True):
        backwards = ", ".join(reversed(pair.input.split(", ")))
        assert is_held_out_query(other, Pair(backwards, "")) == is_held


@pytest.mark.parametrize("name", sorted(set(ALL) - set(LIST_TASKS)))
def test_about_a_tenth_of_the_steps_is_held_out(name: str) -> None:
    task = load_task(name)
    held = [is_held_out_adjacency(task, a, b) for a in task.pairs for b in task.pairs]
    assert 0.08 < sum(held) / len(held) < 0.12


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("icl/antonym", "antonym"),
        ("icl/country-capital", "country-capital"),
        ("natural/company-hq", "company-hq"),
        ("natural/present-past", "natural/present-past"),
        ("present-past", "present-past"),
    ],
)
def test_a_task_may_be_called_by_kind_and_name(asked: str, name: str) -> None:
    assert load_task(asked) == load_task(name)
    assert load_task(asked).name == name


def test_an_unknown_name_is_refused_with_close_ones() -> None:
    with pytest.raises(BadInput) as info:
        load_task("Country Capitl")
    assert str(info.value) == (
        "There is no task 'Country Capitl'. Close names: country-capital, "
        "natural/country-capital, capitalize. "
        "ra_lens.tasks.task_names() lists the 21 built-in tasks."
    )
    for name in ("natural/antonym", "icl/company-hq", "other/antonym", "zzzzzz", ""):
        with pytest.raises(BadInput, match=r"task_names\(\) lists the 21"):
            load_task(name)


def test_sizes_out_of_range_are_refused() -> None:
    task = load_task("person-sport")
    with pytest.raises(BadInput, match=r"n=0 prompts were asked for; at least 1 is needed\."):
        task.sample(0)
    with pytest.raises(BadInput, match=r"shots=-1; the number of demonstrations is 0 or more\."):
        task.sample(1, shots=-1)
    with pytest.raises(BadInput, match=r"shots=83, but task 'person-sport' has 82 pairs beside"):
        task.sample(1, shots=83)
    assert len(task.sample(1, shots=82)[0].demonstrations) == 82
    with pytest.raises(BadInput, match=r"Task 'own' has no pairs"):
        Task("own", "icl", (), "Q: ", "\nA:").sample(1)
    with pytest.raises(BadInput, match=r"n=0 and shots=2; task 'person-sport' with its 83 pairs"):
        held_out_prompts(task, 0, shots=2)
    # Where calls are type-checked, as in these tests, the checker refuses it first.
    with pytest.raises(BadInput, match="kind"):
        task_names("both")  # pyright: ignore[reportArgumentType]


def test_tasks_load_without_torch() -> None:
    code = (
        "import sys; from ra_lens import tasks; tasks.load_task('antonym');"
        "print(sorted({'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    assert printed_by(code) == "[]"
