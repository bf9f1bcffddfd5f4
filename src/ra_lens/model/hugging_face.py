"""Models as objects of Hugging Face's classes: copied, with adapters merged, and their bars hidden.

What is loaded from an object shares nothing with it, so that neither hooks nor masked heads reach
the user's model.
"""

from __future__ import annotations

import copy
import importlib
import json
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ra_lens.errors import BadInput, RALensError


@contextmanager
def no_loading_bars() -> Generator[None]:
    """Hide the progress bars of transformers; afterwards they are as they were."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    with _settings_kept():
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            with _settings_kept():
                bars.enable_progress_bar()


@contextmanager
def _settings_kept() -> Generator[None]:
    # Where HF_HUB_DISABLE_PROGRESS_BARS decides, Hugging Face warns that it does.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Cannot (en|dis)able progress bars")
        yield


def first_line(error: Exception) -> str:
    """Name an exception by its class and the first line of what it says."""
    said = (str(error).strip().splitlines() or [""])[0][:200]
    return said if isinstance(error, RALensError) else f"{type(error).__name__}: {said}"


def as_plain(model: nn.Module) -> Any:
    """Give a model of transformers as it is, or with its adapters merged into a copy.

    Raises:
        BadInput: it is no model of transformers, or its adapters or weights cannot be copied.
    """
    from transformers import PreTrainedModel

    if hasattr(model, "get_base_model"):  # a PeftModel, around a model of transformers
        model = _merged(model)
    elif isinstance(model, PreTrainedModel) and any(map(_is_adapter, model.modules())):
        model = _merged_in_place(model)
    if not isinstance(model, PreTrainedModel):
        raise BadInput(
            f"found a {type(model).__name__}; give a model of transformers, such as "
            "AutoModelForCausalLM.from_pretrained(...) gives, or load by a name."
        )
    _check_weights(model)
    return model


def _merged(model: Any) -> Any:
    name = type(model).__name__
    try:
        return copy.deepcopy(model).merge_and_unload()
    except Exception as error:  # each kind of adapter has its own for what cannot be merged
        raise BadInput(
            f"the adapters of this {name} cannot be merged into its weights: {first_line(error)} "
            "Load adapters that can be (LoRA and its kin), or the model without them: "
            "load_model(model.get_base_model(), tokenizer=...)."
        ) from error


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "get_base_layer") and hasattr(module, "merge")


def _merged_in_place(model: nn.Module) -> nn.Module:
    """Merge adapters that `model.add_adapter` or `inject_adapter_in_model` put into a model."""
    copied = copy.deepcopy(model)
    adapters = [(name, module) for name, module in copied.named_modules() if _is_adapter(module)]
    for name, module in adapters:
        adapter: Any = module
        adapter.merge()
        parent, _, last = name.rpartition(".")
        setattr(copied.get_submodule(parent), last, adapter.get_base_layer())
    return copied


def _check_weights(model: Any) -> None:
    for name, value in model.state_dict().items():
        if value.device.type == "meta":
            raise BadInput(
                f"{type(model).__name__} has no numbers at {name}: its weights were left on disk "
                "or on no device. Load it whole: from_pretrained(..., device_map=None)."
            )
    quantised = [n for n, value in model.named_parameters() if not value.is_floating_point()]
    if quantised:
        raise BadInput(
            f"{type(model).__name__} holds quantised weights ({quantised[0]} is "
            f"{str(model.get_parameter(quantised[0]).dtype).removeprefix('torch.')}). Load it "
            "without quantisation, or call model.dequantize() first."
        )


def write_config(model: Any, folder: Path) -> None:
    """Write the `config.json` of a model of transformers, as save_pretrained would."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def fresh_copy(model: Any, dtype: torch.dtype, device: str | torch.device | None = None) -> Any:
    """Give a new model of the same class, configuration and weights, with eager attention.

    It has none of the hooks, adapters and quantisation settings of `model`, and shares no memory
    with it.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # the one that computes a pattern
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are dequantised, and could not be saved
    # On the host; and of several GPUs fork_rng would warn.
    with torch.random.fork_rng(devices=[]), _no_init_weights():
        made = type(model)(config)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    made.load_state_dict(state)  # copies
    made.tie_weights()
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        made.generation_config = copy.deepcopy(generation)
    return made.to(device=device, dtype=dtype).eval()


def _no_init_weights() -> Any:
    try:
        home: Any = importlib.import_module("transformers.initialization")
    except ImportError:  # transformers 4
        home = importlib.import_module("transformers.modeling_utils")
    return home.no_init_weights()
