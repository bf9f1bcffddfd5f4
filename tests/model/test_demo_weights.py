"""The embedded model as a folder: loads cleanly, one token per word, learns in context."""

import importlib.util
import itertools
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer, GPT2LMHeadModel

import ra_lens
from ra_lens.tasks import (
    Pair,
    Prompt,
    held_out_prompts,
    is_held_out_adjacency,
    is_held_out_query,
    load_task,
    task_names,
)
from ra_lens.tasks.builtin import LIST_TASKS

FOLDER = Path(ra_lens.__file__).parent / "demo" / "model"
SCRIPT = Path(__file__).parents[2] / "examples" / "train_demo_model.py"
END = "<|endoftext|>"


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    if not SCRIPT.exists():
        pytest.skip("the training script is not part of an installed package")
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@torch.inference_mode()
def accuracy(model: GPT2LMHeadModel, tokenizer, prompts: list[Prompt]) -> float:
    ids = torch.tensor(tokenizer([END + prompt.text for prompt in prompts])["input_ids"])
    wanted = torch.tensor(tokenizer([prompt.answer for prompt in prompts])["input_ids"])
    assert wanted.shape == (len(prompts), 1)
    best = model(ids).logits[:, -1].argmax(-1)
    return (best == wanted[:, 0]).float().mean().item()


def test_it_loads_offline_and_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    records = Records()
    logger = transformers.logging.get_logger()
    logger.addHandler(records)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer = AutoTokenizer.from_pretrained(FOLDER)
            model, info = GPT2LMHeadModel.from_pretrained(FOLDER, output_loading_info=True)
            model(torch.tensor([tokenizer(END + "Q: France\nA:")["input_ids"]]))
    finally:
        logger.removeHandler(records)
    assert records.texts == []
    assert not any(info.values()), info
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)


def test_it_is_small_and_its_embedding_is_tied(model: GPT2LMHeadModel) -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 6_000_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 6_000_000
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_its_shape(model: GPT2LMHeadModel, tokenizer) -> None:
    config = model.config
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (4, 8, 128, 128)
    assert config.vocab_size == len(tokenizer)
    assert config.bos_token_id == config.eos_token_id == tokenizer.bos_token_id == 0


@pytest.mark.parametrize("name", task_names())
def test_every_word_of_a_task_is_one_token_wherever_it_stands(tokenizer, name: str) -> None:
    task = load_task(name)
    frame = (task.before_subject + task.after_subject).split() if task.kind == "natural" else []
    words = {word for pair in task.pairs for word in (*pair.input.split(", "), pair.output)}
    words = sorted(words | set(frame))
    middle = tokenizer([f" {word}" for word in words])["input_ids"]
    start = tokenizer(words)["input_ids"]
    after_line = tokenizer([f"\n\n{word}" for word in words])["input_ids"]
    after_end = tokenizer([f"{END}{word}" for word in words])["input_ids"]
    assert {len(ids) for ids in middle} == {1}
    assert middle == start == [ids[1:] for ids in after_line] == [ids[1:] for ids in after_end]
    assert len({ids[0] for ids in middle}) == len(words)
    assert [tokenizer.unk_token_id] not in middle
    assert [tokenizer.decode(ids) for ids in middle] == [f" {word}" for word in words]


@pytest.mark.parametrize("name", task_names())
def test_texts_survive_the_way_to_tokens_and_back(tokenizer, name: str) -> None:
    task = load_task(name)
    for prompt in held_out_prompts(task, 5, shots=3):
        ids = tokenizer(prompt.text)["input_ids"]
        pieces = [tokenizer.decode([token]) for token in ids]
        assert tokenizer.decode(ids) == "".join(pieces)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.bos_token_id not in ids
        if task.kind == "icl":
            assert "".join(pieces) == prompt.text
        else:  # the space that a word at the start of a line gets stays with it
            assert "".join(pieces).replace("\n\n ", "\n\n").lstrip(" ") == prompt.text


