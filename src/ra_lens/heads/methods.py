"""Scores from maps, and orders that know nothing of the prompts.

From maps: how large a head's Reversed Attention or pattern is (paper section 5.2).

    ra[l, h] = mean over prompts of ‖R‖,    fa[l, h] = mean over prompts of ‖A‖    (Frobenius)

    w_norm[l, h] = mean over prompts of (‖∂L/∂W_Q‖² + ‖∂L/∂W_K‖² + ‖∂L/∂W_V‖² + ‖∂L/∂W_O‖²)^½

on prompt and answer, R being that of the mean cross-entropy over the answer's tokens. Both are mean
of norms, as in the published code; `fa_of_mean` is the norm of the mean pattern, as in the paper's
appendix B. R carries the softmax scale, which differs between layers in few models. The gradients
of a head's weights are those of `ra_lens.vjp`; a key/value head that several heads share counts for
each of them. Like every norm it knows no sign: a head may be large because its change would hurt.

A random score is one uniform number per head, from a generator of its own that is seeded by `seed`
and `draw`: the same on every machine and version, and no other generator notices.

`index` puts the first layer first, and within a layer the first head: the paper's text. In its code
the plain run is the other one, last layer first: `rank_heads(..., method="index").reversed()`.

Cost: `ra` and `w_norm` one forward and one backward per prompt; `fa` and `fa_of_mean` one forward,
without unembedding more than one position; `random` and `index` none.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.heads.ranking import RankingContext, ranking_method
from ra_lens.model.sites import table
from ra_lens.padding import batches, watched
from ra_lens.prompts import Prompts
from ra_lens.questions import Questions
from ra_lens.run import run_with_ra
from ra_lens.targets import Objective, answer_nll, sequence_nll
from ra_lens.vjp import norms_of_all_weights


@ranking_method("ra", label="RA", title="norm of Reversed Attention")
def ra_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """Mean of the Frobenius norms of R."""
    _, cache = run_with_ra(
        context.model,
        context.questions.prompts,
        target=_objective(context, context.questions),
        store="norms",
        batch_size=context.batch_size,
        progress=context.progress,
    )
    return cache.norms("ra").cpu().double().mean(dim=0)


@ranking_method("w_norm", label="∂W", title="norm of the gradient of a head's weights")
def w_norm_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """Mean of the norms of ∂L/∂(W_Q, W_K, W_V, W_O), a batch of prompts at a time."""
    questions = context.questions
    total = torch.zeros(context.shape, dtype=torch.float64)
    for examples, prompts in questions.prompts.batches(context.batch_size):
        part = replace(
            questions, prompts=prompts, answers=tuple(questions.answers[i] for i in examples)
        )
        objective = _objective(context, part)
        _, cache = run_with_ra(
            context.model, prompts, target=objective, store="norms", vectors=True
        )
        total += norms_of_all_weights(cache).cpu().double().sum(dim=0)
    return total / len(questions)


def _objective(context: RankingContext, questions: Questions) -> Objective:
    if context.answer_in_input:
        return sequence_nll([list(answer) for answer in questions.answers])
    return answer_nll(questions.first_tokens.tolist())


@ranking_method("fa", label="FA", title="norm of the pattern")
def fa_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """Mean of the Frobenius norms of A."""

    def norms(patterns: Tensor) -> Tensor:
        return patterns.flatten(start_dim=-2).norm(dim=-1).cpu().double().sum(dim=0)

    total = torch.zeros(context.shape, dtype=torch.float64)
    _add_patterns(context, _inputs(context), total, norms)
    return total / len(context.prompts)


@ranking_method("fa_of_mean", label="FA of mean", title="norm of the mean pattern")
def fa_of_mean_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """Frobenius norm of the mean of A over the prompts.

    Raises:
        BadInput: prompts of different lengths, whose positions do not correspond.
    """
    inputs = _inputs(context)
    lengths = sorted(set(inputs.lengths))
    if len(lengths) > 1:
        raise BadInput(
            f"found prompts of {lengths[0]} to {lengths[-1]} tokens"
            f"{' (answer included)' * context.answer_in_input} with method='fa_of_mean'; a mean of "
            "patterns needs prompts of one length (ra_lens.tasks.same_length_sets makes tasks of "
            "such). Or take method='fa', the mean of their norms."
        )
    total = torch.zeros(*context.shape, lengths[0], lengths[0], dtype=torch.float64)
    _add_patterns(context, inputs, total, lambda patterns: patterns.sum(dim=0).cpu().double())
    return (total / len(context.prompts)).flatten(start_dim=-2).norm(dim=-1)


def _inputs(context: RankingContext) -> Prompts:
    questions = context.questions
    if context.answer_in_input:
        return questions.prompts.extended(questions.answers)
    return questions.prompts


def _add_patterns(
    context: RankingContext,
    inputs: Prompts,
    total: Float[Tensor, "layer head *rest"],
    of_batch: Callable[[Tensor], Tensor],
) -> None:
    """Add to `total`, layer by layer, what `of_batch` makes of the patterns of each batch.

    `of_batch` gets `[batch, head, query, key]`, 0 in rows and columns of padding.
    """
    lens = context.lens
    lens.refuse_dropout()
    names = [site.pattern_name for site in lens.sites.values()]
    for _, prompts in batches(lens, inputs, context.batch_size):
        batch = prompts.lay_out(lens)
        real = batch.attention_mask
        keep = real[:, None, :, None] & real[:, None, None, :]

        def of_layer(pattern: Tensor, keep: Tensor = keep) -> Tensor:
            wide = pattern if pattern.dtype == torch.float64 else pattern.float()
            return of_batch(wide.where(keep.to(wide.device), 0.0))

        with watched(lens, batch):
            shown, _ = lens.look(dict.fromkeys(names, of_layer), *batch.model_input, batch.last)
        for row, name in zip(total, names, strict=True):
            if name in shown:
                row[: len(shown[name])] += shown[name]


@ranking_method("random", label="Random", title="random order", random=True)
def random_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """One uniform number in [0, 1) per head."""
    # A text seeds Python's generator by its digest; `random()` itself never changes.
    generator = random.Random(f"ra_lens random order {context.seed} {context.draw}")
    numbers = [[generator.random() for _ in range(n)] for n in context.n_heads]
    return table([torch.tensor(row, dtype=torch.float64) for row in numbers])


@ranking_method("index", label="Index", title="first layer first")
def index_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """How many heads come after this one in the model."""
    after = torch.arange(sum(context.n_heads), dtype=torch.float64).flip(0)
    return table(after.split(context.n_heads))
