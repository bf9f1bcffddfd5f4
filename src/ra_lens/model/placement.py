"""Where a model's layers lie, and how one larger than a device is laid over several.

A TransformerBridge is placed by accelerate, as transformers do it (`device_map`): its hooks bring
to each layer what that layer takes. A HookedTransformer with `n_devices` hands the residual stream
on from block to block itself; its blocks must lie where it looks for them (`spread`), which is not
where TransformerLens 2.18 and 3.9 put them, who look for free memory at each module anew.

Maps come where the attention of their layer lies. Nothing here moves them.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.numbers import Whole, whole
from ra_lens.tensors import Device, read_device, why_unusable

DeviceMap = str | Mapping[str, Any] | None
_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # that accelerate makes itself


@dataclass(frozen=True)
class Placement:
    """Where a model is loaded to: one device, several in turn, or as accelerate maps modules."""

    device: torch.device | None = None
    n_devices: int = 1
    device_map: DeviceMap = None

    @staticmethod
    def read(device: Device, n_devices: Whole, device_map: DeviceMap) -> Placement:
        """Read where a model is to go.

        Raises:
            BadInput: two of the three contradict each other, or there are not so many devices.
        """
        where, n = read_device(device), whole("n_devices", n_devices)
        _check_map(device_map)
        if device_map is not None and (where is not None or n != 1):
            other = f"device={str(where)!r}" if where is not None else f"n_devices={n}"
            raise BadInput(
                f"found device_map={device_map!r} with {other}; device_map says where everything "
                "goes. Give one of them."
            )
        if n < 1:
            raise BadInput(f"found n_devices={n}; give a positive number.")
        if n == 1:
            reason = why_unusable(where)
            if reason:
                raise BadInput(
                    f"found device={str(device)!r}, which cannot be used: {reason}. Give 'cpu', "
                    "or leave it away for a GPU if there is one."
                )
        else:
            where = where or torch.device("cuda")
            module: Any = getattr(torch, where.type, None)
            there = int(module.device_count()) if hasattr(module, "device_count") else 0
            first = where.index or 0
            if first + n > there:
                if where.type == "cpu":
                    raise BadInput(f"found n_devices={n} on the CPU. Leave one of both away.")
                after = f" from {where} on" if first else ""
                raise BadInput(
                    f"found n_devices={n}{after}, and torch sees {there} devices of the kind "
                    f"{where.type!r}. Give fewer, or make more of them visible "
                    "(CUDA_VISIBLE_DEVICES)."
                )
        return Placement(where, n, device_map)

    @property
    def of_one(self) -> str | None:
        """The device that the whole model is loaded onto, at first where there are several."""
        return "cpu" if self.n_devices > 1 else None if self.device is None else str(self.device)

    @property
    def of_bridge(self) -> dict[str, Any]:
        """Options of TransformerBridge.boot_transformers.

        Raises:
            BadInput: several devices, and not the first ones, which it would take.
        """
        if self.device_map is not None:
            return {"device_map": self.device_map}
        if self.n_devices == 1:
            return {"device": self.of_one}
        if self.device is not None and self.device.index:
            raise BadInput(
                f"found n_devices={self.n_devices} from {self.device} on for a TransformerBridge, "
                "which takes the first ones. Leave device= out, and choose by CUDA_VISIBLE_DEVICES "
                "or device_map=."
            )
        return {"n_devices": self.n_devices}

    def settled(self) -> Placement:
        """Put what was not said to be on a device: onto a GPU if there is one."""
        if self.device is not None or self.device_map is not None:
            return self
        return replace(self, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def spread(self, model: Any) -> None:
        """Lay a HookedTransformer over the devices, if there are several."""
        if self.n_devices > 1 and self.device is not None:
            spread(model, self.device, self.n_devices)


def _check_map(device_map: object) -> None:
    if device_map is None or isinstance(device_map, Mapping):
        return
    if not isinstance(device_map, str):
        raise BadInput(
            f"found device_map={device_map!r}; give a mapping from modules to devices, or one of "
            f"{', '.join(map(repr, _MAPS))}."
        )
    if device_map not in _MAPS:
        read_device(device_map)  # a device for all


def spread(model: Any, first: torch.device, n_devices: int) -> None:
    """Lay a HookedTransformer over devices in turn, `first` and those after it.

    Each gets as many blocks as the others, or one fewer. What is before the blocks goes with the
    first of them, what is after them with the last.

    Raises:
        BadInput: this TransformerLens looks for a block beyond the last device.
    """
    cfg = model.cfg
    before = cfg.device, cfg.n_devices
    # Written with its index: of a plain "cuda" the first would be whatever is current.
    cfg.device, cfg.n_devices = f"{first.type}:{first.index or 0}", n_devices
    places = [_looked_for(i, cfg) for i in range(cfg.n_layers)]
    last = (first.index or 0) + n_devices - 1
    if any((place.index or 0) > last for place in places):
        cfg.device, cfg.n_devices = before
        raise BadInput(
            f"found n_devices={n_devices} for {cfg.n_layers} layers, which this version of "
            f"TransformerLens lays over {len(set(places))} devices. Give a number that divides "
            f"the layers, or take TransformerLens 3."
        )
    for block, place in zip(model.blocks, places, strict=True):
        nn.Module.to(block, place)
    after = [getattr(model, name, None) for name in ("ln_final", "unembed")]
    for module in model.children():
        if module is not model.blocks:
            nn.Module.to(module, places[-1] if module in after else places[0])


def refuse_misplaced(model: Any, name: str) -> None:
    """Raise if a HookedTransformer would look for a block where it is not."""
    for i, block in enumerate(model.blocks):
        found, wanted = device_of(block), _looked_for(i, model.cfg)
        if found is not None and not _same(found, wanted):
            raise UnsupportedModel(
                f"found block {i} of {name} on {found}, and a HookedTransformer with "
                f"n_devices={model.cfg.n_devices} hands it the residual stream on {wanted}: "
                "TransformerLens puts each module where most memory is free. Load it with "
                f"ra_lens.load_model(name, n_devices={model.cfg.n_devices}), or as a "
                "TransformerBridge with device_map=."
            )


def _same(found: torch.device, wanted: torch.device) -> bool:
    return found.type == wanted.type and wanted.index in (None, found.index)


def _looked_for(index: int, cfg: Any) -> torch.device:
    """Where a HookedTransformer looks for a block."""
    home: Any = importlib.import_module("transformer_lens.utilities.devices")
    if not hasattr(home, "get_device_for_block_index"):
        home = importlib.import_module("transformer_lens.utilities.multi_gpu")
    return home.get_device_for_block_index(index, cfg)


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module computes; None where it has no weights.

    Of one whose weights accelerate keeps elsewhere until they are used, where it brings them.
    """
    for parameter in nn.Module.parameters(module):
        if parameter.device.type != "meta":
            return parameter.device
    for part in nn.Module.modules(module):
        hook = vars(part).get("_hf_hook")
        for one in getattr(hook, "hooks", [hook]):  # several in turn, or one
            where = getattr(one, "execution_device", None)
            if where is not None:
                return torch.device(where)
    return None


@contextmanager
def masks_beside(blocks: Sequence[nn.Module]) -> Generator[None, None, None]:
    """Hand blocks of a HookedTransformer the mask of padding on their own device, in the context.

    TransformerLens gives all of them that of the first device, and an attention layer brings its
    scores to its mask: every map of another device would be made on the first one.
    """

    def beside(
        _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask: Tensor | None = kwargs.get("attention_mask")
        return args, kwargs if mask is None else {
            **kwargs,
            "attention_mask": mask.to(args[0].device),
        }

    with ExitStack() as stack:
        for block in blocks:
            handle = block.register_forward_pre_hook(beside, with_kwargs=True)
            stack.callback(handle.remove)
        yield
