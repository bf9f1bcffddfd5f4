"""Rows of tokens padded on one side."""

from __future__ import annotations

import torch


def padded(side: str, pad: int, rows):
    """Token tensor and mask of the rows, padded on one side."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, at], mask[i, at] = row, 1
    return tokens, mask


def part(value: torch.Tensor, i: int, side: str, length: int) -> torch.Tensor:
    """The map of example i without padding; checks that the padding is exactly 0."""
    width = value.shape[-1]
    real = slice(width - length, width) if side == "left" else slice(0, length)
    own = value[i, :, real, real]
    rest = value[i].clone()
    rest[:, real, real] = 0
    assert rest.abs().max() == 0
    return own
