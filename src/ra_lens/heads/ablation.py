"""Exact effects: what the loss does when one head at a time is really taken away.

    effect[prompt, layer, head] = L(with the head ablated at every token) − L

in nats; positive: the loss rises, so the head was needed. L is that of the gradient methods, so
that effects can be compared with what these foretell: the mean cross-entropy over the answer's
tokens, read after the prompt, or that of its first token. An ablated head gives, in place of its z,

    zero      nothing: what masking does (`ra_lens.patching.masking`), and zeroed rows of W_O
    mean      its mean z over all tokens of all prompts, each token counting once, the first token
              and the prompt itself included, and the answer where it is read; the same vector
              at every position
    resample  what it gives at the same position on the prompt's corrupted twin
              (`Prompt.corrupted`, or one that `ra_lens.tasks.with_corrupted` draws), read with the
              prompt's own answer behind it

They are different questions, and rank heads differently (Miller, Chughtai and Saunders 2024,
arXiv 2407.08734). Zero puts the layers above where they never were, so that a head matters whose
constant part they need, whatever the prompt. Mean leaves a constant part there, but one that is
the same at every position. Resample leaves all that both prompts share and asks only what tells
them apart: a head that helps on either in the same way has no effect. What a head does that
another one does as well, none of them shows.

The cost, and how every change begins at the block of its head: `ra_lens.heads.each_head`; the mean
and the twins take n forward passes more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.errors import one_of
from ra_lens.heads.each_head import (
    Answered,
    Edit,
    Row,
    ask_each_head,
    check_changing,
    check_zeroing,
    kept,
)
from ra_lens.heads.ranking import ranking_context
from ra_lens.heads.registry import Passes, RankingContext, ranking_method
from ra_lens.heads.scores import HeadScores
from ra_lens.model import FwdHooks, PrependBos, spell_layers
from ra_lens.numbers import BatchSize, Whole
from ra_lens.patching.masking import mask_hooks, read_z
from ra_lens.prompts import Prompts
from ra_lens.tasks import Prompt

Ablation = Literal["zero", "mean", "resample"]
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)


@dataclass(frozen=True, eq=False, repr=False)
class HeadEffects:
    """What the answers of some prompts lose with each head ablated.

    All tensors are float64 on the CPU, NaN where a layer has no such head.

    Attributes:
        ablation: What ablated heads give.
        effects: Rise of the loss, in nats.
        logit_diff_effects: Fall of the logit difference: that of the whole model minus that with
            the head ablated; positive: the head was needed. The logit difference is the logit of
            the answer's first token minus that of the best other token.
        loss: Of the whole model, for each prompt.
        logit_diff: Of the whole model, for each prompt.
        layers: The layers that rows belong to.
        heads: Heads of each layer.
        model_name: As TransformerLens has it.
        answer_in_input: Whether L is the mean over the answer's tokens, or that of the first.
    """

    ablation: Ablation
    effects: Float[Tensor, "prompt layer head"]
    logit_diff_effects: Float[Tensor, "prompt layer head"]
    loss: Float[Tensor, "prompt"]
    logit_diff: Float[Tensor, "prompt"]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    model_name: str
    answer_in_input: bool

    def scores(self) -> HeadScores:
        """Rank the heads by the mean effect: those whose absence raises the loss the most first."""
        return HeadScores(
            method=self.ablation,
            title=_TITLES[self.ablation],
            scores=self.effects.mean(dim=0),
            layers=self.layers,
            n_examples=len(self.loss),
            model_name=self.model_name,
            heads=self.heads,
            each=self.effects,
        )

    def __repr__(self) -> str:
        """Say what was ablated how, and which heads were needed the most."""
        best = ", ".join(f"{head.label} {head.score:+.3g}" for head in self.scores().top(5))
        n = len(self.loss)
        return (
            f"HeadEffects of {self.model_name}, ablation {self.ablation!r}: layers "
            f"{spell_layers(self.layers)}, {n} prompt{'s' * (n != 1)}, loss "
            f"{float(self.loss.mean()):.4f}\n  the loss rises most without: {best}"
        )


_TITLES: dict[Ablation, str] = {
    "zero": "rise of the loss, head zeroed",
    "mean": "rise of the loss, head at its mean",
    "resample": "rise of the loss, head from the corrupted prompt",
}
_PASSES = {
    "zero": Passes(1, forward_per_head=1),
    "mean": Passes(2, forward_per_head=1),
    "resample": Passes(2, forward_per_head=1),
}


def head_effects(
    model: nn.Module,
    prompts: Iterable[Prompt],
    *,
    ablation: Ablation = "zero",
    answer_in_input: bool = True,
    seed: Whole = 0,
    prepend_bos: PrependBos = None,
    batch_size: BatchSize = 32,
    progress: bool = True,
) -> HeadEffects:
    """Ablate every head of a model, one at a time, and measure what the loss does.

    Args:
        model: A HookedTransformer or TransformerBridge that reads left to right.
        prompts: Questions with their answers, as `ra_lens.tasks` makes them.
        ablation: `"zero"`, `"mean"` or `"resample"`: what an ablated head gives, at every token.
        answer_in_input: True reads prompt and answer, the loss being the mean over the answer's
            tokens; False reads the prompt alone, the loss being −log p of its first token.
        seed: Of the corrupted twins that are drawn where prompts have none.
        prepend_bos: What stands in front of each prompt, as in `run_with_ra`.
        batch_size: Rows per forward pass; a row is a prompt with one head ablated. `"auto"`: as
            many as fit what the model's device has free (`ra_lens.fitting`).
        progress: False hides the progress bar.

    Returns:
        The effects on loss and logit difference, for each prompt and head.

    Raises:
        BadInput: an unknown ablation, prompts that cannot be used, a twin of another length, or a
            prompt without one of which none can be drawn.
        UnsupportedModel: a model whose heads cannot be changed one by one.
    """
    one_of("ablation", ablation, ABLATIONS)
    context = ranking_context(
        model,
        prompts,
        seed=seed,
        answer_in_input=answer_in_input,
        prepend_bos=prepend_bos,
        batch_size=batch_size,
        progress=progress,
    )
    before, after = _ablated(context, ablation, stacklevel=3)
    return HeadEffects(
        ablation=ablation,
        effects=after.loss - before.loss[:, None, None],
        logit_diff_effects=before.logit_diff[:, None, None] - after.logit_diff,
        loss=before.loss,
        logit_diff=before.logit_diff,
        layers=tuple(context.lens.sites),
        heads=context.n_heads,
        model_name=context.lens.name,
        answer_in_input=answer_in_input,
    )


@ranking_method("zero", label="Zero", title=_TITLES["zero"], passes=_PASSES["zero"])
def zero_scores(context: RankingContext) -> Float[Tensor, "prompt layer head"]:
    """Rise of the loss, in nats, when the head gives nothing at any token.

    Signed: heads that hurt come last. It is what `atp` foretells and `cm1` measures in
    probability. It fails where another head does the same work, each of which could go alone, and
    it counts what layers above need of a head whatever the prompt says.
    """
    return _rise(context, "zero")


@ranking_method("mean", label="Mean", title=_TITLES["mean"], passes=_PASSES["mean"])
def mean_scores(context: RankingContext) -> Float[Tensor, "prompt layer head"]:
    """Rise of the loss, in nats, when the head gives its mean z at every token.

    The mean is over all tokens of all prompts ranked with, each token once, answers included where
    they are read. Signed as `zero`. With one prompt, or alike ones, the mean holds part of what the
    head knew; it has no positions, so that a head which marks positions is taken away too.
    """
    return _rise(context, "mean")


@ranking_method(
    "resample",
    label="Resample",
    title=_TITLES["resample"],
    passes=_PASSES["resample"],
    twins=True,
)
def resample_scores(context: RankingContext) -> Float[Tensor, "prompt layer head"]:
    """Rise of the loss, in nats, when the head gives what it gives on the corrupted twin.

    Signed as `zero`. It is what `nap` foretells: exact activation patching of one head. It says
    nothing of what the twin shares, such as which task it is, and hangs on which twin was drawn.
    """
    return _rise(context, "resample")


def _rise(context: RankingContext, ablation: Ablation) -> Float[Tensor, "prompt layer head"]:
    before, after = _ablated(context, ablation, stacklevel=6)
    return after.loss - before.loss[:, None, None]


def _ablated(
    context: RankingContext, ablation: Ablation, *, stacklevel: int
) -> tuple[Answered, Answered]:
    """Ask all questions as the model is and with each head ablated."""
    if ablation == "zero":
        check_zeroing(context, stacklevel=stacklevel)
    else:
        check_changing(context)
    edit, changed_from = _EDITS[ablation](context)
    return ask_each_head(
        context,
        context.questions,
        edit,
        changed_from=changed_from,
        whole_answer=context.answer_in_input,
    )


def _zero(context: RankingContext) -> tuple[Edit, None]:
    def edit(rows: Sequence[Row], _prompts: Prompts, _start: int) -> FwdHooks:
        return mask_hooks(context.lens.sites, kept(context, rows))

    return edit, None


def _mean(context: RankingContext) -> tuple[Edit, None]:
    read = _read(context, context.questions.prompts)
    n_tokens = sum(read.lengths)
    means: dict[int, Tensor] = {}
    # Padding is 0 in each.
    for _, some in read.batches(context.batch_size):
        for layer, z in read_z(context.lens, some).items():
            part = z.double().sum(dim=(0, 1), keepdim=True) / n_tokens
            means[layer] = means[layer] + part if layer in means else part

    def edit(rows: Sequence[Row], _prompts: Prompts, _start: int) -> FwdHooks:
        return mask_hooks(context.lens.sites, kept(context, rows), instead=means)

    return edit, None


def _resample(context: RankingContext) -> tuple[Edit, Sequence[int]]:
    own, twins = context.questions.prompts, context.twins
    # Before the first token that differs both runs are the same.
    first = [
        next(i for i, (one, other) in enumerate(zip(*pair, strict=True)) if one != other)
        for pair in zip(own.ids, twins.ids, strict=True)
    ]
    read = _read(context, twins)
    z, starts = read_z(context.lens, read, batch_size=context.batch_size), read.starts

    def edit(rows: Sequence[Row], prompts: Prompts, start: int) -> FwdHooks:
        questions = torch.tensor([question for question, _, _ in rows])
        changed = {layer for _, layer, _ in rows}
        # A column of this batch is that many columns further on in what was read.
        shift = torch.tensor([starts[q] for q in questions.tolist()]) + start
        shift = shift - torch.tensor(prompts.starts)
        columns = torch.arange(prompts.padded_width)[None] + shift[:, None]
        columns = columns.clamp(0, read.padded_width - 1)  # at padding, whatever stands there
        values = {
            layer: z[layer][questions[:, None], columns]
            for i, layer in enumerate(context.lens.sites)
            if i in changed
        }
        return mask_hooks(context.lens.sites, kept(context, rows), instead=values)

    return edit, first


def _read(context: RankingContext, prompts: Prompts) -> Prompts:
    """What is read of prompts, less the answer's last token, after which nothing is asked."""
    if not context.answer_in_input:
        return prompts
    return prompts.extended([answer[:-1] for answer in context.questions.answers])


_Edits = Callable[[RankingContext], tuple[Edit, Sequence[int] | None]]
_EDITS: dict[Ablation, _Edits] = {"zero": _zero, "mean": _mean, "resample": _resample}
