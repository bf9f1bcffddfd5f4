"""How long the paper's experiments take on this machine, and how much memory, from a measurement.

The four models' weights are not needed: two layers of each one's shape are made with random weights
and timed on prompts of the experiments' size, forward and with Reversed Attention; the rest is
counting (tokens of every prompt that is run, layers, parameters).

    python examples/reproduction_cost.py                     # float32 on the CPU
    python examples/reproduction_cost.py --device cuda --batch-size 64
    python examples/reproduction_cost.py --assume-tflops 15  # hours at that speed instead
    python examples/reproduction_cost.py --shared            # with shared demonstrations

Not counted: loading the model, and the unembedding, of which one position per prompt is computed.

With shared demonstrations, those of a task run once for each set of masked heads, and once for each
head that causal mediation zeroes; the paper draws them anew for every question.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ra_lens import run_with_ra

SHOTS = (0, 1, 5, 10)
N_RANK = 25
CURVES = 5 * 2  # RA, FA, CM1, CM2 and index in both directions; random orders come on top
SCALES, MAPS, N_MEAN = 24, 2, 25

# Test questions of the published split, and about how many tokens a solved example has (GPT-2).
TASKS = {
    "adjective_v_verb_3": (210, 12), "alphabetically_first_3": (210, 12),
    "animal_v_object_3": (210, 12), "antonym": (504, 8), "capitalize": (170, 8),
    "capitalize_first_letter": (170, 8), "choose_middle_of_3": (210, 12),
    "country-capital": (42, 9), "english-french": (987, 9), "next_item": (47, 8),
    "person-sport": (67, 10), "present-past": (61, 8), "prev_item": (47, 8),
    "singular-plural": (43, 8), "synonym": (604, 8), "company-hq": (142, 14),
    "natural/country-capital": (42, 8), "landmark-in-country": (175, 11),
    "person-plays-pro-sport": (67, 9), "natural/present-past": (61, 8),
    "product-by-company": (109, 9),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What counts of a model."""

    n_layers: int
    n_heads: int
    d_model: int
    d_mlp: int
    gated: bool
    d_vocab: int

    @property
    def parameters(self) -> float:
        """Number of parameters, biases and norms left out."""
        per_layer = 4 * self.d_model**2 + (3 if self.gated else 2) * self.d_model * self.d_mlp
        return self.n_layers * per_layer + self.d_vocab * self.d_model

    def two_layers(self, device: str) -> Any:
        """Two layers of this shape as a HookedTransformer."""
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        config = HookedTransformerConfig(
            n_layers=2,
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_head=self.d_model // self.n_heads,
            d_mlp=self.d_mlp,
            gated_mlp=self.gated,
            n_ctx=256,
            d_vocab=1000,
            act_fn="silu" if self.gated else "gelu_new",
            normalization_type="RMS" if self.gated else "LN",
            device=device,
        )
        return HookedTransformer(config).eval()


MODELS = {
    "gpt2-xl": Shape(48, 25, 1600, 6400, False, 50257),
    "facebook/opt-1.3b": Shape(24, 32, 2048, 8192, False, 50272),
    "EleutherAI/gpt-j-6B": Shape(28, 16, 4096, 16384, False, 50400),
    "meta-llama/Llama-2-7b-hf": Shape(32, 32, 4096, 11008, True, 32000),
}


def prompt_tokens(example: int, shots: int) -> int:
    """Tokens of a prompt, BOS included; its answer would be one more."""
    return example - 1 + shots * example


def rows_tokens(example: int, shots: int, questions: int, *, shared: bool) -> float:
    """Tokens that run for some questions whose heads are masked alike."""
    if shared:
        return shots * example + questions * prompt_tokens(example, 0)
    return questions * prompt_tokens(example, shots)


def perturbation_tokens(
    shape: Shape, task: str, *, random_orders: int, shared: bool
) -> tuple[float, float]:
    """Tokens that go through the model forward, and those of RA, for one task at all shots."""
    n_test, example = TASKS[task]
    # A pass of causal mediation begins at the layer of its head: half of the layers on average.
    heads = shape.n_layers * shape.n_heads * (shape.n_layers + 1) / (2 * shape.n_layers)
    forward = ra = 0.0
    for shots in SHOTS:
        asked = rows_tokens(example, shots, n_test, shared=shared)
        ranked = rows_tokens(example, shots, N_RANK, shared=shared)
        tokens = prompt_tokens(example, shots) * N_RANK
        forward += asked * (9 * (CURVES + random_orders) + 2)
        # FA; CM1, which can share demonstrations; CM2, whose labels are shuffled: it cannot.
        forward += tokens + (tokens + heads * ranked) + (2 + heads) * tokens
        ra += tokens
    return forward, ra


