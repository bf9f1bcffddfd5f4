"""Asking many questions: in batches of like length, marked in the order given."""

from __future__ import annotations

import pytest
import torch
import transformers

from ra_lens.errors import BadInput, RALensWarning
from ra_lens.heads import rank_heads
from ra_lens.model import as_lens
from ra_lens.questions import ask, by_length, read_questions
from ra_lens.tasks import Pair, Prompt, Task
from tiny_models import ANY_KIND, KINDS

LENGTHS = (5, 2, 6, 2, 5, 3)
QUESTIONS = [
    Prompt(" ".join(f"w{3 + (i * 7 + k) % 30}" for k in range(n)), f" w{4 + i}")
    for i, n in enumerate(LENGTHS)
]


@pytest.mark.parametrize("kind", ANY_KIND)
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


@pytest.mark.parametrize("kind", ANY_KIND)
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


@pytest.mark.parametrize("kind", ANY_KIND)
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


# ---- whole answers ------------------------------------------------------------------------------


def greedily(hugging_face, ids, n):
    """The next `n` tokens of a real greedy decode, by Hugging Face's own `generate`."""
    tokens = torch.tensor([ids])
    options = {"do_sample": False, "max_new_tokens": n, "pad_token_id": 0}
    found = hugging_face.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    return found[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("arch", "kind"), [(arch, kind) for arch in ("gpt2", "llama") for kind in KINDS]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_whole_answer_is_right_where_a_greedy_decode_gives_it(arch, kind, side, fresh, folder):
    model = fresh(arch, kind)
    hugging_face = transformers.AutoModelForCausalLM.from_pretrained(str(folder(arch))).eval()
    hugging_face.generation_config.eos_token_id = None
    model.tokenizer.padding_side = side
    lens = as_lens(model)
    asked, right = [], []
    for i, prompt in enumerate(QUESTIONS):
        ids = lens.encode(prompt.text, prepend_bos=False)
        length = 1 + i % 3
        decoded = greedily(hugging_face, ids, length)
        for place in (None, i % length):  # right, or with one wrong token
            answer = list(decoded)
            if place is not None:
                answer[place] = 3 + (answer[place] - 2) % 30
            if min(answer) >= 3:  # not a special token, which text would not give
                asked.append(Prompt(prompt.text, "".join(f" w{token}" for token in answer)))
                right.append(answer == decoded)
    assert any(right)
    assert not all(right)
    questions = read_questions(lens, asked, prepend_bos=False)
    for batch_size in (1, 4):
        marks = ask(lens, questions, accuracy="answer", batch_size=batch_size)
        assert marks.accuracy(1) == pytest.approx(sum(right) / len(right))
        assert (marks.logit_diff > 0).tolist() == right
    for i, answer in enumerate(questions.answers):
        # One step after the other, as a decode that is told the answer would go.
        ids, chance, differences, places = list(questions.prompts.ids[i]), 1.0, [], []
        for token in answer:
            with torch.no_grad():
                logits = model(torch.tensor([ids]))[0, -1].double()
            chance *= float(logits.softmax(-1)[token])
            differences.append(float(logits[token] - logits[logits != logits[token]].max()))
            places.append(int((logits > logits[token]).sum()))
            ids.append(token)
        assert float(marks.probability[i]) == pytest.approx(chance, rel=1e-4)
        assert float(marks.logit_diff[i]) == pytest.approx(min(differences), abs=1e-4)
        one = marks.part(slice(i, i + 1))
        for k in (1, 2, 3):
            assert one.accuracy(k) == float(max(places) < k)


def test_answers_of_one_token_are_marked_as_by_their_first(shared):
    lens = as_lens(shared("llama", KINDS[0]))
    questions = read_questions(lens, QUESTIONS, prepend_bos=False)
    first, whole = (ask(lens, questions, accuracy=a) for a in ("first token", "answer"))
    for k in (1, 2, 3, 10):
        assert whole.accuracy(k) == first.accuracy(k)
    assert torch.equal(whole.probability, first.probability)
    assert torch.equal(whole.logit_diff, first.logit_diff)


@pytest.mark.parametrize("kind", ANY_KIND)
def test_ties_of_whole_answers_count_by_their_chance(kind, shared):
    # Where nothing is left all 34 logits are equal: each token of an answer is a guess.
    lens = as_lens(shared("llama", kind))
    asked = [Prompt("w3 w4", " w9 w5"), Prompt("w5", " w6"), Prompt("w7", " w8 w9 w10")]
    hooks = [("blocks.2.hook_resid_post", lambda x, hook: torch.zeros_like(x))]
    questions = read_questions(lens, asked, prepend_bos=False)
    marks = ask(lens, questions, lambda _part: hooks, accuracy="answer", batch_size=2)
    for k in (1, 3):
        chance = k / 34
        assert marks.accuracy(k) == pytest.approx((chance**2 + chance + chance**3) / 3)
    assert marks.probability.tolist() == pytest.approx([34**-2, 34**-1, 34**-3])


def test_a_hook_where_the_logits_come_out_sees_every_position(shared):
    lens = as_lens(shared("llama", KINDS[0]))
    if not lens.has("unembed.hook_out"):
        pytest.skip("there is no such hook in this TransformerLens")
    asked = [Prompt("w3 w4 w5", " w9 w5"), Prompt("w5", " w6 w7 w8")]
    questions = read_questions(lens, asked, prepend_bos=False)
    plain = ask(lens, questions, accuracy="answer")
    seen = []
    look = ("unembed.hook_out", lambda logits, hook: seen.append(logits.shape[1]))
    with lens.module.hooks(fwd_hooks=[look]):
        hooked = ask(lens, questions, accuracy="answer")
    assert seen == [4]
    torch.testing.assert_close(hooked.probability, plain.probability)
