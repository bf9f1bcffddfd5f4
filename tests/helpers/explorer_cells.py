"""The explorer's table of a head's largest entries, as a browser shows it and as a cache has it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ra_lens.cache import RACache

NUMBER = r"[+−]?\d[\d.]*(?:e[−+]?\d+)?"
ShownCell = tuple[int, int, float, float, str]
"""Query, key, −R, A, what descent wants."""


def value(text: str) -> float:
    return float(text.replace("−", "-"))


def shown_cells(page: Any) -> list[ShownCell]:
    """Rows of the table, on a page or in a frame."""
    rows = page.locator("#ra-cells tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )
    found = []
    for where, r, a, wants, _ in rows:
        query, key = re.findall(r"\((\d+)\)(?= →|$)", where)
        found.append((int(query), int(key), value(r), value(a), wants))
    return found


def wanted_cells(ra: RACache, layer: int, head: int, example: int, n: int) -> list[ShownCell]:
    r, a = (ra[kind, layer][example, head, :n, :n] for kind in ("ra", "pattern"))
    order = r.abs().flatten().argsort(descending=True)[:10].tolist()
    cells = [divmod(i, n) for i in order]
    return [
        (q, k, -r[q, k].item(), a[q, k].item(), "more" if r[q, k] < 0 else "less")
        for q, k in cells
        if r[q, k] != 0
    ]


def same_cells(found: Any, wanted: Any) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one[:2] == other[:2]
        assert one[2:4] == pytest.approx(other[2:4], rel=6e-3)
        assert one[4] == other[4]
