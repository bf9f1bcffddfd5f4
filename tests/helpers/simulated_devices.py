"""Devices `sim:0`, `sim:1`, … that are memory of the host and still refuse what GPUs refuse.

A tensor there wraps one of the host. Whatever torch does with it is done with what it wraps, after
the rules of CUDA have been applied to what stands together:

* all tensors of an operation are on one device;
* but a tensor of the host without dimensions may stand in an operation that goes entry by entry,
  and tensors of the host may be an index;
* only a copy goes from one device to another, and `Copies` notes it.

Above that all is torch's own: views, autograd and its checks of devices, `.to`, modules, what
TransformerLens and accelerate do with devices. Not simulated: the autograd engine's thread for each
device (`simulated` lets it use one), streams, and memory.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

N_DEVICES = 4
_aten: Any = torch.ops.aten
_COPIES = (_aten.copy_.default,)
# In these, what comes second are indices.
_INDEXING = (
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
    _aten._unsafe_index_put.default,
)


class _Module:
    """What torch asks of a kind of device."""

    def is_initialized(self) -> bool:
        return True

    in_use = 0  # only then are there any for the rest of torch, which looks for accelerators

    def is_available(self) -> bool:
        return self.in_use > 0

    def device_count(self) -> int:
        return N_DEVICES if self.in_use else 0

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False


_module = _Module()


class _Hooks(torch._C._acc.PrivateUse1Hooks):  # type: ignore[name-defined,misc]
    def is_available(self) -> bool:
        return _module.is_available()

    def has_primary_context(self, dev_id: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


@dataclass(frozen=True)
class Copy:
    """Numbers that went from one device to another."""

    source: str
    target: str
    shape: tuple[int, ...]
    n_bytes: int


class Copies:
    """The copies made while it is watching."""

    watching: ClassVar[list[Copies]] = []

    def __init__(self) -> None:
        self.made: list[Copy] = []

    def __enter__(self) -> Copies:
        self.watching.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.watching.remove(self)

    @classmethod
    def note(cls, source: Tensor, target: torch.device) -> None:
        if source.device != target:
            copy = Copy(str(source.device), str(target), tuple(source.shape), source.nbytes)
            for one in cls.watching:
                one.made.append(copy)


class SimTensor(torch.Tensor):
    """A tensor on a simulated device."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, device: torch.device) -> SimTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=device,
        )
        made.raw = raw
        return made

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        return self.raw.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"cannot convert a tensor of {self.device} to numpy; move it first")
        return self.raw.numpy(force=True)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.raw}, on {self.device}"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors: list[Tensor] = []
        raw_args, raw_kwargs = _unwrapped(args, tensors), _unwrapped(kwargs, tensors)
        if func in _COPIES:
            Copies.note(args[1], args[0].device)
            device = args[0].device
        else:
            device = _one_device(func, args, tensors)
        target = kwargs.get("device")
        if target is not None:
            device, raw_kwargs["device"] = torch.device(target), torch.device("cpu")
            if func is _aten._to_copy.default:
                Copies.note(args[0], device)
        found = func(*raw_args, **raw_kwargs)
        # An operation in place gives the very tensor that it was given.
        given: dict[int, Tensor] = {}
        if func._schema.is_mutable:
            given = {id(x.raw): x for x in tensors if isinstance(x, SimTensor)}
            if torch.Tag.inplace_view in func.tags:  # changes a shape, and no number
                with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
                    func(*args, **kwargs)
            for x in tensors:
                if isinstance(x, SimTensor) and x.raw.shape != x.shape:
                    raise NotImplementedError(f"{func} changes the shape of a simulated tensor")
        return _wrapped(found, device, given)


def _unwrapped(given: Any, tensors: list[Tensor]) -> Any:
    """What was given with the host's tensors in it; notes the tensors as they were given."""
    if isinstance(given, Tensor):
        tensors.append(given)
        return given.raw if isinstance(given, SimTensor) else given
    if isinstance(given, list | tuple):
        return type(given)([_unwrapped(x, tensors) for x in given])
    if isinstance(given, dict):
        return {name: _unwrapped(x, tensors) for name, x in given.items()}
    return given


def _wrapped(found: Any, device: torch.device, given: dict[int, Tensor]) -> Any:
    if isinstance(found, Tensor):
        known = given.get(id(found))
        if known is not None or device.type != "sim":
            return found if known is None else known
        return SimTensor(found, device)
    if isinstance(found, list | tuple):
        return type(found)([_wrapped(x, device, given) for x in found])
    return found


def _one_device(func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> torch.device:
    """The device on which an operation runs, or the error that CUDA would give."""
    places = {x.device for x in tensors}
    if len(places) == 1:
        return places.pop()
    apart: list[Tensor] = []  # tensors of the host that may stand there
    if func in _INDEXING:
        apart += [x for x in args[1] if x is not None and x.device.type == "cpu"]
    if func in _INDEXING or torch.Tag.pointwise in func.tags:
        apart += [x for x in tensors if x.device.type == "cpu" and x.ndim == 0]
    if func._schema.is_mutable:
        apart = [x for x in apart if x is not args[0]]
    places = {x.device for x in tensors if not any(x is one for one in apart)}
    if len(places) != 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found "
            f"{sorted(map(str, {x.device for x in tensors}))} in {func}"
        )
    return places.pop()


_library: Any = None


def _register() -> None:
    """Make the kind of device known to torch, once for a process."""
    global _library
    if _library is not None:
        return
    _setup_privateuseone_for_python_backend("sim", backend_module=_module, hook=_Hooks())
    _library = torch.library.Library("aten", "IMPL")

    def factory(name: str) -> None:
        packet, _, overload = name.partition(".")
        make = getattr(getattr(_aten, packet), overload or "default")

        def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
                raw = make(*args, device=torch.device("cpu"), **kwargs)
            return SimTensor(raw, torch.device(device))

        _library.impl(name, made, "PrivateUse1")

    def copied(source: Tensor, target: Tensor, _non_blocking: bool = False) -> Tensor:
        # `torch.tensor(..., device=...)`, which looks at no subclass of a tensor.
        raw, onto = (x.raw if isinstance(x, SimTensor) else x for x in (source, target))
        Copies.note(source, target.device)
        onto.copy_(raw)
        return target

    _library.impl("_copy_from", copied, "PrivateUse1")
    for name in (
        "empty.memory_format",
        "empty_strided",
        "arange",
        "arange.start",
        "arange.start_step",
        "_efficientzerotensor",
    ):
        factory(name)


@contextmanager
def simulated() -> Generator[tuple[torch.device, ...], None, None]:
    """Let there be simulated devices, and autograd run in this thread, in the context."""
    _register()
    _module.in_use += 1
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield tuple(torch.device("sim", i) for i in range(N_DEVICES))
    finally:
        _module.in_use -= 1
