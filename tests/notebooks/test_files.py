"""What counts as the same text: the words, and the numbers to a tolerance."""

from __future__ import annotations

import pytest

from .files import NOTEBOOKS, same_text


def test_there_are_six_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_", "6_"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("p 0.436 to 0.617", "p 0.437 to 0.617", True),
        ("p 0.436", "p 0.536", False),
        ("L0H5 of 32 heads", "L0H6 of 32 heads", False),
        ("predicts 0.5", "foresees 0.5", False),
        ("a  1.0\n0.2", "a 1.0 0.2", True),
        ("1.0", "1.0 2.0", False),
        ("score −2.56", "score 2.56", False),
    ],
)
def test_texts_compare_by_words_and_by_numbers(one, other, same):
    assert same_text(one, other) is same
