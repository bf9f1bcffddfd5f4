"""What can be differentiated, and that each way of saying it means what it says."""

from __future__ import annotations

import pytest
import torch

from oracle import nll
from ra_lens import run_with_ra
from ra_lens.errors import BadInput
from ra_lens.targets import (
    answer_nll,
    custom,
    logit_diff,
    probability_diff,
    sequence_nll,
    top_prediction,
)
from tiny_models import ANY_KIND, CASES, D_HEAD, N_HEADS, N_LAYERS, random_ids, relative, text

SCALES = [D_HEAD**-0.5] * N_LAYERS
POS = 6


def check(ra, wanted, tolerance=1e-5):
    """Every layer's RA of a cache of one example (or a batch) equals what the reference gives."""
    for layer, value in enumerate(wanted):
        assert relative(ra["ra", layer], value) < tolerance


def mean_nll(answer, n):
    """−log p of answer[j] read at position n−1+j, averaged: the loss of the paper's experiments."""

    def loss(logits):
        log_probs = logits[0].log_softmax(-1)
        return -sum(log_probs[n - 1 + j, t] for j, t in enumerate(answer)) / len(answer)

    return loss


@pytest.mark.parametrize("kind", ANY_KIND)
@pytest.mark.parametrize(
    "target", [8, "w8", " w8", [8], ["w8"], torch.tensor([8]), torch.tensor(8), answer_nll(" w8")]
)
def test_every_way_to_name_one_token_gives_its_negative_log_probability(
    kind, target, shared, reference
):
    ids = random_ids(1, POS)
    wanted = reference("gpt2").ra(ids, nll(8), SCALES)
    logits, ra = run_with_ra(shared("gpt2", kind), ids, target=target)
    check(ra, wanted)
    assert logits.shape[:2] == (1, 1)
    assert relative(ra.loss, -logits[:, -1].log_softmax(-1)[:, 8]) < 1e-6
    assert ra.info.objective == "answer_nll"
    assert ra.info.targets == ("w8",)
    assert not ra.info.target_is_top_prediction


@pytest.mark.parametrize("kind", ANY_KIND)
@pytest.mark.parametrize(
    "target", [[5, 9, 4], ["w5", " w9", "w4"], torch.tensor([5, 9, 4]), ("w5", 9, "w4")]
)
def test_targets_per_example(kind, target, shared, reference):
    ids = random_ids(3, POS)
    wanted = reference("llama").ra(ids, nll(5, 9, 4), SCALES)
    _, ra = run_with_ra(shared("llama", kind), ids, target=target)
    check(ra, wanted)
    assert ra.info.targets == ("w5", "w9", "w4")


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_an_answer_of_several_tokens_is_teacher_forced(arch, kind, shared, reference):
    model, prompt, answer = shared(arch, kind), random_ids(POS), [7, 12, 30]
    whole = torch.cat([torch.tensor([model.tokenizer.bos_token_id]), prompt, torch.tensor(answer)])
    loss = mean_nll(answer, POS + 1)
    wanted = reference(arch).ra(whole.unsqueeze(0), loss, SCALES)
    _, ra = run_with_ra(model, text(prompt), target=" " + text(answer))
    assert ra["ra", 0].shape == (1, N_HEADS, POS + 4, POS + 4)
    check(ra, wanted)
    assert relative(ra.loss[0], loss(reference(arch).logits(whole.unsqueeze(0)))) < 1e-5
    assert ra.stack()[..., -1, :].abs().max() == 0  # no loss is read at the answer's last token
    assert ra.stack()[..., -2, :].abs().max() > 0
    assert ra.info.objective == "sequence_nll"
    assert ra.str_tokens is not None
    assert ra.str_tokens[0][-3:] == ["w7", "w12", "w30"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ANY_KIND)
def test_answers_of_different_lengths_in_one_batch(kind, side, shared, reference):
    model, prompts = shared("opt", kind), [random_ids(4, seed=1), random_ids(6, seed=2)]
    answers = [[7, 12, 30], [9]]
    logits, ra = run_with_ra(
        model,
        [text(p) for p in prompts],
        target=[text(a) for a in answers],
        padding_side=side,
    )
    width = ra["ra", 0].shape[-1]
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = torch.cat([torch.tensor([1]), prompt, torch.tensor(answer)]).unsqueeze(0)
        n = whole.shape[1]
        loss = mean_nll(answer, n - len(answer))
        wanted = reference("opt").ra(whole, loss, SCALES)
        real = slice(width - n, width) if side == "left" else slice(0, n)
        for layer in range(N_LAYERS):
            assert relative(ra["ra", layer][i, :, real, real], wanted[layer][0]) < 1e-5
        own = reference("opt").logits(whole)
        assert relative(ra.loss[i], loss(own)) < 1e-5
        # The last position read is the one before the answer's last token.
        assert relative(logits[i, -1], own[0, -2]) < 1e-5


