"""What surrounds the maps of a cache: their names, what they were made from, a head's score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ra_lens.collect import MapKind


def map_name(layer: int, kind: MapKind) -> str:
    """Full name of a map: `blocks.{layer}.attn.hook_{kind}`."""
    return f"blocks.{layer}.attn.hook_{kind}"


def spell_layers(layers: Sequence[int]) -> str:
    """Spell layer indices: `0…11`, or `0, 3, 7` where they are not consecutive."""
    consecutive = list(layers) == list(range(layers[0], layers[-1] + 1))
    if consecutive and len(layers) > 1:
        return f"{layers[0]}…{layers[-1]}"
    return ", ".join(map(str, layers))


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
        wrong: tuple[str, ...] | None = None
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
