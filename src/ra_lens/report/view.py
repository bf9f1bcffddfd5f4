"""What the report and the frame in a notebook have in common: their options, heading and legend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.head_maps import read_example
from ra_lens.numbers import Real, Whole, Wholes, real, whole, wholes

Sign = Literal["descent", "gradient"]

_READ = {
    "descent": (
        "The maps show −R: where one step of gradient descent on this loss would move attention. "
        "Red cells would get more attention, blue ones less."
    ),
    "gradient": (
        "The maps show R, the gradient itself: descent would lower attention at red cells and "
        "raise it at blue ones."
    ),
}
_ALWAYS = (
    "Rows are the tokens that attend (queries), columns the tokens attended to (keys). The entries "
    "of a row of R add up to 0: attention is moved, not made. R is 0 wherever A is."
)
_BLOCKED = (
    "The third map foretells the loss if one look were blocked, to first order: this edge alone, "
    "the rest of its row taking its share. Green: the loss would rise, the answer needs this look. "
    "Brown: it would fall, the look is in the way. Where one look has nearly all of a row, R is "
    "small whatever the look does, and this map is not."
)


@dataclass(frozen=True)
class View:
    """Options of what is shown of a cache, read and checked."""

    examples: tuple[int, ...]
    sign: Sign
    top: int
    max_tokens: int
    max_bytes: int


def read_view(
    ra: RACache,
    *,
    examples: Wholes | None,
    sign: Sign,
    top: Whole,
    max_tokens: Whole,
    max_megabytes: Real,
) -> View:
    """Read the options, or refuse them with BadInput; without `examples` all are chosen."""
    every = range(ra.batch_size)
    asked = every if examples is None else wholes("examples", examples, none_at_all=True)
    chosen = [read_example(ra, example) for example in asked]
    if not chosen:
        raise BadInput("found examples=[]; give at least one, or leave it out for all.")
    if sign not in _READ:
        raise BadInput(f"found sign={sign!r}; give 'descent' (shows −R) or 'gradient' (shows R).")
    top, max_tokens = whole("top", top), whole("max_tokens", max_tokens)
    max_megabytes = real("max_megabytes", max_megabytes)
    if top < 1:
        raise BadInput(f"found top={top}; give the number of heads to show, at least 1.")
    if max_tokens < 1 or max_megabytes <= 0:
        raise BadInput(
            f"found max_tokens={max_tokens}, max_megabytes={max_megabytes}; give positive numbers."
        )
    return View(tuple(chosen), sign, top, max_tokens, int(max_megabytes * 1e6))


def heading_of(ra: RACache) -> str:
    """Name what is shown."""
    return f"Reversed Attention of {ra.info.model_name}"


def how_to_read(sign: Sign) -> tuple[str, ...]:
    """Tell what colours, rows and columns of the maps stand for, in paragraphs."""
    return (_READ[sign], _ALWAYS, _BLOCKED)
