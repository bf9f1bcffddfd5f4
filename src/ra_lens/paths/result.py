"""What a trace gives: paths step by step, as text, JSON, a table, a diagram's data and a page.

A path is read backwards, from the target to where it ends: `positions[0]` is the target. Its score
is the sum of the logarithms of its weights, so it is at most 0 and larger is better.

JSON keys are those of `reverse-attention` 0.1.0's `trace.json`, with more beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ra_lens.errors import BadInput
from ra_lens.files import PAGE, write_whole
from ra_lens.numbers import Whole, whole
from ra_lens.paths.page import MOST_PATHS, paths_page
from ra_lens.text import label, shorten, visible

if TYPE_CHECKING:
    import pandas as pd

Follow = Literal["pattern", "more", "less", "abs", "knockout", "value_norm"]
StepKind = Literal["attention", "head", "residual"]

REVERSED = ("more", "less", "abs")
"""What follows R, whose sign says more or less."""

GRADIENT = (*REVERSED, "knockout")
"""What needs a loss."""

_FOLLOW = {
    "pattern": "attention",
    "value_norm": "attention × norm of what is written",
    "more": "where descent wants more attention (−R)",
    "less": "where descent wants less attention (R)",
    "abs": "where descent changes attention (|R|)",
    "knockout": "edges whose cut raises the loss (−R~/(1−A))",
}
_METADATA = (
    "seq_len", "target_pos", "layer", "layers", "top_beam", "top_k", "follow", "search",
    "length_norm", "agg_heads", "model_name",
    "prepended", "sinks",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One step back: what the token at `query` got from the one at `key`.

    Attributes:
        query: Position that receives.
        key: Position that it came from; `query` itself where a token keeps what it has.
        layer: Layer of the step.
        head: The head; None where heads are aggregated, and for the residual connection.
        weight: What is multiplied along the path, in (0, 1].
        value: What the map says there: A, the norm written, −R (negative: descent wants less), or
            by how much cutting the edge would raise the loss, in its unit (nats).
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
        follow: What was followed: `pattern`, `more`, `less`, `abs`, `knockout` or `value_norm`.
        search: `exact` or `beam`.
        length_norm: How scores of paths of different lengths were compared.
        agg_heads: How heads were put together: `mean`, `max`, a head; `none` across layers.
        model_name: Where the maps are from.
        prepended: The token put in front of text; empty if none was; None where that is not known.
        sinks: Positions of the attention sinks that paths were kept from.
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
    model_name: str = "unknown"
    prepended: str | None = None
    sinks: tuple[int, ...] = ()

    @property
    def is_layered(self) -> bool:
        """Whether paths run through layers, one step per layer."""
        return self.layer is None

    @property
    def sinks_text(self) -> str:
        """Which attention sinks were left out, in words; empty if none."""
        if not self.sinks:
            return ""
        return f"left out: {spell_sinks(self.tokens, self.sinks)} (sinks=True goes there)"

    @property
    def paths_text(self) -> list[str]:
        """Each path in words, in reading order."""
        return [f"{_words(self, beam)} (score {beam.score_norm:.4g})" for beam in self.beams]

    @property
    def sankey(self) -> dict[str, Any]:
        """All paths together, as a Sankey diagram needs them.

        `nodes`: the tokens, each with `id` (`L{layer}_P{position}`), `name`, `position`, `layer`.
        `links`: in reading order, from `source` to `target` (ids of nodes). `value` is the sum of
        the weights of the paths that use a link, each times its path's share (a softmax over the
        scores), and `beam_indices` are those paths.
        """
        places: set[tuple[int, int]] = set()
        links: dict[tuple[str, str], dict[str, Any]] = {}
        shares = _softmax([beam.score_norm for beam in self.beams])
        for i, (beam, share) in enumerate(zip(self.beams, shares, strict=True)):
            nodes = nodes_of(self, beam)
            places.update(nodes)
            for step, (later, earlier) in zip(beam.steps, pairwise(nodes), strict=True):
                ends = (_id(*earlier), _id(*later))
                new = {"source": ends[0], "target": ends[1], "value": 0.0, "beam_indices": []}
                link = links.setdefault(ends, new)
                link["value"] += share * step.weight
                if i not in link["beam_indices"]:
                    link["beam_indices"].append(i)
        return {
            "nodes": [
                {
                    "id": _id(layer, position),
                    "name": self.tokens[position],
                    "position": position,
                    "layer": layer,
                }
                for layer, position in sorted(places)
            ],
            "links": list(links.values()),
        }

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
        written = {
            "metadata": {name: getattr(self, name) for name in _METADATA},
            "tokens": self.tokens,
            "beams": [
                {
                    "positions": beam.positions,
                    "tokens": beam.tokens,
                    "token_ids": beam.token_ids,
                    "edge_attns": beam.edge_attns,
                    "score_raw": beam.score_raw,
                    "score_norm": beam.score_norm,
                    "steps": [vars(step) for step in beam.steps],
                }
                for beam in self.beams
            ],
            "sankey": self.sankey,
            "paths_text": self.paths_text,
        }
        return json.dumps(written, indent=2, allow_nan=False)

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate one row per step of every path."""
        import pandas as pd

        rows = [
            (
                i, j, step.layer, step.head, step.kind, step.query, step.key,
                self.tokens[step.query], self.tokens[step.key], step.weight, step.value,
                beam.score_raw, beam.score_norm,
            )
            for i, beam in enumerate(self.beams)
            for j, step in enumerate(beam.steps)
        ]  # fmt: skip
        columns = [
            "beam", "step", "layer", "head", "kind", "query", "key", "query_token", "key_token",
            "weight", "value", "score_raw", "score_norm",
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=columns).astype({"head": "Int64"})

    def to_html(self) -> str:
        """Give an interactive page of the best 500 paths, which needs no network."""
        return paths_page(f"Attention paths of {self.model_name}", [page_data(self)])

    def save_html(self, path: str | Path) -> Path:
        """Write `to_html()` to a file, whose name ends in `.html` and which opens from disk.

        Raises:
            BadInput: the path cannot be written, or holds something else than a page.
        """
        return write_whole(path, self.to_html(), PAGE)

    def __repr__(self) -> str:
        """Say what was traced, and the paths in words."""
        where = f"layer {self.layer}" if not self.is_layered else f"{len(self.layers)} layers"
        first = (
            f"TraceResult of {self.model_name}: {len(self.beams)} paths to position "
            f"{self.target_pos} of {self.seq_len}, {where}, follow={self.follow!r}"
        )
        lines = [first, *(f"  {text}" for text in self.paths_text)]
        return "\n".join([*lines, f"  {self.sinks_text}"] if self.sinks else lines)


