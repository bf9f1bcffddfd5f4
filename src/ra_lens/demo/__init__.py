"""The embedded model: small, trained by us on in-context learning, shipped with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from torch import nn

from ra_lens.loading_bars import no_loading_bars
from ra_lens.sites import ModelKind, load_folder


def demo_model_folder() -> Path:
    """Folder of the embedded model, in Hugging Face format."""
    return Path(str(resources.files("ra_lens.demo"))) / "model"


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
    with no_loading_bars():
        model = load_folder(demo_model_folder(), kind=kind, device=device, dtype=dtype)
    model.cfg.model_name = "ra-lens-demo"  # type: ignore[union-attr]
    return model