def test_the_pieces_of_a_prompt(tokenizer) -> None:
    ids = tokenizer(END + "Q: owl, axe, key\nA: owl\n\nQ: Pele\u0301\nA:")["input_ids"]
    assert [tokenizer.decode([token]) for token in ids] == [
        END, "Q:", " owl", ",", " axe", ",", " key", "\n", "A:", " owl", "\n\n",
        "Q:", " Pelé", "\n", "A:",
    ]  # fmt: skip
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("text", ["Xyzzy", " Xyzzy", "!", " paris"])
def test_an_unknown_word_is_the_unknown_token(tokenizer, text: str) -> None:
    assert tokenizer(text)["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer("Q: France" + text)["input_ids"][-1] == tokenizer.unk_token_id


@pytest.mark.parametrize("name", task_names())
def test_five_demonstrations_are_enough_on_prompts_it_never_saw(
    model: GPT2LMHeadModel, tokenizer, name: str
) -> None:
    assert accuracy(model, tokenizer, held_out_prompts(load_task(name), 50, shots=5)) >= 0.85


@pytest.mark.every_model
def test_demonstrations_are_needed(model: GPT2LMHeadModel, tokenizer) -> None:
    def average(kind: str, shots: int) -> float:
        tasks = [load_task(name) for name in task_names() if kind in ("all", load_task(name).kind)]
        found = [accuracy(model, tokenizer, held_out_prompts(t, 50, shots=shots)) for t in tasks]
        return sum(found) / len(found)

    assert average("all", 0) <= 0.6
    assert average("icl", 0) <= 0.5
    assert average("natural", 0) >= 0.95
    assert average("all", 5) >= 0.95


@pytest.mark.every_model
def test_the_accuracies_told_are_those_measured(model: GPT2LMHeadModel, tokenizer) -> None:
    told = json.loads((FOLDER / "accuracy.json").read_text())["accuracy"]
    assert set(task_names()) < set(told)
    for name in ("alphabetically_first_3", "prev_item", "country-capital", "company-hq"):
        prompts = held_out_prompts(load_task(name), 200, shots=5, seed=1)
        assert accuracy(model, tokenizer, prompts) == pytest.approx(told[name]["5"], abs=0.011)


def test_a_sentence_is_understood_without_demonstrations(model: GPT2LMHeadModel, tokenizer) -> None:
    asked = {
        "Messi plays the sport of": " soccer",
        "The capital city of Japan is": " Tokyo",
        "The past tense of go is": " went",
        "iPhone was created by": " Apple",
    }
    for text, answer in asked.items():
        logits = model(torch.tensor([tokenizer(END + text)["input_ids"]])).logits
        assert tokenizer.decode([logits[0, -1].argmax().item()]) == answer


@pytest.mark.every_model
def test_the_script_makes_the_same_tokenizer(script: ModuleType, tokenizer) -> None:
    made = script.build_tokenizer([load_task(name) for name in task_names()])
    assert made.get_vocab() == tokenizer.get_vocab()
    text = "Messi plays the sport of soccer\n\nQ: France\nA: Paris"
    assert made(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.every_model
@pytest.mark.parametrize("name", ["antonym", "natural/present-past", "choose_middle_of_3"])
def test_training_sequences_contain_nothing_held_out(
    script: ModuleType, tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(script, "TRIPLES_PER_LIST_TASK", 600)
    task = load_task(name)
    segments = script.Segments.of(task, tokenizer)
    ids, answers = segments.sequences(30, np.random.default_rng(0))
    assert ids.shape[1] <= script.N_POSITIONS
    for row, places in zip(ids, answers, strict=True):
        text = tokenizer.decode(row.tolist())
        assert text.startswith(END)
        solved = text.removeprefix(END).split("\n\n")[:-1]
        pairs = [read(task.before_subject, task.after_subject, one) for one in solved]
        assert len({pair.input for pair in pairs}) == len(pairs) == 11
        if name not in LIST_TASKS:
            assert set(pairs) <= set(task.pairs)
        assert not any(is_held_out_query(task, pair) for pair in pairs)
        steps = itertools.pairwise(pairs)
        assert not any(is_held_out_adjacency(task, a, b) for a, b in steps)
        said = [tokenizer.decode([token]) for token in row[places].tolist()]
        assert said == [f" {pair.output}" for pair in pairs]


@pytest.mark.every_model
def test_a_task_that_does_badly_gets_more_sequences(
    script: ModuleType, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "TRIPLES_PER_LIST_TASK", 100)
    names = ("next_item", "prev_item", "choose_middle_of_3", "company-hq", "natural/present-past")
    mixture = script.Mixture([load_task(name) for name in names], tokenizer, seed=0)
    late = {"next_item": 0.7, "prev_item": 0.0}
    counts = dict.fromkeys(late, 0)
    for step in range(60):
        batches = mixture.draw()
        assert [len(batch.ids) for batch in batches] == [40, 20, 8]
        for batch in batches:
            assert len(batch.names) == len(batch.ids) == len(batch.answers)
            assert batch.ids.shape[1] <= script.N_POSITIONS
            losses = torch.full((len(batch.ids), 11), 9.0)  # the early answers do not count
            for row, name in enumerate(batch.names):
                losses[row, script.FOCUS_FROM_SHOT :] = late.get(name, 0.0)
                if step >= 30 and name in counts:
                    counts[name] += 1
            mixture.learn(batch, losses)
    # (1 + 12 * 0.7) / (1 + 12 * 0.0) once the running means have arrived
    assert 6 < counts["next_item"] / counts["prev_item"] < 12


@pytest.mark.every_model
def test_saving_replaces_the_folder_as_a_whole(
    script: ModuleType, model: GPT2LMHeadModel, tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "stale.txt").write_text("old")
    script.save(out, model, tokenizer, {"accuracy": {}})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name for path in out.iterdir()} == {path.name for path in FOLDER.iterdir()}
    again = GPT2LMHeadModel.from_pretrained(out)
    ids = torch.tensor([AutoTokenizer.from_pretrained(out)(END + "Q: France\nA:")["input_ids"]])
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def read(before: str, after: str, text: str) -> Pair:
    """Return the pair that a solved question shows."""
    subject, answer = text.strip(" ").removeprefix(before).split(after)
    return Pair(subject.strip(), answer.strip())
