"""What people hand over as prompts, answers and decoder inputs: read as meant, or refused."""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import TypeCheckError
from transformers import BatchEncoding

from ra_lens import check_model, run_with_ra, trace_paths
from ra_lens.errors import BadInput, RALensWarning
from ra_lens.experiments import patching_sweep, perturbation_test, rank_tasks
from ra_lens.heads import rank_heads
from ra_lens.paths import read_maps, trace_layers
from ra_lens.report import patched_predictions
from ra_lens.targets import answer_nll, logit_diff, sequence_nll
from ra_lens.tasks import Pair, Prompt, Task
from tiny_models import ANY_KIND, KINDS, random_ids, relative, text

ROWS = [[5, 9, 4, 7], [8, 3]]
WORDS = [text(row) for row in ROWS]
PAD = 6  # an ordinary word: only a mask says that it is padding
RIGHT = [[5, 9, 4, 7], [8, 3, PAD, PAD]]
LEFT = [[5, 9, 4, 7], [PAD, PAD, 8, 3]]
REAL = {"left": [[1, 1, 1, 1], [0, 0, 1, 1]], "right": [[1, 1, 1, 1], [1, 1, 0, 0]]}
TARGETS = [11, 12]
BOS, PAD_TOKEN = 1, 2  # of the tiny Llama


@pytest.fixture(params=ANY_KIND)
def model(request, shared):
    return shared("llama", request.param)


@contextmanager
def refused(message):
    """Raises BadInput with a message; what checks types, where asked for, is there first."""
    with pytest.raises((BadInput, TypeCheckError)) as caught:
        yield
    if isinstance(caught.value, BadInput):
        assert re.search(f"(?s){message}", str(caught.value)), str(caught.value)


def own(ra, i, layer):
    """R of example i without padding."""
    start, n = ra.info.starts[i], len(ra.str_tokens[i])
    return ra["ra", layer][i, :, start : start + n, start : start + n]


def check_each_is_as_alone(model, ra):
    for i, row in enumerate(ROWS):
        _, alone = run_with_ra(model, torch.tensor([row]), target=TARGETS[i])
        assert ra.str_tokens[i] == alone.str_tokens[0]
        assert relative(ra.loss[i], alone.loss[0]) < 1e-5
        for layer in alone.layers:
            assert relative(own(ra, i, layer), alone["ra", layer][0]) < 1e-5


# ---- prompts ------------------------------------------------------------------------------------


