"""What a model predicts for a prompt, before and after a patch with the prompt's own maps.

The patch is one step of attention patching: `scale` times the prompt's own RA map is added to the
pattern of every head (paper section 5.3, with a mean over one prompt). A negative scale follows
descent, so that the loss falls where the step is not too long. Cost: a forward and a backward pass
per prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.binding import ids_of
from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.inputs import TokenIds, answers_given, read_given
from ra_lens.numbers import Real, Whole, real, whole
from ra_lens.prompts import PromptInput, Prompts, read_prompts
from ra_lens.run import run_with_ra
from ra_lens.sites import Lens, as_lens
from ra_lens.targets import Answers, one_each


@dataclass(frozen=True)
class Predictions:
    """What comes next after a prompt.

    Attributes:
        top: The likeliest tokens with their probabilities, the likeliest first.
        target: Probability of the target, of all its tokens together; None where the loss is not
            the target's −log p.
        rank: Rank of the target's first token; 1 is the top prediction. None likewise.
    """

    top: tuple[tuple[str, float], ...]
    target: float | None = None
    rank: int | None = None


@dataclass(frozen=True)
class PatchedPrompt:
    """A prompt's predictions before and after the patch.

    Attributes:
        scale: What the prompt's own RA maps were multiplied by.
        before: Unpatched.
        after: Patched.
    """

    scale: float
    before: Predictions
    after: Predictions


def patched_predictions(
    model: nn.Module,
    input: PromptInput,
    ra: RACache,
    *,
    target: Answers | None = None,
    scale: Real = -30.0,
    top: Whole = 5,
) -> tuple[PatchedPrompt, ...]:
    """Patch each prompt's RA maps into its own attention and compare what comes next.

    Args:
        model: The model that `ra` is of.
        input: The prompts as `run_with_ra` was given them; text is read with BOS or without, as
            it was then.
        ra: What it gave, with its maps.
        target: The target it was given: text, a token id, or one per prompt; None: the model's own
            top prediction, which stays the target once patched.
        scale: What the maps are multiplied by.
        top: How many of the likeliest tokens are told.

    Returns:
        One per prompt.

    Raises:
        BadInput: another number of prompts than the cache holds, or `top` below 1.
        NotStored: the maps were not kept.
        UnsupportedModel: a model whose attention cannot be edited.
    """
    factor, top = real("scale", scale), whole("top", top)
    if top < 1:
        raise BadInput(f"found top={top}; give the number of predictions to tell, at least 1.")
    lens = as_lens(model)
    prompts = _read(lens, input, ra)
    n = len(prompts)
    if n != ra.batch_size:
        raise BadInput(
            f"found {n} prompts for a cache of {ra.batch_size}. Give the prompts that "
            "run_with_ra was given."
        )
    targets = one_each(answers_given("target", target), n)
    if len(targets) != n:
        raise BadInput(
            f"found {len(targets)} targets for {n} prompts. Give one for all, or one for each."
        )
    found: list[PatchedPrompt] = []
    for i, wanted in enumerate(targets):
        prompt = replace(prompts.chosen([i]), width=0)
        options: dict[str, Any] = {"store": "norms", "progress": False}
        logits, plain = run_with_ra(model, prompt, target=_of_one(wanted), **options)
        if wanted is None:
            wanted = int(logits[0, 0].argmax())
        one = ra if not ra.has_batch_dim else ra.apply_slice_to_batch_dim([i])
        hooks = one.mean().patch_hooks(scale=factor)
        after, patched = run_with_ra(
            model, prompt, target=_of_one(wanted), fwd_hooks=hooks, **options
        )
        first = ids_of(lens, prompt, 0, wanted, f"target {i}")[0]
        found.append(
            PatchedPrompt(
                factor,
                # The first position read predicts the target's first token.
                _predictions(lens, logits[0, 0], plain, first, top),
                _predictions(lens, after[0, 0], patched, first, top),
            )
        )
    return tuple(found)


def _read(lens: Lens, input: PromptInput, ra: RACache) -> Prompts:
    if isinstance(input, Prompts):
        return input
    given = read_given("prompt", input)
    as_text = None if isinstance(given, TokenIds) else ra.info.bos_prepended
    return read_prompts(lens, given, prepend_bos=as_text)


def _of_one(target: object) -> Any:
    """The target of one prompt as that of a run: a row of ids is one answer, not several."""
    return [target] if isinstance(target, list) else target


def _predictions(
    lens: Lens, logits: Float[Tensor, "d_vocab"], ra: RACache, first: int, top: int
) -> Predictions:
    chances = logits.float().softmax(dim=-1)
    values, ids = chances.topk(min(top, chances.numel()))
    likely = tuple(
        (lens.decode(int(i)), float(v)) for v, i in zip(values.cpu(), ids.cpu(), strict=True)
    )
    target = None
    if ra.info.objective in ("answer_nll", "top_prediction", "sequence_nll"):
        length = 1 if ra.info.answer_lengths is None else max(ra.info.answer_lengths[0], 1)
        target = math.exp(-float(ra.loss.flatten()[0]) * length)
    if target is None:
        return Predictions(likely, target)
    rank = 1 + int(torch.sum(logits > logits[first]))
    return Predictions(likely, target, rank)
