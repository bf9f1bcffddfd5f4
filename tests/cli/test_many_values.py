"""Several values after one option of the command line."""

from __future__ import annotations

import pytest

from ra_lens.cli.command import numbers, repeat_options, split_values, whole_numbers
from ra_lens.errors import BadInput


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("--shots 0 1 5 10", "--shots=0 --shots=1 --shots=5 --shots=10"),
        ("--scales -30 1 -.5 --quiet", "--scales=-30 --scales=1 --scales=-.5 --quiet"),
        ("--model gpt2-xl --task a b --shots 0", "--model gpt2-xl --task=a --task=b --shots=0"),
        ("-t a b -q", "-t a -t b -q"),
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


def test_an_empty_word_does_not_take_the_next_one() -> None:
    given = repeat_options(["-t", "", "-q", "--shots", "", "--shots="], {"--shots", "-t"})
    assert given == ["-t", "", "-q", "--shots=", "--shots="]


def test_more_values_than_are_ever_meant_are_refused_at_once() -> None:
    words = ["--shots", *map(str, range(100_000))]
    with pytest.raises(BadInput, match=r"^found 100,000 values of --shots; give 10,000 at most\.$"):
        repeat_options(words, {"--shots"})


@pytest.mark.parametrize("values", [[""], [" "], [","], ["0", ""], ["", "0"], ["0", " , "]])
def test_a_word_without_a_value_is_refused(values: list[str]) -> None:
    for read in (split_values, whole_numbers, numbers):
        with pytest.raises(
            BadInput, match=r"^found --x '[ ,]*', which is empty\. Give a value, or"
        ):
            read(values, "--x")


def test_values_may_have_commas_between() -> None:
    assert split_values(["0,1", " 5", "10,"], "--x") == ["0", "1", "5", "10"]
    assert whole_numbers(["0,1", "5"], "--shots") == [0, 1, 5]
    assert numbers(["-30,1e0"], "--scales") == [-30.0, 1.0]
    for read, values in ((whole_numbers, ["0.5"]), (whole_numbers, ["x"]), (numbers, ["1", "y"])):
        with pytest.raises(BadInput, match=f"found --x {' '.join(values)}; give"):
            read(values, "--x")
    with pytest.raises(BadInput, match=r"^found --x 0 1 2 .{1,60}…; give whole numbers"):
        whole_numbers([*map(str, range(5000)), "x"], "--x")