ONE_ROW = ROWS[0]
WAYS = {
    "what a tokenizer gives": lambda t: t(WORDS[0], return_tensors="pt", add_special_tokens=False),
    "the same in arrays": lambda t: t(WORDS[0], return_tensors="np", add_special_tokens=False),
    "the same in lists": lambda t: t(WORDS[0], add_special_tokens=False),
    "a dict": lambda t: {"input_ids": torch.tensor([ONE_ROW]), "token_type_ids": [[0] * 4]},
    "one row of a tensor": lambda t: torch.tensor(ONE_ROW),
    "unsigned bytes": lambda t: torch.tensor([ONE_ROW], dtype=torch.uint8),
    "a list": lambda t: ONE_ROW,
    "a tuple of NumPy's integers": lambda t: tuple(map(np.int64, ONE_ROW)),
    "a list of tensors without dimension": lambda t: list(torch.tensor(ONE_ROW)),
    "rows in lists": lambda t: [ONE_ROW],
    "a row that is a tensor, in a list": lambda t: [torch.tensor(ONE_ROW)],
    "what to_tokens gives, in a list": lambda t: [torch.tensor([ONE_ROW])],
    "an array": lambda t: np.array([ONE_ROW], dtype=np.uint16),
    "a Series": lambda t: pd.Series(ONE_ROW),
    "a Series that can miss some": lambda t: pd.Series(ONE_ROW, dtype="Int64"),
    "a range": lambda t: range(5, 9),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_hand_over_token_ids_is_the_same_prompt(model, way):
    ids = [5, 6, 7, 8] if way == "a range" else ONE_ROW
    _, wanted = run_with_ra(model, torch.tensor([ids]), target=11)
    _, ra = run_with_ra(model, WAYS[way](model.tokenizer), target=11)
    assert ra.str_tokens == wanted.str_tokens == [[f"w{i}" for i in ids]]
    assert ra.info.prepended is None
    assert torch.equal(ra.stack(), wanted.stack())


@pytest.mark.parametrize(
    "texts",
    [tuple(WORDS), np.array(WORDS), np.array(WORDS, dtype=object), pd.Series(WORDS), "generator"],
    ids=["tuple", "array", "array of objects", "Series", "generator"],
)
def test_texts_may_be_in_anything_that_iterates_over_strings(model, texts):
    given = (word for word in WORDS) if isinstance(texts, str) else texts
    _, wanted = run_with_ra(model, WORDS, target=TARGETS)
    _, ra = run_with_ra(model, given, target=TARGETS)
    assert ra.str_tokens == wanted.str_tokens
    assert torch.equal(ra.stack(), wanted.stack())


@pytest.mark.parametrize("side", REAL)
@pytest.mark.parametrize("form", [torch.tensor, np.array, list])
def test_the_mask_of_a_batch_says_what_is_padding(model, side, form):
    rows = LEFT if side == "left" else RIGHT
    given = BatchEncoding({"input_ids": form(rows), "attention_mask": form(REAL[side])})
    _, ra = run_with_ra(model, given, target=TARGETS)
    check_each_is_as_alone(model, ra)


@pytest.mark.parametrize("side", REAL)
def test_a_mask_beside_it_wins(model, side):
    other = {"left": [[0, 0, 0, 1]] * 2, "right": [[1, 0, 0, 0]] * 2}[side]
    rows = torch.tensor(LEFT if side == "left" else RIGHT)
    given = {"input_ids": rows, "attention_mask": torch.tensor(other)}
    for mask in (torch.tensor(REAL[side]), torch.tensor(REAL[side]).bool(), REAL[side]):
        _, ra = run_with_ra(model, given, attention_mask=mask, target=TARGETS)
        check_each_is_as_alone(model, ra)


@pytest.mark.parametrize("side", [None, "left"])
def test_rows_of_different_lengths_are_each_a_prompt(model, side):
    masks = [[1] * len(row) for row in ROWS]
    for given in (ROWS, [torch.tensor(row) for row in ROWS], {"input_ids": ROWS}):
        _, ra = run_with_ra(model, given, target=TARGETS, padding_side=side)
        check_each_is_as_alone(model, ra)
        assert ra.info.starts == ((0, 2) if side == "left" else (0, 0))
    _, ra = run_with_ra(model, {"input_ids": ROWS, "attention_mask": masks}, target=TARGETS)
    check_each_is_as_alone(model, ra)
    short = [*ROWS[:1], [PAD_TOKEN, 3]]  # a pad token in rows that nothing pads is a token
    assert run_with_ra(model, short, target=5)[1].str_tokens[1] == ["<pad>", "w3"]


def test_rows_of_one_length_are_read_as_the_tensor_they_make(model):
    rows = [[5, 9, 4], [8, 3, PAD_TOKEN]]
    _, wanted = run_with_ra(model, torch.tensor(rows), target=TARGETS)
    _, ra = run_with_ra(model, rows, target=TARGETS)
    assert ra.str_tokens == wanted.str_tokens == [["w5", "w9", "w4"], ["w8", "w3"]]


def test_a_chat_is_read_as_its_template_writes_it(model):
    model.tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %} {{ message['content'] }}{% endfor %}"
    )
    chat = [{"role": "user", "content": "w5 w9"}, {"role": "assistant", "content": "w4"}]
    try:
        ids = model.tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        written = model.tokenizer.apply_chat_template(chat, tokenize=False)
    finally:
        model.tokenizer.chat_template = None
    _, wanted = run_with_ra(model, torch.tensor([[BOS, 5, 9, 4]]), target=11)
    assert torch.equal(run_with_ra(model, ids, target=11)[1].stack(), wanted.stack())
    _, ra = run_with_ra(model, written, target=11, prepend_bos=False)
    assert torch.equal(ra.stack(), wanted.stack())
    with pytest.raises(BadInput, match=r"prompt 0 is a dict.*apply_chat_template"):
        run_with_ra(model, chat, target=11)


