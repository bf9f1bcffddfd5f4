"""What the heads that a test masks get: zero, what they give on another question, or a mean.

* `"zero"`: nothing, as in the paper. The model then runs on what it has never seen.
* `"resample"`: what the head gives at the same place in the corrupted twin of the question, which
  is as long in tokens and has another answer (`ra_lens.tasks.with_corrupted`). The model runs on
  what it knows, and what only this question needs is gone.
* `"mean"`: what the head gives on average, over all tokens of the questions that heads are ranked
  with.

Cost: `"resample"` one forward pass over the twins of all questions, and memory for what all heads
give there: layers · questions · tokens · heads · d_head numbers; `"mean"` one forward pass over the
questions that heads are ranked with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast, get_args

from jaxtyping import Float
from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.experiments.runner import Cell
from ra_lens.patching.masking import read_z
from ra_lens.prompts import Prompts

Others = Literal["zero", "resample", "mean"]


def read_others(others: str) -> Others:
    """Read what masked heads get."""
    if others not in get_args(Others):
        raise BadInput(f"found others={others!r}; give 'zero', 'resample' or 'mean'.")
    return cast("Others", others)


class InsteadOfZero:
    """What masked heads get in a batch of the questions of a cell."""

    def __init__(self, cell: Cell) -> None:
        """Read what heads give on the twins, or on the questions that heads are ranked with."""
        others: Others = cell.run.settings["others"]
        self._whole_answer = cell.run.accuracy == "answer"
        self._questions = cell.questions
        self._z: dict[int, Tensor] = {}
        self._mean = others == "mean"
        lens, size = cell.run.lens, cell.run.protocol.batch_size
        if others == "resample":
            twins = _twins(cell)
            # Laid out as the questions are: a twin is as long.
            self._z = read_z(lens, twins, batch_size=size)
        elif others == "mean":
            prompts = next(iter(cell.learned.values()))
            read = cell.run.read(prompts).prompts
            self._z = mean_z(read_z(lens, read, batch_size=size), sum(read.lengths))

    def of(self, questions: Sequence[int]) -> dict[int, Float[Tensor, "#batch #pos head d_head"]]:
        """Give what the heads of each layer get in a batch of some questions."""
        if self._mean:
            return self._z
        every = self._read
        width = every.chosen(questions).padded_width
        beyond = every.padded_width - width
        columns = slice(beyond, None) if every.padding_side == "left" else slice(0, width)
        return {layer: z[list(questions), columns] for layer, z in self._z.items()}

    @property
    def _read(self) -> Prompts:
        return self._questions.with_answers if self._whole_answer else self._questions.prompts


def mean_z(
    z: dict[int, Float[Tensor, "prompt pos head d_head"]], n_tokens: int
) -> dict[int, Float[Tensor, "1 1 head d_head"]]:
    """Take the mean of what heads give over `n_tokens` tokens; padding, where it is 0, is none."""
    return {
        layer: of_layer.sum(dim=(0, 1), keepdim=True) / n_tokens for layer, of_layer in z.items()
    }


def _twins(cell: Cell) -> Prompts:
    """Give the corrupted twins of the questions asked as tokens, laid out as the questions are.

    Where whole answers are marked, the model reads the right answer after the twin's prompt too.
    """
    twins = [prompt.corrupted for prompt in cell.asked if prompt.corrupted is not None]
    read = cell.run.read(twins).prompts
    asked = cell.questions.prompts
    if cell.run.accuracy == "answer":
        read = read.extended([answer[:-1] for answer in cell.questions.answers])
        asked = cell.questions.with_answers
    if read.lengths != asked.lengths:
        i = next(i for i, n in enumerate(read.lengths) if n != asked.lengths[i])
        raise BadInput(
            f"question {i} of task {cell.task.name!r} has {asked.lengths[i]} tokens and its "
            f"corrupted twin {read.lengths[i]}; others='resample' needs as many."
        )
    return replace(read, width=asked.width)
