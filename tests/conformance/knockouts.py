"""Which edges are cut in the checks, what a cache foretells of them, and the same done by hand.

A softmax of which some edges are left out has A / (1 − a) for the rest, with a what the edges had,
whatever a sink has. So, with t from 0 on:

- knockout: A + t · (A′ − A), with A′ = 0 at the edges and A / (1 − a) elsewhere;
- cut: A − t · A at the edges;
- weaken: A less the share t of the edges, over 1 − t · a.

The loss then changes by −Σ R~ / (1 − a), −Σ A·G and −Σ R~ per t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ra_lens.knockouts import Edge, EdgeSet
from ra_lens.knockouts.hooks import knockout_hooks, read_cuts

How = Literal["knockout", "cut", "weaken"]
STEP = 1e-4
Cell = tuple[int, int, int, int]  # layer, head, query, key


@dataclass(frozen=True)
class Direction:
    """Some edges of one example, how they are moved, and what a cache foretells of that per t.

    `size` is what the edges do one by one, without regard to sign: in a set they may cancel out,
    which their rounding does not.
    """

    example: int
    cells: tuple[Cell, ...]
    how: How
    foretold: float = float("nan")
    size: float = float("nan")


def chosen_cells(ra: Any, example: int) -> list[Cell]:
    """Two edges of each of two layers, with attention on them and on others of their row.

    Of the half that matters more; many, such as those of other queries in the last layer, do not.
    """
    generator = torch.Generator().manual_seed(example)
    layers = list(ra.sites)
    found: list[Cell] = []
    for layer in dict.fromkeys([layers[0], layers[-1]]):
        pattern, size = ra["pattern", layer][example], ra["ra", layer][example].abs()
        fitting = (pattern > 0.02) & (pattern < 0.8) & (size > 0)
        fit = (fitting & (size >= size[fitting].median())).nonzero().tolist()
        # Rows of their own, so that a set leaves something of each.
        for i in torch.randperm(len(fit), generator=generator).tolist():
            head, query, key = fit[i]
            if (layer, head, query) not in {cell[:3] for cell in found}:
                found.append((layer, head, query, key))
            if sum(cell[0] == layer for cell in found) == 2:
                break
    return found


def chosen_set(patterns: Mapping[int, Tensor], example: int) -> list[Cell]:
    """In every layer two keys of the last two queries of two heads, where something is left."""
    found: list[Cell] = []
    for layer, maps in patterns.items():
        pattern = maps[example]
        for head in (0, pattern.shape[0] - 1):
            for query in (pattern.shape[1] - 2, pattern.shape[1] - 1):
                row = pattern[head, query]
                reached = (row > 1e-6).nonzero()[:, 0].tolist()
                keys = reached[len(reached) // 2 :][:2] if len(reached) > 2 else []
                if float(row.sum() - row[keys].sum()) > 0.05:
                    found += [(layer, head, query, key) for key in keys]
    return found


def directions(ra: Any, n_examples: int = 2) -> list[Direction]:
    """Single edges moved in every way, and a set cut both ways, of each example."""
    patterns = {layer: ra["pattern", layer] for layer in ra.sites}
    found: list[Direction] = []
    for example in range(n_examples):
        for cell in chosen_cells(ra, example):
            layer, *place = cell
            at = (example, *place)
            values = {
                "knockout": ra["knockout", layer][at],
                "cut": ra["cut", layer][at],
                "weaken": -ra["ra", layer][at] / ra.sites[layer].scale,
            }
            found += [
                Direction(example, (cell,), how, float(values[how]), abs(float(values[how])))
                for how in get_args(How)
            ]
        cells = chosen_set(patterns, example)
        edges = as_set(ra, {example: cells}, n_examples)
        for how in ("knockout", "cut"):
            value = ra.knockout(edges=edges, renormalise=how == "knockout")[example]
            alone = (abs(float(ra[how, layer][(example, *place)])) for layer, *place in cells)
            found.append(Direction(example, tuple(cells), how, float(value), sum(alone)))
    return found


def as_set(ra: Any, cells: Mapping[int, Sequence[Cell]], n_examples: int) -> EdgeSet:
    """The set of some cells of each example."""
    rows = [[Edge(*cell) for cell in cells.get(i, ())] for i in range(n_examples)]
    return read_cuts(rows, ra.sites)


def real_cuts(ra: Any, n_examples: int = 2) -> dict[int, list[Cell]]:
    """All edges of the directions, by example."""
    every = directions(ra, n_examples)
    return {
        i: sorted({cell for one in every if one.example == i for cell in one.cells})
        for i in range(n_examples)
    }


def hooks_for(model: Any, cells: Mapping[int, Sequence[Cell]], *, renormalise: bool) -> Any:
    """The hooks that are checked."""
    rows = [[Edge(*cell) for cell in cells[i]] for i in sorted(cells)]
    return knockout_hooks(model, rows, renormalise=renormalise)


def moved(
    pattern: Tensor, layer: int, of_rows: Sequence[Direction], amount: float | Tensor
) -> Tensor:
    """A pattern whose examples are each moved in a way of their own, by t or one t for each."""
    rows: list[Tensor] = []
    for i, (row, one) in enumerate(zip(pattern, of_rows, strict=True)):
        t, how = amount[i] if isinstance(amount, Tensor) else amount, one.how
        marks = torch.zeros(row.shape, dtype=torch.bool)
        for cell in one.cells:
            if cell[0] == layer:
                marks[cell[1:]] = True
        held = (row * marks).sum(-1, keepdim=True)
        if how == "knockout":
            after = row + t * (row * ~marks / (1 - held) - row)
        elif how == "cut":
            after = row - t * row * marks
        else:
            after = row * (1 - t * marks.to(row)) / (1 - t * held)
        rows.append(torch.where(marks.any(-1, keepdim=True), after, row))
    return torch.stack(rows)


def slopes(
    every: Sequence[Direction], losses: Callable[[Callable[[int, Tensor], Tensor]], Tensor]
) -> Tensor:
    """What the loss really does per t, by central differences.

    `losses` gives the loss of each direction, with patterns edited by what it is given.
    """

    def at(t: float) -> Tensor:
        return losses(lambda layer, pattern: moved(pattern, layer, every, t))

    # Without the error of second order in the step.
    near, far = ((at(t) - at(-t)) / (2 * t) for t in (STEP, 2 * STEP))
    return (4 * near - far) / 3


def foretelling_error(every: Sequence[Direction], measured: Tensor) -> float:
    """Largest error of each way to move edges, relative to the size of what they do."""
    errors: list[float] = []
    for how in get_args(How):
        mine = [i for i, one in enumerate(every) if one.how == how]
        foretold = torch.tensor([every[i].foretold for i in mine], dtype=torch.float64)
        wanted = measured[mine].double()
        size = torch.tensor([every[i].size for i in mine], dtype=torch.float64)
        errors.append(float((foretold - wanted).norm() / size.norm()))
    return max(errors)