class Row:
    text = "w5"


NO_PROMPTS = {
    "nothing": (None, r"found None as prompt; text, .* or token ids are needed.*to_tokens"),
    "a number": (5, r"found 5 as prompt"),
    "NumPy's number": (np.int64(5), r"token ids of shape \(\)"),
    "a path": (Path("x"), r"found PosixPath\('x'\) as prompt|found WindowsPath"),
    "bytes": (b"w5", r"found a bytes as prompt; text is needed.*decode\(\)"),
    "a list of bytes": ([b"w5"], r"prompt 0 is a bytes; a list of prompts holds strings.*decode"),
    "a set": ({"w5"}, r"found a set as prompt, which has no order. Give a list"),
    "keys": ({"w5": 1}.keys(), r"found a dict_keys as prompt, which has no order"),
    "a dict": ({"a": "w5", "b": "w9"}, r"found a dict as prompt with 'a', 'b'.*mapping.values"),
    "ids of nothing": (
        {"input_ids": None, "x": 1},
        r"found a dict as prompt with 'input_ids', 'x'",
    ),
    "text as ids": ({"input_ids": "w5"}, r"found text under input_ids of a prompt"),
    "a table": (pd.DataFrame({"text": WORDS}), r"DataFrame of shape \(2, 1\).*one column"),
    "a matrix of text": (np.array([WORDS]), r"ndarray of shape \(1, 2\)"),
    "an array of floats": (np.array([1.0, 2.0]), r"torch.float64 tensor as prompt; .*integers"),
    "an array of bools": (np.array([True]), r"torch.bool tensor as prompt; .*integers"),
    "a list of floats": ([1.0, 2.0], r"prompt 0 is a float; a list of prompts holds strings"),
    "a list of bools": ([True, False], r"prompt 0 is a bool; a list of prompts holds strings"),
    "lists of texts": ([["w5"], ["w9"]], r"prompt 0 is a list; a list of prompts holds strings"),
    "text and a row": (["w5", [5]], r"prompt 1 is a list; a list of prompts holds strings"),
    "a row and text": ([[5], "w5"], r"prompt 1 is 'w5', and prompt 0 a row of token ids"),
    "an empty row": ([[5], []], r"prompt 1 is \[\], and prompt 0 a row.*at least one integer"),
    "an empty generator": (iter(()), r"empty list of prompts"),
    "things with a text": ([Row()], r"prompt 0 is a Row.*\[one.text for one in prompts\]"),
    "another mask in lists": (
        {"input_ids": ROWS, "attention_mask": [[1, 1], [1, 1]]},
        r"attention_mask of shape \(2, 2\) for token ids of shape \(4, 2\)",
    ),
    "a mask to be added": (
        {"input_ids": [[5, 9]], "attention_mask": torch.tensor([[0.0, -1e9]])},
        r"found -1000000000.0 in attention_mask; it is 1 at real tokens and 0 at padding",
    ),
    "a pair of texts": (
        {"input_ids": [[5, 9]], "token_type_ids": torch.tensor([[0, 1]])},
        r"found token_type_ids beside the input_ids of a prompt; .*ids and mask alone.*Leave it",
    ),
    "a decoder's input": (
        {"input_ids": [[5, 9]], "decoder_input_ids": [[5, 9]]},
        r"found decoder_input_ids beside the input_ids.*Give it as decoder_input=",
    ),
}


