"""Time run_with_ra against a forward pass without gradients and against TransformerLens alone.

Everything runs in one process, interleaved; the figures are medians. The model has the shape of
GPT-2 small and random weights, so nothing is downloaded.

    python examples/benchmark_engine.py
    python examples/benchmark_engine.py --kind TransformerBridge --rounds 9
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ra_lens import run_with_ra
from ra_lens.sites import available_kinds, load_folder


def gpt2_shaped(kind: Any, n_layer: int) -> Any:
    """Load a GPT-2-small-shaped model with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(GPT2Config(n_layer=n_layer)).save_pretrained(folder)
        _word_level_tokenizer().save_pretrained(folder)
        return load_folder(Path(folder), kind=kind)


def _word_level_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(50257)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    last = "w50256"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=last, eos_token=last, pad_token=last, unk_token="w0"
    )


def routes(model: Any, tokens: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """List the routes to time, by name."""

    def forward() -> None:
        with torch.no_grad():
            model(tokens)

    def plain() -> None:
        # What one would write with TransformerLens alone: cache patterns and their gradients.
        kept: dict[str, torch.Tensor] = {}

        def save(t: torch.Tensor, hook: Any) -> None:
            kept[hook.name] = t.detach()

        def save_grad(t: torch.Tensor, hook: Any) -> None:
            kept[f"{hook.name}_grad"] = t.detach()

        def wanted(name: str) -> bool:
            return name.endswith("hook_pattern")

        with model.hooks(fwd_hooks=[(wanted, save)], bwd_hooks=[(wanted, save_grad)]):
            (-model(tokens)[:, -1].log_softmax(-1)[:, 5].sum()).backward()
        model.zero_grad()

    return {
        "forward pass, no_grad": forward,
        "run_with_ra": lambda: run_with_ra(model, tokens, target=5),
        "run_with_ra, store='norms'": lambda: run_with_ra(model, tokens, target=5, store="norms"),
        "TransformerLens hooks + backward()": plain,
    }


def main(
    kind: Annotated[str | None, typer.Option(help="Model class; default: every one here.")] = None,
    rounds: Annotated[int, typer.Option(help="Measurements of each route.")] = 7,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 12,
    threads: Annotated[int | None, typer.Option(help="Threads; default: torch's own.")] = None,
) -> None:
    """Print a table: seconds and ratio to the forward pass, per shape and route."""
    if threads is not None:
        torch.set_num_threads(threads)
    table = Table("model", "batch × tokens", "route", "median s", "ratio")
    for model_kind in available_kinds() if kind is None else (kind,):
        model = gpt2_shaped(model_kind, layers)
        for shape in ((8, 64), (1, 512)):
            tokens = torch.randint(0, 50000, shape, generator=torch.Generator().manual_seed(0))
            named = routes(model, tokens)
            times: dict[str, list[float]] = {name: [] for name in named}
            for round_index in range(rounds + 1):
                for name, run in named.items():
                    start = time.perf_counter()
                    run()
                    if round_index:  # the first round warms up
                        times[name].append(time.perf_counter() - start)
            medians = {name: statistics.median(values) for name, values in times.items()}
            floor = next(iter(medians.values()))
            for name, median in medians.items():
                row = (model_kind, f"{shape[0]} × {shape[1]}", name)
                table.add_row(*row, f"{median:.3f}", f"{median / floor:.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
