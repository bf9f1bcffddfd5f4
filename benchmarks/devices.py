"""Timing, memory and waits on a GPU, and stand-ins with which the same script runs on a CPU."""

from __future__ import annotations

import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Run = Callable[[], Any]
OF_TORCH = Path(torch.__file__).parent


class Device(Protocol):
    """Where the script measures."""

    name: str  # as torch calls it
    called: str  # as people do
    clock: str  # how it measures

    def seconds(self, run: Run) -> float:
        """How long the device works at a call."""
        ...

    def peak(self, run: Run) -> int | None:
        """Most bytes allocated in a call, over those before; None where that is not known."""
        ...

    def waits(self, run: Run) -> dict[str, int]:
        """How often, and where, a call makes the host wait for the device."""
        ...


class Cuda:
    """A GPU: device events, its allocator's peak, and torch's warnings of synchronisation."""

    name = "cuda"
    clock = "device events"

    def __init__(self) -> None:
        """Name the card."""
        self.called = torch.cuda.get_device_name()

    def seconds(self, run: Run) -> float:
        """Between two events around a call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        kept = run()
        end.record()
        torch.cuda.synchronize()
        del kept
        return start.elapsed_time(end) / 1e3

    def peak(self, run: Run) -> int:
        """As torch's allocator counts them, what the call gives included."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before

    def waits(self, run: Run) -> dict[str, int]:
        """Where torch warns of a wait, by the line of Python that it comes from."""
        torch.cuda.synchronize()
        places: Counter[str] = Counter()

        def note(message: Any, *_args: Any, **_options: Any) -> None:
            if "synchroniz" in str(message):
                places[_caller()] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return dict(places)


class Host:
    """A CPU in the place of a GPU, to see that everything runs: its numbers say nothing of one."""

    name = "cpu"
    called = "no GPU"
    clock = "the host's clock"

    def seconds(self, run: Run) -> float:
        """By the clock."""
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def peak(self, run: Run) -> None:
        """Run it; a CPU has no allocator that counts."""
        run()

    def waits(self, run: Run) -> dict[str, int]:
        """Where a number of a tensor is read."""
        with Reads() as seen:
            run()
        return dict(Counter(seen.places))


class Reads(TorchDispatchMode):
    """Notes where numbers of tensors are read (`float(x)`, `bool(x)`, `x.item()`)."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note it, and go on."""
        if func is torch.ops.aten._local_scalar_dense.default:
            if not isinstance(args[0], torch.Tensor):  # a number that autograd keeps as it is
                return args[0]
            self.places.append(_caller())
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost line of Python that is neither torch's own nor this file's."""
    for frame in reversed(traceback.extract_stack(sys._getframe())):
        path = Path(frame.filename)
        if OF_TORCH not in path.parents and path != Path(__file__) and path.name != "warnings.py":
            return f"{path.as_posix()}:{frame.lineno}"
    return "?"


def median_seconds(device: Device, run: Run, *, rounds: int) -> float:
    """The median of some rounds, after one that is not counted."""
    return statistics.median([device.seconds(run) for _ in range(rounds + 1)][1:])
