"""Causal mediation: against one head at a time in a Hugging Face model, and a toy on paper."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import transformers

from folded import fold
from oracle import HFHeads
from ra_lens.errors import BadInput, RALensWarning
from ra_lens.heads import rank_heads
from ra_lens.heads.mediation import shuffle_labels
from ra_lens.model import load_folder
from ra_lens.tasks import Pair, Prompt, Task
from saved_models import silence
from tiny_models import BOS, CASES, KINDS, N_HEADS, N_LAYERS, relative, tokenizer
from tiny_questions import PROMPTS, TASK, WORDS

EVERY = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
OPTIONS = {"prepend_bos": True, "progress": False}


def asked(arch):
    return [([BOS[arch], *ids], answer[0]) for ids, answer in WORDS]


def one_at_a_time(effect):
    """effect(layer, head), as the scores are laid out."""
    values = [effect(layer, head) for layer, head in EVERY]
    return torch.tensor(values, dtype=torch.float64).reshape(N_LAYERS, N_HEADS)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_cm1_is_what_zeroed_rows_of_w_o_cost_the_answer(arch, kind, shared, folder):
    found = rank_heads(shared(arch, kind), PROMPTS, method="cm1", batch_size=7, **OPTIONS)
    wanted = one_at_a_time(partial(HFHeads(folder(arch)).lost, asked(arch)))
    assert wanted.min() < 0 < wanted.max()
    assert relative(found.scores, wanted) < 1e-4


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_cm1_last_zeroes_the_last_token_only(arch, kind, shared, folder):
    model, reference = shared(arch, kind), HFHeads(folder(arch))
    wanted = one_at_a_time(partial(reference.lost_at_the_end, asked(arch)))
    found = rank_heads(model, PROMPTS, method="cm1_last", batch_size=7, **OPTIONS)
    assert relative(found.scores, wanted) < 1e-4
    everywhere = rank_heads(model, PROMPTS, method="cm1", **OPTIONS)
    assert relative(everywhere.scores, wanted) > 1e-2
    # In the last layer there is no other token to pass anything on.
    assert relative(everywhere.scores[-1], found.scores[-1]) < 1e-4


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_cm2_puts_mean_heads_into_shuffled_labels(arch, kind, shared, folder):
    reference = HFHeads(folder(arch))
    # Two demonstrations can be shuffled in one way only; one or none stays as it is.
    prompts = [TASK.sample(1, shots=shots, seed=shots)[0] for shots in (2, 1, 2, 0)]

    def ids_of(prompt):
        return [BOS[arch], *(int(word[1:]) for word in prompt.text.split())]

    def swapped(prompt):
        ids = ids_of(prompt)
        if len(prompt.demonstrations) == 2:  # BOS w30 x w31 y w30 x w31 y …
            ids[4], ids[8] = ids[8], ids[4]
        return ids

    shuffled = [(swapped(prompt), int(prompt.answer[2:])) for prompt in prompts]
    gained = partial(reference.gained, shuffled, [ids_of(prompt) for prompt in prompts])
    found = rank_heads(shared(arch, kind), prompts, method="cm2", batch_size=7, **OPTIONS)
    assert relative(found.scores, one_at_a_time(gained)) < 1e-4


def test_labels_are_shuffled_by_seed_and_place_and_never_right():
    prompt = TASK.sample(1, shots=4)[0]
    seen = set()
    for seed in range(5):
        for index in range(5):
            shuffled = shuffle_labels(prompt, seed=seed, index=index)
            assert shuffled == shuffle_labels(prompt, seed=seed, index=index)
            assert (shuffled.query, shuffled.answer) == (prompt.query, prompt.answer)
            outputs = tuple(p.output for p in shuffled.demonstrations)
            inputs = [p.input for p in shuffled.demonstrations]
            assert inputs == [p.input for p in prompt.demonstrations]
            right = [p.output for p in prompt.demonstrations]
            assert sorted(outputs) == sorted(right)
            assert list(outputs) != right
            assert shuffled.text == TASK.prompt(prompt.query, shuffled.demonstrations)
            seen.add(outputs)
    assert len(seen) > 12  # of 23
    # Written down once: an order must not change between versions or machines.
    first = shuffle_labels(prompt, seed=0, index=0)
    place = {p.output: i for i, p in enumerate(prompt.demonstrations)}
    assert [place[p.output] for p in first.demonstrations] == [0, 2, 3, 1]


def test_labels_that_cannot_be_wrong_stay():
    for shots in (0, 1):
        prompt = TASK.sample(1, shots=shots)[0]
        assert shuffle_labels(prompt, seed=0) is prompt
    pairs = (Pair("w3", "w9"), Pair("w4", "w9"), Pair("w5", "w10"))
    task = Task("same", "icl", pairs, "", "", separator=" ")
    same = task.build(Pair("w6", "w9"), pairs[:2])
    assert shuffle_labels(same, seed=0) is same
    for seed in range(20):  # two of three labels are the same: exchanging those changes nothing
        shuffled = shuffle_labels(task.build(Pair("w6", "w9"), pairs), seed=seed)
        assert [p.output for p in shuffled.demonstrations] != ["w9", "w9", "w10"]
    own = Prompt("w3 w9 w4 w10 w5", " w9", Pair("w5", "w9"), pairs[1:])
    with pytest.raises(BadInput, match=r"has no task.*Make it with Task.build"):
        shuffle_labels(own, seed=0)


@pytest.mark.parametrize(("arch", "kind"), [c for c in CASES if c[0] in ("gpt2", "opt")])
def test_folded_value_biases_change_cm1_with_a_warning_and_cm2_not_at_all(
    arch, kind, fresh, shared
):
    folded = fold(fresh(arch, kind), kind)
    prompts = [TASK.sample(1, shots=2, seed=seed)[0] for seed in range(2)]
    for method in ("cm1", "cm1_last"):
        with pytest.warns(RALensWarning, match="folded into its output biases.*load_model"):
            found = rank_heads(folded, prompts, method=method, **OPTIONS)
        wanted = rank_heads(shared(arch, kind), prompts, method=method, **OPTIONS)
        assert relative(found.scores, wanted.scores) > 1e-2
    found = rank_heads(folded, prompts, method="cm2", **OPTIONS)
    wanted = rank_heads(shared(arch, kind), prompts, method="cm2", **OPTIONS)
    assert relative(found.scores, wanted.scores) < 1e-4


# ---- a toy on paper ------------------------------------------------------------------------------
#
# One GPT-2 layer, two heads, no MLP, prompts `x y x y q`. Head 1 gives position 1, the first label,
# six times the weight of any other, and copies the labels w10 and w11 (values (1,0) and (0,1), all
# other words 0) to the directions that the two logits read. Head 0 gives position 0 a thousand
# times the weight of any other and writes the same everywhere to where no logit reads.
#
# Every input is +1 and −1 in two pairs of dimensions, of 20: norm² 4, mean 0, so the layer norm
# multiplies it by √5. The last norm divides by √((4 + 2 (a² + b² + g²)) / 20), where a, b, g are
# what is written for w10, w11 and by head 0.

WIDTH, SIZE, GAIN = 20, 10, 8.0
POS_0, POS_1, POS_ELSE, W10, W11, W_ELSE, OUT_10, OUT_11, NOWHERE = range(9)


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    cfg = transformers.GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=WIDTH,
        n_positions=16,
        vocab_size=34,
        tie_word_embeddings=False,
        layer_norm_epsilon=1e-12,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(cfg)
    silence(model)
    block, root5 = model.transformer.h[0], math.sqrt(5)
    with torch.no_grad():

        def pair(row, which, value=1.0):
            row[2 * which], row[2 * which + 1] = value, -value

        for token, row in enumerate(model.transformer.wte.weight):
            pair(row, {10: W10, 11: W11}.get(token, W_ELSE))
        for position, row in enumerate(model.transformer.wpe.weight):
            pair(row, {0: POS_0, 1: POS_1}.get(position, POS_ELSE))
        weight, bias, out = block.attn.c_attn.weight, block.attn.c_attn.bias, block.attn.c_proj
        for head, (position, factor) in enumerate(((POS_0, 1000.0), (POS_1, 6.0))):
            bias[head * SIZE] = 1.0  # every query
            key = WIDTH + head * SIZE
            weight[2 * position, key] = math.sqrt(SIZE) * math.log(factor) / root5
        bias[2 * WIDTH] = 1.0  # the value of head 0
        pair(out.weight[0], NOWHERE)
        for unit, (word, read) in enumerate(((W10, OUT_10), (W11, OUT_11))):
            weight[2 * word, 2 * WIDTH + SIZE + unit] = 1 / root5
            pair(out.weight[SIZE + unit], read)
        model.lm_head.weight[10, 2 * OUT_10] = GAIN
        model.lm_head.weight[11, 2 * OUT_11] = GAIN
    where = tmp_path_factory.mktemp("toy")
    model.save_pretrained(str(where))
    tokenizer("gpt2").save_pretrained(str(where))
    return where


def probability(right, other, head_0=1.0):
    """p of w10 where `right` is written for it, `other` for w11, and `head_0` elsewhere."""
    norm = math.sqrt((4 + 2 * (right**2 + other**2 + head_0**2)) / WIDTH)
    odds = math.exp(GAIN * right / norm)
    return odds / (odds + math.exp(GAIN * other / norm) + 32)


TOY = Task("toy", "icl", (Pair("w3", "w10"), Pair("w4", "w11")), "", "", separator=" ")
TOY_PROMPT = TOY.build(Pair("w5", "w10"), TOY.pairs)  # w3 w10 w4 w11 w5 → w10
OTHER_PROMPT = TOY.build(Pair("w6", "w11"), TOY.pairs[::-1])  # w4 w11 w3 w10 w6 → w11


@pytest.mark.parametrize("kind", KINDS)
def test_every_sound_method_puts_the_head_that_matters_first(kind, toy_folder):
    model = load_folder(toy_folder, kind=kind, device="cpu")
    options = {"prepend_bos": False, "progress": False}
    # The last token sees x y x y q with weights 1 6 1 1 1: it writes 0.6 for w10, 0.1 for w11.
    clean = probability(0.6, 0.1)
    wanted = {
        "cm1": [clean - probability(0.6, 0.1, head_0=0.0), clean - 1 / 34],
        "cm1_last": [clean - probability(0.6, 0.1, head_0=0.0), clean - 1 / 34],
        # Shuffled, the first label is w11. Head 0 always writes its mean.
        "cm2": [0.0, clean - probability(0.1, 0.6)],
    }
    for method, scores in wanted.items():
        found = rank_heads(model, [TOY_PROMPT], method=method, **options)
        assert found.scores[0].tolist() == pytest.approx(scores, abs=1e-5), method
        assert found.order() == [(0, 1), (0, 0)]
        assert scores[1] > 0.5
    # Three questions, two of them alike: the mean of the others is (0.35, 0.35) for these two, and
    # for the third what its shuffled labels make of it anyway.
    three = [TOY_PROMPT, TOY_PROMPT, OTHER_PROMPT]
    found = rank_heads(model, three, method="cm2", **options)
    gain = 2 / 3 * (probability(0.35, 0.35) - probability(0.1, 0.6))
    assert found.scores[0].tolist() == pytest.approx([0.0, gain], abs=1e-5)
    assert found.order()[0] == (0, 1)
    # Head 0 has the same value everywhere: moving its attention changes nothing. Head 1 gets
    # R = A ⊙ (G − A·G) / √10 in the last row of the prompt, with G = (0, ∂L/∂a, 0, ∂L/∂b, 0).
    ra = rank_heads(model, [TOY_PROMPT], method="ra", **options)
    step = 1e-6
    up = [-math.log(probability(0.6 + step, 0.1)), -math.log(probability(0.6, 0.1 + step))]
    down = [-math.log(probability(0.6 - step, 0.1)), -math.log(probability(0.6, 0.1 - step))]
    slopes = [(u - d) / (2 * step) for u, d in zip(up, down, strict=True)]
    pattern, gradient = [0.1, 0.6, 0.1, 0.1, 0.1], [0.0, slopes[0], 0.0, slopes[1], 0.0]
    mean = sum(a * g for a, g in zip(pattern, gradient, strict=True))
    row = [a * (g - mean) / math.sqrt(SIZE) for a, g in zip(pattern, gradient, strict=True)]
    assert ra.scores[0].tolist() == pytest.approx([0.0, math.hypot(*row)], rel=1e-4, abs=1e-7)
    assert ra.order() == [(0, 1), (0, 0)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_of_the_pattern_is_not_a_sound_method(kind, toy_folder):
    # It looks at where heads attend, not at what they write: head 0 is the more concentrated one.
    model = load_folder(toy_folder, kind=kind, device="cpu")

    def norm(factor, place, n=6):  # the answer is read too
        rows = ([factor if k == place else 1.0 for k in range(q + 1)] for q in range(n))
        return math.sqrt(sum((w / sum(row)) ** 2 for row in rows for w in row))

    wanted = [norm(1000.0, 0), norm(6.0, 1)]
    for method in ("fa", "fa_of_mean"):
        found = rank_heads(model, [TOY_PROMPT], method=method, prepend_bos=False)
        assert found.scores[0].tolist() == pytest.approx(wanted, rel=1e-5)
        assert found.order() == [(0, 0), (0, 1)]
