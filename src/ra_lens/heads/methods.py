"""Scores from patterns alone, and orders that know nothing of the prompts.

From patterns: how large a head's pattern is (paper section 5.2).

    fa[l, h] = mean over prompts of ‖A‖    (Frobenius)

on prompt and answer: a mean of norms, as in the published code; `fa_of_mean` is the norm of the
mean pattern, as in the paper's appendix B.

A random score is one uniform number per head, from a generator of its own that is seeded by `seed`
and `draw`: the same on every machine and version, and no other generator notices.

`index` puts the first layer first, and within a layer the first head: the paper's text. In its code
the plain run is the other one, last layer first: `rank_heads(..., method="index").reversed()`.

Cost: `fa` and `fa_of_mean` one forward per prompt, without unembedding more than one position;
`random` and `index` none.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.heads.registry import Passes, RankingContext, ranking_method
from ra_lens.model.sites import table
from ra_lens.padding import batches, watched
from ra_lens.prompts import Prompts


@ranking_method("fa", label="FA", title="norm of the pattern", passes=Passes(1))
def fa_scores(context: RankingContext) -> Float[Tensor, "prompt layer head"]:
    """Frobenius norm of A."""
    each = torch.zeros(len(context.prompts), *context.shape, dtype=torch.float64)

    def norms(examples: list[int], layer: int, patterns: Tensor) -> None:
        found = patterns.flatten(start_dim=-2).norm(dim=-1).cpu().double()
        each[examples, layer, : found.shape[1]] = found

    _read_patterns(context, _inputs(context), norms)
    return each


@ranking_method(
    "fa_of_mean", label="FA of mean", title="norm of the mean pattern", passes=Passes(1)
)
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

    def add(_examples: list[int], layer: int, patterns: Tensor) -> None:
        total[layer, : patterns.shape[1]] += patterns.sum(dim=0).cpu().double()

    _read_patterns(context, inputs, add)
    return (total / len(context.prompts)).flatten(start_dim=-2).norm(dim=-1)


def _inputs(context: RankingContext) -> Prompts:
    questions = context.questions
    if context.answer_in_input:
        return questions.prompts.extended(questions.answers)
    return questions.prompts


def _read_patterns(
    context: RankingContext, inputs: Prompts, look: Callable[[list[int], int, Tensor], None]
) -> None:
    """Hand over the patterns of each batch, layer by layer: which examples, which row of scores.

    The patterns are `[batch, head, query, key]`, 0 in rows and columns of padding.
    """
    lens = context.lens
    lens.refuse_dropout()
    names = [site.pattern_name for site in lens.sites.values()]
    for examples, prompts in batches(lens, inputs, context.batch_size):
        batch = prompts.lay_out(lens)
        real = batch.attention_mask
        keep = real[:, None, :, None] & real[:, None, None, :]

        def of_layer(layer: int, examples: list[int], keep: Tensor, pattern: Tensor) -> Tensor:
            wide = pattern if pattern.dtype == torch.float64 else pattern.float()
            look(examples, layer, wide.where(keep.to(wide.device), 0.0))
            return pattern.new_zeros(())  # nothing else is kept

        shown = {name: partial(of_layer, i, examples, keep) for i, name in enumerate(names)}
        with watched(lens, batch):
            lens.look(shown, *batch.model_input, batch.last)


@ranking_method("random", label="Random", title="random order", random=True, passes=Passes(0))
def random_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """One uniform number in [0, 1) per head."""
    # A text seeds Python's generator by its digest; `random()` itself never changes.
    generator = random.Random(f"ra_lens random order {context.seed} {context.draw}")
    numbers = [[generator.random() for _ in range(n)] for n in context.n_heads]
    return table([torch.tensor(row, dtype=torch.float64) for row in numbers])


@ranking_method("index", label="Index", title="first layer first", passes=Passes(0))
def index_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """How many heads come after this one in the model."""
    after = torch.arange(sum(context.n_heads), dtype=torch.float64).flip(0)
    return table(after.split(context.n_heads))
