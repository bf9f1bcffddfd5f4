"""Which head is meant: `"L2H3"`, as heads are printed, `(2, 3)`, or a `HeadScore`.

Where several are asked for, one alone will do, and whatever iterates over them: a list, the column
`label` of a table, an array with a row for each head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from ra_lens.errors import BadInput
from ra_lens.numbers import Whole, as_whole


@dataclass(frozen=True)
class HeadScore:
    """A head and its score; larger = more important."""

    layer: int
    head: int
    score: float

    @property
    def label(self) -> str:
        """`L5H3`, as TransformerLens labels heads."""
        return f"L{self.layer}H{self.head}"


Head = HeadScore | str | Iterable[Whole]
Heads = Head | Iterable[Head] | None

_LABEL = re.compile(r"L(\d+)H(\d+)")


def layer_and_index(head: object) -> tuple[int, int]:
    """Give layer and index of one head, as they were given: negative ones stay negative.

    Raises:
        BadInput: none of the three forms.
    """
    if isinstance(head, HeadScore):
        return head.layer, head.head
    if isinstance(head, str):
        match = _LABEL.fullmatch(head)
        pair = None if match is None else (int(match.group(1)), int(match.group(2)))
    else:
        pair = _pair(head)
    if pair is None:
        raise BadInput(
            f"found {head!r} among heads. Give (layer, head) pairs, labels like 'L3H5', or the "
            "HeadScores of a ranking's top(k)."
        )
    return pair


def list_heads(heads: object) -> list[object]:
    """Give several heads as a list; one alone becomes a list of one."""
    if isinstance(heads, str | HeadScore) or not isinstance(heads, Iterable):
        return [heads]  # where it is none, that is said where it is read
    given: list[object] = list(heads)
    return [tuple(given)] if _pair(given) is not None else given


def spell_head(head: object) -> str:
    """Spell a head as it was given."""
    return head.label if isinstance(head, HeadScore) else str(head)


def _pair(head: Any) -> tuple[int, int] | None:
    """Two whole numbers, in whatever holds two things in order."""
    unordered = isinstance(head, str | bytes | Mapping | Set) or getattr(head, "ndim", 1) != 1
    if unordered or not hasattr(head, "__len__") or len(head) != 2:
        return None
    layer, index = map(as_whole, head)
    return None if layer is None or index is None else (layer, index)