def _softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores, default=0.0)
    grown = [math.exp(score - top) for score in scores]
    return [value / sum(grown) for value in grown]


# ---- in words -----------------------------------------------------------------------------------


def _words(trace: TraceResult, path: TracedPath) -> str:
    """Tell a path in words, the earliest token first."""
    if trace.is_layered:
        moved = [step_text(trace, step) for step in reversed(path.steps) if step.moves]
        return "; ".join(moved) or "nothing moved"
    return " → ".join(_name(trace, position) for position in reversed(path.positions))


def step_text(trace: TraceResult, step: Step) -> str:
    """Tell one step in words: `layer 3 head 5 moved “·Italy” (4) to “·of” (9)`."""
    there, here = _name(trace, step.key), _name(trace, step.query)
    if step.kind == "residual":
        return f"layer {step.layer}: {here} kept what it had"
    if step.kind == "attention":
        return f"layer {step.layer}: {here} attends to {there}"
    if not step.moves:
        return f"layer {step.layer} head {step.head}: {here} attends to itself"
    return f"layer {step.layer} head {step.head} moved {there} to {here}"


def spell_sinks(tokens: Sequence[str], sinks: Sequence[int]) -> str:
    """Name attention sinks by token and position."""
    named = ", ".join(f"“{label(tokens[position])}” ({position})" for position in sinks)
    return f"the attention sink{'s' * (len(sinks) > 1)} {named}"


