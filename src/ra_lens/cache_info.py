"""What surrounds the maps of a cache: their names, what they were made from, a head's score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ra_lens.collect import MAP_KINDS, MapKind
from ra_lens.errors import BadInput, NotStored


def map_name(layer: int, kind: MapKind) -> str:
    """Full name of a map: `blocks.{layer}.attn.hook_{kind}`."""
    return f"blocks.{layer}.attn.hook_{kind}"


def full_name(key: str | tuple[str, int], n_layers: int) -> str:
    """Full name of a map asked for by name, or as `(kind, layer)` with a layer from either end.

    Raises:
        NotStored: there is no such kind of map.
    """
    if isinstance(key, str):
        return key
    kind, layer = key
    return map_name(layer + n_layers if layer < 0 else layer, read_kind(kind))


def read_kind(kind: str) -> MapKind:
    """Read the name of a kind of map, with or without `hook_`.

    Raises:
        NotStored: there is no such kind of map.
    """
    for known in MAP_KINDS:
        if kind.removeprefix("hook_") == known:
            return known
    raise NotStored(f"found kind {kind!r}; a cache holds {', '.join(MAP_KINDS)}.")


def in_order(names: Iterable[str], layers: Iterable[int]) -> list[str]:
    """Sort full names of maps by layer, then by kind."""
    present = set(names)
    every = (map_name(layer, kind) for layer in layers for kind in MAP_KINDS)
    return [name for name in every if name in present]


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


@dataclass(frozen=True)
class RunInfo:
    """What a cache was made from.

    Attributes:
        model_name: As TransformerLens has it.
        n_layers: Layers of the model, from which negative layers count.
        objective: Kind of loss, `answer_nll`, `sequence_nll`, …; `unknown` where the user ran the
            backward pass.
        targets: What the loss asked for, as text, one per example; None for a metric of the user.
        wrong: What a logit difference compares the targets with.
        target_is_top_prediction: True if no target was given and the model's own was taken.
        str_tokens: Exactly what the model read, without padding, one list per example.
        answer_lengths: How many of each example's last tokens are the answer; None where none is
            appended.
        starts: Column of each example's first token; not 0 with padding on the left.
        bos_prepended: Whether TransformerLens put a BOS token in front; None if ids were given.
    """

    model_name: str = "unknown"
    n_layers: int | None = None
    objective: str = "unknown"
    targets: tuple[str, ...] | None = None
    wrong: tuple[str, ...] | None = None
    target_is_top_prediction: bool = False
    str_tokens: tuple[tuple[str, ...], ...] | None = None
    answer_lengths: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    bos_prepended: bool | None = None

    def part(self, examples: Sequence[int]) -> RunInfo:
        """The same for some of the examples."""

        def cut(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
            return None if values is None else tuple(values[i] for i in examples)

        return replace(
            self,
            targets=cut(self.targets),
            wrong=cut(self.wrong),
            str_tokens=cut(self.str_tokens),
            answer_lengths=cut(self.answer_lengths),
            starts=cut(self.starts),
        )

    def common_span(self) -> slice:
        """Columns of the tokens, where all examples have the same number of them.

        Raises:
            BadInput: examples of different lengths.
        """
        if self.str_tokens is None:
            return slice(None)
        lengths = sorted({len(row) for row in self.str_tokens})
        if len(lengths) > 1:
            raise BadInput(
                f"found prompts of {lengths[0]} to {lengths[-1]} tokens; a mean adds position to "
                "position, so all must have the same length. Group the prompts by length first."
            )
        first = 0 if self.starts is None else self.starts[0]
        return slice(first, first + lengths[0])

    def describe(self, losses: Sequence[float]) -> str:
        """Tell in two lines what was read and what was differentiated."""
        lines: list[str] = []
        if self.str_tokens is not None:
            longest = max(map(len, self.str_tokens))
            lines.append(f"  tokens: up to {longest}{', BOS prepended' * bool(self.bos_prepended)}")
        text = self.objective
        if self.targets:
            text += f" of {_shortened(self.targets)}"
        if self.wrong:
            text += f" over {_shortened(self.wrong)}"
        if self.target_is_top_prediction:
            text += " (the model's own top prediction; no target was given)"
        if losses:
            text += f"; loss {sum(losses) / len(losses):.4f}{' on average' * (len(losses) > 1)}"
        return "\n".join([*lines, f"  loss: {text}"])


def _shortened(texts: Sequence[str]) -> str:
    return ", ".join(map(repr, texts[:3])) + ", …" * (len(texts) > 3)
