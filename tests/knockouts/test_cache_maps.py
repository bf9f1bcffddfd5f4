"""Maps that a cache foretells: by name, in tables, means and files, and what is missing."""

from __future__ import annotations

import pytest
import torch

from oracle import nll
from padded_rows import padded, part
from ra_lens import RACache, get_ra_caching_hooks, run_with_ra
from ra_lens.errors import BadInput, NotStored
from ra_lens.knockouts.predict import cut_map, knockout_map
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

POS, TARGET = 6, [8, 9, 10]
IDS = random_ids(3, POS)
MADE = ("knockout", "cut")


@pytest.fixture(params=ANY_KIND)
def ra(request, shared):
    return run_with_ra(shared("gpt2", request.param), IDS, target=TARGET)[1]


def wanted_of(reference, arch, ids, targets):
    """Both maps of every layer, from Hugging Face's gradients at softmax inputs and outputs."""
    found = reference(arch).all_gradients(ids, nll(*targets), range(N_LAYERS))
    knockout = {i: -step / (1 - a) for i, (step, a, _) in found.items()}
    for value in knockout.values():
        value[:, :, 0, 0] = 0.0  # all that the first row has
    return {"knockout": knockout, "cut": {i: -a * grad for i, (_, a, grad) in found.items()}}


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_maps_are_those_of_hugging_faces_gradients(arch, kind, shared, reference):
    _, ra = run_with_ra(shared(arch, kind), IDS, target=TARGET)
    wanted = wanted_of(reference, arch, IDS, TARGET)
    for layer in range(N_LAYERS):
        assert relative(ra["knockout", layer], wanted["knockout"][layer]) < 1e-5
        if not (kind == "HookedTransformer" and arch in ("gpt2", "opt")):
            # There value biases are folded, which moves G by a number for each row.
            assert relative(ra["cut", layer], wanted["cut"][layer]) < 1e-5


@pytest.mark.parametrize("kind", MADE)
def test_every_form_of_a_name(ra, kind):
    for layer in range(N_LAYERS):
        value = ra[kind, layer]
        assert value.shape == (3, N_HEADS, POS, POS)
        for name in (f"blocks.{layer}.attn.hook_{kind}", (f"hook_{kind}", layer - N_LAYERS)):
            assert name in ra
            assert torch.equal(ra[name], value)
        assert (kind, layer) in ra
    assert (kind, N_LAYERS) not in ra
    assert f"blocks.7.attn.hook_{kind}" not in ra
    with pytest.raises(NotStored, match=r"\('cut', 7\) is not in this cache, which holds blocks"):
        ra["cut", 7]
    # They are made when they are asked for, not held.
    assert not any(kind in name for name in ra)
    assert len(ra) == 3 * N_LAYERS


@pytest.mark.parametrize("kind", MADE)
def test_stacks_norms_and_tables(ra, kind):
    stack = ra.stack(kind)
    assert torch.equal(stack, torch.stack([ra[kind, i] for i in range(N_LAYERS)]))
    norms = ra.norms(kind)
    assert norms.shape == (3, N_LAYERS, N_HEADS)
    torch.testing.assert_close(norms, stack.square().sum((-1, -2)).sqrt().transpose(0, 1))
    frame = ra.to_dataframe()
    row = frame[(frame.prompt == 1) & (frame.layer == 2) & (frame["head"] == 3)].iloc[0]
    assert row[f"{kind}_norm"] == pytest.approx(float(norms[1, 2, 3]))
    best = ra.top_heads(1, kind)[0]
    assert best.score == pytest.approx(float(norms.mean(0).max()))
    one = ra.apply_slice_to_batch_dim(1)
    assert one[kind, 0].shape == (N_HEADS, POS, POS)
    assert torch.equal(one[kind, 0], ra[kind, 0][1])
    assert torch.equal(one.norms(kind), norms[1])
    some = ra.apply_slice_to_batch_dim([2, 0])
    assert torch.equal(some[kind, 1], ra[kind, 1][[2, 0]])
    assert torch.equal(one.stack(kind), stack[:, 1])


@pytest.mark.parametrize("kind", MADE)
def test_means(ra, kind, shared):
    mean = ra.mean(kind)
    for layer in range(N_LAYERS):
        # The mean of the maps, not a map made of means.
        torch.testing.assert_close(mean[kind, layer], ra[kind, layer].mean(0))
    with pytest.raises(NotStored):
        ra.mean()[kind, 0]
    lean = run_with_ra(shared("gpt2", KINDS[0]), IDS, target=TARGET, store="mean")[1]
    with pytest.raises(NotStored, match=rf"'?{kind}'?"):
        lean.mean(kind)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("arch", "kind"), [("llama", KINDS[0]), ("opt", KINDS[-1])])
def test_padding_is_nothing_and_changes_nothing(arch, kind, side, shared):
    model = shared(arch, kind)
    rows = [IDS[0], IDS[1, :4], IDS[2, :5]]
    tokens, mask = padded(side, 2, rows)
    _, ra = run_with_ra(model, tokens, attention_mask=mask, target=TARGET)
    for i, row in enumerate(rows):
        _, alone = run_with_ra(model, row[None], target=TARGET[i])
        for made in MADE:
            for layer in range(N_LAYERS):
                own = part(ra[made, layer], i, side, len(row))
                torch.testing.assert_close(own, alone[made, layer][0], rtol=1e-4, atol=1e-5)


