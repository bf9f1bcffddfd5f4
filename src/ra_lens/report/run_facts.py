"""The tokens of a prompt as they are shown."""

from __future__ import annotations

from ra_lens.cache import RACache
from ra_lens.text import visible


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
