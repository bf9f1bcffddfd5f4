"""`--run-notebooks`: execute every notebook; otherwise only their structure is checked."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--run-notebooks",
        action="store_true",
        help="execute the notebooks of examples/ and compare what they print",
    )
