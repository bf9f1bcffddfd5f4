"""Edges: how they are chosen, and what a cache foretells of sets, of the strongest, of flows."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from made_caches import ROWS, make
from oracle import Wide
from padded_rows import padded
from patches import logits_with
from ra_lens import run_with_ra
from ra_lens.errors import BadInput
from ra_lens.knockouts import Edge, Edges, EdgeSet, knockout_hooks
from ra_lens.knockouts.edges import find_text
from tiny_models import ANY_KIND, KINDS, N_HEADS, N_LAYERS, random_ids, text

POS, TARGET = 6, [8, 9, 10]
IDS = random_ids(3, POS)

TOKENS = [
    "<|end|>",
    " Beats",
    " Music",
    " is",
    " by",
    " Apple",
    ".",
    " Beats",
    " Music",
    "\n",
    " ",
    "✓",
]


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        ("Beats Music", [1, 2, 7, 8]),  # several tokens, twice
        (" Beats Music", [1, 2, 7, 8]),  # a space in front is the token's
        ("Music ", [2, 8]),
        ("by Apple.", [4, 5, 6]),
        ("Apple", [5]),
        ("<|end|>", [0]),
        ("<|end|> Beats", [0, 1]),
        (".", [6]),
        ("\n", [9]),
        (" ", [10]),  # but no space in front of a word
        ("Music is", [2, 3]),
    ],
)
def test_a_text_stands_for_the_tokens_that_it_covers(wanted, places):
    assert find_text("keys", wanted, TOKENS) == places


@pytest.mark.parametrize(
    "wanted", ["Beat", "usic", "App", "Beats  Music", "beats", "Apple,", "end"]
)
def test_a_text_that_is_not_there(wanted):
    needed = r"found keys='.*not among the tokens of example 2: .*Beats.*begins and ends where"
    with pytest.raises(BadInput, match=needed):
        find_text("keys", wanted, TOKENS, "tokens of example 2")


def test_no_text_and_no_tokens():
    with pytest.raises(BadInput, match=r"found keys='', which no token has"):
        find_text("keys", "", TOKENS)
    with pytest.raises(BadInput, match=r"found queries='a', but this cache does not know which"):
        find_text("queries", "a", None)
    long = [f" w{i}" for i in range(50)]
    with pytest.raises(BadInput, match=r"w39 …\. Give a text"):
        find_text("keys", "x", long)


def test_a_character_of_several_tokens_has_its_bytes():
    tokens = ["a", "⟨E2 9C⟩", "✓", " b", "⟨F0 9F⟩", "⟨98⟩", "😀", "c"]
    assert find_text("keys", "✓", tokens) == [1, 2]
    assert find_text("keys", "a✓", tokens) == [0, 1, 2]
    assert find_text("keys", "✓ b", tokens) == [1, 2, 3]
    assert find_text("keys", "b😀c", tokens) == [3, 4, 5, 6, 7]
    assert find_text("keys", "😀", tokens) == [4, 5, 6]
    assert find_text("keys", "c", tokens) == [7]
    # Tokens without any text of their own, as some tokenizers have, are not bytes.
    assert find_text("keys", "b", ["a", "", " b"]) == [2]


# ---- choosing in a cache ------------------------------------------------------------------------


def chosen(ra, layer=0, n=5, example=0, n_heads=3, **choice):
    """Which cells of a layer a choice marks, as (head, query, key)."""
    index = torch.arange(n)[None]
    marks = ra.edges(**choice).marks(layer, n_heads, index, index)
    return set(map(tuple, marks[example if len(marks) > 1 else 0].nonzero().tolist()))


def cells(heads, queries, keys):
    return set(product(heads, queries, keys))


@pytest.mark.parametrize(
    ("choice", "places"),
    [
        (None, range(5)),
        (2, [2]),
        (-1, [4]),
        (-5, [0]),
        ([0, -2], [0, 3]),
        ((3, 1, 3), [1, 3]),
        (range(1, 3), [1, 2]),
        (slice(1, 4), [1, 2, 3]),
        (slice(None, None, 2), [0, 2, 4]),
        (slice(-2, None), [3, 4]),
        (np.array([1, 2]), [1, 2]),
        (torch.tensor([4]), [4]),
        (np.int64(3), [3]),
        ("Paris", [1, 3]),
        (["Paris", 0, "\n"], [0, 1, 2, 3]),
        ("<b>&$x$", [4]),
    ],
)
def test_tokens_are_chosen_in_every_form(choice, places):
    ra = make(ROWS[:1])
    assert chosen(ra, queries=choice, keys=0) == cells(range(3), places, [0])
    assert chosen(ra, queries=1, keys=choice) == cells(range(3), [1], places)


def test_positions_count_within_each_example():
    for side in ("left", "right"):
        ra = make(side=side)
        # The second prompt has three tokens.
        assert chosen(ra, example=1, queries=-1, keys=-3) == cells(range(3), [2], [0])
        assert chosen(ra, example=0, queries=-1, keys=-3) == cells(range(3), [4], [2])
    with pytest.raises(BadInput, match=r"queries=3, but 3 is none of the 3 tokens of example 1"):
        ra.edges(queries=3)
    with pytest.raises(BadInput, match=r"found keys='Paris'.*tokens of example 1: <\|end\|> ·a ·b"):
        ra.edges(keys="Paris")


def test_heads_and_layers():
    ra = make()
    assert chosen(ra, heads="L0H1", queries=1, keys=0) == cells([1], [1], [0])
    assert chosen(ra, heads=["L0H1", (2, 0)], queries=1, keys=0) == cells([1], [1], [0])
    assert chosen(ra, layer=2, heads=["L0H1", (2, -1)], queries=1, keys=0) == cells([2], [1], [0])
    assert chosen(ra, layer=2, layers=0, queries=1, keys=0) == set()
    assert chosen(ra, layers=[0, 2], queries=1, keys=0) == cells(range(3), [1], [0])
    assert ra.edges(heads="L2H1").layers == [2]
    with pytest.raises(BadInput, match="layers 0, 2"):
        ra.edges(layers=1)
    with pytest.raises(BadInput, match="heads 0 to 2"):
        ra.edges(heads="L0H3")


def test_what_has_no_end_goes_on():
    ra = make(ROWS[:1])
    new = 8  # three generated tokens
    everywhere = cells([0], range(new), range(new))
    assert chosen(ra, n=new, heads="L0H0") == everywhere
    assert chosen(ra, n=new, heads="L0H0", queries=slice(3, None), keys=1) == cells(
        [0], range(3, new), [1]
    )
    assert chosen(ra, n=new, heads="L0H0", queries=slice(3, 5), keys=1) == cells([0], [3, 4], [1])
    assert chosen(ra, n=new, heads="L0H0", queries=-1, keys=slice(-2, None)) == cells(
        [0], [4], range(3, new)
    )
    assert chosen(ra, n=new, heads="L0H0", queries=slice(None, None, 2), keys=1) == cells(
        [0], [0, 2, 4], [1]
    )
    assert ra.edges(queries=slice(3, 5)).ends_before(0, 5)
    assert not ra.edges(queries=slice(3, 5)).ends_before(0, 4)
    assert not ra.edges(queries=slice(3, None)).ends_before(0, 100)


def test_sets_are_joined_and_say_what_they_are():
    ra = make()
    one, two = ra.edges(heads="L0H0", queries=1, keys=0), ra.edges(heads="L2H1", queries=-1)
    both = one | two
    index = torch.arange(5)[None]
    for layer in (0, 2):
        joined = both.marks(layer, 3, index, index)
        apart = [one.marks(layer, 3, index, index), two.marks(layer, 3, index, index)]
        assert torch.equal(joined, apart[0] | apart[1])
    assert both.layers == [0, 2]
    for_all = EdgeSet((one.rows[0],))
    assert len((for_all | two).rows) == len((two | for_all).rows) == 2
    with pytest.raises(BadInput, match=r"sets of 2 and 3 examples"):
        two | EdgeSet(two.rows + two.rows[:1])
    assert repr(one) == ("EdgeSet(2 examples; the first: 1 heads of layers 0, queries 1, keys 0)")
    assert repr(for_all | for_all).startswith("EdgeSet(1 heads of layers 0, queries 1, keys 0; 1 ")
    assert "queries 4, keys all" in repr(two)
    alone = make(ROWS[:1])
    assert "queries 3, 4, 5…" in repr(alone.edges(queries=slice(3, None)))


def test_edges_are_records():
    edge = Edge(5, 3, 4, 1, 0.25, 0.5, " is", "\n")
    assert edge.label == "L5H3"
    assert str(edge) == "L5H3 ·is (4) → ⏎ (1) +0.2500"
    assert str(Edge(0, 1, 2, 1)) == "L0H1 2 → 1"
    edges = Edges([edge, Edge(0, 1, 2, 1, -1.0, example=1)], "knockout")
    assert repr(edges).splitlines()[0] == "2 edges by knockout:"
    assert [list(own) for own in edges.by_example()] == [[edge], [edges[1]]]
    assert isinstance(edges[:1], Edges)
    assert edges[:1].by == "knockout"
    frame = edges.to_dataframe()
    assert list(frame.effect) == [0.25, -1.0]
    assert list(frame.key_token) == ["\n", ""]
    assert list(Edges([], "cut").to_dataframe().columns) == list(frame.columns)


# ---- what is foretold of them -------------------------------------------------------------------


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("kind", ANY_KIND)
def test_sets_against_central_differences(kind, renormalise, fresh):
    model = fresh("gpt2", kind, torch.float64)
    with Wide():
        _, ra = run_with_ra(model, IDS, target=TARGET)
    for choice in (
        {"queries": -1, "keys": [1, 2], "heads": "L1H2"},
        {"queries": slice(2, None), "keys": [0, -1], "layers": [0, 2]},
        {"keys": 1},
        {"queries": [2, 4], "keys": [0, 3]},
    ):
        edges = ra.edges(**choice)
        foretold = ra.knockout(**choice, renormalise=renormalise)
        assert foretold.shape == (3,)
        assert torch.equal(foretold, ra.knockout(edges=edges, renormalise=renormalise))

        def loss(amount, edges=edges):
            hooks = knockout_hooks(model, edges, renormalise=renormalise, amount=amount)
            with Wide():
                logits = logits_with(model, hooks, IDS)
            return -logits[:, -1].log_softmax(-1)[range(3), TARGET]

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        torch.testing.assert_close(foretold, slope, rtol=1e-6, atol=1e-9)
        assert float(slope.abs().max()) > 1e-4
        # Really done by a thousandth, it is off by what a first-order expansion is.
        done = (loss(1e-3) - loss(0.0)) / 1e-3
        torch.testing.assert_close(foretold, done, rtol=0.05, atol=1e-3)


def test_sets_of_padded_prompts(shared):
    model = shared("llama", KINDS[0])
    rows = [IDS[0], IDS[1, :4], IDS[2, :5]]
    for side in ("left", "right"):
        tokens, mask = padded(side, 2, rows)
        _, ra = run_with_ra(model, tokens, attention_mask=mask, target=TARGET)
        found = ra.knockout(queries=slice(-2, None), keys=[0, 1])
        for i, row in enumerate(rows):
            _, one = run_with_ra(model, row[None], target=TARGET[i])
            alone = one.knockout(queries=slice(-2, None), keys=[0, 1])
            torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-4, atol=1e-6)
            single = one.remove_batch_dim()
            assert single.knockout(queries=-1, keys=0).ndim == 0
            assert single.flow().shape == (N_LAYERS, len(row))


def test_what_does_not_fit_a_set(shared):
    _, ra = run_with_ra(shared("gpt2", KINDS[0]), IDS, target=TARGET)
    edges = ra.edges(queries=-1, keys=0)
    with pytest.raises(BadInput, match=r"edges= beside heads, layers, queries or keys"):
        ra.knockout(edges=edges, queries=1)
    two = EdgeSet(edges.rows[:2])
    with pytest.raises(BadInput, match=r"edges of 2 examples for a cache of 3.*or one set for all"):
        ra.knockout(edges=two)
    first = EdgeSet(edges.rows[:1])
    assert torch.equal(ra.knockout(edges=first), ra.knockout(edges=edges))
    # All edges of all rows: nothing would be left of any, so nothing is cut.
    assert ra.knockout().tolist() == [0.0, 0.0, 0.0]
    plain = ra.knockout(renormalise=False)
    every = -sum((ra["pattern", i] * ra["pattern_grad", i]).sum((1, 2, 3)) for i in range(N_LAYERS))
    torch.testing.assert_close(plain, every)


@pytest.mark.parametrize("by", ["knockout", "cut", "ra", "pattern"])
def test_the_strongest_edges_against_all_of_them(by, shared):
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, [text(row) for row in IDS], target=["w8", "w9", "w10"])
    n = ra["ra", 0].shape[-1]
    assert ra.info.prepended is not None
    for bos in (False, True):
        best = ra.top_edges(7, by=by, bos=bos)
        assert best.by == by
        for i, own in enumerate(best.by_example()):
            every = [
                (float(ra[by, layer][i, h, q, k]), layer, h, q, k)
                for layer, h, q, k in product(range(N_LAYERS), range(N_HEADS), range(n), range(n))
                if bos or k > 0
            ]
            wanted = sorted(every, key=lambda one: -abs(one[0]))[:7]
            # The first token looks at itself alone in every head: several patterns are 1.
            assert [e.effect for e in own] == [one[0] for one in wanted]
            places = {(e.effect, e.layer, e.head, e.query, e.key) for e in own}
            assert len(places) == 7
            assert places == set(wanted) or (by == "pattern" and places < set(every))
            for e in own:
                assert e.pattern == float(ra["pattern", e.layer][i, e.head, e.query, e.key])
                assert e.query_token == ra.str_tokens[i][e.query]
                assert e.key_token == ra.str_tokens[i][e.key]
                assert e.example == i
    assert len(ra.top_edges(10**6).by_example()[0]) < N_LAYERS * N_HEADS * n * n
    with pytest.raises(BadInput, match="k"):
        ra.top_edges(0)


def test_the_strongest_edges_of_padded_prompts(shared):
    model = shared("llama", KINDS[-1])
    rows = [IDS[0], IDS[1, :4]]
    for side in ("left", "right"):
        tokens, mask = padded(side, 2, rows)
        _, ra = run_with_ra(model, tokens, attention_mask=mask, target=TARGET[:2])
        for i, own in enumerate(ra.top_edges(5).by_example()):
            _, one = run_with_ra(model, rows[i][None], target=TARGET[i])
            alone = one.top_edges(5)
            for a, b in zip(own, alone, strict=True):
                assert (a.layer, a.head, a.query, a.key) == (b.layer, b.head, b.query, b.key)
                assert a.effect == pytest.approx(b.effect, rel=1e-4)


def test_a_flow_is_knockouts_of_single_keys(shared):
    _, ra = run_with_ra(shared("gpt2", KINDS[0]), IDS, target=TARGET)
    flow = ra.flow()
    assert flow.shape == (3, N_LAYERS, POS)
    for layer, key in product(range(N_LAYERS), range(POS)):
        alone = sum(ra.knockout(heads=[(layer, h)], queries=-1, keys=key) for h in range(N_HEADS))
        torch.testing.assert_close(flow[:, layer, key], alone)
        one_set = ra.knockout(layers=layer, queries=-1, keys=key)  # rows and heads add up
        torch.testing.assert_close(flow[:, layer, key], one_set)
    some = ra.flow(queries=[2, -1], by="cut", heads=["L0H1", "L2H3"])
    wanted = torch.zeros_like(some)
    for layer, head in ((0, 1), (2, 3)):
        wanted[:, layer] = ra["cut", layer][:, head, [2, 5]].sum(1)
    torch.testing.assert_close(some, wanted)
    assert torch.equal(ra.apply_slice_to_batch_dim(1).flow(), flow[1])
    with pytest.raises(BadInput, match="queries=9"):
        ra.flow(queries=9)


def test_choices_without_tokens_count_columns():
    ra = make()
    blind = replace(ra, info=replace(ra.info, str_tokens=None, starts=None))
    assert chosen(blind, queries=-1, keys=1) == cells(range(3), [4], [1])
    with pytest.raises(BadInput, match=r"does not know which tokens were read.*run_with_ra"):
        blind.edges(keys="Paris")