def test_files_and_other_types(ra, tmp_path):
    ra.save(tmp_path / "maps.safetensors")
    again = RACache.load(tmp_path / "maps.safetensors")
    half = ra.to(torch.bfloat16)
    for kind in MADE:
        assert torch.equal(again[kind, 1], ra[kind, 1])
        # Made in float32 from what is rounded.
        assert half[kind, 1].dtype == torch.float32
        assert torch.isfinite(half[kind, 1]).all()
        assert relative(half[kind, 1], ra[kind, 1]) < 0.05
        wide = ra.to(torch.float64)
        assert wide[kind, 1].dtype == torch.float64
        assert relative(wide[kind, 1], ra[kind, 1]) < 1e-5


@pytest.mark.parametrize(
    ("arch", "kind"), [c for c in CASES if c not in OBSERVE_ONLY and c[0] == "llama"]
)
def test_from_an_activation_cache(arch, kind, shared):
    model = shared(arch, kind)
    _, ra = run_with_ra(model, IDS, target=TARGET)
    model.zero_grad()

    def loss(logits):
        return nll(*TARGET)(logits)

    cache = {}

    def keep(value, hook):
        cache[hook.name] = value.detach()

    def keep_grad(value, hook):
        value = value[0] if isinstance(value, tuple) else value
        cache[f"{hook.name}_grad"] = value.detach()

    names = [f"blocks.{i}.attn.hook_pattern" for i in range(N_LAYERS)]
    with (
        torch.enable_grad(),
        model.hooks([(name, keep) for name in names], [(name, keep_grad) for name in names]),
    ):
        loss(model(IDS)).backward()
    model.zero_grad()
    found = RACache.from_activation_cache(cache, model)
    for made in MADE:
        for layer in range(N_LAYERS):
            assert relative(found[made, layer], ra[made, layer]) < 1e-5
    # It was not told which tokens were read: positions choose, texts do not.
    torch.testing.assert_close(
        found.knockout(queries=-1, keys=[0, 2]), ra.knockout(queries=-1, keys=[0, 2])
    )
    with pytest.raises(BadInput, match=r"found keys='w5', but this cache does not know"):
        found.knockout(queries=-1, keys="w5")
    assert found.top_edges(1)[0].key_token == ""


def test_parts_that_were_not_stored(shared):
    model = shared("gpt2", KINDS[0])
    run = {"target": TARGET}
    for store, instead in (
        ("norms", r"ra\.norms\(\)"),
        ("mean", r"ra\.mean\(\) and ra\.norms\(\)"),
    ):
        _, ra = run_with_ra(model, IDS, store=store, **run)
        for kind, part_of in (("knockout", "pattern"), ("cut", "pattern")):
            needed = rf"'{kind}' is made from 'pattern' and .*'{part_of}' was not kept.*{instead}"
            with pytest.raises(NotStored, match=needed):
                ra[kind, 0]
            assert (kind, 0) not in ra
            with pytest.raises(NotStored, match="store='maps'"):
                ra.norms(kind)
        for ask in (
            lambda ra: ra.edges(queries=-1),
            lambda ra: ra.knockout(queries=-1, keys=0),
            lambda ra: ra.top_edges(3),
            lambda ra: ra.flow(),
        ):
            with pytest.raises(NotStored, match=rf"was not kept.*{instead}.*store='maps'"):
                ask(ra)
        frame = ra.to_dataframe()
        assert "ra_norm" in frame
        assert not [name for name in frame if "knockout" in name or "cut" in name]
    _, ra = run_with_ra(model, IDS, names_filter=lambda n: not n.endswith("pattern_grad"), **run)
    assert ("knockout", 0) in ra
    assert ("cut", 0) not in ra
    with pytest.raises(NotStored, match=r"'cut' is made from 'pattern' and 'pattern_grad'"):
        ra["cut", 0]
    assert ra.knockout(queries=-1, keys=0).shape == (3,)
    with pytest.raises(NotStored, match=r"'pattern_grad', 0\) is not in this cache"):
        ra.knockout(queries=-1, keys=0, renormalise=False)
    _, ra = run_with_ra(model, IDS, names_filter=lambda name: name.endswith("hook_ra"), **run)
    with pytest.raises(NotStored, match=r"'knockout' is made from 'pattern' and 'ra'"):
        ra["knockout", 0]
    with pytest.raises(NotStored, match=r"found kind 'knocked'.*knockout, cut"):
        ra["knocked", 0]


def test_before_the_backward_pass_there_is_nothing(shared):
    model = shared("gpt2", KINDS[0])
    ra, fwd_hooks, bwd_hooks = get_ra_caching_hooks(model)
    assert ("knockout", 0) not in ra
    with pytest.raises(NotStored, match="run the backward pass"):
        ra["knockout", 0]
    with torch.enable_grad(), model.hooks(fwd_hooks, bwd_hooks):
        nll(*TARGET)(model(IDS)).backward()
    model.zero_grad()
    _, same = run_with_ra(model, IDS, target=TARGET)
    assert relative(ra["knockout", 1], same["knockout", 1]) < 1e-6


def test_both_are_made_by_the_formulas(ra):
    step = ra["ra", 1] / ra.scale[1]
    assert torch.equal(ra["knockout", 1], knockout_map(ra["pattern", 1], step))
    assert torch.equal(ra["cut", 1], cut_map(ra["pattern", 1], ra["pattern_grad", 1]))
