"""Which heads, layers and rows are patched, the variants, padding; and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patches import IDS, POS, TARGET, keeping, logits_with, pattern_of
from ra_lens import patch_hooks, run_with_ra
from ra_lens.errors import BadInput, NotStored, UnsupportedModel
from ra_lens.head_names import HeadScore
from ra_lens.patching.hooks import scaled_hooks
from refused import unchecked
from tiny_models import (
    ANY_KIND,
    CASES,
    EDITABLE,
    KINDS,
    N_HEADS,
    N_LAYERS,
    OBSERVE_ONLY,
    random_ids,
    relative,
)

SCALE = -25.0


CHOICES = {
    "pairs": ({"heads": [(0, 1), (2, 3), (2, 0)]}, {(0, 1), (2, 3), (2, 0)}),
    "one pair": ({"heads": (1, 2)}, {(1, 2)}),
    "from the end": ({"heads": [(-1, -1)]}, {(2, 3)}),
    "labels": ({"heads": ["L0H1", "L2H3"]}, {(0, 1), (2, 3)}),
    "one label": ({"heads": "L1H0"}, {(1, 0)}),
    "scores": ({"heads": [HeadScore(1, 3, 0.5), HeadScore(0, 0, 0.1)]}, {(1, 3), (0, 0)}),
    "an iterator": ({"heads": iter([(0, 1), (1, 1)])}, {(0, 1), (1, 1)}),
    "an array": ({"heads": np.array([[0, 1], [2, 3]], dtype=np.uint8)}, {(0, 1), (2, 3)}),
    "a tensor": ({"heads": torch.tensor([[0, 1], [-1, 3]])}, {(0, 1), (2, 3)}),
    "one pair of NumPy": ({"heads": (np.int64(1), np.int32(2))}, {(1, 2)}),
    "lists": ({"heads": [[0, 1], [2, 3]]}, {(0, 1), (2, 3)}),
    "layers of an array": ({"layers": np.array([1])}, {(1, h) for h in range(N_HEADS)}),
    "layers": ({"layers": [0, -1]}, {(i, h) for i in (0, 2) for h in range(N_HEADS)}),
    "one layer": ({"layers": -2}, {(1, h) for h in range(N_HEADS)}),
    "both": ({"heads": [(0, 1), (1, 1), (2, 0)], "layers": range(2)}, {(0, 1), (1, 1)}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_only_the_heads_chosen_are_patched(choice, shared, mean, reference):
    options, heads = CHOICES[choice]
    maps = mean("gpt2", KINDS[0])
    deltas = {}
    for layer in range(N_LAYERS):
        deltas[layer] = torch.zeros(N_HEADS, POS, POS)
        for head in (h for i, h in heads if i == layer):
            deltas[layer][head] = SCALE * maps["ra", layer][head]
    wanted = reference("gpt2").logits(IDS, pattern_deltas=deltas)
    hooks = maps.patch_hooks(scale=SCALE, **options)
    assert relative(logits_with(shared("gpt2", KINDS[0]), hooks), wanted) < 1e-4


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_heads_and_rows_in_every_model(arch, kind, shared, mean, reference):
    maps, deltas = mean(arch, kind), {}
    for layer, head in ((0, 2), (2, 1)):
        deltas[layer] = torch.zeros(N_HEADS, POS, POS)
        deltas[layer][head, [2, 5]] = SCALE * maps["ra", layer][head, [2, 5]]
    wanted = reference(arch).logits(IDS, pattern_deltas=deltas)
    hooks = maps.patch_hooks(scale=SCALE, heads=["L0H2", "L2H1"], rows=[2, -1])
    assert relative(logits_with(shared(arch, kind), hooks), wanted) < 1e-4
    per_layer = 4 if (arch, kind) in OBSERVE_ONLY else 1
    assert len(hooks) == 2 * per_layer


def test_the_heads_of_a_cache_are_taken_as_they_come(shared):
    _, ra = run_with_ra(shared("gpt2", KINDS[0]), IDS, target=TARGET)
    top = ra.top_heads(4)
    by_pair = ra.mean().patch_hooks(scale=SCALE, heads=[(h.layer, h.head) for h in top])
    wanted = logits_with(shared("gpt2", KINDS[0]), by_pair)
    found = logits_with(shared("gpt2", KINDS[0]), ra.mean().patch_hooks(scale=SCALE, heads=top))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        (slice(1, 3), [1, 2]),
        (slice(-2, None), [4, 5]),
        (-6, [0]),
        (range(0, 6, 2), [0, 2, 4]),
        (np.array([0, -1]), [0, 5]),
        (torch.tensor([False, True, False, False, True, False]), [1, 4]),
    ],
)
def test_rows_are_query_rows_of_the_map(rows, kept, shared, mean, reference):
    # Added on the right of a longer prompt: rows are counted in the map, not in the prompt.
    ids, maps = random_ids(2, POS + 2, seed=3), mean("gpt2", KINDS[0])
    deltas = {}
    for layer in range(N_LAYERS):
        deltas[layer] = torch.zeros(N_HEADS, POS + 2, POS + 2)
        for row in kept:
            value = maps["pattern", layer][:, row]
            deltas[layer][:, row + 2, 2:] = 0.5 * value
    wanted = reference("gpt2").logits(ids, pattern_deltas=deltas)
    hooks = maps.patch_hooks(scale=0.5, kind="pattern", rows=rows, align="right")
    assert relative(logits_with(shared("gpt2", KINDS[0]), hooks, ids), wanted) < 1e-4


def test_rows_of_an_iterator_count_in_every_layer(shared, mean):
    model, maps = shared("gpt2", KINDS[0]), mean("gpt2", KINDS[0])
    wanted = logits_with(model, maps.patch_hooks(scale=SCALE, rows=[1, 2]))
    hooks = maps.patch_hooks(scale=SCALE, rows=(i for i in (1, 2)))
    assert torch.equal(logits_with(model, hooks), wanted)


BAD = {
    "head": ({"heads": [(0, 4)]}, r"head \(0, 4\).*layer 0 has heads 0 to 3"),
    "layer of a head": ({"heads": ["L7H0"]}, r"head L7H0.*maps for layers 0…2"),
    "a score's layer": ({"heads": [HeadScore(5, 1, 0.0)]}, r"head L5H1.*maps for layers 0…2"),
    "label": ({"heads": ["3.1"]}, r"'3\.1' among heads.*\(layer, head\).*'L3H5'.*top\(k\)"),
    "a number": ({"heads": 3}, r"found 3 among heads"),
    "no head": ({"heads": []}, r"leaves no head to patch"),
    "no head left": ({"heads": [(0, 1)], "layers": [1]}, r"layers=\[1\], which leaves no head"),
    "unknown layer": ({"layers": [1, 3]}, r"layers=\[3\]; there are maps for layers 0…2"),
    "no layer": ({"layers": []}, r"found layers without a number in it"),
    "a bool for each layer": ({"layers": [True, False, True]}, r"layers=True; give a whole number"),
    "a bool for each head": ({"heads": np.ones((3, 2), dtype=bool)}, r"array.* among heads"),
    "a float in a head": ({"heads": np.array([[0.0, 1.0]])}, r"array.* among heads.*pairs"),
    "three numbers": ({"heads": [(0, 1, 2)]}, r"\(0, 1, 2\) among heads.*pairs"),
    "row": ({"rows": [0, 6]}, r"rows=\[0, 6\], but 6 is none.*6 query rows.*0 to 5, or -6 to -1"),
    "no row": ({"rows": slice(6, 9)}, r"none of the 6 query rows of the maps"),
    "too few bools": ({"rows": [True]}, r"a bool for each of the 6 query rows"),
    "float rows": ({"rows": torch.tensor([0.0])}, r"rows=tensor\(\[0.\]\); give whole numbers"),
    "align": ({"align": "centre"}, r"align='centre'; give one of 'exact', 'left', 'right'"),
    "at": ({"at": "values"}, r"at='values'; give 'pattern' or 'scores'"),
    "both": ({"renormalise": True, "at": "scores"}, r"renormalise=True with at='scores'"),
    "scale": ({"scale": float("nan")}, r"scale=nan; give a finite number"),
}


OF_ANOTHER_TYPE = ("a bool for each head", "a float in a head", "float rows")


# Values outside a Literal are what is tested here, so the checker of annotations has to be passed.
@pytest.mark.parametrize("case", [name for name in BAD if name not in ("align", "at", "a number")])
def test_what_cannot_be_chosen_is_said(case, mean, request):
    options, needed = BAD[case]
    if request.config.getoption("--check-shapes") and case in OF_ANOTHER_TYPE:
        pytest.skip("the check of types is there first")
    with pytest.raises(BadInput, match=needed):
        mean("gpt2", KINDS[0]).patch_hooks(**{"scale": SCALE, **options})


@pytest.mark.parametrize("case", ["align", "at", "a number"])
def test_options_outside_their_choices_are_said(case, mean):
    maps, (options, needed) = mean("gpt2", KINDS[0]), BAD[case]
    with pytest.raises(BadInput, match=needed):
        if case == "a number":
            unchecked(type(maps.sites).choose_heads)(maps.sites, 3)
        else:
            unchecked(scaled_hooks)({0: maps["ra", 0]}, maps.sites, SCALE, **options)


def test_maps_that_cannot_be_added_are_said(mean):
    sites = mean("gpt2", KINDS[0]).sites
    for maps, needed in (
        ({}, "found no maps to add"),
        ({5: torch.zeros(N_HEADS, 3, 3)}, r"map for layer 5, but sites has layers \[0, 1, 2\]"),
        ({0: torch.zeros(N_HEADS, 3, 4)}, r"shape \(4, 3, 4\) for layer 0"),
        ({0: torch.zeros(3, 3)}, r"shape \(3, 3\) for layer 0; \[head, query, key\]"),
        ({0: torch.zeros(2, 3, 3)}, r"shape \(2, 3, 3\) for layer 0.*with 4 heads"),
    ):
        with pytest.raises(BadInput, match=needed):
            patch_hooks(maps, sites, scale=1.0)
    with pytest.raises(NotStored, match="found kind 'values'"):
        mean("gpt2", KINDS[0]).patch_hooks(scale=1.0, kind="values")


@pytest.mark.parametrize("options", [{"renormalise": True}, {"at": "scores"}])
@pytest.mark.parametrize(("arch", "kind"), sorted(OBSERVE_ONLY & set(CASES)))
def test_variants_need_a_pattern_that_is_used(arch, kind, options, mean):
    needed = r"layers \[0, 1, 2\] is observe-only.*through z, but renormalise=True and at='scores'"
    with pytest.raises(UnsupportedModel, match=needed):
        mean(arch, kind).patch_hooks(scale=SCALE, **options)


def around(model, hooks, ids=IDS, **inputs):
    """Patterns of the first layer before and after some hooks."""
    seen = {}
    both = [keeping(pattern_of(0), seen, 0), *hooks, keeping(pattern_of(0), seen, 1)]
    logits_with(model, both, ids, **inputs)
    return seen[0], seen[1]


@pytest.mark.parametrize(("arch", "kind"), EDITABLE)
def test_renormalised_rows_are_attention(arch, kind, shared, mean):
    maps = mean(arch, kind)
    hooks = maps.patch_hooks(scale=-60.0, renormalise=True, heads=[(0, 0), (0, 2)])
    plain, seen = around(shared(arch, kind), hooks)
    assert float(seen.min()) >= 0
    torch.testing.assert_close(seen.sum(-1), torch.ones_like(seen.sum(-1)))
    assert torch.equal(seen[:, [1, 3]], plain[:, [1, 3]])
    added = plain.double() - 60.0 * maps["ra", 0].double()
    assert float(added[:, [0, 2]].min()) < 0  # there is something to set to 0
    for example in range(len(IDS)):
        for head in (0, 2):
            for row in range(POS):
                values = [max(float(v), 0.0) for v in added[example, head, row]]
                wanted = [v / sum(values) for v in values]
                assert seen[example, head, row].tolist() == pytest.approx(wanted, abs=1e-5)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def padded(side):
    """Rows of 6, 4 and 5 tokens."""
    ids, mask = random_ids(3, POS, seed=5), torch.ones(3, POS, dtype=torch.long)
    for row, n in ((1, 4), (2, 5)):
        if side == "left":
            mask[row, : POS - n] = 0
        else:
            mask[row, n:] = 0
    return ids, mask


@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_with_a_mask_each_example_is_patched_as_if_alone(arch, kind, side, align, shared, mean):
    model, maps = shared(arch, kind), mean(arch, kind)
    ids, mask = padded(side)
    hooks = maps.patch_hooks(scale=SCALE, align=align, attention_mask=mask)
    together = logits_with(model, hooks, ids, attention_mask=mask)
    for row in range(3):
        alone = ids[row : row + 1, mask[row].bool()]
        own = maps.patch_hooks(scale=SCALE, align=align)
        wanted = logits_with(model, own, alone)[0]
        assert relative(together[row][mask[row].bool()], wanted) < 1e-4
        assert relative(logits_with(model, [], alone)[0], wanted) > 1e-2


@pytest.mark.parametrize("kind", ANY_KIND)
def test_padding_gets_nothing(kind, shared, mean):
    ids, mask = padded("left")
    hooks = mean("llama", kind).patch_hooks(
        scale=1.0, kind="pattern", align="right", attention_mask=mask
    )
    plain, seen = around(shared("llama", kind), hooks, ids, attention_mask=mask)
    added = seen - plain
    assert float(added[1, :, :2].abs().max()) == 0
    assert float(added[1, :, :, :2].abs().max()) == 0
    assert float(added[1, :, 2:].sum(-1).min()) > 0


@pytest.mark.parametrize("options", [{"renormalise": True}, {"at": "scores"}])
@pytest.mark.parametrize("kind", ANY_KIND)
def test_padding_rows_keep_their_sums(kind, options, shared, mean):
    ids, mask = padded("left")
    hooks = mean("gpt2", kind).patch_hooks(
        scale=-60.0, align="left", attention_mask=mask, **options
    )
    plain, seen = around(shared("gpt2", kind), hooks, ids, attention_mask=mask)
    torch.testing.assert_close(seen.sum(-1), plain.sum(-1))
    assert torch.equal(seen[1, :, :2], plain[1, :, :2])
    assert relative(seen[1, :, 3:], plain[1, :, 3:]) > 1e-3


@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_batch_of_another_size_is_refused(kind, shared, mean):
    model, maps = shared("gpt2", kind), mean("gpt2", kind)
    hooks = maps.patch_hooks(scale=SCALE, attention_mask=torch.ones(2, POS, dtype=torch.long))
    with pytest.raises(
        BadInput, match=r"found 3 examples at layer 0, but 2 rows of attention_mask"
    ):
        logits_with(model, hooks)
    own = {0: torch.ones(2, N_HEADS, POS, POS)}
    with pytest.raises(BadInput, match=r"found 3 examples at layer 0, but 2 maps"):
        logits_with(model, patch_hooks(own, maps.sites, scale=1.0))
