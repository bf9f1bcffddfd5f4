"""The surface: names, what importing costs, what is typed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

import ra_lens
from other_process import printed_by
from ra_lens import errors

HEAVY = ["torch", "plotly", "pandas", "typer", "transformer_lens", "transformers", "numpy"]


@pytest.mark.parametrize("name", ra_lens.__all__)
def test_every_public_name_imports(name):
    assert callable(getattr(ra_lens, name))
    assert name in dir(ra_lens)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="'ra_lens' has no attribute 'run_with_rra'"):
        ra_lens.run_with_rra  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, ra_lens; print([m for m in {HEAVY} if m in sys.modules])"
    assert printed_by(code) == "[]"


@pytest.mark.every_model
def test_computing_imports_no_figures_and_no_tables():
    code = (
        "import sys; from ra_lens import run_with_ra, RACache, get_ra_caching_hooks, patch_hooks; "
        "print([m for m in ('plotly', 'typer', 'pandas') if m in sys.modules])"
    )
    assert printed_by(code) == "[]"


def test_every_module_has_a_docstring():
    root = Path(ra_lens.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.lstrip().startswith('"""'), path


def test_errors_can_be_caught_together_and_as_what_they_are():
    pairs = {
        "BadInput": ValueError,
        "UnsupportedModel": RuntimeError,
        "NothingToDifferentiate": RuntimeError,
        "BadFile": ValueError,
        "UnfinishedGrid": RuntimeError,
        "DownloadFailed": OSError,
        "NotStored": KeyError,
    }
    for name, builtin in pairs.items():
        cls = getattr(errors, name)
        assert issubclass(cls, errors.RALensError)
        assert issubclass(cls, builtin)
        assert str(cls("what was found")) == "what was found"


def test_the_package_is_typed():
    assert (Path(ra_lens.__file__).parent / "py.typed").is_file()
    assert import_module("ra_lens.model").available_kinds()
