"""How a model was loaded, so that another process can load the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ra_lens.files import user_path


@dataclass(frozen=True)
class ModelSource:
    """A function of ra_lens that loads a model, and what it was called with."""

    function: Callable[..., nn.Module]
    names: tuple[str, ...]  # none, or one: a name or an absolute path
    options: Mapping[str, Any]

    def load(self, device: str) -> nn.Module:
        """Load it once more, onto some device, or over as many as it was laid over."""
        options = {**self.options, "device": device}
        if device == "cpu":
            options |= dict.fromkeys(options.keys() & {"device_map"})
            options |= dict.fromkeys(options.keys() & {"n_devices"}, 1)
        elif options.get("device_map") is not None:
            options["device"] = None
        return self.function(*self.names, **options)


_sources: WeakKeyDictionary[nn.Module, ModelSource] = WeakKeyDictionary()


def note_source(
    model: nn.Module,
    function: Callable[..., nn.Module],
    name: str | Path | None,
    options: Mapping[str, Any],
) -> nn.Module:
    """Remember how a model was loaded, as long as it lives; gives the model."""
    names = ()
    if name is not None:
        # Another process may stand in another folder.
        path = user_path(name)
        names = (str(path.resolve() if path.exists() else name),)
    _sources[model] = ModelSource(function, names, dict(options))
    return model


def source_of(model: nn.Module) -> ModelSource | None:
    """Say how a model was loaded; None where it was not loaded by name or from a folder or file."""
    return _sources.get(model)
