"""What a model predicts for a prompt, before and after a patch with the prompt's own maps.

The patch is one step of attention patching: `scale` times the prompt's own RA map is added to the
pattern of every head (paper section 5.3, with a mean over one prompt). A negative scale follows
descent, so that the loss falls where the step is not too long. Cost: a forward and a backward pass
per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.run import run_with_ra
from ra_lens.sites import Lens, as_lens


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
    input: str | Sequence[str],
    ra: RACache,
    *,
    target: str | int | Sequence[str | int] | None = None,
    scale: float = -30.0,
    top: int = 5,
) -> tuple[PatchedPrompt, ...]:
    """Patch each prompt's RA maps into its own attention and compare what comes next.

    Args:
        model: The model that `ra` is of.
        input: The prompts as `run_with_ra` was given them.
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
    texts = [input] if isinstance(input, str) else list(input)
    if len(texts) != ra.batch_size:
        raise BadInput(
            f"found {len(texts)} prompts for a cache of {ra.batch_size}. Give the prompts that "
            "run_with_ra was given."
        )
    if top < 1:
        raise BadInput(f"found top={top}; give the number of predictions to tell, at least 1.")
    lens = as_lens(model)
    if target is None or isinstance(target, str | int):
        targets: list[str | int | None] = [target] * len(texts)
    else:
        targets = list(target)
    if len(targets) != len(texts):
        raise BadInput(
            f"found {len(targets)} targets for {len(texts)} prompts. Give one for all, or one for "
            "each."
        )
    found: list[PatchedPrompt] = []
    for i, (text, wanted) in enumerate(zip(texts, targets, strict=True)):
        options: dict[str, Any] = {"store": "norms", "progress": False}
        logits, plain = run_with_ra(model, text, target=wanted, **options)
        if wanted is None:
            wanted = int(logits[0, 0].argmax())
        one = ra if not ra.has_batch_dim else ra.apply_slice_to_batch_dim([i])
        hooks = one.mean().patch_hooks(scale=scale)
        after, patched = run_with_ra(model, text, target=wanted, fwd_hooks=hooks, **options)
        first = _first_token(lens, plain, text, wanted)
        found.append(
            PatchedPrompt(
                scale,
                # The first position read predicts the target's first token.
                _predictions(lens, logits[0, 0], plain, first, top),
                _predictions(lens, after[0, 0], patched, first, top),
            )
        )
    return tuple(found)


def _first_token(lens: Lens, ra: RACache, text: str, target: Any) -> int | None:
    if isinstance(target, int):
        return target
    if not isinstance(target, str):
        return None
    # Tokenised after the prompt, as run_with_ra does.
    start = lens.encode(text, prepend_bos=ra.info.bos_prepended)
    joint = lens.encode(text + target, prepend_bos=ra.info.bos_prepended)
    if joint[: len(start)] == start and len(joint) > len(start):
        return int(joint[len(start)])
    return int(lens.encode_fragment(target)[0])


def _predictions(
    lens: Lens, logits: Float[Tensor, "d_vocab"], ra: RACache, first: int | None, top: int
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
    if first is None or target is None:
        return Predictions(likely, target)
    rank = 1 + int(torch.sum(logits > logits[first]))
    return Predictions(likely, target, rank)
