"""Do paths reach the tokens that an answer comes from? On prompts whose evidence is known.

`python -m benchmarks.paths evidence` and `italy` print its tables. The prompts:

* countries: "I like Italy and France. I visited the city of", for two countries drawn, the capital
  of one as the target. The evidence is that country; of ways that know no target either is counted.
* lists, copy, recall: those of `benchmarks.pointing`.

A path reaches the evidence where it visits one of its tokens on the way back from the last token.
`chance` visits as many tokens drawn at random as there are paths, the one in front and the last one
left aside.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn

from benchmarks.pointing import Asked, questions
from ra_lens import load_task, run_with_ra
from ra_lens.knockouts.edges import find_text
from ra_lens.model import as_lens
from ra_lens.paths import PromptMaps, TraceResult, read_maps, trace_layers

Way = Literal["value_norm", "pattern", "more", "less", "abs", "knockout"]
WAYS: tuple[Way, ...] = ("value_norm", "pattern", "more", "less", "abs", "knockout")
ITALY = "I like Italy and France. I visited the city of"


def countries(model: nn.Module, n: int) -> list[tuple[Asked, str]]:
    """Prompts of two countries of one token each, with the one that is not asked for."""
    lens = as_lens(model)

    def ids(word: str) -> list[int]:
        return lens.encode(f" {word}", prepend_bos=False)

    pairs = [pair for pair in load_task("country-capital").pairs if len(ids(pair.input)) == 1]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    found: list[tuple[Asked, str]] = []
    for i in range(n):
        one, other = (pairs[order[j % len(order)]] for j in (2 * i, 2 * i + 1))
        text = f"I like {one.input} and {other.input}. I visited the city of"
        asked, beside = (one, other) if i % 2 else (other, one)
        found.append((Asked("countries", text, ids(asked.output)[0], asked.input), beside.input))
    return found


def fifty(
    model: nn.Module, *, n_countries: int = 14, n: int = 12
) -> list[tuple[Asked, str | None]]:
    """The prompts, each with a second token that counts for ways that know no target."""
    others = [one for one in questions(model, n) if one.kind != "lists, each item"]
    return [*countries(model, n_countries), *((one, None) for one in others)]


def maps_of(
    model: nn.Module, text: str, target: int, front: str | bool | None
) -> dict[Way, PromptMaps]:
    """What each way follows, from one forward pass and one with gradients."""
    _, ra = run_with_ra(model, text, target=target, prepend_bos=front, progress=False)
    found = {way: read_maps(ra, follow=way)[0] for way in WAYS if way != "value_norm"}
    own = read_maps(model, text, follow="value_norm", prepend_bos=front)[0]
    return {"value_norm": own, **found}


def reached(trace: TraceResult, n_paths: int) -> set[int]:
    """The tokens that the best paths visit, without the one that they are traced from."""
    return {step.key for beam in trace.beams[:n_paths] for step in beam.steps if step.moves}


def measure(
    model: nn.Module, asked: Iterable[tuple[Asked, str | None]], front: str | bool | None
) -> pd.DataFrame:
    """One row per prompt, way, sinks or none, and number of paths: whether they reach it."""
    rows: list[dict[str, Any]] = []
    for one, beside in asked:
        for way, maps in maps_of(model, one.text, one.target, front).items():
            evidence = set(find_text("evidence", one.evidence, maps.tokens))
            either = evidence | set(find_text("evidence", beside, maps.tokens) if beside else ())
            for sinks in (False, True):
                trace = trace_layers(maps, sinks=sinks, top_beam=3)
                for n_paths in (1, 3):
                    seen = reached(trace, n_paths)
                    row = {"kind": one.kind, "way": way, "sinks": sinks, "paths": n_paths}
                    row |= {"hit": float(bool(seen & evidence)), "found": bool(maps.sinks)}
                    rows.append(row)
                    if beside:
                        hit = float(bool(seen & either))
                        rows.append({**row, "kind": f"{one.kind}, either", "hit": hit})
        inside = len(maps.tokens) - 1 - bool(maps.prepended)
        for kind, tokens in ((one.kind, evidence), (f"{one.kind}, either", either)):
            if kind == one.kind or beside:
                for n_paths in (1, 3):
                    hit = 1 - (1 - len(tokens) / inside) ** n_paths
                    row = {"kind": kind, "way": "chance", "sinks": False, "paths": n_paths}
                    rows.append({**row, "hit": hit, "found": True})
    return pd.DataFrame(rows)


def print_evidence(frame: pd.DataFrame) -> None:
    """Print the share of prompts that the best path, and one of the best three, reach."""
    kinds = list(dict.fromkeys(frame["kind"]))
    sizes = frame[(frame.way == "chance") & (frame.paths == 1)].groupby("kind").size()
    print("Evidence reached by the best path / by one of the best three")
    print("| | " + " | ".join(f"{kind} ({sizes[kind]})" for kind in kinds) + " |")
    print("|---" * (1 + len(kinds)) + "|")
    shares = frame.groupby(["way", "sinks", "kind", "paths"])["hit"].mean()
    for sinks in (False, True):
        for way in (*WAYS, "chance")[: len(WAYS) + (not sinks)]:
            cells = [
                " / ".join(f"{shares[way, sinks, kind, n]:.2f}".removeprefix("0") for n in (1, 3))
                for kind in kinds
            ]
            print(f"| `{way}`{', to sinks too' * sinks} | " + " | ".join(cells) + " |")
    found = frame[frame.way.isin(WAYS)].groupby("way")["found"].mean()
    print("sinks found in:", ", ".join(f"{way} {found[way]:.0%}" for way in WAYS))


def print_italy(model: nn.Module, front: str | bool | None, n: int = 200) -> None:
    """Print the first path to each country, and the best, for the prompt of the paper's figures."""
    lens = as_lens(model)
    target = lens.encode(" Paris", prepend_bos=False)[0]
    print(f"{ITALY!r}, target ' Paris': the first of {n} paths to a country, and the best three")
    for way, maps in maps_of(model, ITALY, target, front).items():
        for sinks in (False, True):
            trace = trace_layers(maps, sinks=sinks, top_beam=n)
            first = {
                word: next(
                    (
                        i
                        for i, beam in enumerate(trace.beams, start=1)
                        if set(beam.positions) & set(find_text("word", word, maps.tokens))
                    ),
                    None,
                )
                for word in ("Italy", "France")
            }
            print(f"  {way}{', to sinks too' * sinks} (sinks {maps.sinks}): {first}")
            for text in trace.paths_text[:3]:
                print(f"    {text}")