@pytest.mark.parametrize("case", NO_PROMPTS)
def test_what_is_no_prompt_is_refused_with_what_to_call(model, case):
    given, message = NO_PROMPTS[case]
    with refused(message):
        run_with_ra(model, given, target=11)


def test_a_mask_that_comes_with_text_is_refused(model):
    with pytest.raises(BadInput, match=r"attention_mask with text"):
        run_with_ra(model, "w5 w9", attention_mask=[1, 1], target=11)


def scores(found):
    return {beam.positions: beam.score_raw for beam in found.beams}


def probabilities(model, given):
    _, ra = run_with_ra(model, torch.tensor([ROWS[0]]), target=11)
    (found,) = patched_predictions(model, given, ra, target=11)
    return {"before": found.before.target, "after": found.after.target}


ENTRIES = {
    "trace_paths": lambda m, given: scores(trace_paths(m, given)),
    "trace_paths, R": lambda m, given: scores(trace_paths(m, given, follow="abs", target=11)),
    "trace_layers": lambda m, given: scores(trace_layers(m, given)),
    "trace_layers, R": lambda m, given: scores(trace_layers(m, given, follow="abs", target=11)),
    "read_maps": lambda m, given: scores(trace_paths(read_maps(m, given)[0])),
    "weights": lambda m, given: scores(trace_paths(torch.eye(4).roll(-1, 1).tril(), given)),
    "check_model": lambda m, given: {"ok": check_model(m, prompt=given).ok},
    "patched_predictions": probabilities,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_reads_what_a_tokenizer_gives(model, entry):
    call = ENTRIES[entry]
    wanted = call(model, torch.tensor([ROWS[0]]))
    for given in (WAYS["what a tokenizer gives"](model.tokenizer), iter(ROWS[0])):
        assert call(model, given) == wanted
    padded = {"input_ids": [[*ROWS[0], PAD]], "attention_mask": [[1, 1, 1, 1, 0]]}
    if entry != "weights":
        assert call(model, padded) == pytest.approx(wanted, rel=1e-5)
    for given in ({"w5"}, {"a": "w5"}, b"w5"):
        with refused("as prompt"):
            call(model, given)


def test_a_mask_of_ids_keeps_paths_of_weights_away(model):
    weights = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.1, 0.8, 0.1]])
    assert trace_paths(weights, {"input_ids": [[5, 9, 4]]}).beams[0].positions == (2, 1, 0)
    given = {"input_ids": [[5, 9, 4]], "attention_mask": [[1, 0, 1]]}
    assert [beam.positions for beam in trace_paths(weights, given).beams] == [(2, 0)]
    several = {"input_ids": [[5, 9, 4]] * 2, "attention_mask": [[1, 0, 1], [1, 1, 1]]}
    masked, whole = read_maps(weights.expand(2, 1, 3, 3), several)
    assert [beam.positions for beam in trace_paths(masked).beams] == [(2, 0)]
    assert trace_paths(whole).beams[0].positions == (2, 1, 0)
    with pytest.raises(BadInput, match=r"attention_mask= with a tensor; use trace_paths"):
        trace_layers(masked)


def test_several_prompts_are_told_before_one_is_traced(model):
    with pytest.raises(BadInput, match=r"found 2 prompts; this traces one.*read_maps"):
        trace_paths(model, {"input_ids": ROWS})
    with pytest.raises(BadInput, match=r"prompts of 2 to 4 tokens; check_model reads one"):
        check_model(model, prompt=ROWS)


PAIRS = tuple(Pair(f"w{i}", f"w{i + 10}") for i in range(3, 13))
TASK = Task("own", "icl", PAIRS, "", "", separator=" ")


def test_questions_are_read_once_whatever_holds_them(model):
    prompts = TASK.sample(3, shots=1)
    wanted = rank_heads(model, prompts, progress=False)
    found = rank_heads(model, iter(prompts), progress=False)
    assert torch.equal(found.scores, wanted.scores)
    for given in ({"a": prompts[0]}, set(prompts[:1]), "w5", None):
        with refused("found prompts of type .*list of Prompt is needed"):
            rank_heads(model, given)