@pytest.mark.parametrize("kind", ANY_KIND)
def test_sequence_nll_of_ids_and_of_one_token(kind, shared, reference):
    model, ids = shared("gptj", kind), random_ids(2, POS)
    _, ra = run_with_ra(model, ids, target=sequence_nll([[7, 12], [9]]))
    for i, answer in enumerate([[7, 12], [9]]):
        whole = torch.cat([ids[i], torch.tensor(answer)]).unsqueeze(0)
        n = whole.shape[1]
        wanted = reference("gptj").ra(whole, mean_nll(answer, POS), SCALES)
        for layer in range(N_LAYERS):
            assert relative(ra["ra", layer][i, :, :n, :n], wanted[layer][0]) < 1e-5
    assert ra["ra", 0].shape[-1] == POS + 2
    assert ra["ra", 0][1, :, POS:].abs().max() == 0


@pytest.mark.parametrize("kind", ANY_KIND)
def test_logit_difference_is_wrong_minus_correct_so_that_descent_helps_the_correct(
    kind, shared, reference
):
    model, ids = shared("gpt2", kind), random_ids(2, POS)

    def loss(logits):
        last = logits[:, -1]
        return (last[0, 20] - last[0, 5]) + (last[1, 20] - last[1, 9])

    wanted = reference("gpt2").ra(ids, loss, SCALES)
    _, ra = run_with_ra(model, ids, target=logit_diff([5, "w9"], " w20"))
    check(ra, wanted)
    own = reference("gpt2").logits(ids)[:, -1]
    assert relative(ra.loss, torch.stack([own[0, 20] - own[0, 5], own[1, 20] - own[1, 9]])) < 1e-5
    _, swapped = run_with_ra(model, ids, target=logit_diff(20, [5, 9]))
    check(swapped, [-w for w in wanted])
    assert ra.info.objective == "logit_diff"


@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_metric_gets_all_logits_and_is_differentiated_as_it_is(kind, shared, reference):
    model, ids = shared("llama", kind), random_ids(2, POS)

    def metric(logits):
        assert logits.shape[:2] == (2, POS)
        return (logits[:, 2:5, 4] ** 2).mean(dim=1)

    wanted = reference("llama").ra(ids, lambda logits: metric(logits).sum(), SCALES)
    logits, ra = run_with_ra(model, ids, metric=metric)
    check(ra, wanted)
    with torch.no_grad():  # what comes back is read at the last token, unless all is asked for
        torch.testing.assert_close(logits[:, 0], model(ids)[:, -1], rtol=1e-5, atol=1e-5)
    _, as_scalar = run_with_ra(model, ids, metric=lambda logits: metric(logits).sum())
    check(as_scalar, wanted)
    assert as_scalar.loss.ndim == 0
    assert relative(as_scalar.loss, ra.loss.sum()) < 1e-6
    _, as_objective = run_with_ra(model, ids, metric=custom(metric))
    check(as_objective, wanted)
    _, as_mean = run_with_ra(model, ids, metric=lambda logits: metric(logits).mean())
    check(as_mean, [w / 2 for w in wanted])
    assert ra.info.objective == "custom"
    assert ra.info.targets is None


@pytest.mark.parametrize("kind", ANY_KIND)
@pytest.mark.parametrize(
    ("position", "rows"),
    [(2, (2, 2)), (-1, (POS - 1, POS - 1)), (-2, (POS - 2,) * 2), ([1, -1], (1, POS - 1))],
)
def test_the_position_read_can_be_chosen(kind, position, rows, shared, reference):
    model, ids = shared("opt", kind), random_ids(2, POS)

    def loss(logits):
        return -sum(logits[i, row].log_softmax(-1)[8] for i, row in enumerate(rows))

    wanted = reference("opt").ra(ids, loss, SCALES)
    for given in (position, torch.tensor(position)):
        logits, ra = run_with_ra(model, ids, target=8, position=given)
        check(ra, wanted)
    own = reference("opt").logits(ids)
    assert relative(logits[:, -1], own[[0, 1], list(rows)]) < 1e-5
    # Causality: rows after the one read have no gradient.
    for i, row in enumerate(rows):
        assert ra.stack()[:, i, :, row + 1 :].numel() == 0 or (
            ra.stack()[:, i, :, row + 1 :].abs().max() == 0
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ANY_KIND)
def test_positions_count_within_each_prompt_whatever_the_padding(kind, side, shared):
    model, prompts = shared("gpt2", kind), [random_ids(4, seed=1), random_ids(6, seed=2)]
    for position, absolute in ((2, (2, 2)), (-3, (2, 4)), ([3, 1], (3, 1))):
        _, ra = run_with_ra(
            model,
            [text(p) for p in prompts],
            target=8,
            position=position,
            padding_side=side,
        )
        for i, prompt in enumerate(prompts):
            _, alone = run_with_ra(model, text(prompt), target=8, position=absolute[i])
            assert relative(ra.loss[i], alone.loss[0]) < 1e-5
            assert relative(ra.norms()[i], alone.norms()[0]) < 1e-5


