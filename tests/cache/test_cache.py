"""RACache: read like an ActivationCache, and summed up as the paper does."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch

from ra_lens import RACache, get_ra_caching_hooks, run_with_ra
from ra_lens.errors import BadInput, NotStored
from tiny_models import ANY_KIND, CASES, KINDS, N_HEADS, N_KV, N_LAYERS, random_ids, relative, text

POS, TARGET = 6, [8, 9, 10]
IDS = random_ids(3, POS)
KIND_OF_MAP = ("ra", "pattern", "pattern_grad")


@pytest.fixture(params=ANY_KIND)
def ra(request, shared):
    return run_with_ra(shared("gpt2", request.param), IDS, target=TARGET)[1]


@pytest.mark.parametrize("kind_of_map", KIND_OF_MAP)
def test_both_forms_of_a_name_and_negative_layers(ra, kind_of_map):
    for layer in range(N_LAYERS):
        value = ra[kind_of_map, layer]
        assert value.shape == (3, N_HEADS, POS, POS)
        assert ra[f"blocks.{layer}.attn.hook_{kind_of_map}"] is value
        assert ra[kind_of_map, layer - N_LAYERS] is value
        assert ra[f"hook_{kind_of_map}", layer] is value
        assert (kind_of_map, layer) in ra
        assert f"blocks.{layer}.attn.hook_{kind_of_map}" in ra


def test_it_is_a_mapping_from_full_names_to_maps(ra):
    names = {f"blocks.{i}.attn.hook_{k}" for i in range(N_LAYERS) for k in KIND_OF_MAP}
    assert set(ra) == set(ra.keys()) == names
    assert len(ra) == len(names)
    assert len(list(ra.values())) == len(names)
    assert all(value is ra[name] for name, value in ra.items())
    assert ra.n_bytes == len(names) * 3 * N_HEADS * POS * POS * 4
    assert (ra.layers, ra.n_heads, ra.batch_size) == ([0, 1, 2], N_HEADS, 3)


def test_what_is_not_there_is_said_with_what_is(ra):
    for key in (
        ("ra", N_LAYERS),
        ("ra", -4),
        ("ra", np.int64(9)),
        "blocks.9.attn.hook_ra",
        "hook_ra",
    ):
        assert key not in ra
        with pytest.raises(NotStored, match=r"not in this cache, which holds blocks.*layers \[0"):
            ra[key]
    assert ("resid", 0) not in ra
    with pytest.raises(NotStored, match=r"found kind 'resid'.*ra, pattern, pattern_grad"):
        ra["resid", 0]
    with pytest.raises(KeyError):
        ra["resid", 0]
    assert 5 not in ra
    assert None not in ra
    assert ra["ra", np.int64(1)] is ra["ra", torch.tensor(1)] is ra["ra", 1]
    assert ("ra", np.int64(1)) in ra


STRANGE = [("ra",), ("ra", 0, "attn"), ("ra", "0"), ("ra", 0.0), ("ra", True), (0, "ra"), 0, None]
STRANGE += [("ra", slice(0, 2)), ("ra", [0])]


@pytest.mark.parametrize("strange", STRANGE, ids=repr)
def test_a_name_of_another_form_is_not_there_and_said_to_be_none(ra, strange, request):
    assert strange not in ra
    if request.config.getoption("--check-shapes"):
        pytest.skip("the check of types is there first")
    needed = re.escape(f"found {strange!r}; ask for a map by kind and number of the layer, as ra['")
    for maps in (ra, ra.mean()):
        with pytest.raises(NotStored, match=needed):
            maps[strange]


def test_stack_and_norms_are_made_of_the_maps(ra):
    for kind in KIND_OF_MAP:
        stacked = ra.stack(kind)
        assert stacked.shape == (N_LAYERS, 3, N_HEADS, POS, POS)
        assert ra.norms(kind).shape == (3, N_LAYERS, N_HEADS)
        for layer in range(N_LAYERS):
            assert torch.equal(stacked[layer], ra[kind, layer])
            for i in range(3):
                for head in range(N_HEADS):
                    wanted = torch.linalg.matrix_norm(ra[kind, layer][i, head].double())
                    assert ra.norms(kind)[i, layer, head] == pytest.approx(float(wanted), rel=1e-5)
    assert torch.equal(ra.stack(), ra.stack("ra"))
    assert torch.equal(ra.norms(), ra.norms("ra"))


def test_top_heads_are_sorted_by_mean_norm(ra):
    mean = ra.norms().mean(0)
    top = ra.top_heads(5)
    order = sorted(
        ((float(mean[i, h]), i, h) for i in range(N_LAYERS) for h in range(N_HEADS)), reverse=True
    )
    assert [(h.layer, h.head) for h in top] == [(i, h) for _, i, h in order[:5]]
    assert [h.score for h in top] == pytest.approx([s for s, _, _ in order[:5]])
    assert top[0].label == f"L{top[0].layer}H{top[0].head}"
    assert ra.top_heads(np.int64(5)) == ra.top_heads(torch.tensor(5)) == top
    assert len(ra.top_heads()) == 10
    assert len(ra.top_heads(100)) == N_LAYERS * N_HEADS
    by_pattern = [(h.layer, h.head) for h in ra.top_heads(12, "pattern")]
    assert by_pattern != [(h.layer, h.head) for h in ra.top_heads(12)]


def test_slicing_the_batch_keeps_what_belongs_to_each_example(ra):
    whole = slice(0, 3, 2)
    cases = [(1, [1]), (-1, [2]), (slice(1, None), [1, 2]), ([2, 0], [2, 0]), (whole, [0, 2])]
    for given, chosen in cases:
        cut = ra.apply_slice_to_batch_dim(given)
        assert cut.has_batch_dim != isinstance(given, int)
        for name, value in ra.items():
            wanted = value[chosen[0]] if isinstance(given, int) else value[chosen]
            assert torch.equal(cut[name], wanted)
        assert torch.equal(cut.loss.flatten(), ra.loss[chosen])
        assert cut.info.targets == tuple(ra.info.targets[i] for i in chosen)
        assert torch.equal(cut.norms().reshape(-1, N_LAYERS, N_HEADS), ra.norms()[chosen])
    assert ra.batch_size == 3  # the original is as it was
    with pytest.raises(BadInput, match="no batch dimension"):
        ra.apply_slice_to_batch_dim(0).apply_slice_to_batch_dim(0)


# What chooses examples, and those that it chooses; a number alone drops the batch dimension.
ONE_OF_THREE = [
    *(np.dtype(name).type(2) for name in ("int8", "int16", "int32", "int64", "uint8", "uint64")),
    np.array(2),
    *(torch.tensor(2, dtype=t) for t in (torch.uint8, torch.int8, torch.int32, torch.int64)),
]
MASK = [True, False, True]
SEVERAL_OF_THREE = [
    (MASK, [0, 2]),
    ([np.True_, np.False_, np.True_], [0, 2]),
    ([torch.tensor(keep) for keep in MASK], [0, 2]),
    (np.array(MASK), [0, 2]),
    (torch.tensor(MASK), [0, 2]),
    (pd.Series(MASK, index=["a", "b", "c"]), [0, 2]),
    (pd.Series(MASK, dtype="boolean"), [0, 2]),
    (lambda: (keep for keep in MASK), [0, 2]),
    (torch.tensor([-1, 0], dtype=torch.int8), [2, 0]),
    (np.array([2, 0], dtype=np.uint16), [2, 0]),
    (pd.Series([2, 0], index=[0, 1]), [2, 0]),
    (pd.Index([2, 0]), [2, 0]),
    ([np.int64(2), torch.tensor(0)], [2, 0]),
    (range(2, -1, -2), [2, 0]),
    (lambda: iter([2, 0]), [2, 0]),
    ([1], [1]),
    (torch.tensor([1]), [1]),
    (np.array([1]), [1]),
    (slice(np.int64(1), None), [1, 2]),
]


def spelled(given):
    return f"{type(given).__module__}.{type(given).__name__} {getattr(given, 'dtype', '')}"


@pytest.mark.parametrize("given", ONE_OF_THREE, ids=spelled)
def test_a_number_of_any_type_takes_one_example(given, ra):
    cut = ra.apply_slice_to_batch_dim(given)
    assert not cut.has_batch_dim
    assert torch.equal(cut["ra", 1], ra["ra", 1][2])
    assert cut.loss == ra.loss[2]
    assert cut.info.targets == (f"w{TARGET[2]}",)


@pytest.mark.parametrize(
    ("given", "examples"), SEVERAL_OF_THREE, ids=[spelled(g) for g, _ in SEVERAL_OF_THREE]
)
def test_several_examples_are_taken_by_places_or_by_bools(given, examples, ra):
    cut = ra.apply_slice_to_batch_dim(given() if callable(given) else given)
    assert cut.has_batch_dim
    assert torch.equal(cut["ra", 1], ra["ra", 1][examples])
    assert torch.equal(cut.loss, ra.loss[examples])
    assert cut.info.targets == tuple(f"w{TARGET[i]}" for i in examples)


def test_a_condition_on_the_loss_takes_the_examples_that_meet_it(ra):
    order = ra.loss.argsort()
    between = (ra.loss[order[0]] + ra.loss[order[1]]) / 2
    cut = ra.apply_slice_to_batch_dim(ra.loss > between)
    assert float(cut.loss.min()) > between
    assert cut.batch_size == 2
    with pytest.raises(BadInput, match=r"batch_slice=tensor.*which is none of the 3 examples"):
        ra.apply_slice_to_batch_dim(ra.loss > 1e6)


NO_CHOICE = {
    "nothing": (slice(3, None), r"none of the 3 examples. Give at least one"),
    "an empty list": ([], r"batch_slice=\[\], which is none of the 3 examples"),
    "all False": (np.zeros(3, dtype=bool), r"none of the 3 examples"),
    "outside": (3, r"batch_slice=3, but 3 is none of the 3 examples: 0 to 2, or -3 to -1"),
    "one outside": ([0, -4], r"but -4 is none of the 3 examples"),
    "too few bools": (torch.tensor([True, False]), r"a bool for each of the 3 examples"),
    "bools and numbers": ([True, 1, 2], r"\[True, 1, 2\]; give whole numbers"),
    "a missing value": (pd.Series([True, None, True], dtype="boolean"), "give whole numbers"),
    "one bool": (True, r"batch_slice=True; give whole numbers, a slice, or a bool for each"),
    "one bool of torch": (torch.tensor(True), "give whole numbers"),
    "floats": (np.array([0.0, 1.0]), r"array\(\[0., 1.\]\); give whole numbers"),
    "a float of torch": (torch.tensor(1.0), "give whole numbers"),
    "text": ("01", r"batch_slice='01'; give whole numbers"),
    "a column": (torch.tensor([[True], [False], [True]]), "give whole numbers"),
    "a table": (pd.DataFrame({0: [1, 2]}), "give whole numbers"),
    "a dict": ({0: "a"}, "give whole numbers"),
    "ends that are floats": (slice(0.5, 2), "give whole numbers"),
    "a step of 0": (slice(0, 2, 0), "give whole numbers"),
}


@pytest.mark.parametrize("case", NO_CHOICE)
def test_what_chooses_no_example_is_refused_by_name(case, ra):
    given, needed = NO_CHOICE[case]
    with pytest.raises(BadInput, match=f"(?s)found {needed}|found batch_slice=.*{needed}"):
        ra.apply_slice_to_batch_dim(given)


def test_one_example_can_lose_its_batch_dimension(ra):
    with pytest.raises(BadInput, match=r"3 examples.*apply_slice_to_batch_dim\(0\)"):
        ra.remove_batch_dim()
    one = ra.apply_slice_to_batch_dim([1])
    bare = one.remove_batch_dim()
    assert bare["ra", 0].shape == (N_HEADS, POS, POS)
    assert torch.equal(bare["ra", 0], ra["ra", 0][1])
    assert bare.stack().shape == (N_LAYERS, N_HEADS, POS, POS)
    assert bare.norms().shape == (N_LAYERS, N_HEADS)
    assert bare.batch_size == 1
    assert bare.loss.shape == ()
    assert bare.str_tokens == ra.str_tokens[1]
    assert bare.top_heads(3) == one.top_heads(3)
    assert bare.remove_batch_dim() is bare
    assert relative(bare.mean()["ra", 0], ra["ra", 0][1]) == 0
    assert len(bare.to_dataframe()) == N_LAYERS * N_HEADS
    assert "1 prompt," in repr(bare)


def test_to_moves_and_converts_every_tensor(ra):
    wide = ra.to(torch.float64)
    assert {t.dtype for t in (*wide.values(), wide.norms(), wide.loss)} == {torch.float64}
    assert relative(wide.stack(), ra.stack()) == 0
    assert ra["ra", 0].dtype == torch.float32
    for place, needed in (
        ("float16", r"dtype='float16'; give torch.float16"),
        (torch.int8, r"dtype=torch.int8, which holds no floating-point numbers"),
        ("nowhere", r"device='nowhere'; give a device of torch, such as 'cpu'"),
    ):
        with pytest.raises(BadInput, match=needed):
            ra.to(place)
    assert ra.to("cpu")["ra", 0].device.type == "cpu"


def own_pass(model, ids, **options):
    """A cache filled by the user's own backward pass, which knows no loss."""
    ra, fwd_hooks, _ = get_ra_caching_hooks(model, **options)
    with model.hooks(fwd_hooks=fwd_hooks):
        logits = model(ids)[:, -1].log_softmax(-1)
        (-logits.gather(1, torch.tensor(TARGET[: len(ids)])[:, None])).sum().backward()
    return ra


