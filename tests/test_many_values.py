"""Several values after one option of the command line."""

from __future__ import annotations

import pytest

from ra_lens.cli.many_values import numbers, repeat_options, split_values, whole_numbers
from ra_lens.errors import BadInput


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("--shots 0 1 5 10", "--shots=0 --shots=1 --shots=5 --shots=10"),
        ("--scales -30 1 -.5 --quiet", "--scales=-30 --scales=1 --scales=-.5 --quiet"),
        ("--model gpt2-xl --task a b --shots 0", "--model gpt2-xl --task=a --task=b --shots=0"),
        ("-t a b -q", "-ta -tb -q"),
        ("--shots 0 --shots 1", "--shots=0 --shots=1"),
        ("--shots=0 1 --out x", "--shots=0 --shots=1 --out x"),
        ("--shots", "--shots"),
        ("--shots --quiet", "--shots --quiet"),
        ("--separator -1 --shots 3", "--separator -1 --shots=3"),
        ("--shots 0 -- --task a", "--shots=0 -- --task a"),
        ("", ""),
    ],
)
def test_an_option_is_repeated_for_each_of_its_values(typed: str, read: str) -> None:
    assert repeat_options(typed.split(), {"--shots", "--scales", "--task", "-t"}) == read.split()


def test_values_may_have_commas_between() -> None:
    assert split_values(["0,1", " 5", "10,"]) == ["0", "1", "5", "10"]
    assert whole_numbers(["0,1", "5"], "--shots") == [0, 1, 5]
    assert numbers(["-30,1e0"], "--scales") == [-30.0, 1.0]
    assert whole_numbers(None, "--shots") is None
    for read, values in ((whole_numbers, ["0.5"]), (whole_numbers, ["x"]), (numbers, ["1", "y"])):
        with pytest.raises(BadInput, match=f"found --x {' '.join(values)}; give"):
            read(values, "--x")
