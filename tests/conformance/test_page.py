"""docs/models.md says what the results kept beside it say, and those are as expected."""

from __future__ import annotations

import pytest

from . import results
from .configs import ARCHITECTURES
from .expectations import expected, surprises
from .variants import VARIANTS

KEPT = [
    (kind, v) for kind in ("TransformerBridge", "HookedTransformer") for v in results.read(kind)
]


def test_the_page_is_what_the_results_render_to():
    assert results.PAGE.read_text(encoding="utf-8") == results.render()


def test_results_of_three_generations_are_kept():
    assert [f"{kind} {v[0]}" for kind, v in KEPT] == [
        "TransformerBridge 4",
        "TransformerBridge 3",
        "HookedTransformer 3",
        "HookedTransformer 2",
    ]


@pytest.mark.parametrize(("kind", "version"), KEPT)
def test_kept_results_are_complete_and_as_expected(kind, version):
    _, records = results.read(kind)[version]
    assert list(records) == list(ARCHITECTURES if kind == "TransformerBridge" else VARIANTS)
    for name, record in records.items():
        assert not surprises({"reason": "", **record}, expected(name, kind, version[0])), name
        assert record["status"] != "failing"