def patching_tokens(task: str, *, shared: bool) -> tuple[float, float]:
    """The same for a sweep over the scales, if all of the task's questions had one length."""
    n_test, example = TASKS[task]
    forward = ra = 0.0
    for shots in SHOTS:
        forward += rows_tokens(example, shots, n_test, shared=shared) * (1 + SCALES * MAPS)
        ra += prompt_tokens(example, shots) * N_MEAN
    return forward, ra


def hours(seconds: float) -> str:
    """Write a time in hours."""
    found = seconds / 3600
    return f"{found:.1f} h" if found < 100 else f"{found:,.0f} h"


def timed(run: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of a call, after one that warms up; on the CPU those of its own threads."""
    on_gpu = device.startswith("cuda")

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()  # other work does not count

    seconds: list[float] = []
    for _ in range(repeats + 1):
        start = now()
        run()
        seconds.append(now() - start)
    return statistics.median(seconds[1:])


def kept_for_backward(model: Any, tokens: torch.Tensor) -> int:
    """Bytes that the graph of a run with RA keeps, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run_with_ra(model, tokens, target=5, store="norms")
    return sum(kept.values())


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="Prompts per forward pass.")] = 16,
    pos: Annotated[int, typer.Option(help="Tokens of the prompts timed.")] = 48,
    repeats: Annotated[int, typer.Option(help="Timed runs; the median counts.")] = 3,
    random_orders: Annotated[
        int, typer.Option(help="Random orders of the perturbation test; 2 make 12 orders in all.")
    ] = 20,
    shared: Annotated[bool, typer.Option("--shared", help="Share demonstrations.")] = False,
    assume_tflops: Annotated[
        float | None,
        typer.Option(help="Give the hours at this speed; only the cost of RA is then measured."),
    ] = None,
) -> None:
    """Print the expected hours and gigabytes for each of the paper's models."""
    warnings.simplefilter("ignore")
    columns = ["model", "parameters", "forward tokens/s", "RA tokens/s", "TFLOP/s"]
    columns += ["perturb antonym", "perturb all", "patch antonym", "patch all", "weights", "graph"]
    how = f"{device}, float32, batches of {batch_size} × {pos} tokens, "
    how += f"{CURVES + random_orders} orders, demonstrations {'shared' if shared else 'own'}"
    table = Table(title=how if assume_tflops is None else f"{how}, at {assume_tflops:g} TFLOP/s")
    for name in columns:
        table.add_column(name, overflow="fold")
    total = [0.0, 0.0]
    for name, shape in MODELS.items():
        model = shape.two_layers(device)
        tokens = torch.randint(0, 1000, (batch_size, pos), device=device)

        @torch.no_grad()
        def forward(model: Any = model, tokens: torch.Tensor = tokens) -> None:
            model(tokens, return_type=None)

        def ra(model: Any = model, tokens: torch.Tensor = tokens) -> None:
            run_with_ra(model, tokens, target=5, store="norms")

        share = 2 / shape.n_layers  # two layers were timed
        speed = batch_size * pos / timed(forward, device, repeats) * share
        ra_speed = batch_size * pos / timed(ra, device, repeats) * share
        if assume_tflops is not None:
            ratio, body = speed / ra_speed, shape.parameters - shape.d_vocab * shape.d_model
            speed = assume_tflops * 1e12 / (2 * body)
            ra_speed = speed / ratio
        longest = torch.randint(0, 1000, (batch_size, prompt_tokens(8, 10) + 1), device=device)
        graph = kept_for_backward(model, longest) / share
        flops = 2 * (shape.parameters - shape.d_vocab * shape.d_model) * speed

        def seconds(
            work: list[tuple[float, float]], speed: float = speed, ra_speed: float = ra_speed
        ) -> float:
            return sum(f / speed + r / ra_speed for f, r in work)

        perturb = [
            perturbation_tokens(shape, task, random_orders=random_orders, shared=shared)
            for task in TASKS
        ]
        patch = [patching_tokens(task, shared=shared) for task in TASKS]
        total[0] += seconds(perturb)
        total[1] += seconds(patch)
        one = list(TASKS).index("antonym")
        table.add_row(
            name,
            f"{shape.parameters / 1e9:.2f}e9",
            f"{speed:,.0f}",
            f"{ra_speed:,.0f}",
            f"{flops / 1e12:.2f}",
            hours(seconds(perturb[one : one + 1])),
            hours(seconds(perturb)),
            hours(seconds(patch[one : one + 1])),
            hours(seconds(patch)),
            f"{4 * shape.parameters / 2**30:.1f} GiB",
            f"{graph / 2**30:.1f} GiB",
        )
        del model
    table.add_section()
    table.add_row("all four", "", "", "", "", "", hours(total[0]), "", hours(total[1]))
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
