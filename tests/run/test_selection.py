"""Less than everything: layers, names, norms or means only, another dtype; the rest unchanged."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from held import forget_older, tensors_of
from ra_lens import run_with_ra
from ra_lens.errors import NotStored
from ra_lens.patching.mean import RunningMean
from tiny_models import ANY_KIND, CASES, N_HEADS, N_LAYERS, every_model, random_ids, relative, text

POS, TARGET = 6, 8
IDS = random_ids(5, POS)


def check_choice(model, layers, full):
    wanted = sorted({i % N_LAYERS for i in ([layers] if isinstance(layers, int) else layers)})
    _, ra = run_with_ra(model, IDS, target=TARGET, layers=layers)
    assert ra.layers == wanted, layers
    assert len(ra) == 3 * len(wanted)
    assert ra.norms().shape == (5, len(wanted), N_HEADS)
    assert relative(ra.stack(), full.stack()[wanted]) < 1e-6, layers
    assert relative(ra.norms(), full.norms()[:, wanted]) < 1e-6, layers
    assert relative(ra.loss, full.loss) < 1e-6, layers
    for layer in set(range(N_LAYERS)) - set(wanted):
        assert ("ra", layer) not in ra
        with pytest.raises(NotStored, match=rf"layers \[{wanted[0]}"):
            ra["ra", layer]


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_choice_of_layers_gives_the_maps_of_the_full_run(arch, kind, shared, fresh):
    model, new = shared(arch, kind), fresh(arch, kind)
    _, full = run_with_ra(model, IDS, target=TARGET)
    for layers in (0, 1, -1, [1], [0, 2], (2, 0, 0), [-1, -2], range(2)):
        check_choice(model, layers, full)
    check_choice(new, [1], full)
    # Having met one layer says nothing about the others.
    _, rest = run_with_ra(new, IDS, target=TARGET)
    assert relative(rest.stack(), full.stack()) < 1e-6


@pytest.mark.parametrize("kind", ANY_KIND)
def test_names_filter_keeps_what_it_names(kind, shared):
    model = shared("gpt2", kind)
    _, full = run_with_ra(model, IDS, target=TARGET)
    one = "blocks.1.attn.hook_ra"
    cases = {
        (one,): one,
        (one, "blocks.2.attn.hook_pattern"): [one, "blocks.2.attn.hook_pattern"],
        tuple(f"blocks.{i}.attn.hook_ra" for i in range(3)): lambda name: name.endswith("hook_ra"),
    }
    for names, names_filter in cases.items():
        _, ra = run_with_ra(model, IDS, target=TARGET, names_filter=names_filter)
        assert sorted(ra) == sorted(names)
        for name in names:
            assert torch.equal(ra[name], full[name])
        assert torch.equal(ra.norms(), full.norms())  # norms are kept whatever is stored


@pytest.mark.parametrize("kind", ANY_KIND)
def test_norms_only(kind, shared):
    model = shared("llama", kind)
    _, full = run_with_ra(model, IDS, target=TARGET)
    for batch_size in (None, 2):
        _, ra = run_with_ra(
            model, IDS, target=TARGET, store="norms", batch_size=batch_size, progress=False
        )
        assert len(ra) == 0
        assert ra.n_bytes == 0
        for what in ("ra", "pattern", "pattern_grad"):
            wanted = torch.stack(
                [full[what, i].pow(2).sum((-1, -2)).sqrt() for i in range(N_LAYERS)], dim=1
            )
            assert relative(ra.norms(what), wanted) < 1e-5
        tops = [(h.layer, h.head) for h in ra.top_heads(12)]
        assert tops == [(h.layer, h.head) for h in full.top_heads(12)]
        with pytest.raises(NotStored, match=r"store='norms', which gives ra.norms\(\).*'maps'"):
            ra["ra", 0]
        with pytest.raises(NotStored, match=r"store='norms'"):
            ra.mean()


@pytest.mark.parametrize("kind", ANY_KIND)
def test_norms_only_holds_no_map_of_a_layer_that_is_done(kind, shared):
    # Not GPT-2: TransformerBridge keeps the last pattern of each of its layers in an attribute.
    model, shape = shared("llama", kind, num_hidden_layers=8), (2, N_HEADS, 11, 11)
    alive = {}
    forget_older()

    def count(name):
        if name.endswith("hook_ra"):
            layer = int(name.split(".")[1])
            alive[store][layer] = len({t.data_ptr() for t in tensors_of(shape)})
        return True

    for store in ("norms", "maps"):
        alive[store] = {}
        _, ra = run_with_ra(
            model, random_ids(2, 11), target=TARGET, names_filter=count, store=store
        )
        assert len(ra) == (0 if store == "norms" else 24)
    # Layers still to come: their pattern, and on the bridge the copy that is handed on. This layer:
    # three maps, and R~, which goes on to the scores.
    copies = 2 if kind == "TransformerBridge" else 1
    assert all(alive["norms"][layer] <= copies * layer + 4 for layer in range(8))
    assert alive["maps"][0] >= 3 * 7
    del ra
    assert tensors_of(shape) == []


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ANY_KIND)
def test_the_running_mean_is_the_mean_of_the_maps(kind, side, shared):
    model = shared("opt", kind)
    prompts, answers = [text(row) for row in IDS], ["w4", "w5", "w6", "w7", "w8"]
    options = {"target": answers, "padding_side": side, "progress": False}
    _, full = run_with_ra(model, prompts, **options)
    running = RunningMean(full.sites)
    for part in (slice(0, 2), slice(2, 5)):
        options["target"] = answers[part]
        _, ra = run_with_ra(model, prompts[part], **options)
        running.count += ra.batch_size
        for name, value in ra.items():
            running.add(name, value)
    options["target"] = answers
    for batch_size in (None, 1, 2, 5):
        _, ra = run_with_ra(model, prompts, store="mean", batch_size=batch_size, **options)
        assert len(ra) == 0
        assert torch.allclose(ra.norms(), full.norms(), rtol=1e-5)
        for mean in (ra.mean(), full.mean(), running.result()):
            assert mean.count == 5
            for layer in range(N_LAYERS):
                for what in ("ra", "pattern", "pattern_grad"):
                    wanted = full[what, layer].double().mean(0)
                    assert relative(mean[what, layer], wanted) < 1e-5
            assert torch.equal(mean["ra", -1], mean["blocks.2.attn.hook_ra"])
    with pytest.raises(NotStored, match=r"store='mean', which gives ra.mean\(\)"):
        ra["ra", 0]
    with pytest.raises(NotStored, match="among the mean maps"):
        ra.mean()["ra", 7]


@pytest.mark.parametrize("kind", ANY_KIND)
def test_dtype_and_device_of_what_is_kept(kind, shared):
    model = shared("gpt2", kind)
    _, full = run_with_ra(model, IDS, target=TARGET)
    _, half = run_with_ra(model, IDS, target=TARGET, dtype=torch.bfloat16, device="cpu")
    assert {t.dtype for t in half.values()} == {torch.bfloat16}
    assert half.n_bytes == full.n_bytes // 2
    for name, value in full.items():  # rounded once, from the float32 map
        assert torch.equal(half[name], value.bfloat16())
    assert torch.equal(half.norms(), full.norms())
    _, wide = run_with_ra(model, IDS, target=TARGET, dtype=torch.float64)
    assert relative(wide.stack(), full.stack()) == 0


@pytest.mark.parametrize("store", ["maps", *every_model("norms", "mean")])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_a_cache_that_is_dropped_is_freed(arch, kind, store, fresh):
    model = fresh(arch, kind)
    for _ in range(2):  # with the routes unknown, then known
        _, ra = run_with_ra(model, IDS, target=TARGET, store=store)
        alive = weakref.ref(ra)
        tensors = [weakref.ref(value) for value in ra.values()]
        del ra
        gc.collect()
        assert alive() is None
        assert not any(tensor() is not None for tensor in tensors)