@pytest.mark.parametrize("kind", ANY_KIND)
def test_without_target_the_models_top_prediction_is_taken_and_said(kind, shared, reference):
    model, ids = shared("llama", kind), random_ids(2, POS)
    best = reference("llama").logits(ids)[:, -1].argmax(-1).tolist()
    wanted = reference("llama").ra(ids, nll(*best), SCALES)
    for target in (None, top_prediction()):
        _, ra = run_with_ra(model, ids, target=target)
        check(ra, wanted)
        assert ra.info.target_is_top_prediction
        assert ra.info.targets == tuple(f"w{b}" for b in best)
        assert "top prediction" in repr(ra)
    _, cut = run_with_ra(model, ids, batch_size=1, progress=False)
    assert cut.info.targets == ra.info.targets


def test_objectives_of_ids_are_functions_of_logits():
    logits = torch.randn(3, 4, 20, dtype=torch.float64)
    log_probs = logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(answer_nll(5)(logits), -log_probs[:, 5])
    torch.testing.assert_close(
        answer_nll([5, 6, 7])(logits), -log_probs[torch.arange(3), torch.tensor([5, 6, 7])]
    )
    torch.testing.assert_close(
        answer_nll(torch.tensor([1, 2, 3]))(logits),
        -log_probs[torch.arange(3), torch.tensor([1, 2, 3])],
    )
    torch.testing.assert_close(
        logit_diff(5, [1, 2, 3])(logits),
        logits[torch.arange(3), -1, torch.tensor([1, 2, 3])] - logits[:, -1, 5],
    )
    torch.testing.assert_close(top_prediction()(logits), -log_probs.max(-1).values)
    assert custom(lambda x: x.sum())(logits) == logits.sum()


@pytest.mark.parametrize("kind", ANY_KIND)
def test_the_loss_of_a_bfloat16_model_is_computed_in_float32(kind, fresh):
    model = fresh("gpt2", kind, torch.bfloat16)
    logits, ra = run_with_ra(model, random_ids(2, POS), target=8)
    assert ra.loss.dtype == torch.float32
    assert relative(ra.loss, -logits[:, -1].float().log_softmax(-1)[:, 8]) < 1e-6


# ---- several right answers ----------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("kind", ANY_KIND)
def test_the_probability_of_wrong_tokens_minus_that_of_right_ones(
    kind, batch_size, shared, reference
):
    ids = random_ids(3, POS)
    right, wrong = [[5, 6], [9], [3, 4, 7]], [[1], [2, 3, 4], [8, 9]]
    sets = list(zip(right, wrong, strict=True))
    objective = probability_diff(right, wrong)
    _, ra = run_with_ra(shared("llama", kind), ids, target=objective, batch_size=batch_size)

    def loss(logits):
        p = logits[:, -1].softmax(-1)
        each = [p[i, w].sum() - p[i, r].sum() for i, (r, w) in enumerate(sets)]
        return torch.stack(each).sum()

    check(ra, reference("llama").ra(ids, loss, SCALES))
    with torch.no_grad():
        p = reference("llama").model(ids).logits[:, -1].softmax(-1)
    wanted = torch.stack([p[i, wrong[i]].sum() - p[i, right[i]].sum() for i in range(3)])
    assert relative(ra.loss, wanted) < 1e-5
    assert ra.info.objective == "probability_diff" and ra.info.targets is None


def test_a_probability_difference_outside_a_run_and_what_it_refuses():
    logits = torch.zeros(2, 3, 4)
    found = probability_diff([[0], [1, 2]], [[1, 2, 3], [3]])(logits)
    assert found.tolist() == [0.5, -0.25]  # all tokens have 1/4
    for right, wrong, said in [
        ([[0]], [[1], [2]], "1 lists of right tokens and 2 of wrong"),
        ([[0, 1]], [[1]], "found token 1 as right and as wrong for prompt 0"),
        ([[]], [[1]], "token"),
        ([[-1]], [[1]], "token=-1"),
    ]:
        with pytest.raises(BadInput, match=said):
            probability_diff(right, wrong)
    with pytest.raises(BadInput, match="sets of tokens for 1 prompts, and 2 prompts"):
        probability_diff([[0]], [[1]])(logits)
    with pytest.raises(BadInput, match=r"token 9 is not in the vocabulary.*ids 0 to 3"):
        probability_diff([[0], [9]], [[1], [1]])(logits)
