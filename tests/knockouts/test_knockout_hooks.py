"""Edges that are really cut, against Hugging Face's model with scores of minus infinity there."""

from __future__ import annotations

import pytest
import torch

from cuts import as_edges, boxed, cutting, minus_infinity
from left_behind import changes, snapshot
from oracle import Wide, nll
from padded_rows import padded
from patches import IDS, POS, TARGET, keeping, logits_with, pattern_of
from ra_lens import run_with_ra
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.knockouts import Edge, knockout_hooks
from ra_lens.patching import patch_hooks
from ra_lens.patching.masking import mask_hooks
from tiny_models import (
    ANY_KIND,
    CASES,
    KINDS,
    N_HEADS,
    N_LAYERS,
    OBSERVE_ONLY,
    random_ids,
    relative,
)

# Some edges, a column of a head, all of the last row but one key, and an edge in the first row.
CELLS = [(0, 1, 4, 2), (1, 0, 5, 0), (2, 3, 3, 1), (2, 3, 3, 2), (1, 2, 0, 0)]
CELLS += boxed([1], [3], range(POS), [1])
CELLS += boxed([2], [0], [POS - 1], range(1, POS))
# Cuts of its own in each row of the batch, and none in one.
ROWS = [CELLS, [], boxed([0, 2], [0, 1], [5, 4], [3, 1])]


def routed(arch, kind, shared):
    """The model, which a run has met, so that the route of its patterns is known."""
    model = shared(arch, kind)
    return model, run_with_ra(model, IDS, target=TARGET)[1]


