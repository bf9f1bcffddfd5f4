"""Models over two devices, and the same models on one.

The devices are simulated (`simulated_devices`) or, where there are two, GPUs. What places the
models is what people call: `load_folder(n_devices=2)` and `load_folder(device_map=...)`, which
transformers and accelerate obey.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ra_lens.model import load_folder
from simulated_devices import simulated
from tiny_models import KINDS

N_LAYERS = 4  # two on each device
SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": N_LAYERS},
    "llama": {"num_hidden_layers": N_LAYERS},
    "opt": {"num_hidden_layers": N_LAYERS},
}
CASES = [(arch, kind) for arch in SIZES for kind in KINDS]
# Names of a Hugging Face model's parts, and on which of two devices they are; the unembedding of
# two of these models is their embedding.
_PARTS: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": (
        "transformer.h",
        {
            "transformer.wte": 0,
            "transformer.wpe": 0,
            "transformer.drop": 0,
            "transformer.ln_f": 1,
            "lm_head": 0,
        },
    ),
    "llama": (
        "model.layers",
        {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1},
    ),
    "opt": (
        "model.decoder.layers",
        {
            "model.decoder.embed_tokens": 0,
            "model.decoder.embed_positions": 0,
            "model.decoder.final_layer_norm": 1,
            "lm_head": 0,
        },
    ),
}

Pair = tuple[torch.device, torch.device]


def device_map(arch: str, pair: Pair) -> dict[str, str]:
    """Half of the layers on each of two devices."""
    layers, others = _PARTS[arch]
    places = {f"{layers}.{i}": i * 2 // N_LAYERS for i in range(N_LAYERS)}
    return {name: str(pair[i]) for name, i in (others | places).items()}


@dataclass(frozen=True)
class OverTwo:
    """Two devices, and models over them."""

    pair: Pair
    folder: Callable[..., Path]
    made: dict[Any, Any]

    @property
    def is_simulated(self) -> bool:
        return self.pair[0].type == "sim"

    @property
    def of_layers(self) -> list[str]:
        """Where each layer lies."""
        return [str(self.pair[i * 2 // N_LAYERS]) for i in range(N_LAYERS)]

    def path(self, arch: str) -> Path:
        return self.folder(arch, **SIZES[arch])

    def load(self, arch: str, kind: Any, dtype: torch.dtype = torch.float32) -> Any:
        """A model over both, of the test's own."""
        places: dict[str, Any] = {"device": self.pair[0], "n_devices": 2}
        if kind == "TransformerBridge":
            places = {"device_map": device_map(arch, self.pair)}
        return load_folder(self.path(arch), kind=kind, dtype=dtype, **places)

    def over(self, arch: str, kind: Any, dtype: torch.dtype = torch.float32) -> Any:
        """A model over both; leave it as it is."""
        return self._once(("over", arch, kind, dtype), lambda: self.load(arch, kind, dtype))

    def alone(self, arch: str, kind: Any, dtype: torch.dtype = torch.float32) -> Any:
        """The same on one device, which computes with the same kernels."""
        where = "cpu" if self.is_simulated else self.pair[0]
        return self._once(
            ("alone", arch, kind, dtype),
            lambda: load_folder(self.path(arch), kind=kind, device=where, dtype=dtype),
        )

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        key = (*key, self.pair[0].type)
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


_made: dict[Any, Any] = {}


def over_two(kind: str, folder: Callable[..., Path]) -> Iterator[OverTwo]:
    """Two devices of a kind, with models over them; skips where there are none."""
    if kind == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with simulated() if kind == "sim" else nullcontext():
        yield OverTwo((torch.device(kind, 0), torch.device(kind, 1)), folder, _made)


def home(value: torch.Tensor) -> torch.Tensor:
    """A tensor in the host's memory, to be compared."""
    return value.detach().to("cpu")
