"""Reading the devices and dtypes that people hand over; numbers to a device and back.

Reading a number from a GPU waits until everything before it is computed, and while it waits nothing
new is handed to the GPU. So a run reads what it checks in one go (`read_numbers`), and what it
sends does not wait (`sent`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ra_lens.errors import BadInput

Device = str | torch.device | None


def read_numbers(values: Sequence[Tensor]) -> list[float]:
    """Give the numbers in tensors of one element, waiting for their device once."""
    if not values:
        return []
    first = values[0].device
    found: list[float] = torch.stack([value.detach().to(first) for value in values]).tolist()
    return found


def sent(value: Tensor, device: torch.device) -> Tensor:
    """Give a tensor of the host on a device, without waiting for what that computes."""
    # Only CUDA copies what can be overwritten aside first.
    return value.to(device, non_blocking=device.type == "cuda")


def read_dtype(dtype: object) -> torch.dtype | None:
    """Read in which floating-point dtype maps are kept; None: in the one they are made in."""
    if dtype is None:
        return None
    if not isinstance(dtype, torch.dtype):
        name = getattr(dtype, "__name__", str(dtype)).removeprefix("torch.")
        meant = getattr(torch, name, None)
        better = meant if isinstance(meant, torch.dtype) else "one of torch, such as torch.float16"
        raise BadInput(f"found dtype={dtype!r}; give {better}.")
    if not dtype.is_floating_point:
        raise BadInput(
            f"found dtype={dtype}, which holds no floating-point numbers, as maps are. Give one "
            "that does, such as torch.float16."
        )
    return dtype


def read_device(device: Device) -> torch.device | None:
    """Read where maps are kept; None: where they are made."""
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise BadInput(
            f"found device={device!r}; give a device of torch, such as 'cpu' or 'cuda:0'."
        ) from None


def why_unusable(device: Device) -> str:
    """Say why tensors cannot be made on a device here; empty if they can."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return ""


def read_place(place: str | torch.device | torch.dtype) -> torch.device | torch.dtype:
    """Read a device or a floating-point dtype, either of which `Tensor.to` takes."""
    meant = place if isinstance(place, torch.dtype) else getattr(torch, str(place), None)
    found = read_dtype(place) if isinstance(meant, torch.dtype) else read_device(place)  # pyright: ignore[reportArgumentType]
    if found is None:
        raise BadInput("found nothing to move to; give a device, or a dtype of torch.")
    return found
