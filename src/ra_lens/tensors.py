"""Reading the devices and dtypes that people hand over, before anything is computed."""

from __future__ import annotations

import torch

from ra_lens.errors import BadInput

Device = str | torch.device | None


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


def read_place(place: str | torch.device | torch.dtype) -> torch.device | torch.dtype:
    """Read a device or a floating-point dtype, either of which `Tensor.to` takes."""
    meant = place if isinstance(place, torch.dtype) else getattr(torch, str(place), None)
    found = read_dtype(place) if isinstance(meant, torch.dtype) else read_device(place)  # pyright: ignore[reportArgumentType]
    if found is None:
        raise BadInput("found nothing to move to; give a device, or a dtype of torch.")
    return found
