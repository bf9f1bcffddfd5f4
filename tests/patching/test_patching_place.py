"""Where a map lies in a pattern: against loops that place one entry at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra_lens.errors import BadInput
from ra_lens.patching.place import map_indices, place, read_mask

N_HEADS = 2


def by_hand(maps, n_queries, n_keys, align, mask):
    """maps: [some][head][i][j]; mask: rows of 0/1, of the prompt only, or None."""
    n = maps.shape[-1]
    rows = [[1] * n_keys] if mask is None else [[*row, *[1] * (n_keys - len(row))] for row in mask]
    batch = max(len(rows), len(maps))
    result = torch.zeros(batch, N_HEADS, n_queries, n_keys)
    for b in range(batch):
        real = rows[b % len(rows)]
        tokens = [column for column in range(n_keys) if real[column]]
        for head in range(N_HEADS):
            for i, query in enumerate(tokens):
                for j, key in enumerate(tokens):
                    row, column = i, j
                    if align == "right":  # counted from the end on both sides
                        row, column = n - (len(tokens) - i), n - (len(tokens) - j)
                    inside = 0 <= row < n and 0 <= column < n
                    seen = query >= n_keys - n_queries
                    if inside and seen and key <= query:
                        q = query - (n_keys - n_queries)
                        result[b, head, q, key] = maps[b % len(maps), head, row, column]
    return result


@st.composite
def cases(draw):
    n_keys = draw(st.integers(1, 7))
    n_queries = draw(st.integers(1, n_keys))
    align = draw(st.sampled_from(["left", "right"]))
    n_examples = draw(st.integers(1, 3))
    mask = None
    if draw(st.booleans()):
        width = draw(st.integers(1, n_keys))
        row = st.lists(st.integers(0, 1), min_size=width, max_size=width).filter(any)
        mask = draw(st.lists(row, min_size=n_examples, max_size=n_examples))
    n_maps = draw(st.sampled_from([1, n_examples if mask else 3]))
    n = draw(st.integers(1, 9))
    # Every entry different and none 0, the upper triangle too.
    maps = torch.arange(1.0, 1 + n_maps * N_HEADS * n * n).reshape(n_maps, N_HEADS, n, n)
    return maps, n_queries, n_keys, align, mask


@settings(max_examples=300, deadline=None)
@given(cases())
def test_maps_are_placed_entry_by_entry(case):
    maps, n_queries, n_keys, align, mask = case
    read = read_mask(None if mask is None else torch.tensor(mask))
    index = map_indices(maps.shape[-1], n_queries, n_keys, align=align, mask=read)
    assert torch.equal(place(maps, index, n_queries), by_hand(maps, n_queries, n_keys, align, mask))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.data())
def test_rows_of_a_cached_pass_are_the_last_rows_of_the_whole(n_keys, data):
    n_queries = data.draw(st.integers(1, n_keys))
    align = data.draw(st.sampled_from(["left", "right"]))
    n = data.draw(st.integers(1, 9))
    maps = torch.arange(1.0, 1 + N_HEADS * n * n).reshape(1, N_HEADS, n, n)
    whole = place(maps, map_indices(n, n_keys, n_keys, align=align), n_keys)
    part = place(maps, map_indices(n, n_queries, n_keys, align=align), n_queries)
    assert torch.equal(part, whole[:, :, -n_queries:])


def test_an_exact_fit_is_the_map_itself_below_the_diagonal():
    maps = torch.arange(1.0, 19.0).reshape(1, 2, 3, 3)
    found = place(maps, map_indices(3, 3, 3, align="exact"), 3)
    assert found[0, 1].tolist() == [[10.0, 0.0, 0.0], [13.0, 14.0, 0.0], [16.0, 17.0, 18.0]]
    mask = read_mask(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]))
    padded = place(maps, map_indices(3, 4, 4, align="exact", mask=mask), 4)
    assert torch.equal(padded[0, :, 1:, 1:], found[0])
    assert torch.equal(padded[1, :, :3, :3], found[0])
    assert float(padded.sum()) == 2 * float(found.sum())


def test_lengths_that_do_not_fit_exactly_are_said():
    with pytest.raises(BadInput, match=r"found 4 tokens at layer 3.*has 5.*align='left'"):
        map_indices(5, 4, 4, align="exact", layer=3)
    with pytest.raises(BadInput, match=r"found 6 tokens.*has 5.*cache.*align='left' adds to the"):
        map_indices(5, 1, 6, align="exact")
    mask = read_mask(torch.tensor([[1, 1, 1], [0, 1, 1]]))
    with pytest.raises(BadInput, match=r"found 2 tokens in example 1 at layer 0.*has 3"):
        map_indices(3, 3, 3, align="exact", mask=mask)
    with pytest.raises(BadInput, match=r"found 2 tokens at layer 0.*mask has 3 columns"):
        map_indices(3, 2, 2, align="left", mask=mask)


@pytest.mark.parametrize(
    ("mask", "needed"),
    [
        (torch.ones(3), r"shape \(3,\); \[batch, pos\]"),
        (torch.tensor([[0.0, -1e9]]), r"other values than 0 and 1.*not the mask that is added"),
        (torch.tensor([[1, 0], [0, 0]]), r"row 1 of attention_mask has no real token"),
    ],
)
def test_a_mask_is_ones_at_real_tokens(mask, needed):
    with pytest.raises(BadInput, match=needed):
        read_mask(mask)
