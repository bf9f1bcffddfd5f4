"""run_with_ra on a GPU: GPT-2 XL's and Llama 7B's shape, float32 and bfloat16, device events."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import routes
from benchmarks.models import word_level_tokenizer
from ra_lens.model import available_kinds, load_folder

SHAPES = {"GPT-2 XL": ((8, 64), (1, 512)), "Llama 7B": ((8, 64), (1, 512))}


def measure(*, rounds: int, quick: bool = False) -> dict[str, Any]:
    """The table of `benchmarks.engine` on a GPU; no rows where there is none."""
    rows: list[list[Any]] = []
    how = "Random weights, medians of device events."
    if torch.cuda.is_available():
        how = f"{torch.cuda.get_device_name()}. {how}"
        for name, shapes in SHAPES.items():
            for dtype in (torch.float32, torch.bfloat16):
                for kind in available_kinds():
                    rows += _of_model(name, shapes, dtype, kind, rounds, quick=quick)
    else:
        how = f"Not measured: no GPU was at hand. {how}"
    columns = ["model", "dtype", "class", "batch × tokens", "route", "s", "over the forward pass"]
    return {"title": "On a GPU", "how": how, "columns": columns, "rows": rows}


def _of_model(
    name: str, shapes: Any, dtype: torch.dtype, kind: Any, rounds: int, *, quick: bool
) -> list[list[Any]]:
    rows: list[list[Any]] = []
    model = _load(name, dtype, kind, quick=quick)
    for shape in shapes:
        tokens = torch.randint(0, 30000, shape, device="cuda")
        seconds = {
            route: statistics.median(_device_seconds(run) for _ in range(rounds + 1))
            for route, run in routes(model, tokens).items()
        }
        base = next(iter(seconds.values()))
        size = f"{shape[0]} × {shape[1]}"
        rows += [
            [name, str(dtype).removeprefix("torch."), kind, size, route, s, s / base]
            for route, s in seconds.items()
        ]
    del model
    torch.cuda.empty_cache()
    return rows


def _device_seconds(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _load(name: str, dtype: torch.dtype, kind: Any, *, quick: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        if name == "GPT-2 XL":
            config: Any = GPT2Config(n_layer=2 if quick else 48, n_embd=1600, n_head=25)
            model: Any = GPT2LMHeadModel(config)
        else:
            config = LlamaConfig(num_hidden_layers=2 if quick else 32)
            model = LlamaForCausalLM(config)
    model = model.to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        word_level_tokenizer(config.vocab_size).save_pretrained(folder)
        del model
        return load_folder(Path(folder), kind=kind, device="cuda", dtype=dtype)
