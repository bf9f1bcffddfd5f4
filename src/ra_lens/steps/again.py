"""The prompts of a cache, run again under hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from torch import nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.inputs import Given, Mask
from ra_lens.memory import offering
from ra_lens.model import FwdHooks, PrependBos, Site
from ra_lens.numbers import BatchSize
from ra_lens.prompts import PaddingSide, PromptInput
from ra_lens.run import run_with_ra
from ra_lens.targets import Answers, Metric, Objective, Position


class RunOptions(TypedDict, total=False):
    """The options of `run_with_ra` that say what was read, and what was asked for."""

    target: Answers | Objective | None
    metric: Metric | Objective | None
    position: Position | None
    attention_mask: Mask | None
    prepend_bos: PrependBos
    padding_side: PaddingSide | None
    decoder_input: Given | None
    batch_size: BatchSize | None


def run_again(
    ra: RACache,
    model: nn.Module,
    input: PromptInput,
    options: RunOptions,
    hooks: FwdHooks,
    site: Site,
    *,
    vectors: Sequence[str] = (),
    fixed: bool = False,
) -> RACache:
    """Run the prompts of a cache again, under hooks; refuses other prompts.

    With `fixed` the target is that of the cache where it was the model's own top prediction, which
    the hooks may change.
    """
    given: dict[str, Any] = {**options}
    asked = given.get("target") is not None or given.get("metric") is not None
    if (
        not asked
        and ra.info.targets is not None
        and (fixed or not ra.info.target_is_top_prediction)
    ):
        given["target"] = list(ra.info.targets)
    scale = {site.layer: site.scale} if site.scale is not None else None
    with offering("batch_size"):
        _, again = run_with_ra(
            model,
            input,
            **given,
            layers=[site.layer],
            store="norms",
            vectors=list(vectors),
            fwd_hooks=hooks,
            softmax_scale=scale,
            progress=False,
        )
    mine, theirs = ra.info, again.info
    same = (mine.str_tokens, mine.decoder_tokens) == (theirs.str_tokens, theirs.decoder_tokens)
    if mine.str_tokens is not None and (not same or mine.starts != theirs.starts):
        raise BadInput(
            "found other prompts than those that the cache was made from. Give input= and the "
            "options as they were given to run_with_ra (prepend_bos, padding_side, and a target "
            "of several tokens, which is appended)."
        )
    return again
