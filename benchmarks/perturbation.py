"""The perturbation test, batched, against one forward pass for each step and question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks.models import gpt2_small
from benchmarks.timing import interleaved, ratio_spread
from ra_lens import load_demo_model, perturbation_test
from ra_lens.heads import rank_heads
from ra_lens.model import as_lens, available_kinds
from ra_lens.patching.masking import mask_hooks
from ra_lens.questions import Questions, mark, marked, read_questions
from ra_lens.tasks import Pair, Prompt, Task, load_task

BATCHED, ONE = "perturbation_test", "one forward pass per step and question"
STEPS = 10


def task_of_words() -> Task:
    """A task whose questions have about 50 tokens with 5 shots, of the words of the models here.

    An input has 1 to 3 tokens and an output 1 or 2, so that prompts are of several lengths.
    """
    pairs = tuple(
        Pair(
            " ".join(f"w{100 + 10 * i + k}" for k in range(1 + i % 3)),
            " ".join(f"w{5000 + 10 * i + k}" for k in range(1 + i % 2)),
        )
        for i in range(100)
    )
    return Task("words", "icl", pairs, "w1 w2 ", " w3 w4 w5", separator=" w6 ")


def asked(task: Task, *, shots: int, n: int) -> list[Prompt]:
    """The questions that `perturbation_test` asks."""
    return task.split("code").prompts("test", shots=shots, n=n, seed=0)


@torch.no_grad()
def one_by_one(model: Any, questions: list[Prompt], learned: list[Prompt], orders: int) -> Any:
    """Every step of every order, one question at a time: batch 1, answer appended, all logits."""
    lens = as_lens(model)
    read = read_questions(lens, questions)
    shape = len(lens.sites), next(iter(lens.sites.values())).n_heads
    rows: list[dict[str, Any]] = []
    for draw in range(orders):
        order = rank_heads(model, learned, method="random", draw=draw).order()
        for step in range(STEPS + 1):
            keep = torch.zeros(shape, dtype=torch.bool)
            for layer, head in order[: step * len(order) // STEPS]:
                keep[layer, head] = True
            with model.hooks(fwd_hooks=mask_hooks(lens.sites, keep)):
                logits = torch.cat([_last(model, ids) for ids in _with_answers(read)])
            rows.append({"draw": draw, **marked(mark(logits, read.first_tokens))})
    return pd.DataFrame(rows)


def _with_answers(read: Questions) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return list(zip(read.prompts.ids, read.answers, strict=True))


def _last(model: Any, ids: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    prompt, answer = ids
    return model(torch.tensor([[*prompt, *answer]]))[:, len(prompt) - 1]


def _ways(
    model: Any,
    task: Task,
    questions: list[Prompt],
    learned: list[Prompt],
    *,
    orders: int,
    shots: int,
) -> tuple[dict[str, Callable[[], None]], dict[str, pd.DataFrame]]:
    """Both ways, by name, and where their results will be."""
    found: dict[str, pd.DataFrame] = {}

    def batched() -> None:
        found[BATCHED] = perturbation_test(
            model,
            task,
            methods="random",
            random_orders=orders,
            shots=shots,
            n_rank=1,
            n_test=len(questions),
            progress=False,
        )

    def one() -> None:
        found[ONE] = one_by_one(model, questions, learned, orders)

    return {BATCHED: batched, ONE: one}, found


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Time both ways on a model of GPT-2 small's shape, and on the embedded model.

    Args:
        rounds: Measurements of each.
        quick: One kind of model, two layers and two questions, to see that it runs.
    """
    n, n_layer, shots = (2, 2, 1) if quick else (4, 12, 5)
    # A test of one method alone, and one of several orders, which share the two ends.
    numbers = (1,) if quick else (1, 4)
    kinds = available_kinds()[:1] if quick else available_kinds()
    models = [(f"GPT-2 small's shape, {kind}", kind) for kind in kinds]
    models += [(f"embedded model, {kind}", kind) for kind in kinds]
    rows: list[list[Any]] = []
    for name, kind in models:
        embedded = name.startswith("embedded")
        model = load_demo_model(kind=kind) if embedded else gpt2_small(kind, n_layer=n_layer)
        task = load_task("antonym") if embedded else task_of_words()
        questions, learned = asked(task, shots=shots, n=n), task.sample(1, seed=0)
        lengths = [len(ids) for ids in read_questions(as_lens(model), questions).prompts.ids]
        for orders in numbers:
            ways, found = _ways(model, task, questions, learned, orders=orders, shots=shots)
            times = interleaved(ways, rounds=rounds)
            ours, theirs = times[BATCHED], times[ONE]
            apart = (found[BATCHED]["logit_diff"] - found[ONE]["logit_diff"]).abs().max()
            rows.append(
                [
                    name,
                    f"{min(lengths)} to {max(lengths)}",
                    orders,
                    ours.median,
                    theirs.median,
                    theirs.median / ours.median,
                    ratio_spread(theirs.seconds, ours.seconds),
                    float(apart),
                ]
            )
    return {
        "title": "Perturbation test",
        "how": (
            f"Random orders of the heads, 11 shares each, {n} questions with {shots} "
            "demonstrations. perturbation_test runs shares and questions in batches of at most 64 "
            "rows, unembeds the last token of the question, and runs no and all heads once for all "
            "orders. Its peer, as the published experiment does, runs the same model on one "
            "question at a time for each share, answer appended, and unembeds every token; heads "
            "are zeroed by the same hooks, and the model is not loaded anew. Tokenising is in both "
            "times, loading is not. The spread is that of the ratio within a round. "
            f"Medians of {rounds} rounds, interleaved."
        ),
        "columns": [
            "model",
            "tokens",
            "orders",
            "perturbation_test, s",
            "one forward pass per step and question, s",
            "ratio",
            "spread",
            "largest difference of a mean logit difference",
        ],
        "rows": rows,
    }
