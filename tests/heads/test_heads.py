"""Scores from maps, against Hugging Face's own attention and autograd; and how prompts are batched.

Causal mediation is in test_heads_mediation.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.heads import rank_heads
from ra_lens.tasks import Prompt
from tiny_models import BOS, CASES, D_HEAD, KINDS, N_HEADS, N_LAYERS, relative
from tiny_questions import PROMPTS, TASK, WORDS

SCALE = 1 / math.sqrt(D_HEAD)


def read(arch, ids, answer):
    """Prompt with BOS and with the answer appended, and how long the prompt is."""
    return torch.tensor([[BOS[arch], *ids, *answer]]), 1 + len(ids)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_ra_is_the_mean_norm_of_the_gradient_that_autograd_gives(arch, kind, shared, reference):
    wanted = torch.zeros(N_LAYERS, N_HEADS, dtype=torch.float64)
    first_only = torch.zeros_like(wanted)
    for ids, answer in WORDS:
        tokens, n = read(arch, ids, answer)

        def mean_nll(logits, n=n, answer=answer):
            rows = logits[0, n - 1 : n - 1 + len(answer)].log_softmax(-1)
            return -sum(rows[i, token] for i, token in enumerate(answer)) / len(answer)

        def first_nll(logits, answer=answer):
            return -logits[0, -1].log_softmax(-1)[answer[0]]

        for total, inputs, loss in (
            (wanted, tokens, mean_nll),
            (first_only, tokens[:, :n], first_nll),
        ):
            maps = reference(arch).ra(inputs, loss, [SCALE] * N_LAYERS)
            total += torch.stack([r[0].flatten(1).norm(dim=1) for r in maps]) / len(WORDS)
    model, bos = shared(arch, kind), {"prepend_bos": True, "progress": False}
    found = rank_heads(model, PROMPTS, method="ra", **bos)
    assert relative(found.scores, wanted) < 1e-5
    assert (found.method, found.layers, found.n_examples) == ("ra", (0, 1, 2), 3)
    prompt_only = rank_heads(model, PROMPTS, method="ra", answer_in_input=False, **bos)
    assert relative(prompt_only.scores, first_only) < 1e-5
    assert relative(wanted, first_only) > 1e-2


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_fa_is_the_mean_norm_of_the_pattern(arch, kind, shared, reference):
    def norms(with_answer):
        total = torch.zeros(N_LAYERS, N_HEADS, dtype=torch.float64)
        for ids, answer in WORDS:
            tokens, n = read(arch, ids, answer)
            inputs = tokens if with_answer else tokens[:, :n]
            _, patterns = reference(arch).score_gradients(inputs, lambda logits: logits.sum())
            total += torch.stack([a[0].flatten(1).norm(dim=1) for a in patterns]) / len(WORDS)
        return total

    model, options = shared(arch, kind), {"prepend_bos": True, "method": "fa"}
    assert relative(rank_heads(model, PROMPTS, **options).scores, norms(True)) < 1e-6
    alone = rank_heads(model, PROMPTS, answer_in_input=False, **options)
    assert relative(alone.scores, norms(False)) < 1e-6


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_fa_of_mean_is_the_norm_of_the_mean_pattern(arch, kind, shared, reference):
    words = [[3, 5, 7], [4, 6, 8], [20, 21, 22]]
    prompts = [Prompt(" ".join(f"w{i}" for i in ids), " w9") for ids in words]
    sums = 0.0
    for ids in words:
        tokens, _ = read(arch, ids, [9])
        _, patterns = reference(arch).score_gradients(tokens, lambda logits: logits.sum())
        sums = sums + torch.cat(patterns)
    wanted = (sums / 3).flatten(2).norm(dim=2)
    options = {"prepend_bos": True, "progress": False, "batch_size": 2}
    found = rank_heads(shared(arch, kind), prompts, method="fa_of_mean", **options)
    assert relative(found.scores, wanted) < 1e-6
    fa = rank_heads(shared(arch, kind), prompts, method="fa", **options)
    assert bool((found.scores < fa.scores).all())  # a norm is convex


def test_a_mean_of_patterns_needs_prompts_of_one_length(shared):
    model = shared("gpt2", KINDS[0])
    needed = r"prompts of 5 to 7 tokens \(answer included\).*one length.*same_length_sets.*'fa'"
    with pytest.raises(BadInput, match=needed):
        rank_heads(model, PROMPTS, method="fa_of_mean", prepend_bos=True)
    with pytest.raises(BadInput, match=r"prompts of 3 to 6 tokens with method='fa_of_mean'"):
        rank_heads(model, PROMPTS, method="fa_of_mean", prepend_bos=True, answer_in_input=False)


def test_the_forward_pass_of_fa_builds_no_graph(shared):
    model, seen = shared("gpt2", KINDS[0]), []
    look = [("blocks.2.attn.hook_pattern", lambda p, hook: seen.append(p.requires_grad))]
    with model.hooks(fwd_hooks=look):
        rank_heads(model, PROMPTS, method="fa")
    assert seen == [False]


# One side and one number of rows for each model, all of them over the models. cm2 changes heads at
# the last token, as cm1_last does.
@pytest.mark.parametrize(
    ("arch", "kind", "side", "batch_size"),
    [
        pytest.param(
            arch,
            kind,
            "left" if (i + j) % 2 else "right",
            (2, 5, 64)[(i + j) % 3],
            marks=() if arch == "gpt2" else pytest.mark.every_model,
        )
        for i, (arch, kind) in enumerate(CASES)
        for j in ((0, 1) if arch == "gpt2" else (0,))
    ],
)
def test_scores_depend_neither_on_batches_nor_on_padding(arch, kind, side, batch_size, fresh):
    model = fresh(arch, kind)
    model.tokenizer.padding_side = side
    # Prompts of 0, 2 and 3 demonstrations: 3, 11 and 15 tokens, labels to shuffle in two.
    prompts = [TASK.sample(1, shots=shots, seed=shots)[0] for shots in (0, 2, 3)]
    options = {"progress": False, "prepend_bos": False}
    for method in ("ra", "fa", "cm1", "cm2"):
        if method == "cm2":  # its mean over prompts is not a mean over their scores
            alone = rank_heads(model, prompts, method=method, batch_size=1, **options).scores
        else:
            each = [rank_heads(model, [p], method=method, **options).scores for p in prompts]
            alone = torch.stack(each).mean(0)
        found = rank_heads(model, prompts, method=method, batch_size=batch_size, **options)
        assert relative(found.scores, alone) < 1e-4, method


def test_dropout_that_is_on_is_refused(fresh):
    model = fresh("gpt2", KINDS[-1], attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1).train()
    if not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules()):
        pytest.skip("HookedTransformer has no dropout")
    for method in ("ra", "fa", "cm1", "cm1_last", "cm2"):
        with pytest.raises(UnsupportedModel, match=r"drops out.*Call model.eval\(\) first"):
            rank_heads(model, PROMPTS, method=method)