@pytest.mark.parametrize("experiment", [perturbation_test, patching_sweep, rank_tasks])
def test_experiments_take_tasks_and_nothing_that_holds_them_unordered(model, experiment):
    for given in ({5: TASK}, {"own"}, b"own", None, 5):
        with refused(r"found a \w+ as task. Give a Task.*sets.values"):
            experiment(model, given)
    with refused("found a int among the tasks"):
        experiment(model, [TASK, 5])


# ---- answers ------------------------------------------------------------------------------------


ONE_ANSWER = {
    "ids without BOS": torch.tensor([[11]]),
    "what a tokenizer gives": {"input_ids": [11], "attention_mask": [1]},
    "its tensors": BatchEncoding({"input_ids": torch.tensor([[11]])}),
    "an array": np.array([11], dtype=np.uint16),
    "an array of rows": np.array([[11]]),
    "a Series of text": pd.Series(["w11"]),
    "an array of text": np.array(["w11"]),
    "a generator": "generator",
    "a generator in an objective": "answer_nll",
}


@pytest.mark.parametrize("way", ONE_ANSWER)
def test_every_way_to_hand_over_one_answer(model, way):
    def answer():
        made = {"generator": lambda: iter([11]), "answer_nll": lambda: answer_nll(iter(["w11"]))}
        return made[ONE_ANSWER[way]]() if isinstance(ONE_ANSWER[way], str) else ONE_ANSWER[way]

    ids = torch.tensor([ROWS[0]])
    _, wanted = run_with_ra(model, ids, target=11)
    _, ra = run_with_ra(model, ids, target=answer())
    assert ra.info.targets == ("w11",)
    assert torch.equal(ra.stack(), wanted.stack())
    traced = trace_paths(model, ids, follow="abs", target=answer())
    assert traced.beams == trace_paths(model, ids, follow="abs", target=11).beams


@pytest.mark.parametrize(
    "answers",
    [
        torch.tensor([[11, 12], [13, 14]]),
        np.array([[11, 12], [13, 14]]),
        {"input_ids": torch.tensor([[11, 12], [13, 14]])},
        [torch.tensor([11, 12]), (13, 14)],
        sequence_nll([[11, 12], [13, 14]]),
    ],
    ids=["tensor", "array", "mapping", "list", "objective"],
)
def test_rows_of_ids_are_one_answer_for_each_prompt(model, answers):
    _, ra = run_with_ra(model, torch.tensor(LEFT), target=answers)
    for i, answer in enumerate(["w11 w12", "w13 w14"]):
        _, alone = run_with_ra(model, torch.tensor(LEFT[i : i + 1]), target=answer)
        assert relative(ra.loss[i], alone.loss[0]) < 1e-5
        assert relative(own(ra, i, 1), alone["ra", 1][0]) < 1e-5


def test_a_mask_says_how_long_each_answer_is(model):
    padded = {"input_ids": [[11, 12], [13, PAD]], "attention_mask": [[1, 1], [1, 0]]}
    _, wanted = run_with_ra(model, torch.tensor(LEFT), target=["w11 w12", "w13"])
    _, ra = run_with_ra(model, torch.tensor(LEFT), target=padded)
    assert torch.equal(ra.stack(), wanted.stack())


