"""A trace as text, JSON, a table and the data of a Sankey diagram.

JSON keys are those of `reverse-attention` 0.1.0's `trace.json`, with more beside them.
"""

from __future__ import annotations

import json
from typing import Any

from ra_lens.display.tokens import label
from ra_lens.paths.result import (
    Sankey,
    SankeyLink,
    SankeyNode,
    Step,
    TracedPath,
    TraceResult,
    shares,
)


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