def error(found, wanted, plain):
    """What a cut does wrong, relative to what it changes."""
    change = float((wanted - plain).norm())
    assert change > 1e-2 * float(plain.norm())
    return float((found.double() - wanted).norm()) / change


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_cut_is_a_score_of_minus_infinity(arch, kind, shared, reference):
    model, _ = routed(arch, kind, shared)
    oracle = reference(arch)
    plain = oracle.logits(IDS)
    # The only edge of the first row cannot be cut: its softmax would have no keys.
    possible = [cell for cell in CELLS if cell[2:] != (0, 0)]
    assert len(possible) < len(CELLS)
    deltas = minus_infinity([possible] * 3, N_LAYERS, N_HEADS, POS)
    wanted = oracle.logits(IDS, deltas)
    found = logits_with(model, knockout_hooks(model, as_edges(CELLS)))
    assert error(found, wanted, plain) < 1e-5


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_each_row_of_a_batch_has_cuts_of_its_own(arch, kind, renormalise, shared, reference):
    model, _ = routed(arch, kind, shared)
    oracle = reference(arch)
    plain = oracle.logits(IDS)
    wanted = oracle.logits(IDS, edit=cutting(ROWS, renormalise=renormalise))
    hooks = knockout_hooks(model, [as_edges(row) for row in ROWS], renormalise=renormalise)
    found = logits_with(model, hooks)
    assert error(found, wanted, plain) < 1e-5
    assert torch.equal(found[1], logits_with(model, [])[1])
    for i, row in enumerate(ROWS):
        if row:
            alone = knockout_hooks(model, as_edges(row), renormalise=renormalise)
            one = logits_with(model, alone, IDS[i : i + 1])
            torch.testing.assert_close(found[i : i + 1], one, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("HookedTransformer" not in KINDS, reason="no HookedTransformer here")
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_hooked_transformer_with_scores_edited(arch, shared):
    # llama: two query heads share a key/value head, and only one of them is cut.
    model = shared(arch, "HookedTransformer")
    cells = boxed(range(N_LAYERS), [1], range(2, POS), [1])

    def forbid(scores, hook):
        scores[:, 1, 2:, 1] = -torch.inf
        return scores

    names = [f"blocks.{i}.attn.hook_attn_scores" for i in range(N_LAYERS)]
    wanted = logits_with(model, [(name, forbid) for name in names])
    found = logits_with(model, knockout_hooks(model, as_edges(cells)))
    assert relative(found, wanted) < 1e-6
    assert relative(found, logits_with(model, [])) > 1e-3


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_set_of_a_cache_cuts_what_its_edges_cut(arch, kind, shared):
    model, ra = routed(arch, kind, shared)
    chosen = ra.edges(heads=["L0H1", (2, -1)], queries=slice(2, 5), keys=[0, -2])
    cells = boxed([0], [1], range(2, 5), [0, POS - 2]) + boxed([2], [3], range(2, 5), [0, POS - 2])
    found = logits_with(model, knockout_hooks(model, chosen))
    assert torch.equal(found, logits_with(model, knockout_hooks(model, as_edges(cells))))
    assert relative(found, logits_with(model, [])) > 1e-3


def test_top_edges_are_cut_of_each_example(shared):
    model, ra = routed("gpt2", KINDS[0], shared)
    best = ra.top_edges(3)
    with pytest.raises(BadInput, match=r"edges of several examples in one list.*by_example\(\)"):
        knockout_hooks(model, best)
    found = logits_with(model, knockout_hooks(model, best.by_example()))
    for i, own in enumerate(best.by_example()):
        assert len(own) == 3
        alone = logits_with(model, knockout_hooks(model, list(own)), IDS[i : i + 1])
        torch.testing.assert_close(found[i], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_row_is_cut_in_a_padded_batch_as_it_is_alone(arch, kind, side, shared):
    model, _ = routed(arch, kind, shared)
    rows = [IDS[0], IDS[1, :4], IDS[2, :5]]
    tokens, mask = padded(side, 2, rows)
    cells = [CELLS, boxed([0, 1, 2], [0, 2], [3, 2], [1]), boxed([1], [1, 3], [4], [0, 2])]
    hooks = knockout_hooks(model, list(map(as_edges, cells)), attention_mask=mask)
    together = logits_with(model, hooks, tokens, attention_mask=mask)
    plain = logits_with(model, [], tokens, attention_mask=mask)
    for i, row in enumerate(rows):
        real = mask[i].bool()
        alone = logits_with(model, knockout_hooks(model, as_edges(cells[i])), row[None])
        bare = logits_with(model, [], row[None])
        torch.testing.assert_close(plain[i, real], bare[0], rtol=1e-4, atol=1e-4)
        assert error(together[i, real], alone[0].double(), bare[0].double()) < 1e-4


@pytest.mark.parametrize("kind", ANY_KIND)
def test_without_a_mask_positions_are_columns(kind, shared):
    model, _ = routed("gpt2", kind, shared)
    tokens, mask = padded("left", 2, [IDS[0], IDS[1, :4]])
    # Token 3 of the second prompt stands in column 5, token 1 in column 3.
    by_column = knockout_hooks(model, [[], [Edge(1, 2, 5, 3)]])
    by_token = knockout_hooks(model, [[], [Edge(1, 2, 3, 1)]], attention_mask=mask)
    found = [
        logits_with(model, hooks, tokens, attention_mask=mask) for hooks in (by_column, by_token)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_rows_that_would_have_nothing_left_stay(arch, kind, shared, reference):
    model, _ = routed(arch, kind, shared)
    plain = logits_with(model, [])
    whole_row = boxed([0, 1, 2], range(N_HEADS), [3], range(POS))
    assert torch.equal(logits_with(model, knockout_hooks(model, as_edges(whole_row))), plain)
    first = as_edges(boxed([0], range(N_HEADS), [0], [0]))
    assert torch.equal(logits_with(model, knockout_hooks(model, first)), plain)
    # Edges to keys after the query are not there.
    later = as_edges(boxed([0, 1], range(N_HEADS), [1], [2, 4]))
    assert torch.equal(logits_with(model, knockout_hooks(model, later)), plain)
    # Not renormalised, a row can lose everything: its heads say nothing.
    hooks = knockout_hooks(model, as_edges(whole_row), renormalise=False)
    oracle = reference(arch)
    wanted = oracle.logits(IDS, edit=cutting([whole_row] * 3, renormalise=False))
    assert error(logits_with(model, hooks), wanted, oracle.logits(IDS)) < 1e-5


# ---- with other hooks ---------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_cuts_and_patches_follow_each_other(arch, kind, shared, reference):
    model, ra = routed(arch, kind, shared)
    maps = {i: 0.3 * torch.randn(N_HEADS, POS, POS).tril() for i in range(N_LAYERS)}
    patch = patch_hooks(maps, ra.sites, scale=0.5)
    cells, more = boxed([0, 1, 2], [1, 2], [4, 5], [1, 3]), boxed([1, 2], [1, 3], [5], [2, 4])
    cut, again = (knockout_hooks(model, as_edges(one)) for one in (cells, more))
    plainly = knockout_hooks(model, as_edges(more), renormalise=False)
    first, second = cutting([cells] * 3), cutting([more] * 3)
    third = cutting([more] * 3, renormalise=False)

    def added(site, pattern):
        return pattern + 0.5 * maps[site].double()

    oracle, plain = reference(arch), reference(arch).logits(IDS)
    orders = [
        ([*cut, *patch], (first, added)),
        ([*cut, *again], (first, second)),
        ([*again, *cut], (second, first)),
        # What a row lacks is a share of its own, as a sink's: the order makes no difference.
        ([*plainly, *cut], (first, third)),
        ([*patch, *plainly], (added, third)),
        ([*cut, *patch, *plainly], (first, added, third)),
    ]
    seen = []
    for hooks, edits in orders:

        def edit(site, pattern, edits=edits):
            for one in edits:
                pattern = one(site, pattern)
            return pattern

        wanted = oracle.logits(IDS, edit=edit)
        found = logits_with(model, hooks)
        assert error(found, wanted, plain) < 1e-5
        seen.append(wanted)
    assert relative(seen[3], seen[2]) > 1e-3
    # The same hooks twice, and in contexts around each other.
    with model.hooks(fwd_hooks=cut):
        assert relative(logits_with(model, patch), seen[0]) < 1e-5
    once, twice = (logits_with(model, hooks) for hooks in (cut, [*cut, *cut]))
    assert relative(twice, once) < 1e-6


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_masked_heads_stay_masked(arch, kind, shared, reference):
    model, ra = routed(arch, kind, shared)
    keep = torch.ones(N_LAYERS, N_HEADS, dtype=torch.bool)
    keep[1, 1] = keep[2, 0] = False
    cells = boxed([0, 1, 2], [0, 1], [4, 5], [1, 3])
    hooks = [*knockout_hooks(model, as_edges(cells)), *mask_hooks(ra.sites, keep)]
    cut = cutting([cells] * 3)

    def edit(site, pattern):
        return cut(site, pattern) * keep[site].reshape(-1, 1, 1)

    folded = arch == "gpt2" and kind == "HookedTransformer"
    oracle = reference(arch)
    if folded or not hasattr(model, "original_model"):
        # Loaded with processed weights: zeroing z and zeroing the pattern differ by a bias.
        hand = [(pattern_of(i), lambda a, hook, i=i: edit(i, a)) for i in range(N_LAYERS)]
        wanted = logits_with(model, hand).double()
        plain = logits_with(model, []).double()
    else:
        wanted, plain = oracle.logits(IDS, edit=edit), oracle.logits(IDS)
    assert error(logits_with(model, hooks), wanted, plain) < 1e-5


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_activations_patched_beside_a_cut(arch, kind, shared):
    model, _ = routed(arch, kind, shared)
    seen = {}
    cut = knockout_hooks(model, as_edges(boxed([0, 1], range(N_HEADS), [5], [1, 2])))
    other = random_ids(3, POS, seed=7)
    z, out = "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"
    logits_with(model, [keeping(z, seen, "clean z"), keeping(out, seen, "clean out")], other)

    def put_z(value, hook):
        value[:, 5, 2] = seen["clean z"][:, 5, 2]

    def put_out(value, hook):
        return seen["clean out"]

    # What is put in the place of something that was cut stands there, cut or not before.
    logits_with(model, [*cut, (z, put_z), keeping(z, seen, "z")])
    assert torch.equal(seen["z"][:, 5, 2], seen["clean z"][:, 5, 2])
    logits_with(model, [*cut, keeping(z, seen, "cut z")])
    assert torch.equal(seen["z"][:, 5, 1], seen["cut z"][:, 5, 1])
    logits_with(model, [keeping(z, seen, "plain z")])
    assert not torch.equal(seen["cut z"][:, 5], seen["plain z"][:, 5])
    only = [pair for pair in cut if ".1." in pair[0]]
    assert torch.equal(
        logits_with(model, [*only, (out, put_out)]), logits_with(model, [(out, put_out)])
    )


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_the_gradient_of_the_cut_model_is_hugging_faces(arch, kind, renormalise, shared, reference):
    model, ra = routed(arch, kind, shared)
    hooks = knockout_hooks(model, [as_edges(row) for row in ROWS], renormalise=renormalise)
    edit = cutting(ROWS, renormalise=renormalise)
    gradients, _ = reference(arch).score_gradients(IDS, nll(*[TARGET] * 3), edit=edit)
    for recompute in (False, True):
        _, cut = run_with_ra(model, IDS, target=TARGET, fwd_hooks=hooks, recompute=recompute)
        for layer in range(N_LAYERS):
            wanted = ra.scale[layer] * gradients[layer]
            assert relative(cut["ra", layer], wanted) < 1e-5
            assert relative(ra["ra", layer], wanted) > 1e-2


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_second_cut_is_foretold_under_a_first(arch, kind, renormalise, fresh):
    model = fresh(arch, kind, torch.float64)
    run_with_ra(model, IDS, target=TARGET)
    first = knockout_hooks(model, as_edges(boxed([0, 1], [0, 1], [4, 5], [1, 2])))
    with Wide():
        _, ra = run_with_ra(model, IDS, target=TARGET, fwd_hooks=first)
    second = ra.edges(layers=2, heads=None, queries=[3, 5], keys=[0, 2])
    foretold = ra.knockout(edges=second, renormalise=renormalise)

    def loss(amount):
        little = knockout_hooks(model, second, renormalise=renormalise, amount=amount)
        with Wide():
            logits = logits_with(model, [*first, *little])
        return -logits[:, -1].log_softmax(-1)[:, TARGET]

    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    torch.testing.assert_close(foretold, slope, rtol=1e-6, atol=1e-9)


# ---- by part ------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_the_slope_at_no_cut_is_what_a_cache_foretells(arch, kind, renormalise, fresh):
    model = fresh(arch, kind, torch.float64)
    with Wide():
        _, ra = run_with_ra(model, IDS, target=TARGET)
    chosen = ra.edges(layers=[0, 2], queries=[2, 5], keys=[0, 1])
    amount = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    hooks = knockout_hooks(model, chosen, renormalise=renormalise, amount=amount)
    with Wide(), model.hooks(fwd_hooks=hooks):
        logits = model(IDS)
    loss = -logits[:, -1].log_softmax(-1)[:, TARGET].sum()
    (slope,) = torch.autograd.grad(loss, [amount])
    foretold = ra.knockout(edges=chosen, renormalise=renormalise)
    torch.testing.assert_close(slope, foretold, rtol=1e-9, atol=1e-12)
    assert float(slope.abs().min()) > 1e-4


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_part_of_a_cut_moves_the_pattern_part_of_the_way(arch, kind, shared, reference):
    model, _ = routed(arch, kind, shared)
    cells = boxed([0, 1, 2], [1, 2], [4, 5], [1, 3])
    amounts = torch.tensor([0.25, 0.0, 1.0])
    cut = cutting([cells] * 3)

    def edit(site, pattern):
        share = amounts.double()[:, None, None, None]
        return pattern + share * (cut(site, pattern) - pattern)

    oracle = reference(arch)
    wanted, plain = oracle.logits(IDS, edit=edit), oracle.logits(IDS)
    found = logits_with(model, knockout_hooks(model, as_edges(cells), amount=amounts))
    assert error(found, wanted, plain) < 1e-5
    for i, amount in enumerate(amounts.tolist()):
        one = logits_with(model, knockout_hooks(model, as_edges(cells), amount=amount))
        torch.testing.assert_close(one[i], found[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_half_precision_cuts_the_same(arch, kind, dtype, shared, fresh):
    cells = boxed([0, 1, 2], [1, 2], [4, 5], [1, 3])
    wide, _ = routed(arch, kind, shared)
    narrow = fresh(arch, kind, dtype)
    run_with_ra(narrow, IDS, target=TARGET)
    moved = []
    for model in (wide, narrow):
        cut = logits_with(model, knockout_hooks(model, as_edges(cells)))
        assert cut.dtype == logits_with(model, []).dtype
        moved.append(cut.double() - logits_with(model, []).double())
    # Rounding of both logits, in the difference of which most of them cancel.
    assert relative(moved[1], moved[0]) < (0.15 if dtype == torch.bfloat16 else 0.02)


# ---- what is refused, and what is left ----------------------------------------------------------


@pytest.mark.parametrize(
    ("edges", "needed"),
    [
        ([], r"found no edge to cut.*top_edges\(5\)"),
        ([[], []], r"found no edge to cut"),
        (Edge(0, 4, 1, 0), r"layer 0 has heads 0 to 3"),
        ([Edge(7, 0, 1, 0)], r"layers 0…2"),
        (Edge(0, 1, -1, 0), r"found query=-1 in an edge.*count from the start.*ra\.edges\(\)"),
        (Edge(0, 1, 2, -3), r"found key=-3 in an edge"),
        (["L0H1"], r"found 'L' among the edges.*Edge\(layer, head, query, key\)"),
        (3, r"found 3 among the edges"),
        ([[Edge(0, 1, 2, 1), (0, 1)]], r"found \(0, 1\) among the edges.*ra\.edges\(\)"),
    ],
)
def test_edges_that_cannot_be_cut(edges, needed, shared, request):
    typed = edges not in (["L0H1"], 3, [[Edge(0, 1, 2, 1), (0, 1)]])
    if request.config.getoption("--check-shapes") and not typed:
        pytest.skip("the check of types is there first")
    with pytest.raises(BadInput, match=needed):
        knockout_hooks(shared("gpt2", KINDS[0]), edges)


def test_sets_that_do_not_fit_the_batch(shared, request):
    model, ra = routed("gpt2", KINDS[0], shared)
    every = ra.edges(queries=-1, keys=1)
    with pytest.raises(BadInput, match=r"a set of 3 examples in a list.*Give it alone"):
        knockout_hooks(model, [every, []])
    with pytest.raises(BadInput, match=r"found 2 examples at layer 0, but edges of 3\. Run as"):
        logits_with(model, knockout_hooks(model, every), IDS[:2])
    mask = torch.ones(2, POS, dtype=torch.long)
    hooks = knockout_hooks(model, Edge(0, 1, 2, 1), attention_mask=mask)
    with pytest.raises(BadInput, match=r"found 3 examples at layer 0, but rows of attention_mask"):
        logits_with(model, hooks)
    with pytest.raises(BadInput, match="amount"):
        knockout_hooks(model, Edge(0, 1, 2, 1), amount=float("nan"))
    amounts = torch.ones(2)
    with pytest.raises(BadInput, match=r"found 3 examples at layer 0, but amounts of 2"):
        logits_with(model, knockout_hooks(model, Edge(0, 1, 2, 1), amount=amounts))
    if not request.config.getoption("--check-shapes"):  # which is there first
        with pytest.raises(BadInput, match=r"amount of shape \(1, 2\).*one for each example"):
            knockout_hooks(model, Edge(0, 1, 2, 1), amount=amounts[None])


@pytest.mark.skipif("TransformerBridge" not in KINDS, reason="no TransformerBridge here")
def test_a_model_whose_route_is_not_known_is_refused(fresh):
    model = fresh("llama", "TransformerBridge")
    with pytest.raises(UnsupportedModel, match=r"not known.*hook_pattern at layer 1.*run_with_ra"):
        knockout_hooks(model, Edge(1, 0, 2, 1))


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_nothing_is_left_on_the_model(arch, kind, shared):
    model, _ = routed(arch, kind, shared)
    plain = logits_with(model, [])
    hooks = knockout_hooks(model, as_edges(CELLS))

    def stop(value, hook):
        raise KeyboardInterrupt

    def left():
        # Attention of a bridge keeps the pattern of its last forward pass, whatever runs.
        return {key: value for key, value in snapshot(model).items() if key[-1] != "tensors"}

    before = left()
    wanted = logits_with(model, hooks)
    assert not changes(before, left())
    # Stopped at every place of the layer: before, between and after the hooks of the cut.
    places = ("hook_q", "hook_v", "hook_z", "hook_pattern")
    names = [f"blocks.1.attn.{place}" for place in places] + ["blocks.1.hook_attn_out"]
    if (arch, kind) in OBSERVE_ONLY:
        names.append("blocks.1.hook_out")
    for name in names:
        for order in ([*hooks, (name, stop)], [(name, stop), *hooks]):
            with pytest.raises(KeyboardInterrupt):
                logits_with(model, order)
            assert not changes(before, left()), name
            assert torch.equal(logits_with(model, []), plain)
    assert torch.equal(logits_with(model, hooks), wanted)
