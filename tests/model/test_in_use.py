"""The pattern that a running attention layer holds, found on the call stack."""

from __future__ import annotations

import torch
from torch import nn

from ra_lens.model.in_use import patterns_in_use

N, HEADS, QUERIES, KEYS = 2, 3, 4, 5


class Output(nn.Module):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def forward(self, z):
        self.found.append(patterns_in_use(N, HEADS, QUERIES))
        return z


class Inside(nn.Module):
    """As Hugging Face's attention: one function makes the pattern, another one calls W_O."""

    def __init__(self, found):
        super().__init__()
        self.o = Output(found)

    def weights(self):
        return torch.rand(N, HEADS, QUERIES, KEYS)

    def forward(self, x):
        made = self.weights(), None  # in a tuple, as BERT keeps it
        again = made[0]
        mask = torch.ones(N, HEADS, QUERIES, KEYS, dtype=torch.long)
        few = torch.rand(N, 1, QUERIES, KEYS)
        longer = torch.rand(N, HEADS, QUERIES, KEYS + 2)
        self.kept = made[0], longer
        assert again is not None
        assert mask.shape != few.shape
        return self.o(x)


class Bridge(nn.Module):
    def __init__(self, found):
        super().__init__()
        self.hook_pattern = nn.Identity()
        self.inside = Inside(found)

    def forward(self, x):
        beside = torch.rand(N, HEADS, QUERIES, KEYS)  # of the bridge, not of what it calls
        assert beside is not None
        return self.inside(x)


def test_what_the_layer_holds_is_found_and_nothing_above_it():
    above = torch.rand(N, HEADS, QUERIES, KEYS)
    found = []
    bridge = Bridge(found)
    bridge(torch.zeros(1))
    # Each tensor once, of real numbers, with as many heads; how many keys there are is not known.
    assert [id(one) for one in found[0]] == [id(one) for one in bridge.inside.kept]
    assert all(one is not above for one in found[0])


def test_where_no_layer_runs_there_is_none():
    found = []
    # Up to the bottom of the stack: this test's own tensors have another shape.
    Output(found)(torch.zeros(1))
    assert found == [[]]


def test_nothing_is_held_when_the_layer_is_done():
    import weakref

    found = []
    bridge = Bridge(found)
    bridge(torch.zeros(1))
    pattern = weakref.ref(bridge.inside.kept[0])
    found.clear()
    bridge.inside.kept = ()
    assert pattern() is None
