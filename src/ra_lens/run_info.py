"""`RunInfo`: what the maps of a cache were made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.model import Side
from ra_lens.model.backward import Backward
from ra_lens.text import isolated, label

_LOSSES = {
    "answer_nll": "−log p of the target",
    "top_prediction": "−log p of the target",
    "sequence_nll": "mean of −log p over the target's tokens",
    "logit_diff": "logit of the wrong answer − logit of the right one",
    "probability_diff": "probability of the wrong tokens − that of the right ones",
    "custom": "a metric of the user's own",
}
_UNITS = {
    "answer_nll": "nats",
    "top_prediction": "nats",
    "sequence_nll": "nats",
    "logit_diff": "logits",
}


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

    @property
    def loss_unit(self) -> str:
        """Unit of the loss: `nats` for −log p, `logits`, or of others `units of the loss`."""
        return _UNITS.get(self.objective, "units of the loss")

    def facts(self, loss: Tensor, example: int | None) -> list[tuple[str, str]]:
        """Tell in names and values what was read, what was asked for, and the loss of each."""
        found = list[tuple[str, str]]()
        if self.str_tokens is not None:
            lengths = list(map(len, self.str_tokens))
            n = f"up to {max(lengths)}" if example is None else lengths[example]
            found.append(("Tokens", f"{n}{_in_front(self.prepended)}"))
        own = " (the model's own top prediction; no target was given)"
        own *= self.target_is_top_prediction
        if example is None:
            text = self.objective
            text += f" of {_shortened(self.targets)}" if self.targets else ""
            text += f" over {_shortened(self.wrong)}" if self.wrong else ""
            losses = loss.flatten().tolist()
            if losses and not any(map(math.isnan, losses)):  # NaN where nobody said what it is
                average = " on average" * (len(losses) > 1)
                own += f"; loss {sum(losses) / len(losses):.4f}{average}"
            return [*found, ("Loss", text + own), *_of_another(self.backward)]
        if self.targets is not None:
            found.append(("Target", f"“{label(self.targets[example])}”{own}"))
        value = float(loss[example] if loss.ndim else loss)
        if not math.isnan(value):
            text = f"{value:.4f}, {_LOSSES.get(self.objective, self.objective)}"
            if self.objective in ("answer_nll", "top_prediction"):
                text += f"; p(target) = {math.exp(-value):.3g}"
            found.append(("Loss", text))
        return [*found, *_of_another(self.backward)]


def _shortened(texts: Sequence[str]) -> str:
    shown = [isolated(repr(text)) for text in texts[:3]]
    return ", ".join(shown) + ", …" * (len(texts) > 3)


def _in_front(prepended: str | None) -> str:
    """Say what was put in front of text; nothing where ids were given."""
    return (
        "" if prepended is None else f", {label(prepended) if prepended else 'nothing'} prepended"
    )


def _of_another(backward: str) -> list[tuple[str, str]]:
    """Say which backward pass gave the maps, where it is not the loss's own."""
    text = f"{backward}: gradients of other rules (ra_lens.model.backward), not of the loss"
    return [] if backward == "exact" else [("Backward", text)]
