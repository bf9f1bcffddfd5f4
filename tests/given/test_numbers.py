"""Numbers in every form that NumPy, torch and pandas give them in."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from ra_lens.errors import BadInput
from ra_lens.numbers import as_whole, real, reals, whole, wholes

THREES = [
    3,
    *(np.dtype(name).type(3) for name in ("int8", "int16", "int32", "int64", "uint8", "uint64")),
    np.array(3),
    *(torch.tensor(3, dtype=t) for t in (torch.uint8, torch.int8, torch.int32, torch.int64)),
    torch.tensor([3]),
]


@pytest.mark.parametrize("three", THREES, ids=lambda three: f"{type(three).__name__}")
def test_a_whole_number_of_any_type_is_an_int(three):
    found = whole("seed", three)
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize(
    "value",
    [True, np.True_, torch.tensor(True), "3", b"3", 3.0, np.float64(3), torch.tensor(3.0), None],
    ids=repr,
)
def test_what_is_no_whole_number_is_refused_by_name(value):
    assert as_whole(value) is None
    with pytest.raises(BadInput, match=r"found seed=.*; give a whole number from 0 on"):
        whole("seed", value, least=0)


def test_a_number_below_the_least_is_refused():
    with pytest.raises(BadInput, match="found n_rank=0; give at least 1"):
        whole("n_rank", np.int64(0), least=1)


@pytest.mark.parametrize(
    "values",
    [
        [0, 1],
        (0, 1),
        range(2),
        np.array([0, 1], dtype=np.uint8),
        [np.int64(0), torch.tensor(1)],
        torch.tensor([0, 1]),
        pd.Series([0, 1], index=["a", "b"]),
        (i for i in range(2)),
        {0: "a", 1: "b"}.keys(),
    ],
    ids=lambda values: type(values).__name__,
)
def test_whole_numbers_in_any_order_of_things(values):
    found = wholes("shots", values)
    assert found == [0, 1]
    assert {type(i) for i in found} == {int}


@pytest.mark.parametrize("one", THREES, ids=lambda three: f"{type(three).__name__}")
def test_one_number_is_a_sequence_of_one(one):
    assert wholes("shots", one) == [3]
    assert reals("scales", one) == [3.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "found shots without a number in it; give at least one"),
        (np.array([], dtype=int), "found shots without a number"),
        ("01", "found shots='01'; give a whole number, or several in a list"),
        ({0: 1}, "found shots={0: 1}; give a whole number, or several in a list"),
        ([0, 1.5], "found shots=1.5; give a whole number"),
        (np.array([[0, 1]]), r"found shots=array\(\[0, 1\]\); give a whole number"),
        (np.array([True, False]), "give a whole number"),
        (None, "found shots=None"),
    ],
    ids=repr,
)
def test_sequences_that_are_none_are_refused(values, message):
    with pytest.raises(BadInput, match=message):
        wholes("shots", values)


def test_numbers_of_any_type_are_floats():
    assert reals("scales", np.linspace(-30, 1, 3)) == [-30.0, -14.5, 1.0]
    assert reals("scales", torch.tensor([-30.0, 1.0])) == [-30.0, 1.0]
    assert reals("scales", pd.Series([1, 2])) == [1.0, 2.0]
    assert type(real("scale", np.float32(0.5))) is float
    assert real("scale", torch.tensor(2)) == 2.0


@pytest.mark.parametrize("value", [float("nan"), np.inf, torch.tensor(-np.inf)], ids=repr)
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(BadInput, match=r"found scale=.*; give a finite number"):
        real("scale", value)


@pytest.mark.parametrize("value", ["1", True, None, [1.0], np.array([1.0, 2.0])], ids=repr)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(BadInput, match=r"found scale=.*; give a number"):
        real("scale", value)
