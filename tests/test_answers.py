"""Asking many questions: in batches of like length, marked in the order given."""

from __future__ import annotations

import pytest
import torch

from ra_lens.answers import ask, by_length, read_questions
from ra_lens.errors import BadInput, RALensWarning
from ra_lens.heads import rank_heads
from ra_lens.sites import as_lens
from ra_lens.tasks import Pair, Prompt, Task
from tiny_models import KINDS

LENGTHS = (5, 2, 6, 2, 5, 3)
QUESTIONS = [
    Prompt(" ".join(f"w{3 + (i * 7 + k) % 30}" for k in range(n)), f" w{4 + i}")
    for i, n in enumerate(LENGTHS)
]


@pytest.mark.parametrize("kind", KINDS)
def test_marks_are_in_the_order_of_the_questions_whatever_the_batches(kind, shared):
    lens = as_lens(shared("llama", kind))
    questions = read_questions(lens, QUESTIONS, prepend_bos=False)
    alone = [ask(lens, read_questions(lens, [q], prepend_bos=False)) for q in QUESTIONS]
    for batch_size in (1, 2, 4, 6):
        marks = ask(lens, questions, batch_size=batch_size)
        for i, wanted in enumerate(alone):
            assert float(marks.probability[i]) == pytest.approx(float(wanted.probability), rel=1e-4)
            assert float(marks.logit_diff[i]) == pytest.approx(float(wanted.logit_diff), abs=1e-4)
            assert int(marks.above[i]) == int(wanted.above)
            assert int(marks.tied[i]) == int(wanted.tied)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_of_like_length_share_a_batch_and_hooks_know_which(kind, shared):
    lens = as_lens(shared("llama", kind))
    questions = read_questions(lens, QUESTIONS, prepend_bos=False)
    told, shapes = [], []

    def hooks_of(which):
        told.append(which)
        return [("blocks.0.hook_resid_pre", lambda x, hook: shapes.append(tuple(x.shape[:2])))]

    ask(lens, questions, hooks_of, batch_size=2)
    assert told == [[1, 3], [5, 0], [4, 2]]
    assert shapes == [(2, 2), (2, 5), (2, 6)]
    assert by_length(questions.prompts) == [1, 3, 5, 0, 4, 2]
    assert torch.equal(questions.first_tokens, torch.tensor([4, 5, 6, 7, 8, 9]))


STRANGE = Task(
    "capital", "icl", (Pair("w5", "w6"), Pair("Peru", "w7"), Pair("w8", "Quito")), "ask ", ""
)


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_a_task_that_the_model_does_not_know_are_named_with_it(kind, shared):
    model = shared("llama", kind)
    told = r"task 'capital': llama\w* does not know 'Peru', 'Quito', 'ask'; .* reads them as <pad>"
    for asked in ("w5", "Peru"):  # whichever prompt is read, it is the same warning
        query = next(pair for pair in STRANGE.pairs if pair.input == asked)
        with pytest.warns(RALensWarning, match=told) as caught:
            rank_heads(model, [STRANGE.build(query)], progress=False)
        assert len(caught) == 1
    with (
        pytest.warns(RALensWarning, match=told),
        pytest.raises(BadInput, match=r"answer of task 'capital': ' Quito' is not a word that"),
    ):
        rank_heads(model, STRANGE.sample(3), progress=False)
    with pytest.warns(RALensWarning, match=r"prompt 1: .* does not know 'Peru'; .* reads it as"):
        rank_heads(model, [Prompt("w5", " w6"), Prompt("w4 Peru", " w6")], progress=False)
