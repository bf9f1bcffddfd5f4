"""The tokens of a prompt as they are shown, each with its kind."""

from __future__ import annotations

from ra_lens.cache import RACache
from ra_lens.model import Side
from ra_lens.text import visible


def sides(ra: RACache) -> tuple[Side, ...]:
    """Tell what the model reads: an input, and what a decoder beside its encoder reads."""
    sites = ra.sites.values()
    decodes = any("decoder" in (site.query_side, site.key_side) for site in sites)
    return ("input", "decoder") if decodes else ("input",)


def prompt_tokens(
    ra: RACache, example: int, side: Side = "input", *, target: bool = True
) -> list[tuple[str, str]]:
    """Give the tokens of an example as shown, the target's last, each with a kind.

    The kind is `''`, `special`, `target` or, for a target that the model has not read, `target
    next`. Of a cache that was told no tokens the positions are given, if it has maps to count them.
    """
    info = ra.info
    rows = info.tokens_of(side)
    if rows is None:
        n = next((maps.shape[-1] for maps in ra.values()), 0)
        shown = [(f"#{i}", "") for i in range(n)]
    else:
        shown = [(visible(token), "") for token in rows[example]]
    if shown and info.prepended and side == "input":
        shown[0] = (shown[0][0], "special")
    if not target or info.targets is None:
        return shown
    read = info.answer_lengths if side == sides(ra)[-1] else None
    first = len(shown) - (0 if read is None else read[example])
    answer = [(token, "target") for token, _ in shown[first:]]
    return [*shown[:first], *(answer or [(visible(info.targets[example]), "target next")])]
