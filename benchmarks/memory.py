"""Peak memory of a run over the loaded model, each in a process of its own; on Linux.

python -m benchmarks.memory TransformerBridge 1024 maps
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESET = Path("/proc/self/clear_refs")  # Linux's own

BARE, FORWARD = "bare", "forward"
OPTIONS: dict[str, dict[str, Any]] = {
    "maps": {"store": "maps"},
    "norms": {"store": "norms"},
    "norms, recompute": {"store": "norms", "recompute": True},
    "maps, recompute": {"store": "maps", "recompute": True},
}
LONG: dict[str, dict[str, Any]] = {
    "whole maps": {"store": "norms", "recompute": True, "query_rows": 2**40},
    "blocks of 64 rows": {"store": "norms", "recompute": True, "query_rows": 64},
    "blocks as chosen": {"store": "norms", "recompute": True},
}
"""What `benchmarks.long_prompts` runs: a layer's attention in one block, and in several."""
ROUTES = {
    FORWARD: "forward pass, no_grad",
    BARE: "bare forward and backward pass",
    **{name: f"run_with_ra, {name}" for name in OPTIONS},
}


def one(kind: str, tokens: int, route: str, shape: dict[str, Any]) -> dict[str, float]:
    """Measure one route in this process: peak over the loaded model, seconds, and the estimate."""
    import torch
    from torch import nn

    from benchmarks.models import gpt2_small, random_tokens
    from ra_lens import run_with_ra

    options = dict(shape)
    batch = options.pop("batch", 1)
    model = gpt2_small(kind, **options)
    for parameter in nn.Module.parameters(model):
        parameter.requires_grad_(False)
    words = int(model.cfg.d_vocab) - 1  # the last one is for padding
    ids = random_tokens(batch, tokens, n_vocab=words)

    def leaf(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x.detach().requires_grad_()

    def run(ids: torch.Tensor) -> object:
        if route == FORWARD:
            with torch.no_grad():
                return model(ids)
        if route == BARE:
            with model.hooks(fwd_hooks=[("hook_embed", leaf)]):
                (-model(ids)[:, -1].log_softmax(-1)[:, 5].sum()).backward()
            return None
        return run_with_ra(model, ids, target=5, **(OPTIONS | LONG)[route])

    with estimated() as estimates:
        run(ids[:, :8])  # what is loaded or allocated once
        estimates.clear()
        peak, seconds = _peak(lambda: run(ids))
    return {"peak": peak, "seconds": seconds, "estimate": estimates[0] if estimates else 0}


@contextmanager
def estimated() -> Generator[list[int], None, None]:
    """The bytes that each run in the context was reckoned to need at least, before it ran."""
    import ra_lens  # noqa: F401  run_with_ra hides its module

    estimates: list[int] = []
    runs = vars(sys.modules["ra_lens.run"])
    refuse = runs["refuse_what_cannot_fit"]

    def note(plan: Any) -> None:
        estimates.append(plan.need)
        refuse(plan)

    runs["refuse_what_cannot_fit"] = note
    try:
        yield estimates
    finally:
        runs["refuse_what_cannot_fit"] = refuse


def _peak(run: Callable[[], object]) -> tuple[float, float]:
    """Largest resident memory while `run` runs, less that before, in bytes; and its seconds.

    Linux keeps the mark itself, so that nothing is missed on a busy machine.
    """
    RESET.write_text("5")  # the mark falls to what is resident
    before = _highest_resident()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return _highest_resident() - before, seconds


def _highest_resident() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024.0 * int(line.split()[1])
    raise OSError("this kernel keeps no mark of the highest resident memory (VmHWM).")


def apart(kind: str, tokens: int, route: str, **shape: Any) -> dict[str, float]:
    """Measure one route in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory"]
    ran = subprocess.run(
        [*command, kind, str(tokens), route, json.dumps(shape)],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(ran.stdout.splitlines()[-1])


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """Peaks on 1 × 1,024 tokens."""
    from statistics import median

    from benchmarks.timing import ratio_spread
    from ra_lens.model import available_kinds

    n = min(rounds, 3)
    tokens, n_layer = (32, 2) if quick else (1024, 12)
    rows: list[list[Any]] = []
    for kind in available_kinds()[:1] if quick else available_kinds():
        runs: dict[str, list[dict[str, float]]] = {route: [] for route in ROUTES}
        for _ in range(n):
            for route in ROUTES:
                runs[route].append(apart(kind, tokens, route, n_layer=n_layer))
        peaks = {route: [r["peak"] for r in runs[route]] for route in ROUTES}
        for route, title in ROUTES.items():
            estimate = runs[route][0]["estimate"]
            rows.append(
                [
                    kind,
                    f"1 × {tokens}",
                    title,
                    median(peaks[route]) / 1e6,
                    median(peaks[route]) / median(peaks[BARE]),
                    ratio_spread(peaks[route], peaks[BARE]),
                    estimate / 1e6 if estimate else None,
                    median(r["seconds"] for r in runs[route]),
                ]
            )
    return {
        "title": "Peak memory",
        "how": (
            "GPT-2 small's shape, float32. Resident memory at its highest during the run, less "
            "that of the loaded and warmed-up process; each run in a process of its own, medians "
            f"of {n} rounds, interleaved. Base: a bare forward and "
            "backward pass of the same model to its embedding, parameters frozen, nothing kept. "
            "The spread is that of the ratio within a round. The estimate is the lower bound that "
            "is checked before a run."
        ),
        "columns": [
            "model",
            "batch × tokens",
            "route",
            "peak, MB",
            "over the bare pass",
            "spread",
            "estimated, MB",
            "s",
        ],
        "rows": rows,
    }


if __name__ == "__main__":
    kind, tokens, route, shape = sys.argv[1:]
    print(json.dumps(one(kind, int(tokens), route, json.loads(shape))))
