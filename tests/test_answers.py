"""Asking many questions: in batches of like length, marked in the order given."""

from __future__ import annotations

import pytest
import torch

from ra_lens.answers import ask, by_length, read_questions
from ra_lens.sites import as_lens
from ra_lens.tasks import Prompt
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
