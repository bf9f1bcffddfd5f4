"""`--every-model`: the whole matrix; otherwise a representative part of it."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-model",
        action="store_true",
        help="check every architecture and variant, not only representative ones",
    )
