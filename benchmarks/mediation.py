"""Causal mediation from the layer of each head, against full forward passes, and against RA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.models import gpt2_small
from benchmarks.timing import Times, interleaved, ratio_spread
from ra_lens.heads import rank_heads
from ra_lens.model import as_lens, available_kinds
from ra_lens.patching.masking import mask_hooks
from ra_lens.questions import ask, last_logits, mark, read_questions
from ra_lens.tasks import Pair, Prompt, Task

LATE, FULL, RA = "CM1", "CM1, full forward passes", "RA"


def prompts(n: int, *, shots: int = 5) -> list[Prompt]:
    """Questions of about 50 tokens (5 shots), of the words of `benchmarks.models`.

    An input has 1 to 3 tokens and an output 1 or 2, so that prompts are of several lengths.
    """
    pairs = tuple(
        Pair(
            " ".join(f"w{100 + 10 * i + k}" for k in range(1 + i % 3)),
            " ".join(f"w{5000 + 10 * i + k}" for k in range(1 + i % 2)),
        )
        for i in range(n + 20)
    )
    task = Task("words", "icl", pairs, "w1 w2 ", " w3 w4 w5", separator=" w6 ")
    return task.sample(n, shots=shots, seed=0)


def full_forwards(model: Any, asked: list[Prompt], *, batch_size: int) -> Tensor:
    """Rank heads by CM1 with a full forward pass for each question and head, batched."""
    lens = as_lens(model)
    questions = read_questions(lens, asked)
    shape = len(lens.sites), lens.sites[0].n_heads
    rows = [
        (q, layer, h)
        for q in range(len(asked))
        for layer in range(shape[0])
        for h in range(shape[1])
    ]
    after: list[Tensor] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        keep = torch.ones(len(part), *shape, dtype=torch.bool)
        for row, (_, layer, head) in enumerate(part):
            keep[row, layer, head] = False
        which = [q for q, _, _ in part]
        logits = last_logits(lens, questions.prompts.chosen(which), mask_hooks(lens.sites, keep))
        after.append(mark(logits, questions.first_tokens[which]).probability)
    before = ask(lens, questions, batch_size=batch_size).probability
    return (before[:, None, None] - torch.cat(after).reshape(len(asked), *shape)).mean(dim=0)


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Time both ways of CM1, and RA, on the same questions.

    Args:
        rounds: Measurements of each.
        quick: One model of two layers and two questions, to see that it runs.
    """
    n, n_layer, batch_size, shots = (2, 2, 8, 1) if quick else (2, 12, 32, 5)
    asked = prompts(n, shots=shots)
    rows: list[list[Any]] = []
    for kind in available_kinds()[:1] if quick else available_kinds():
        model = gpt2_small(kind, n_layer=n_layer)
        options: dict[str, Any] = {"batch_size": batch_size, "progress": False}
        found: dict[str, Tensor] = {}

        def late(model: Any = model, found: Any = found, options: Any = options) -> None:
            found[LATE] = rank_heads(model, asked, method="cm1", **options).scores

        def full(model: Any = model, found: Any = found) -> None:
            found[FULL] = full_forwards(model, asked, batch_size=batch_size)

        def ra(model: Any = model, options: Any = options) -> None:
            rank_heads(model, asked, method="ra", **options)

        times = interleaved({LATE: late, FULL: full, RA: ra}, rounds=rounds)
        largest = found[FULL].abs().max()
        apart = (found[LATE] - found[FULL]).abs().max() / largest
        rows.append([kind, *_compared(times), float(apart), float(largest)])
    return {
        "title": "Causal mediation (CM1)",
        "how": (
            f"GPT-2 small's shape, {n_layer} layers of 12 heads, random weights, {n} questions of "
            f"{min(_lengths(asked))} to {max(_lengths(asked))} words, batches of {batch_size} "
            "rows. CM1 begins each forward pass at the layer of the head that is zeroed; its peer "
            "runs every layer, for the same rows in batches of the same size. RA ranks the same "
            "heads on the same questions, answers appended. Tokenising and proofs are in the "
            "time; loading is not. A spread is that of the ratio within a round. "
            f"Medians of {rounds} rounds, interleaved."
        ),
        "columns": [
            "model",
            "CM1, s",
            "full forward passes, s",
            "RA, s",
            "full / CM1",
            "spread of full / CM1",
            "CM1 / RA",
            "spread of CM1 / RA",
            "full / RA",
            "largest difference / largest effect",
            "largest effect",
        ],
        "rows": rows,
    }


def _compared(times: dict[str, Times]) -> list[float | str | None]:
    late, full, ra = (times[name] for name in (LATE, FULL, RA))
    return [
        late.median,
        full.median,
        ra.median,
        full.median / late.median,
        ratio_spread(full.seconds, late.seconds),
        late.median / ra.median,
        ratio_spread(late.seconds, ra.seconds),
        full.median / ra.median,
    ]


def _lengths(asked: list[Prompt]) -> list[int]:
    return [len(prompt.text.split()) for prompt in asked]
