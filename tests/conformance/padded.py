"""Two prompts of different lengths in one padded batch, against each of them alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ra_lens import run_with_ra
from ra_lens.targets import answer_nll, sequence_nll

from .record import relative

Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")


def padded_error(
    model: Any, ids: Tensor, side: Side, *, answers: list[list[int]], pad: int, **options: Any
) -> float:
    """Largest error of R and of the loss; infinite where they are not finite.

    Args:
        model: A TransformerLens model.
        ids: Two prompts; the second loses its first or last third to padding.
        side: Where the padding is.
        answers: Ids of the answer of each, which is appended to it; one token is not, if both have
            one.
        pad: Id that is written at the padding.
        options: Of `run_with_ra`; tensors have one row for each prompt.
    """
    n = ids.shape[1] // 3
    padding = slice(0, n) if side == "left" else slice(-n, None)
    tokens, mask = ids.clone(), torch.ones_like(ids)
    tokens[1, padding], mask[1, padding] = pad, 0
    objective = sequence_nll if max(map(len, answers)) > 1 else answer_nll
    _, ra = run_with_ra(model, tokens, attention_mask=mask, target=objective(answers), **options)
    errors: list[float] = []
    for i in range(2):
        own = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in options.items()}
        row = tokens[i : i + 1, mask[i].bool()]
        _, one = run_with_ra(model, row, target=objective(answers[i : i + 1]), **own)
        errors.append(relative(ra.loss[i : i + 1], one.loss))
        for layer, site in ra.sites.items():
            alone, found = one["ra", layer], ra["ra", layer][i : i + 1]
            sides = zip((site.query_side, site.key_side), alone.shape[-2:], strict=True)
            # What the decoder of an encoder-decoder reads begins in the first column.
            rows, columns = (
                slice(-length, None) if side == "left" and of == "input" else slice(0, length)
                for of, length in sides
            )
            wanted = torch.zeros_like(found)
            wanted[:, :, rows, columns] = alone
            errors.append(relative(found, wanted))
    return max(errors)


def by_length(report: Any) -> str:
    """Padded on which sides prompts run in groups of one length, as `check_model` found."""
    sides = {"left": report.padded_left, "right": report.padded_right}
    return " and ".join(s for s, how in sides.items() if how == "by length") or "neither"