@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_cache_that_was_given_no_loss_does_what_others_do(kind, shared, ra, tmp_path):
    cache = own_pass(shared("gpt2", kind), IDS)
    assert cache.loss.shape == (3,)
    assert bool(cache.loss.isnan().all())
    some = cache.apply_slice_to_batch_dim([2, 0])
    assert relative(some["ra", 0], ra["ra", 0][[2, 0]]) < 1e-5
    one = cache.apply_slice_to_batch_dim(1)
    bare = cache.apply_slice_to_batch_dim([1]).remove_batch_dim()
    for cut in (one, bare):
        assert relative(cut["ra", 0], ra["ra", 0][1]) < 1e-5
        assert cut.loss.isnan()
    for each in (cache, some, one):
        assert "nan" not in repr(each).lower()
        frame = each.to_dataframe()
        assert len(frame) == each.batch_size * N_LAYERS * N_HEADS
        assert frame["loss"].isna().all()
        each.save(tmp_path / "cache")
        back = RACache.load(tmp_path / "cache")
        assert repr(back) == repr(each)
        assert torch.equal(back.stack(), each.stack())
        assert back.loss.shape == each.loss.shape
        page = each.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
        assert "nan" not in page.partition("<script")[0].lower()
    other = own_pass(shared("gpt2", kind), IDS[:2], store="norms")
    assert other.apply_slice_to_batch_dim(1).loss.isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_the_examples_of_a_second_backward_pass_may_be_others(kind, shared):
    model = shared("gpt2", kind)
    ra, fwd_hooks, _ = get_ra_caching_hooks(model)
    with model.hooks(fwd_hooks=fwd_hooks):
        for n in (3, 2):
            model(IDS[:n])[:, -1, 5].sum().backward()
            assert ra.batch_size == len(ra.loss) == n
    assert ra.apply_slice_to_batch_dim(-1)["ra", 0].shape == (N_HEADS, POS, POS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_activation_cache_without_batch_dimension_is_read(kind, shared):
    model = shared("gpt2", kind)
    _, cache = model.run_with_cache(IDS[:1], return_type="loss", incl_bwd=True)
    ra = RACache.from_activation_cache(cache, model)
    bare = RACache.from_activation_cache(cache.remove_batch_dim(), model)
    assert not bare.has_batch_dim
    assert torch.equal(bare.stack(), ra.stack()[:, 0])
    assert bare.loss.isnan()
    assert bare.loss.shape == ()


def test_means_need_equal_lengths(shared):
    model = shared("gpt2", KINDS[0])
    prompts = [text(random_ids(n)) for n in (4, 6)]
    _, ra = run_with_ra(model, prompts, target=8)
    with pytest.raises(BadInput, match=r"prompts of 5 to 7 tokens.*same length.*Group"):
        ra.mean()
    assert (
        relative(ra.apply_slice_to_batch_dim([0]).mean()["ra", 1], ra["ra", 1][0, :, :5, :5]) == 0
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_means_of_an_example_leave_out_its_padding(side, shared):
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, [text(random_ids(n)) for n in (4, 6)], target=8, padding_side=side)
    _, alone = run_with_ra(model, text(random_ids(4)), target=8)
    mean = ra.apply_slice_to_batch_dim([0]).mean()
    assert relative(mean["ra", 0], alone["ra", 0][0]) < 1e-5


def test_repr_says_what_is_in_it(ra, shared):
    said = repr(ra)
    for part in ("gpt2", "3 prompts", "layers 0…2", "4 heads", "ra, pattern, pattern_grad"):
        assert part in said
    assert f"{ra.n_bytes / 1e6:.2f} MB" in said
    assert "answer_nll of 'w8', 'w9', 'w10'" in said
    shown = re.search(r"loss ([\d.]+) on average", said)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(float(ra.loss.mean()), abs=1e-4)
    model = shared("gpt2", KINDS[0])
    _, some = run_with_ra(model, "w4 w5", layers=[0, 2], store="norms")
    said = repr(some)
    for part in (
        "1 prompt,",
        "layers 0, 2",
        "norms only",
        "<|endoftext|> prepended",
        "top prediction",
    ):
        assert part in said


def test_the_repr_of_mean_maps_says_what_was_averaged(ra, shared):
    wanted = f"MeanMaps of 3 prompts: layers 0…2, {N_HEADS} heads, 6 × 6 tokens (ra, pattern, "
    n_bytes = 3 * N_LAYERS * N_HEADS * POS * POS * 4
    assert repr(ra.mean()) == wanted + f"pattern_grad, {n_bytes / 1e6:.2f} MB)"
    names = ["blocks.0.attn.hook_ra", "blocks.2.attn.hook_ra"]
    model = shared("gpt2", KINDS[0])
    _, one = run_with_ra(model, IDS[:1], target=8, layers=[0, 2], store="mean", names_filter=names)
    assert "of 1 prompt: layers 0, 2, 4 heads, 6 × 6 tokens (ra, 0.00 MB)" in repr(one.mean())


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_kv_groups_are_those_of_the_model(arch, kind, shared):
    _, ra = run_with_ra(shared(arch, kind), IDS, target=TARGET)
    per_group = N_HEADS // N_KV if arch == "llama" else 1
    assert [ra.kv_group(h) for h in range(N_HEADS)] == [h // per_group for h in range(N_HEADS)]
    assert ra.kv_group(-1) == ra.kv_group(N_HEADS - 1)
    assert ra.kv_group(np.int64(3)) == ra.kv_group("L0H3") == ra.kv_group(3)
    with pytest.raises(BadInput, match=r"head 4.*heads 0 to 3"):
        ra.kv_group(4)
    with pytest.raises(BadInput, match=r"found True among heads"):
        ra.kv_group(True)


@pytest.mark.parametrize("n_kv", [N_KV, 1])  # two groups of two heads, one of four
@pytest.mark.parametrize("kind", KINDS)
def test_query_heads_of_one_group_share_their_values(kind, n_kv, shared):
    # An oracle for kv_group: G = dL/dz Vᵀ, so the rows of G lie in the span of V's columns. With
    # 14 tokens and 6 numbers per head only the right V spans them.
    model, ids = shared("llama", kind, num_key_value_heads=n_kv), random_ids(1, 14)
    _, ra = run_with_ra(model, ids, target=8)
    _, cache = model.run_with_cache(ids)
    value = cache["v", 0].reshape(14, n_kv, -1).double()
    for head in range(N_HEADS):
        rows = ra["pattern_grad", 0][0, head].double().T
        for group in range(n_kv):
            v = value[:, group]
            off = relative(v @ torch.linalg.lstsq(v, rows).solution, rows)
            assert (off < 1e-4) == (group == ra.kv_group(head))


def test_to_activation_cache_holds_the_same_maps(ra, shared):
    model = shared("gpt2", KINDS[0])
    cache = ra.to_activation_cache(model)
    assert type(cache).__name__ == "ActivationCache"
    assert set(cache.keys()) == set(ra)
    assert torch.equal(cache["blocks.1.attn.hook_ra"], ra["ra", 1])
    assert torch.equal(cache["pattern", 1], ra["pattern", 1])
    for kind_of_map in KIND_OF_MAP:  # as the docstring says
        assert cache[kind_of_map, 1, "attn"] is ra[kind_of_map, 1]


def test_to_dataframe_has_a_row_per_prompt_layer_and_head(ra):
    frame = ra.to_dataframe()
    assert len(frame) == 3 * N_LAYERS * N_HEADS
    for i, layer, head in ((0, 0, 0), (2, 1, 3), (1, 2, 2)):
        row = frame[(frame.prompt == i) & (frame.layer == layer) & (frame["head"] == head)]
        assert len(row) == 1
        for kind in KIND_OF_MAP:
            wanted = float(ra.norms(kind)[i, layer, head])
            assert row[f"{kind}_norm"].item() == pytest.approx(wanted)
        assert row.loss.item() == pytest.approx(float(ra.loss[i]))
        assert row.target.item() == f"w{TARGET[i]}"
