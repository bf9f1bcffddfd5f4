"""Sets of questions of one length: a tokenizer made by hand, the embedded one, GPT-2's."""

import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2TokenizerFast

import ra_lens
from ra_lens.errors import BadInput
from ra_lens.tasks import Pair, Task, load_task, same_length_sets, task_names

PUBLISHED = Path(__file__).parents[3] / "shared" / "tasks"
DEMO = Path(ra_lens.__file__).parent / "demo" / "model"
GPT2 = "RA_LENS_GPT2_TOKENIZER"


def letters(text: str) -> list[int]:
    """One token per character, but one for each of " x", "Q: " and "\\nA:"."""
    for joined, token in (("Q: ", "\x01"), ("\nA:", "\x02"), (" x", "\x03")):
        text = text.replace(joined, token)
    return [ord(letter) for letter in text]


WORDS = ("ab", "x"), ("c", "x"), ("de", "x"), ("fg", "y"), ("h", "xx"), ("i", "x"), ("ab", "x")
TASK = Task("own", "icl", tuple(Pair(*pair) for pair in WORDS), "Q: ", "\nA:", source="here")


def inputs(task: Task) -> list[str]:
    return [pair.input for pair in task.pairs]


def test_pairs_are_grouped_by_the_length_of_question_and_answer() -> None:
    # "Q: ab\nA: x" is 1 + 2 + 1 + 1 tokens; " y" and " xx" are two.
    sets = same_length_sets(TASK, letters, at_least=1)
    assert {length: inputs(task) for length, task in sets.items()} == {
        4: ["c", "i"],
        5: ["ab", "de", "ab"],
    }
    assert [task.name for task in sets.values()] == ["own_len_4_1", "own_len_5_1"]
    assert {task.source for task in sets.values()} == {"here"}
    two = same_length_sets(TASK, letters, at_least=1, answer_tokens=2)
    assert {task.name: inputs(task) for task in two.values()} == {
        "own_len_5_2": ["h"],
        "own_len_6_2": ["fg"],
    }


def test_small_sets_are_left_out() -> None:
    assert list(same_length_sets(TASK, letters, at_least=3)) == [5]
    assert same_length_sets(TASK, letters, at_least=4) == {}
    assert same_length_sets(TASK, letters) == {}


def test_an_answer_that_changes_the_question_is_left_out() -> None:
    def joining(text: str) -> list[int]:
        return letters(text.replace(": x", "\x04"))  # the colon of the question goes with it

    sets = same_length_sets(TASK, joining, at_least=1, answer_tokens=2)
    assert [inputs(task) for task in sets.values()] == [["fg"]]
    assert same_length_sets(TASK, joining, at_least=1) == {}


def test_the_format_of_the_task_counts() -> None:
    longer = same_length_sets(TASK.with_format(opening="##"), letters, at_least=1)
    assert list(longer) == [6, 7]
    assert longer[6].opening == "##"


def test_sizes_below_one_are_refused() -> None:
    for name in ("answer_tokens", "at_least"):
        with pytest.raises(BadInput, match=rf"^found {name}=0; give at least 1\.$"):
            same_length_sets(TASK, letters, **{name: 0})


@pytest.mark.parametrize("name", task_names())
def test_every_built_in_task_is_one_set_for_the_embedded_model(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)

    def encode(text: str) -> list[int]:
        return [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]

    task = load_task(name)
    ((length, whole),) = same_length_sets(task, encode, at_least=1).items()
    assert whole.pairs == task.pairs
    assert whole.split().test == task.split().test
    for shots in (0, 1, 5):
        prompts = whole.split().prompts("test", shots=shots, n=10)
        lengths = {len(encode(prompt.text + prompt.answer)) for prompt in prompts}
        # The line break between examples is one token.
        assert lengths == {length + shots * (length - 1 + 1)}


def gpt2_tokenizer() -> GPT2TokenizerFast:
    where = os.environ.get(GPT2)
    if where is not None:
        return GPT2TokenizerFast.from_pretrained(where, local_files_only=True)
    try:
        found = GPT2TokenizerFast.from_pretrained("gpt2", local_files_only=True)
    except (OSError, TypeError):
        found = None
    # Where there are no files, some versions of transformers make an empty tokenizer.
    if found is None or len(found) != 50257:
        pytest.skip(
            f"needs GPT-2's tokenizer: a folder in the variable {GPT2} (vocab.json and merges.txt),"
            " or gpt2 in the Hugging Face cache"
        )
    return found


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published files in ../shared/tasks")
def test_the_sets_for_gpt2_are_the_published_ones() -> None:
    tokenizer = gpt2_tokenizer()
    assert tokenizer("<|endoftext|>Q: hot\nA: cold")["input_ids"] == [
        50256, 48, 25, 3024, 198, 32, 25, 4692,
    ]  # fmt: skip
    index = json.loads((PUBLISHED / "const_len_index.json").read_text(encoding="utf-8"))["sets"]
    published = {
        name: one for name, one in index.items() if not name.endswith(("_nospace", "_authors"))
    }
    assert len(published) == 23

    def encode(text: str) -> list[int]:
        return tokenizer(f"<|endoftext|>{text}")["input_ids"]

    made: dict[str, Task] = {}
    for name in task_names("icl", PUBLISHED):
        task = load_task(name, PUBLISHED)
        for length, one in same_length_sets(task, encode).items():
            made[one.name] = one
            wanted = published[one.name]
            assert wanted["task"] == name
            assert wanted["total_tokens_with_bos_and_answer"] == length
            assert one.pairs == tuple(task.pairs[i] for i in wanted["indices"])
            split = one.split()
            for part in ("train", "valid", "test"):
                pairs = tuple(task.pairs[i] for i in wanted[part])
                assert getattr(split, part) == pairs, (one.name, part)
    assert set(made) == set(published)
    for one in made.values():
        for shots in (1, 5):
            prompts = one.split().prompts("test", shots=shots, n=20)
            assert len({len(encode(prompt.text + prompt.answer)) for prompt in prompts}) == 1
