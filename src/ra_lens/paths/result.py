"""What a trace gives: paths step by step, as text, JSON, a table, a diagram's data and a page.

A path is read backwards, from the target to where it ends: `positions[0]` is the target. Its score
is the sum of the logarithms of its weights, so it is at most 0 and larger is better.

A trace as text, JSON, a table and the data of a Sankey diagram.

JSON keys are those of `reverse-attention` 0.1.0's `trace.json`, with more beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ra_lens.errors import BadInput
from ra_lens.numbers import Whole, whole
from ra_lens.text import label

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

        return sankey(self)

    @property
    def paths_text(self) -> list[str]:
        """Each path in words, in reading order."""

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

        return to_json(self)

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate one row per step of every path."""

        return to_dataframe(self)

    def to_html(self) -> str:
        """Give an interactive page of the best 500 paths, which needs no network."""
        from ra_lens.paths.page import paths_page

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


def path_text(result: TraceResult, path: TracedPath) -> str:
    """A path in words, earliest token first."""
    score = f"(score {path.score_norm:.4g})"
    if result.is_layered:
        moved = [step_text(result, step) for step in reversed(path.steps) if step.moves]
        return f"{'; '.join(moved) or 'nothing moved'} {score}"
    names = [_name(result, position) for position in reversed(path.positions)]
    return f"{' → '.join(names)} {score}"


def step_text(result: TraceResult, step: Step) -> str:
    """One step in words: `layer 3 head 5 moved “·Italy” (4) to “·of” (9)`."""
    there, here = _name(result, step.key), _name(result, step.query)
    if step.kind == "residual":
        return f"layer {step.layer}: {here} kept what it had"
    if step.kind == "attention":
        return f"layer {step.layer}: {here} attends to {there}"
    if not step.moves:
        return f"layer {step.layer} head {step.head}: {here} attends to itself"
    return f"layer {step.layer} head {step.head} moved {there} to {here}"


def _name(result: TraceResult, position: int) -> str:
    return f"“{label(result.tokens[position])}” ({position})"


def sankey(result: TraceResult) -> Sankey:
    """Nodes and links of all paths of a trace."""
    nodes: dict[tuple[int, int], SankeyNode] = {}
    values: dict[tuple[str, str], float] = {}
    users: dict[tuple[str, str], list[int]] = {}
    for i, (beam, share) in enumerate(
        zip(result.beams, shares([beam.score_norm for beam in result.beams]), strict=True)
    ):
        boundaries = boundaries_of(result, beam)
        for place in zip(boundaries, beam.positions, strict=True):
            nodes.setdefault(place, _node(result, *place))
        ids = [nodes[place].id for place in zip(boundaries, beam.positions, strict=True)]
        for step, target, source in zip(beam.steps, ids, ids[1:], strict=False):
            link = (source, target)
            values[link] = values.get(link, 0.0) + share * step.weight
            if i not in users.setdefault(link, []):
                users[link].append(i)
    return Sankey(
        tuple(nodes[place] for place in sorted(nodes)),
        tuple(SankeyLink(*link, values[link], tuple(users[link])) for link in values),
    )


def boundaries_of(result: TraceResult, beam: TracedPath) -> list[int]:
    """Layer of each node of a path.

    Across layers a node is the residual stream in front of that layer, the target's being after
    the last one.
    """
    if result.layer is not None:
        return [result.layer] * len(beam.positions)
    return [result.layers[-1] + 1, *(step.layer for step in beam.steps)]


def _node(result: TraceResult, layer: int, position: int) -> SankeyNode:
    return SankeyNode(f"L{layer}_P{position}", result.tokens[position], position, layer)


def to_json(result: TraceResult) -> str:
    """See `TraceResult.to_json`."""
    return json.dumps(as_dict(result), indent=2, allow_nan=False)


def as_dict(result: TraceResult) -> dict[str, Any]:
    """A trace as plain data."""
    diagram = sankey(result)
    return {
        "metadata": {
            "seq_len": result.seq_len,
            "target_pos": result.target_pos,
            "layer": result.layer,
            "layers": list(result.layers),
            "top_beam": result.top_beam,
            "top_k": result.top_k,
            "follow": result.follow,
            "search": result.search,
            "length_norm": result.length_norm,
            "agg_heads": result.agg_heads,
            "model_name": result.model_name,
        },
        "tokens": list(result.tokens),
        "beams": [_beam(beam) for beam in result.beams],
        "sankey": {
            "nodes": [vars(node) for node in diagram.nodes],
            "links": [
                {**vars(link), "beam_indices": list(link.beam_indices)} for link in diagram.links
            ],
        },
        "paths_text": result.paths_text,
    }


def _beam(beam: TracedPath) -> dict[str, Any]:
    return {
        "positions": list(beam.positions),
        "tokens": list(beam.tokens),
        "token_ids": None if beam.token_ids is None else list(beam.token_ids),
        "edge_attns": list(beam.edge_attns),
        "score_raw": beam.score_raw,
        "score_norm": beam.score_norm,
        "steps": [vars(step) for step in beam.steps],
    }


def to_dataframe(result: TraceResult) -> Any:
    """See `TraceResult.to_dataframe`."""
    import pandas as pd

    rows = [
        {
            "beam": i,
            "step": j,
            "layer": step.layer,
            "head": step.head,
            "kind": step.kind,
            "query": step.query,
            "key": step.key,
            "query_token": result.tokens[step.query],
            "key_token": result.tokens[step.key],
            "weight": step.weight,
            "value": step.value,
            "score_raw": beam.score_raw,
            "score_norm": beam.score_norm,
        }
        for i, beam in enumerate(result.beams)
        for j, step in enumerate(beam.steps)
    ]
    columns = [
        "beam", "step", "layer", "head", "kind", "query", "key", "query_token", "key_token",
        "weight", "value", "score_raw", "score_norm",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns).astype({"head": "Int64"})
