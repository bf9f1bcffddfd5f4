"""`RunInfo`: what the maps of a cache were made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ra_lens.errors import BadInput
from ra_lens.model import Side
from ra_lens.model.backward import Backward


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
        str_tokens: Exactly what the model read, without padding, one list per example. To be read,
            not to be joined: a character cut over several tokens stands with the last of them, and
            the others are their bytes, such as `⟨E2 9C⟩`.
        answer_lengths: How many of each example's last tokens are the answer; None where none is
            appended.
        starts: Column of each example's first token; not 0 with padding on the left.
        prepended: The token put in front of each prompt; empty if none was; None if ids were given.
        decoder_tokens: What the decoder of an encoder-decoder read, answer included, one list per
            example, each from column 0; its encoder read `str_tokens`.
        backward: Which backward pass gave the maps: `exact`, the gradient of the loss, or another
            of `run_with_ra(backward=...)`.
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
    prepended: str | None = None
    decoder_tokens: tuple[tuple[str, ...], ...] | None = None
    backward: Backward = "exact"

    def need_exact(self, what: str) -> None:
        """Raise BadInput where the maps are not those of the loss's own gradient."""
        if self.backward != "exact":
            raise BadInput(
                f"found maps of run_with_ra(backward={self.backward!r}), which are no slopes of "
                f"the loss, and {what} is made of such. Run again with backward='exact'."
            )

    def part(self, examples: Sequence[int]) -> RunInfo:
        """The same for some of the examples."""
        of_each = ("targets", "wrong", "str_tokens", "answer_lengths", "starts", "decoder_tokens")
        there: dict[str, tuple[Any, ...] | None] = {name: getattr(self, name) for name in of_each}
        cut = {name: v and tuple(v[i] for i in examples) for name, v in there.items()}
        return replace(self, **cut)  # pyright: ignore[reportArgumentType]

    def tokens_of(self, side: Side) -> tuple[tuple[str, ...], ...] | None:
        """What the queries or keys of an attention layer are made from, one list per example."""
        return self.decoder_tokens if side == "decoder" else self.str_tokens

    def common_span(self, side: Side = "input") -> slice:
        """Columns of the tokens, where all examples have the same number of them.

        Raises:
            BadInput: examples of different lengths.
        """
        rows = self.tokens_of(side)
        if rows is None:
            return slice(None)
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise BadInput(
                f"found prompts of {lengths[0]} to {lengths[-1]} tokens; a mean adds position to "
                "position, so all must have the same length. Group the prompts by length first."
            )
        first = 0 if self.starts is None or side == "decoder" else self.starts[0]
        return slice(first, first + lengths[0])