def _name(trace: TraceResult, position: int) -> str:
    return f"“{label(trace.tokens[position])}” ({position})"


# ---- as a picture -------------------------------------------------------------------------------


def nodes_of(trace: TraceResult, path: TracedPath) -> list[tuple[int, int]]:
    """Layer and position of each node of a path, the target's first.

    Across layers a node is the residual stream in front of that layer, the target's being after
    the last one.
    """
    if trace.layer is not None:
        return [(trace.layer, position) for position in path.positions]
    first = (trace.layers[-1] + 1, trace.target_pos)
    return [first, *((step.layer, step.key) for step in path.steps)]


def page_data(trace: TraceResult) -> dict[str, Any]:
    """Give what a page shows of a trace: every text and place that `page.js` draws."""
    shown = trace.beams[:MOST_PATHS]
    rows: dict[tuple[int, int], int] = {}
    for lane, beam in enumerate(shown):
        for node in nodes_of(trace, beam):
            rows.setdefault(node, node[0] if trace.is_layered else lane)
    top = trace.layers[-1] + 1 if trace.is_layered else trace.layers[-1]
    where = "All layers" if trace.is_layered else f"Layer {trace.layer}"
    n = len(trace.beams)
    paths = f"{n} best paths" if n <= MOST_PATHS else f"{MOST_PATHS} best of {n} paths"
    return {
        "title": f"{where}: {_FOLLOW[trace.follow]}",
        "about": (
            f"The {paths} to “{label(trace.tokens[trace.target_pos])}” (position "
            f"{trace.target_pos} of {trace.seq_len}) along {_FOLLOW[trace.follow]}, "
            f"{trace.search} search."
            + (f" Left out: {spell_sinks(trace.tokens, trace.sinks)}." if trace.sinks else "")
        ),
        "layered": trace.is_layered,
        "signed": trace.follow in REVERSED,
        "tokens": [visible(token) for token in trace.tokens],
        "target": _id(top, trace.target_pos),
        "nodes": [
            {
                "id": _id(layer, position),
                "position": position,
                "row": row,
                "label": _boundary(trace, layer),
            }
            for (layer, position), row in rows.items()
        ],
        "beams": [_beam_data(trace, beam) for beam in shown],
    }


def _beam_data(trace: TraceResult, beam: TracedPath) -> dict[str, Any]:
    ids = [_id(*node) for node in nodes_of(trace, beam)]
    n = len(beam.steps)
    return {
        "text": shorten(_words(trace, beam), 400),
        "note": f"score {beam.score_norm:.4g}, {n} step{'s' * (n != 1)}",
        "nodes": ids,
        "steps": [
            {
                "source": source,
                "target": target,
                "weight": step.weight,
                "value": step.value,
                "kind": step.kind,
                "text": step_text(trace, step),
                "shown": _value(trace, step),
            }
            for step, (target, source) in zip(beam.steps, pairwise(ids), strict=True)
        ],
    }


def _value(trace: TraceResult, step: Step) -> str:
    if step.kind == "residual" or trace.follow == "pattern":
        return ""
    if trace.follow == "knockout":
        of_heads = ", mean of heads" * (trace.agg_heads == "mean")
        return f", loss {step.value:+.3g} without it{of_heads}"
    name = "norm" if trace.follow == "value_norm" else "−R"
    return f", {name} {step.value:.3g}"


def _id(layer: int, position: int) -> str:
    return f"L{layer}_P{position}"


def _boundary(trace: TraceResult, layer: int) -> str:
    if not trace.is_layered:
        return f"Layer {layer}"
    after = layer == trace.layers[-1] + 1
    return f"after layer {layer - 1}" if after else f"in front of layer {layer}"
