"""A run waits for its device as often as it says: numbers are read together, once a batch."""

from __future__ import annotations

import linecache
import sys

import pytest
import torch

from benchmarks.devices import Reads
from ra_lens import run_with_ra
from ra_lens.errors import NothingToDifferentiate
from ra_lens.tensors import read_numbers
from tiny_models import KINDS, random_ids

IDS = random_ids(2, 7)
RAGGED = ["w5 w6 w7", "w8 w9 w10 w11 w12"]


def reads(run):
    """Lines of ra_lens where a call reads a number of a tensor that a GPU would have."""
    run()  # what is looked at once
    with Reads() as seen:
        run()
    lines = [
        linecache.getline(path, int(number)).strip()
        for path, number in (place.rsplit(":", 1) for place in seen.places)
        if "/ra_lens/" in path and not path.endswith("/prompts.py")
    ]
    # Prompts, and the mask of a batch, lie on the host.
    return [line for line in lines if "attention_mask.all()" not in line]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"store": "norms"},
        {"store": "norms", "recompute": True},
        {"vectors": True},
        {"metric": lambda logits: logits[:, -1, 3]},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_number_is_read_alone(options, kind, shared):
    model = shared("gpt2", kind)
    options = options if "metric" in options else {"target": 8, **options}
    assert reads(lambda: run_with_ra(model, IDS, **options)) == []


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_reads_none_either(side, kind, shared):
    model = shared("gpt2", kind)
    assert reads(lambda: run_with_ra(model, RAGGED, target=8, padding_side=side)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_checked_is_read_once_a_batch(kind, shared, monkeypatch):
    model = shared("gpt2", kind)
    run, read = vars(sys.modules["ra_lens.run"]), []

    def noted(values):
        read.append(len(values))
        return read_numbers(values)

    monkeypatch.setitem(run, "read_numbers", noted)
    run_with_ra(model, random_ids(4, 7), target=8, batch_size=2, progress=False)
    checks = 3  # logits, loss and the gradient at the logits
    assert read == [checks + model.cfg.n_layers] * 2


def test_a_number_that_is_read_is_seen(shared):
    model = shared("gpt2", KINDS[0])
    hook = ("hook_embed", lambda x, hook: float(x.sum()) and None)
    with Reads() as seen:
        run_with_ra(model, IDS, target=8, fwd_hooks=[hook])
    assert [place for place in seen.places if "test_host_waits.py" in place]


def test_numbers_are_those_of_the_tensors():
    values = [
        torch.tensor(1.5),
        torch.tensor(2.25, dtype=torch.bfloat16),
        torch.tensor([3.0]).sum(),
    ]
    assert read_numbers(values) == [1.5, 2.25, 3.0]
    assert read_numbers([torch.tensor(1e-300, dtype=torch.float64)]) == [1e-300]
    assert read_numbers([]) == []


def test_nan_logits_are_told_before_what_a_metric_makes_of_them(shared):
    model = shared("gpt2", KINDS[0])
    hook = ("hook_embed", lambda x, hook: x * float("nan"))

    def stumbles(logits):
        raise ValueError("NaN")

    for metric in (
        stumbles,
        lambda logits: logits[:, -1, 3],
        lambda logits: logits[:, -1, 3].nan_to_num(0.0),
    ):
        with pytest.raises(NothingToDifferentiate, match=r"logits of .* contain NaN"):
            run_with_ra(model, IDS, metric=metric, fwd_hooks=[hook])
