"""Pickled weights can run any code when they are read: they are read only where the user says so.

Transformers takes safetensors where there are any, and what is pickled where there are none. What
HookedTransformer is given beside its own options reaches transformers, and TransformerBridge has no
option for it; so transformers' own function is told, while a model is loaded.
"""

from __future__ import annotations

import importlib
import json
import os
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ra_lens.errors import BadInput

ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
"""Of files with pickled weights."""

_SAFE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADVICE = (
    "Reading them can run any code that was put into them. If you trust who made them, allow it: "
    "allow_pickle=True, or --allow-pickle; or give the model as safetensors."
)
# Models of TransformerLens's own, kept as .pth files, which it reads by itself.
_OWN_MODELS = ("NeelNanda", "ArthurConmy", "Baidicoot")


@contextmanager
def weights_read(*, allow_pickle: bool) -> Generator[None]:
    """Have transformers read safetensors only, unless pickled weights are allowed."""
    if allow_pickle:
        yield
        return
    from transformers import PreTrainedModel

    theirs: Any = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, *given: Any, **options: Any) -> Any:
        return theirs.__func__(cls, *given, **{**options, "use_safetensors": True})

    setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))  # noqa: B010
    try:
        yield
    finally:
        setattr(PreTrainedModel, "from_pretrained", theirs)  # noqa: B010


def check_folder(folder: Path) -> None:
    """Raise BadInput if the weights that transformers would read from a folder are pickled."""
    found = sorted(file.name for file in folder.iterdir() if file.suffix in ENDINGS)
    index = folder / _INDEX
    if not (folder / _SAFE).is_file() and index.is_file():
        parts = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        found = sorted(str(part) for part in parts if not str(part).endswith(".safetensors"))
    elif (folder / _SAFE).is_file():
        adapter = folder / "adapter_model.safetensors"
        found = [
            name for name in found if name.startswith("adapter_model") and not adapter.is_file()
        ]
    if found:
        raise BadInput(f"the weights in {folder} are pickled ({', '.join(found[:3])}). {_ADVICE}")


def check_file(path: Path) -> None:
    """Raise BadInput if it is a file with weights: a model needs its folder."""
    if not os.path.isfile(path):  # nor where a name is too long to be one
        return
    if path.suffix in ENDINGS:
        raise BadInput(
            f"{path} holds weights that are pickled, and no configuration. Give the folder with "
            "config.json and tokenizer, and allow_pickle=True, or --allow-pickle, if you trust who "
            "made them."
        )
    if path.suffix == ".safetensors":
        raise BadInput(
            f"{path} holds weights only. Give its folder, with config.json and tokenizer."
        )


def check_name(name: str) -> None:
    """Raise BadInput if it is a name of TransformerLens whose weights are pickled."""
    try:
        known: Any = importlib.import_module("transformer_lens.loading_from_pretrained")
        official = str(known.get_official_model_name(name))
    except (ImportError, AttributeError, ValueError):  # TransformerLens 4; a name it does not know
        return
    if official.startswith(_OWN_MODELS):
        raise BadInput(f"the weights of {name!r} ({official}) are pickled. {_ADVICE}")


def advice(error: Exception, *, allow_pickle: bool) -> str:
    """What to say behind an error of loading, if it is for want of safetensors."""
    if allow_pickle or not ("safetensors" in str(error) or _asked_for_conversion(error)):
        return ""
    return (
        f"There are no safetensors; pickled weights are only read where that is allowed. {_ADVICE} "
    )


def _asked_for_conversion(error: Exception) -> bool:
    # Transformers 4 looks on Hugging Face for a conversion of pickled weights, which may fail.
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name == "auto_conversion" for frame in frames)
