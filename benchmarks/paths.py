"""Measure traced paths: how long they take, what a beam misses, what masking their heads does.

    python -m benchmarks.paths            # all three, about two minutes
    python -m benchmarks.paths speed

Nothing is downloaded: attention is drawn, the large model has the shape of GPT-2 small and random
weights, and heads are masked in the embedded model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.models import gpt2_small
from ra_lens import load_demo_model, load_task, trace_paths
from ra_lens.model import as_lens, available_kinds
from ra_lens.patching.masking import mask_hooks
from ra_lens.paths import read_maps, trace_layers
from ra_lens.questions import Questions, ask, read_questions

TASKS = ("country-capital", "antonym", "present-past", "singular-plural")


def drawn_attention(n: int, seed: int, heads: int = 3) -> Tensor:
    """Softmax of normal scores with a standard deviation of 2, `[head, query, key]`."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(heads, n, n, generator=generator)
    above = torch.ones(n, n, dtype=torch.bool).triu(1)
    return scores.masked_fill(above, float("-inf")).softmax(dim=-1)


def seconds(function: Callable[[], Any], rounds: int = 5) -> float:
    """Median of a few rounds, after one to warm up."""
    function()
    found: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def speed() -> None:
    """Time the search through one layer and through all of them."""
    print(f"Speed, {torch.get_num_threads()} threads")
    attention = drawn_attention(1024, 0)
    for norm in ("none", "avg_logprob"):
        taken = seconds(partial(trace_paths, attention, top_beam=10, length_norm=norm))
        print(f"  one layer, 1,024 tokens, 10 best, exact, length_norm={norm}: {taken:.2f} s")
    tokens = torch.randint(3, 50000, (1, 128), generator=torch.Generator().manual_seed(0))
    for kind in available_kinds():
        model = gpt2_small(kind)
        for options in ({}, {"follow": "pattern"}, {"follow": "more", "target": 5}):
            once = partial(trace_layers, model, tokens, top_beam=10, **options)
            taken = seconds(once, rounds=3)
            name = options.get("follow", "value_norm")
            print(f"  12 layers of 12 heads, 128 tokens, 10 best, {name}, {kind}: {taken:.2f} s")


def misses(matrices: int = 200, n: int = 24) -> None:
    """Count the best paths that a beam does not find."""
    print(f"Beam search (5 wide, 5 steps each) on {matrices} drawn maps of {n} tokens")
    for norm in ("none", "avg_logprob", "sqrt"):
        best = found = 0
        for seed in range(matrices):
            maps = drawn_attention(n, 1000 + seed)
            exact = trace_paths(maps, length_norm=norm)
            beam = trace_paths(maps, length_norm=norm, search="beam")
            wanted = [path.positions for path in exact.beams]
            given = {path.positions for path in beam.beams}
            best += wanted[0] in given
            found += len(set(wanted) & given)
        print(
            f"  {norm}: misses the best path in {matrices - best} of {matrices} maps, and "
            f"{5 * matrices - found} of the {5 * matrices} best five"
        )


def masking(draws: int = 10) -> None:
    """Mask the heads of traced paths, and as many random ones."""
    print("Masked heads of the embedded model: rise of −log p(answer), nats, mean over prompts")
    model = load_demo_model()
    lens = as_lens(model)
    n_layers, n_heads = len(lens.sites), next(iter(lens.sites.values())).n_heads
    generator = torch.Generator().manual_seed(0)

    def loss(questions: Questions, heads_of: list[list[tuple[int, int]]]) -> Tensor:
        keep = torch.ones(len(questions), n_layers, n_heads, dtype=torch.bool)
        for i, heads in enumerate(heads_of):
            for layer, head in heads:
                keep[i, layer, head] = False
        marks = ask(lens, questions, lambda part: mask_hooks(lens.sites, keep[part]))
        return -marks.probability.log()

    def anywhere(heads: list[tuple[int, int]]) -> list[tuple[int, int]]:
        order = torch.randperm(n_layers * n_heads, generator=generator)[: len(heads)]
        return [divmod(int(i), n_heads) for i in order]

    def same_layers(heads: list[tuple[int, int]]) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for layer in {layer for layer, _ in heads}:
            n = sum(other == layer for other, _ in heads)
            order = torch.randperm(n_heads, generator=generator)[:n]
            found += [(layer, int(i)) for i in order]
        return found

    for n_paths in (1, 5):
        for follow in ("value_norm", "pattern", "more", "less", "abs"):
            rows: list[Tensor] = []
            sizes: list[int] = []
            for task in TASKS:
                prompts = load_task(task).split().prompts("test", shots=2)
                questions = read_questions(lens, prompts)
                own = {} if follow in ("value_norm", "pattern") else {
                    "target": [prompt.answer for prompt in prompts]
                }  # fmt: skip
                texts = [prompt.text for prompt in prompts]
                maps = read_maps(model, texts, follow=follow, **own)
                heads = [trace_layers(one).heads(n_paths) for one in maps]
                before = loss(questions, [[] for _ in prompts])
                columns = [loss(questions, heads) - before]
                for draw in (anywhere, same_layers):
                    every = [loss(questions, list(map(draw, heads))) for _ in range(draws)]
                    columns.append(torch.stack(every).mean(dim=0) - before)
                rows.append(torch.stack(columns, dim=1))
                sizes += map(len, heads)
            rise = torch.cat(rows)
            path, random, beside = rise.mean(dim=0).tolist()
            share = float((rise[:, 0] > rise[:, 1]).float().mean())
            print(
                f"  {n_paths} path(s), {follow}: {sum(sizes) / len(sizes):.1f} heads, "
                f"{path:+.3f}; as many random heads {random:+.3f}, of the same layers "
                f"{beside:+.3f}; above random in {share:.0%} of {len(rise)} prompts"
            )


def main(
    what: Annotated[str, typer.Argument(help="speed, misses, masking or all.")] = "all",
) -> None:
    """Measure."""
    for function in (speed, misses, masking):
        if what in ("all", function.__name__):
            function()


if __name__ == "__main__":
    typer.run(main)
