"""What a trace gives: paths step by step, as text, JSON, a table, a diagram's data and a page.

A path is read backwards, from the target to where it ends: `positions[0]` is the target. Its score
is the sum of the logarithms of its weights, so it is at most 0 and larger is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ra_lens.errors import BadInput
from ra_lens.numbers import Whole, whole

if TYPE_CHECKING:
    import pandas as pd

Follow = Literal["pattern", "more", "less", "abs", "value_norm"]
StepKind = Literal["attention", "head", "residual"]


@dataclass(frozen=True)
class Step:
    """One step back: what the token at `query` got from the one at `key`.

    Attributes:
        query: Position that receives.
        key: Position that it came from; `query` itself where a token keeps what it has.
        layer: Layer of the step.
        head: The head; None where heads are aggregated, and for the residual connection.
        weight: What is multiplied along the path, in (0, 1].
        value: What the map says there: A, the norm written, or −R (negative: descent wants less).
        kind: `attention` (heads aggregated, or one chosen), `head` or `residual`.
    """

    query: int
    key: int
    layer: int
    head: int | None
    weight: float
    value: float
    kind: StepKind = "attention"

    @property
    def moves(self) -> bool:
        """Whether something came from another token."""
        return self.query != self.key


@dataclass(frozen=True)
class TracedPath:
    """One path, from the target back to where it ends.

    Attributes:
        positions: Positions visited, the target first. Across layers, one per layer boundary.
        tokens: Their tokens.
        token_ids: Their ids; None where the source does not know them.
        steps: The steps between them.
        score_raw: Sum of the logarithms of the weights.
        score_norm: The same, divided as `length_norm` says; paths are sorted by it.
    """

    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...] | None
    steps: tuple[Step, ...]
    score_raw: float
    score_norm: float

    @property
    def edge_attns(self) -> tuple[float, ...]:
        """Weights of the steps."""
        return tuple(step.weight for step in self.steps)

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Heads on the path, each once, as `(layer, head)`, the last layer first."""
        found = [(step.layer, step.head) for step in self.steps if step.head is not None]
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class SankeyNode:
    """A token of the diagram, `L{layer}_P{position}`."""

    id: str
    name: str
    position: int
    layer: int


@dataclass(frozen=True)
class SankeyLink:
    """A link of the diagram, in reading order: from the earlier token to the later one.

    Attributes:
        source: Node it comes from.
        target: Node it goes to.
        value: Weights of the paths that use it, each times its path's share (a softmax over the
            scores).
        beam_indices: Those paths.
    """

    source: str
    target: str
    value: float
    beam_indices: tuple[int, ...]


@dataclass(frozen=True)
class Sankey:
    """Nodes and links of all paths together."""

    nodes: tuple[SankeyNode, ...]
    links: tuple[SankeyLink, ...]


@dataclass(frozen=True)
class TraceResult:
    """The best paths that lead to one token.

    Attributes:
        seq_len: Number of tokens.
        target_pos: Position traced from, counted from 0.
        layer: The layer traced; None across layers.
        layers: All layers traced.
        top_beam: How many paths were asked for.
        top_k: Steps considered from each token, the heaviest; None: all.
        tokens: What the model read.
        beams: The paths, best first.
        follow: What was followed: `pattern`, `more`, `less`, `abs` or `value_norm`.
        search: `exact` or `beam`.
        length_norm: How scores of paths of different lengths were compared.
        agg_heads: How heads were put together: `mean`, `max`, a head; `none` across layers.
        model_name: Where the maps are from.
    """

    seq_len: int
    target_pos: int
    layer: int | None
    layers: tuple[int, ...]
    top_beam: int
    top_k: int | None
    tokens: tuple[str, ...]
    beams: tuple[TracedPath, ...]
    follow: Follow = "pattern"
    search: Literal["exact", "beam"] = "exact"
    length_norm: str = "none"
    agg_heads: str | int = "mean"
    model_name: str = field(default="unknown")

    @property
    def sankey(self) -> Sankey:
        """Nodes and links of the paths, as a Sankey diagram needs them."""
        from ra_lens.paths.export import sankey

        return sankey(self)

    @property
    def paths_text(self) -> list[str]:
        """Each path in words, in reading order."""
        from ra_lens.paths.export import path_text

        return [path_text(self, beam) for beam in self.beams]

    @property
    def is_layered(self) -> bool:
        """Whether paths run through layers, one step per layer."""
        return self.layer is None

    def heads(self, n_paths: Whole = 1) -> list[tuple[int, int]]:
        """Heads on the best `n_paths` paths, each once, for `patch_hooks(heads=...)`.

        Raises:
            BadInput: the trace has aggregated heads.
        """
        if not self.is_layered:
            raise BadInput(
                "found a trace of one layer, whose steps belong to no single head. Use "
                "ra_lens.paths.trace_layers, or read the path's edges with agg_heads=<head>."
            )
        found = [head for beam in self.beams[: whole("n_paths", n_paths)] for head in beam.heads]
        return list(dict.fromkeys(found))

    def to_json(self) -> str:
        """Give everything as one JSON text."""
        from ra_lens.paths.export import to_json

        return to_json(self)

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate one row per step of every path."""
        from ra_lens.paths.export import to_dataframe

        return to_dataframe(self)

    def to_html(self) -> str:
        """Give an interactive page of the best 500 paths, which needs no network."""
        from ra_lens.display.paths import paths_page

        return paths_page([self])

    def save_html(self, path: str | Path) -> Path:
        """Write `to_html()` to a file, whose name ends in `.html` and which opens from disk.

        Raises:
            BadInput: the path cannot be written, or holds something else than a page.
        """
        from ra_lens.files import PAGE, write_whole

        return write_whole(path, self.to_html(), PAGE)

    def __repr__(self) -> str:
        """Say what was traced, and the paths in words."""
        where = f"layer {self.layer}" if not self.is_layered else f"{len(self.layers)} layers"
        first = (
            f"TraceResult of {self.model_name}: {len(self.beams)} paths to position "
            f"{self.target_pos} of {self.seq_len}, {where}, follow={self.follow!r}"
        )
        return "\n".join([first, *(f"  {text}" for text in self.paths_text)])


def shares(scores: Sequence[float]) -> list[float]:
    """Softmax over scores."""
    top = max(scores, default=0.0)
    grown = [math.exp(score - top) for score in scores]
    return [value / sum(grown) for value in grown]
