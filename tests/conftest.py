"""Fixtures: the tiny models, loaded once per session, or fresh where a test needs its own."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

THIRD_PARTY_WARNINGS = [
    "HookedTransformer is deprecated and will be removed in 4.0:DeprecationWarning",
    "Backward hooks on hook_scale/hook_normalized require grad-connected:UserWarning",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--check-shapes",
        action="store_true",
        help="check the shapes and types stated in src at every call, which takes a fifth longer",
    )
    parser.addoption(
        "--every-model",
        action="store_true",
        help="run what is left to CI too: every model, and what is marked every_model",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_model: left to CI, and run with --every-model")
    for warning in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{warning}")
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        prepare_to_run(config)  # which a process that only hands out tests does not


def prepare_to_run(config: pytest.Config) -> None:
    """Import what all tests use, and have what they import checked if that was asked for."""
    # Little of what an import or a test leaves is in a circle, and that may wait for some more.
    gc.set_threshold(20_000, 20, 20)
    import torch
    import transformer_lens  # noqa: F401  before that hook, under which no compiled file is found
    from jaxtyping import install_import_hook

    if config.getoption("--check-shapes"):
        # Only modules that state shapes: types of text and numbers are pyright's to check.
        source = Path(__file__).parents[1] / "src"
        state_shapes = [
            ".".join(path.relative_to(source).with_suffix("").parts)
            for path in sorted(source.rglob("*.py"))
            if "\nfrom jaxtyping import" in path.read_text(encoding="utf-8")
        ]
        install_import_hook(state_shapes, "beartype.beartype")
    torch.set_num_threads(1)  # tiny tensors; more threads only wait for each other


@pytest.hookimpl(tryfirst=True)  # so that -m knows the marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave to CI what is marked `every_model`, and each architecture and class that need not be.

    A test over architectures and classes runs by default on `tiny_models.REPRESENTATIVE`.
    """
    from tiny_models import CASES, REPRESENTATIVE

    for item in items:
        parameters = getattr(item, "callspec", None)
        given = parameters.params if parameters else {}
        case = (given.get("arch"), given.get("kind"))
        if case in CASES and case not in REPRESENTATIVE:
            item.add_marker("every_model")
    if not config.getoption("--every-model"):
        kept: list[pytest.Item] = []
        left: list[pytest.Item] = []
        for item in items:
            (left if item.get_closest_marker("every_model") else kept).append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=left)


def pytest_collection_finish() -> None:
    # What is imported stays; looking through it in every collection takes most of a collection.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`folder("gpt2", **config overrides)`: a saved tiny model; the same for the same arguments."""
    from tiny_models import write_folder

    written: dict[Any, Path] = {}

    def get(arch: str, **overrides: Any) -> Path:
        key = (arch, *sorted(overrides.items()))
        if key not in written:
            written[key] = write_folder(arch, tmp_path_factory.mktemp(arch), **overrides)
        return written[key]

    return get


@pytest.fixture(scope="session")
def fresh(folder: Callable[..., Path]) -> Callable[..., Any]:
    """`fresh(arch, kind, dtype)`: a model of the test's own, which no run has met."""
    import torch

    from tiny_models import copied, load

    loaded: dict[Any, Any] = {}

    def get(arch: str, kind: Any, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
        key = (arch, kind, dtype, *sorted(overrides.items()))
        if key not in loaded:
            loaded[key] = load(folder(arch, **overrides), kind, dtype)
        return copied(loaded[key])  # in less than a third of the time that loading takes

    return get


@pytest.fixture(scope="session")
def shared(fresh: Callable[..., Any]) -> Callable[..., Any]:
    """`shared(arch, kind, dtype)`: a model that other tests use too; leave it as it is."""
    import torch

    made: dict[Any, Any] = {}

    def get(arch: str, kind: Any, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
        key = (arch, kind, dtype, *sorted(overrides.items()))
        if key not in made:
            made[key] = fresh(arch, kind, dtype, **overrides)
        return made[key]

    return get


@pytest.fixture(scope="session")
def reference(folder: Callable[..., Path]) -> Callable[..., Any]:
    """`reference(arch)`: the same weights in Hugging Face's own float64 eager model."""
    from oracle import load_oracle

    loaded: dict[Any, Any] = {}

    def get(arch: str, **overrides: Any) -> Any:
        key = (arch, *sorted(overrides.items()))
        if key not in loaded:
            loaded[key] = load_oracle(folder(arch, **overrides))
        return loaded[key]

    return get


@pytest.fixture(scope="session")
def mean(shared: Callable[..., Any]) -> Callable[..., Any]:
    """`mean(arch, kind)`: mean maps of the prompts that tests of patches share."""
    from patches import IDS, TARGET
    from ra_lens import run_with_ra

    made: dict[Any, Any] = {}

    def get(arch: str, kind: Any) -> Any:
        if (arch, kind) not in made:
            made[arch, kind] = run_with_ra(shared(arch, kind), IDS, target=TARGET)[1].mean()
        return made[arch, kind]

    return get


@pytest.fixture(params=["sim", "cuda"])
def two(request: pytest.FixtureRequest, folder: Callable[..., Path]) -> Iterator[Any]:
    """Two devices, simulated ones and two GPUs if there are any, with models over them."""
    from several_devices import over_two

    yield from over_two(request.param, folder)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chrome or Chromium; skips where there is none."""
    from browser import need_chromium

    return need_chromium()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by Playwright."""
    from browser import browser as started

    with started() as driven:
        yield driven
