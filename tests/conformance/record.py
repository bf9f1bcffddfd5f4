"""What the checks of one model found, and how numbers and exceptions are written down."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from torch import Tensor

MAPS_LIMIT = 1e-5
PATCH_LIMIT = 1e-4
FORETOLD_LIMIT = 1e-5
VECTORS_LIMIT = 1e-5
COMPAT_LIMIT = 1e-4
SAME_LOGITS = 1e-3
FINITE = 1e30


class Over(Exception):
    """Nothing more can be checked of this model."""


@dataclass
class Record:
    """Results of one architecture. A value is a number where it could be had, else the reason."""

    name: str
    status: str = "failing"
    reason: str = ""
    logits: float | None = None
    maps: float | str | None = None
    patches: float | str | None = None
    route: str = ""
    foretold: float | None = None
    knockouts: float | str | None = None
    vectors: float | None = None
    no_vectors: str = ""  # kinds of vectors that a run does not give
    scale: float | str | None = None
    scales: list[float] = field(default_factory=list)
    compat: float | str | None = None
    bfloat16: float | str | None = None
    float16: float | str | None = None
    padding_left: float | str | None = None
    padding_right: float | str | None = None
    by_length: str | None = None  # padded on which sides prompts run in groups of one length
    heads: float | str | None = None
    sites: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def end(self, status: str, reason: str) -> NoReturn:
        """Nothing more can be checked."""
        self.status, self.reason = status, reason.replace(f"Bridge '{self.name}'", "Bridge")
        if self.failures:
            self.status, self.reason = "failing", "; ".join(self.failures)
        raise Over

    def finish(self) -> None:
        """Sum up, when every check has run."""
        if self.failures:
            self.status, self.reason = "failing", "; ".join(self.failures)
        elif isinstance(self.patches, str):
            self.status, self.reason = "patches refused", self.patches
        else:
            self.status = "exact"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of what is wanted; NaN counts as infinite."""
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = found.detach().double(), wanted.detach().double()
    error = float((found - wanted).norm() / wanted.norm())
    return error if error == error else float("inf")


def spell(error: Exception) -> str:
    """One line for an exception, without paths of this machine."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r"(/[\w.-]+){3,}", "…", text)
    text = re.sub(r" Available architectures: \[.*", "", text)
    return text if len(text) <= 400 else text[:400].rsplit(" ", 1)[0] + " …"
