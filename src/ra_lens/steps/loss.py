"""What a step does to the loss, and how far first order holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NothingToDifferentiate
from ra_lens.head_names import Heads, list_heads
from ra_lens.model import FwdHooks, as_lens
from ra_lens.numbers import Real, real
from ra_lens.prompts import PromptInput
from ra_lens.steps.again import RunOptions, run_again
from ra_lens.steps.gradient import gradient_norm, gradient_step, read_weights
from ra_lens.vjp import WEIGHTS, Weight

_HALVINGS = 12  # of a step that is foretold to change the loss by a thousandth
_CLOSE = 1.02  # ratio of two steps that are told apart no further


@dataclass(frozen=True, eq=False, repr=False)
class StepEffect:
    """What a step does to the loss: foretold to first order, and measured.

    Attributes:
        eta: Size of the step.
        norm: ‖∂L/∂W‖ over the matrices stepped.
        loss_before: Loss of each example (one number, if a metric gave one).
        loss_after: The same after the step.
    """

    eta: float
    norm: float
    loss_before: Float[Tensor, "*batch"]
    loss_after: Float[Tensor, "*batch"]

    @property
    def predicted(self) -> float:
        """Change of the mean loss to first order, −η ‖∂L/∂W‖²."""
        return -self.eta * self.norm**2

    @property
    def measured(self) -> float:
        """Change of the mean loss."""
        return float((self.loss_after.double() - self.loss_before.double()).mean())

    @property
    def error(self) -> float:
        """|measured − predicted| / |predicted|."""
        return abs(self.measured - self.predicted) / abs(self.predicted)

    def __repr__(self) -> str:
        """Say what was foretold and what happened."""
        return (
            f"StepEffect of a step of {self.eta:.4g}: loss {float(self.loss_before.mean()):.4f} → "
            f"{float(self.loss_after.mean()):.4f} ({self.measured:+.4g}, foretold "
            f"{self.predicted:+.4g})"
        )


def step_effect(
    model: nn.Module,
    input: PromptInput,
    ra: RACache,
    heads: Heads,
    eta: Real,
    *,
    weights: Weight | Iterable[Weight] = WEIGHTS,
    **options: Unpack[RunOptions],
) -> StepEffect:
    """Take a step and measure the loss of the same prompts, beside −η ‖∂L/∂W‖².

    Costs two forward passes, and backward passes through the last layer.

    Args:
        model: The model that the cache is of.
        input: The prompts that it was made from.
        ra: Their run, with the vectors that `gradient_step` needs.
        heads: Which heads; None: all.
        eta: Size of the step.
        weights: Which of their matrices.
        **options: As they were given to `run_with_ra`, `target` or `metric` included. Targets that
            were told apart by text alone may be left out.

    Raises:
        BadInput: heads or options that cannot be used, other prompts, or another loss than the
            cache's.
        NotStored: vectors that were not kept.
        UnsupportedModel: a step that cannot be taken; see `gradient_step`.
        NothingToDifferentiate: a loss that is NaN after the step.
    """
    taken = _Taken(model, input, ra, heads, read_weights(weights), options)
    return taken.step(real("eta", eta))


@dataclass(frozen=True)
class LinearStep:
    """How far the loss follows its first order, as `largest_linear_step` found it.

    Attributes:
        eta: The largest step tried that stays within.
        within: The error that was allowed, relative to what is foretold.
        effect: What it does to the loss.
        tried: All steps tried, with the change of the loss foretold and measured.
    """

    eta: float
    within: float
    effect: StepEffect
    tried: tuple[tuple[float, float, float], ...]

    def __str__(self) -> str:
        """Say how far."""
        return f"{self.eta:.4g}: within {self.within:.0%} of first order; {self.effect}"


def largest_linear_step(
    model: nn.Module,
    input: PromptInput,
    ra: RACache,
    heads: Heads,
    *,
    weights: Weight | Iterable[Weight] = WEIGHTS,
    within: Real = 0.1,
    **options: Unpack[RunOptions],
) -> LinearStep:
    """Find the largest step after which the loss is what first order foretells, or nearly.

    Steps are really taken: from one that is foretold to change the mean loss by a thousandth,
    twice as large each time until one fails; then between the last two, until they are within 2 %
    of each other. (The loss may come back to its first order by chance at a larger step; the first
    failure counts.) Costs 15 to 25 forward passes.

    Args:
        model: The model that the cache is of.
        input: The prompts that it was made from.
        ra: Their run, with the vectors that `gradient_step` needs.
        heads: Which heads; None: all.
        weights: Which of their matrices.
        within: The error allowed, relative to what is foretold.
        **options: As in `step_effect`.

    Raises:
        BadInput: as in `step_effect`; or no such step, as the loss follows its first order nowhere
            that can be measured.
        NotStored: vectors that were not kept.
        UnsupportedModel: a step that cannot be taken; see `gradient_step`.
    """
    allowed = real("within", within)
    if not 0 < allowed < 1:
        raise BadInput(f"found within={allowed:g}; give a share between 0 and 1, such as 0.1.")
    taken = _Taken(model, input, ra, heads, read_weights(weights), options)
    if taken.norm == 0:
        raise BadInput("the gradient of these weights is 0: a step along it goes nowhere.")
    tried: dict[float, StepEffect | None] = {}

    def holds(eta: float) -> bool:
        try:
            tried[eta] = taken.step(eta)
        except NothingToDifferentiate:  # NaN: far too large
            tried[eta] = None
        effect = tried[eta]
        return effect is not None and effect.error <= allowed

    size = float(taken.before.double().abs().mean())
    low = 1e-3 * size / taken.norm**2
    for _ in range(_HALVINGS):
        if holds(low):
            break
        low /= 2
    else:
        raise BadInput(
            f"the loss follows its first order within {allowed:.0%} at no step that can be "
            f"measured, down to {2 * low:.2g}: it is {size:.3g}, and differences of it are lost in "
            "rounding. Give larger within=, prompts with a larger loss, or a float64 model."
        )
    high = 2 * low
    while holds(high):
        low, high = high, 2 * high
    while high / low > _CLOSE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    best = tried[low]
    assert best is not None
    nan = float("nan")
    every = (
        (eta, nan, nan) if one is None else (eta, one.predicted, one.measured)
        for eta, one in sorted(tried.items())
    )
    return LinearStep(low, allowed, best, tuple(every))


class _Taken:
    """Steps on the weights of some heads, and the loss after them."""

    def __init__(
        self,
        model: nn.Module,
        input: PromptInput,
        ra: RACache,
        heads: Heads,
        weights: tuple[Weight, ...],
        options: RunOptions,
    ) -> None:
        self._heads = cast("Heads", heads if heads is None else list_heads(heads))
        self._model, self._input, self._ra = model, input, ra
        self._weights, self._options = weights, options
        self.norm = gradient_norm(model, ra, self._heads, weights=weights)
        self.before = self._loss(())
        known = ra.loss.to(self.before)
        if known.shape != self.before.shape and known.numel() == self.before.numel():
            known = known.reshape(self.before.shape)  # of one example, without its dimension
        apart = known.shape != self.before.shape or (known - self.before).abs().max() > 1e-2 * (
            self.before.abs().max() + 1e-3
        )
        if apart and not bool(known.isnan().any()):
            raise BadInput(
                f"found a loss of {float(self.before.mean()):.4g} where the cache has "
                f"{float(known.mean()):.4g} ({ra.info.objective}): give target= or metric= as they "
                "were given to run_with_ra."
            )

    def step(self, eta: float) -> StepEffect:
        hooks = gradient_step(self._model, self._ra, self._heads, eta, weights=self._weights)
        return StepEffect(eta, self.norm, self.before, self._loss(hooks))

    def _loss(self, hooks: FwdHooks) -> Tensor:
        lens = as_lens(self._model)
        last = lens.sites[max(lens.sites)]
        return run_again(
            self._ra, self._model, self._input, self._options, hooks, last, fixed=True
        ).loss
