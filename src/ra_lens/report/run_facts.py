"""What was run and what came out, as plain text: the tokens of a prompt, names and values."""

from __future__ import annotations

import math

from ra_lens.cache import RACache
from ra_lens.model import Side
from ra_lens.model.sites import heads_of, spell_counts
from ra_lens.text import label, visible

_LOSSES = {
    "answer_nll": "−log p of the target",
    "top_prediction": "−log p of the target",
    "sequence_nll": "mean of −log p over the target's tokens",
    "logit_diff": "logit of the wrong answer − logit of the right one",
    "custom": "a metric of the user's own",
}
_OF_ONE_TOKEN = ("answer_nll", "top_prediction")


def sides(ra: RACache) -> tuple[Side, ...]:
    """Tell what the model reads: an input, and what a decoder beside its encoder reads."""
    sites = ra.sites.values()
    decodes = any("decoder" in (site.query_side, site.key_side) for site in sites)
    return ("input", "decoder") if decodes else ("input",)


def prompt_tokens(
    ra: RACache, example: int, side: Side = "input", *, target: bool = True
) -> list[tuple[str, str]]:
    """Tokens of an example as shown, the target's last, each with a kind.

    The kind is `''`, `special`, `target` or, for a target that the model has not read, `target
    next`.
    """
    info = ra.info
    rows = info.tokens_of(side)
    if rows is None:  # the cache was not told; positions stand for tokens
        shown = [(f"#{i}", "") for i in range(ra["ra", ra.layers[0]].shape[-1])]
    else:
        shown = [(visible(token), "") for token in rows[example]]
    if shown and info.bos_prepended and side == "input":
        shown[0] = (shown[0][0], "special")
    if not target or info.targets is None:
        return shown
    read = info.answer_lengths if side == sides(ra)[-1] else None
    first = len(shown) - (0 if read is None else read[example])
    answer = [(token, "target") for token, _ in shown[first:]]
    return [*shown[:first], *(answer or [(visible(info.targets[example]), "target next")])]


def model_facts(ra: RACache) -> list[tuple[str, str]]:
    """Which model, and which of its layers."""
    first, last = ra.layers[0], ra.layers[-1]
    whole = len(ra.layers) > 1 and ra.layers == list(range(first, last + 1))
    layers = f"{first} to {last}" if whole else ", ".join(map(str, ra.layers))
    return [
        ("Model", ra.info.model_name),
        ("Layers", f"{layers}; {spell_counts(heads_of(ra.sites))} heads each"),
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
        chance = f"; p(target) = {math.exp(-loss):.3g}" * (info.objective in _OF_ONE_TOKEN)
        rows.append(("Loss", f"{loss:.4f}, {_LOSSES.get(info.objective, info.objective)}{chance}"))
    return rows


def loss_of(ra: RACache, example: int) -> float:
    """Loss of an example; of the whole batch where a metric gave one number for it."""
    losses = ra.loss.detach().flatten().tolist()
    return losses[example] if len(losses) > example else losses[0]