WITH_BOS = r"begins with the BOS token \('<s>' \+ 'w11'.*to_tokens\(text, prepend_bos=False\)"
NO_ANSWERS = {
    "to_tokens": (torch.tensor([[BOS, 11]]), f"target 0 {WITH_BOS}"),
    "a row of it": (torch.tensor([BOS, 11]), r"2 targets for 1 prompt.*prepend_bos=False"),
    "lists": ([[BOS, 11]], f"target 0 {WITH_BOS}"),
    "what a tokenizer gives": ({"input_ids": [BOS, 11]}, f"target 0 {WITH_BOS}"),
    "sequence_nll": (sequence_nll([[BOS, 11]]), f"target 0 {WITH_BOS}"),
    "a correct answer": (logit_diff([[BOS, 11]], 12), f"target 0 {WITH_BOS}"),
    "a wrong answer": (logit_diff(12, torch.tensor([[BOS, 11]])), f"wrong answer 0 {WITH_BOS}"),
    "padded": ([[11, PAD_TOKEN]], r"target 0 begins or ends with '<pad>'.*without padding"),
    "padded on the left": (torch.tensor([[PAD_TOKEN, 11]]), r"target 0 begins or ends with"),
    "three dimensions": (torch.tensor([[[11]]]), r"target 0 is \[\[11\]\]"),
    "floats": (np.array([0.5]), r"target 0 is a float; give text or a token id"),
    "a set": ({"w11"}, r"found a set as target, which has no order"),
    "a dict": ({"w11": 1}, r"found a dict as target with 'w11' in it"),
    "bytes": (b"w", r"found a bytes as target; text is needed"),
    "a table": (pd.DataFrame({"w11": ["w12"]}), r"target 0 is \['w12'\]"),
}


@pytest.mark.parametrize("case", NO_ANSWERS)
def test_answers_that_would_be_read_as_something_else_are_refused(model, case):
    answer, message = NO_ANSWERS[case]
    with refused(message):
        run_with_ra(model, torch.tensor([ROWS[0]]), target=answer)


@pytest.mark.parametrize("kind", ANY_KIND)
def test_an_end_of_text_that_is_predicted_is_an_answer(kind, shared):
    model = shared("gpt2", kind)  # BOS, end of text and pad token are one
    ids = torch.tensor(LEFT)
    _, wanted = run_with_ra(model, ids, target=" <|endoftext|>")
    for answer in (0, torch.tensor([[0], [0]]), [[0], [0]]):
        _, ra = run_with_ra(model, ids, target=answer)
        assert torch.equal(ra.stack(), wanted.stack())
    _, ra = run_with_ra(model, ids, target=[[11, 0], [12, 0]])
    assert ra.info.targets == ("w11 <|endoftext|>", "w12 <|endoftext|>")
    with pytest.raises(BadInput, match=r"target 1 begins or ends with '<\|endoftext\|>', which sh"):
        run_with_ra(model, ids, target=torch.tensor([[11, 12], [13, 0]]))
    with pytest.raises(BadInput, match=r"target 0 begins with the BOS token"):
        run_with_ra(model, ids, target=torch.tensor([[0, 12], [0, 13]]))


def test_ids_in_rows_are_a_function_of_logits_too():
    logits = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    wanted = -logits[:, -1].log_softmax(-1)[[0, 1], [5, 6]]
    for rows in ([[5], [6]], torch.tensor([[5], [6]]), np.array([5, 6]), iter([5, 6])):
        torch.testing.assert_close(answer_nll(rows)(logits), wanted)
    with pytest.raises(BadInput, match=r"for logits of 2 examples"):
        answer_nll([[5, 6]])(logits)


# ---- decoder inputs -----------------------------------------------------------------------------


