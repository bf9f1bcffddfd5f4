"""What a function of one's own computes with, as a text that is the same in every process.

A method of one's own is known by its name alone, and the next one may have the same. So its results
are found again by what it is: its code, its defaults, what it has from the function around it or
from `functools.partial`, what was set on it, and, of the file that it stands in, the functions that
it calls and the values that it reads. Functions of ra_lens are known by their names, since the
settings of a run hold its version; of all other files, what is called there is known by its name
too, and so are classes and modules. Its docstring changes nothing.

Numbers, texts, lists and dicts of such, tensors and modules of torch can be told. An object that
shows its place in memory, or itself not in full, cannot.
"""

from __future__ import annotations

import dis
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import fields, is_dataclass
from functools import partial
from hashlib import blake2b
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (int, float, complex, str, bytes, type(None), type(...))  # a bool is an int
_NOT_IN_FULL = re.compile(r"\bat 0x[0-9a-fA-F]+|\.\.\.|…")


class Untold(Exception):
    """Something among what a function computes with has no text of its own; the message has it."""


def code_hash(function: object) -> str:
    """Give a short text that differs where two functions compute with something else.

    Raises:
        Untold: something that it computes with shows itself not, or not in full.
    """
    return _digest(_Text().of(function).encode())


class _Text:
    """Spells values out."""

    def __init__(self) -> None:
        self._functions: list[FunctionType] = []

    def of(self, value: Any, around: tuple[int, ...] = ()) -> str:
        """Spell a value; `around` are those that it is in."""
        if isinstance(value, _PLAIN):
            return repr(value)
        if id(value) in around:
            return "itself"
        if isinstance(value, FunctionType):
            if value in self._functions:
                return f"function {self._functions.index(value)}"
            self._functions.append(value)
        inside = partial(self.of, around=(*around, id(value)))
        parts = list(map(inside, _parts(value)))
        # The order of a set is another one in each process.
        parts = sorted(parts) if isinstance(value, Set) else parts
        return f"{_name(value)}({', '.join(parts)})"


def _parts(value: Any) -> Iterable[object]:
    """What makes a value this one, beside its name."""
    match value:
        case FunctionType():
            return () if _of_ra_lens(value) else _parts_of_function(value)
        case CodeType():
            return value.co_code, value.co_names, *value.co_consts
        case MethodType():
            return value.__func__, value.__self__
        case partial():
            return value.func, value.args, value.keywords
        case type() | ModuleType():
            return ()
        case BuiltinFunctionType() if isinstance(value.__self__, type | ModuleType | None):
            return ()
        case Tensor():
            flat = value.detach().cpu().reshape(-1).contiguous()
            return str(value.dtype), tuple(value.shape), _digest(flat.view(torch.uint8).numpy())
        case np.ndarray():
            numbers = value.tolist() if value.dtype.hasobject else _digest(value.tobytes())
            return str(value.dtype), value.shape, numbers
        case nn.Module():
            return list(value.state_dict().items())
        case Mapping():
            return list(value.items())
        case list() | tuple() | Set():
            return value
        case _ if is_dataclass(value):
            return [getattr(value, field.name) for field in fields(value)]
        case _:
            shown = repr(value)
            if _NOT_IN_FULL.search(shown):
                raise Untold(shown)
            return shown, *([type(value).__call__] if callable(value) else [])


def _parts_of_function(function: FunctionType) -> Iterator[object]:
    code, said = function.__code__, function.__doc__
    if said is not None and code.co_consts[:1] == (said,):  # what it says of itself changes nothing
        code = code.replace(co_consts=(None, *code.co_consts[1:]))
    yield code
    yield sorted(vars(function).items())
    yield function.__defaults__
    yield function.__kwdefaults__
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # nothing is in it yet
            yield None
    own = function.__globals__
    for name in sorted(set(_globals_of(function.__code__)) & set(own)):
        value = own[name]
        elsewhere = isinstance(value, FunctionType) and value.__globals__ is not own
        if not elsewhere and not isinstance(value, ModuleType | type | BuiltinFunctionType):
            yield name, value


def _globals_of(code: CodeType) -> Iterator[str]:
    """Names that code, or code in it, reads from its file."""
    yield from (one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)


def _of_ra_lens(function: FunctionType) -> bool:
    inner = "<locals>" in function.__qualname__  # which the function around it made
    return str(function.__module__).startswith("ra_lens.") and not inner


def _name(value: Any) -> str:
    """The name of a thing that has one, else of its type."""
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, CodeType):
        return "code"
    if isinstance(value, FunctionType) and not _of_ra_lens(value):
        return "function"  # the file, and where it stands there, change nothing
    if not isinstance(value, FunctionType | BuiltinFunctionType | type):
        value = type(value)
    return f"{value.__module__}.{value.__qualname__}"


def _digest(data: Any) -> str:
    return blake2b(data, digest_size=8).hexdigest()
