"""What was run and what came out, as plain text: the tokens of a prompt, names and values."""

from __future__ import annotations

import math

from ra_lens.cache import RACache
from ra_lens.model.sites import spell_counts
from ra_lens.text import label, visible

_LOSSES = {
    "answer_nll": "−log p of the target",
    "top_prediction": "−log p of the target",
    "sequence_nll": "mean of −log p over the target's tokens",
    "logit_diff": "logit of the wrong answer − logit of the right one",
    "custom": "a metric of the user's own",
}


def prompt_tokens(ra: RACache, example: int) -> list[tuple[str, str]]:
    """Tokens of an example as shown, each `''`, `special` or `target`; the target comes last."""
    info = ra.info
    tokens = [] if info.str_tokens is None else list(info.str_tokens[example])
    target = None if info.targets is None else info.targets[example]
    answer = 0 if info.answer_lengths is None else info.answer_lengths[example]
    shown = [(visible(token), "") for token in tokens[: len(tokens) - answer]]
    if shown and info.bos_prepended:
        shown[0] = (shown[0][0], "special")
    return shown if target is None else [*shown, (visible(target), "target")]


def run_facts(ra: RACache, example: int) -> list[tuple[str, str]]:
    """What was run, on what, and what came out, as names and values."""
    return [*model_facts(ra), *example_facts(ra, example)]


def model_facts(ra: RACache) -> list[tuple[str, str]]:
    """Which model, and which of its layers."""
    first, last = ra.layers[0], ra.layers[-1]
    whole = len(ra.layers) > 1 and ra.layers == list(range(first, last + 1))
    layers = f"{first} to {last}" if whole else ", ".join(map(str, ra.layers))
    return [
        ("Model", ra.info.model_name),
        ("Layers", f"{layers}; {spell_counts(ra.sites.n_heads)} heads each"),
    ]


def example_facts(ra: RACache, example: int) -> list[tuple[str, str]]:
    """How long a prompt is, what was asked of the model, and its loss."""
    info = ra.info
    rows: list[tuple[str, str]] = []
    if info.str_tokens is not None:
        bos = ", BOS prepended" if info.bos_prepended else ""
        rows.append(("Tokens", f"{len(info.str_tokens[example])}{bos}"))
    if info.targets is not None:
        own = " (the model's own top prediction; no target was given)"
        target = f"“{label(info.targets[example])}”"
        rows.append(("Target", target + own * info.target_is_top_prediction))
    if not math.isnan(loss := loss_of(ra, example)):  # NaN where nobody said what it is
        chance = target_probability(ra, example)
        said = "" if chance is None else f"; p(target) = {chance:.3g}"
        what = _LOSSES.get(info.objective, info.objective)
        rows.append(("Loss", f"{loss:.4f}, {what}{said}"))
    return rows


def loss_of(ra: RACache, example: int) -> float:
    """Loss of an example; of the whole batch where a metric gave one number for it."""
    losses = ra.loss.detach().flatten().tolist()
    return losses[example] if len(losses) > example else losses[0]


def target_probability(ra: RACache, example: int) -> float | None:
    """Probability that the model gave a target of one token; None for other losses."""
    known = ra.info.objective in ("answer_nll", "top_prediction")
    return math.exp(-loss_of(ra, example)) if known else None