@pytest.mark.skipif("TransformerBridge" not in KINDS, reason="no TransformerBridge here")
def test_decoder_inputs_are_read_as_prompts_are(tmp_path):
    import arch_models
    from ra_lens.model import load_folder

    folder = arch_models.write("bart", tmp_path)
    model = load_folder(folder, kind="TransformerBridge", device="cpu")
    start, ids = arch_models.PAD, random_ids(2, 5)
    rows = [[start, 7, 9], [start, 4]]
    alone = [
        run_with_ra(model, ids[i : i + 1], target=11, decoder_input=torch.tensor([row]))[1]
        for i, row in enumerate(rows)
    ]
    padded = {"input_ids": [rows[0], [*rows[1], 3]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}
    for given in (rows, padded, BatchEncoding(padded), ["w7 w9", "w4"], np.array(["w7 w9", "w4"])):
        _, ra = run_with_ra(model, ids, target=11, decoder_input=given)
        for i, wanted in enumerate(alone):
            assert relative(ra.loss[i], wanted.loss[0]) < 1e-5
            for layer in (2, 3):  # the decoder's own attention, and that to the encoder
                _, queries, keys = wanted["ra", layer][0].shape
                found = ra["ra", layer][i, :, :queries, :keys]
                assert relative(found, wanted["ra", layer][0]) < 1e-5
    with pytest.warns(RALensWarning, match=r"decoder_input begins with '<pad>'.*Leave it out"):
        run_with_ra(model, ids, target=11, decoder_input="<pad> w7")
    for given, message in (
        ({"w7"}, "found a set as decoder_input"),
        ({"a": "w7"}, "found a dict as decoder_input"),
        ([], "empty list of decoder_inputs"),
        (["w7", 4], "decoder_input 1 is a int"),
        ("w7 \ud800", "decoder_input 0 has half a character"),
    ):
        with refused(message):
            run_with_ra(model, ids, target=11, decoder_input=given)


# ---- text ---------------------------------------------------------------------------------------


HALF = "w5 \udce9"  # what becomes of the byte of an é in Latin-1, read as a file name


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda m: run_with_ra(m, HALF, target=11), "prompt 0"),
        (lambda m: run_with_ra(m, ["w5", "\ud83d"], target=11), "prompt 1"),
        (lambda m: run_with_ra(m, "w5", target=HALF), "target 0"),
        (lambda m: run_with_ra(m, WORDS, target=["w5", HALF]), "target 1"),
        (lambda m: run_with_ra(m, "w5", target=logit_diff("w5", HALF)), "wrong answer 0"),
        (lambda m: trace_paths(m, HALF), "prompt 0"),
        (lambda m: check_model(m, prompt=HALF), "prompt 0"),
        (lambda m: rank_heads(m, [Prompt("w5", " w6"), Prompt(HALF, " w6")]), "prompt 1"),
        (lambda m: rank_heads(m, [Prompt("w5", HALF)]), "an answer of prompt 0"),
        (lambda m: Task("own", "icl", (*PAIRS, Pair("w5", HALF)), "", ""), "pair 10: its output"),
        (lambda m: TASK.with_format(separator=HALF), "separator of task 'own'"),
    ],
)
def test_half_a_character_is_told_where_it_is(model, call, where):
    told = r"has half a character, '\\ud.*at place \d.*wrong encoding.*'ignore'\)\.decode"
    with pytest.raises(BadInput, match=f"{where} {told}"):
        call(model)


@pytest.mark.parametrize(("arch", "bos"), [("llama", "<s>"), ("gpt2", "<|endoftext|>")])
@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_second_bos_is_told_once(arch, bos, kind, shared):
    model = shared(arch, kind)
    texts = ["w5 w9", f"{bos} w5", f"{bos} w9"]
    told = rf"prompt 1 begins with {bos!r}, which was put in front .*prepend_bos=False".replace(
        "|", r"\|"
    )
    with pytest.warns(RALensWarning, match=told) as caught:
        _, ra = run_with_ra(model, texts, target=11)
    assert len(caught) == 1
    assert ra.str_tokens[1] == [bos, bos, "w5"]
    with pytest.warns(RALensWarning, match=told) as caught:
        read_maps(model, texts, follow="abs", target=11)
    assert len(caught) == 1
    with pytest.warns(RALensWarning, match="prompt 0 begins with") as caught:
        rank_heads(model, [Prompt(texts[1], " w9")], progress=False)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, once = run_with_ra(model, texts[1], target=11, prepend_bos=False)
        assert once.str_tokens == [[bos, "w5"]]
        run_with_ra(model, texts[1], target=11, prepend_bos=True)  # asked for
        run_with_ra(model, f"w9 {bos}", target=11)
