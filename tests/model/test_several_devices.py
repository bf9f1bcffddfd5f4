"""Models over two devices: the maps of one, made where their layers lie and left there.

Simulated devices refuse what GPUs refuse and count what moves; two GPUs run the same tests.
"""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import accelerate
import pytest
import torch
import transformers

from ra_lens import load_model, run_with_ra
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.model import as_lens, load_folder
from ra_lens.model.loading import demo_model_folder
from ra_lens.model.placement import Placement, device_of
from ra_lens.model.sites import STORED_KINDS
from ra_lens.model.source import source_of
from several_devices import CASES, device_map, home
from simulated_devices import Copies
from tiny_models import D_MODEL, KINDS, N_HEADS, every_model, random_ids, relative, text, tokenizer

BRIDGE, HOOKED = "TransformerBridge", "HookedTransformer"
IDS, TARGETS = random_ids(2, 7), [5, 11]
RUNS = {
    "maps": {},
    "norms": {"store": "norms"},
    "mean": {"store": "mean"},
    "recompute": {"recompute": True},
    "rows": {"recompute": True, "store": "norms", "query_rows": 3},
    "vectors": {"vectors": True},
    "batches": {"batch_size": 1, "progress": False},
    "auto": {"batch_size": "auto", "progress": False},
    "last layers": {"layers": [-1, -2]},
    "relp": {"backward": "relp"},
    "all logits": {"return_logits": "all"},
}
FIRST = [("gpt2", KINDS[0]), ("llama", KINDS[-1])]
needs_bridge = pytest.mark.skipif(BRIDGE not in KINDS, reason="no TransformerBridge here")
needs_hooked = pytest.mark.skipif(HOOKED not in KINDS, reason="no HookedTransformer here")


def check_equal(found, wanted, devices=None, most=1e-10):
    """Every map and vector, the norms and the loss; and where they lie, by layer."""
    assert list(found) == list(wanted)
    for layer, site in found.sites.items():
        for name in (name for name in found if name.startswith(f"{site.prefix}.")):
            assert devices is None or str(found[name].device) == devices[layer], name
            size = float(wanted[name].norm())
            assert float((home(found[name]) - home(wanted[name])).norm()) <= most * size, name
    for kind in STORED_KINDS:
        if (kind, found.layers[0]) in found._norms:
            assert relative(home(found.norms(kind)), home(wanted.norms(kind))) < most
    assert relative(home(found.loss), home(wanted.loss)) < most


def check_run(two, arch, kind, given, **options):
    """A run of a model over two devices, and of the same on one."""
    over, alone = (load(arch, kind, torch.float64) for load in (two.over, two.alone))
    logits, found = run_with_ra(over, given, **options)
    wanted_logits, wanted = run_with_ra(alone, given, **options)
    assert relative(home(logits), home(wanted_logits)) < 1e-10
    check_equal(found, wanted, two.of_layers)
    return found, wanted


@pytest.mark.parametrize("run", ["maps", *every_model(*(run for run in RUNS if run != "maps"))])
@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        case if case in FIRST else pytest.param(*case, marks=pytest.mark.every_model)
        for case in CASES
    ],
)
def test_maps_are_those_of_one_device(arch, kind, run, two):
    found, wanted = check_run(two, arch, kind, IDS, target=TARGETS, **RUNS[run])
    if found.store == "norms":
        return
    for kind_of_map in STORED_KINDS:
        means = found.mean().by_layer(kind_of_map)
        for layer, value in wanted.mean().by_layer(kind_of_map).items():
            assert relative(home(means[layer]), home(value)) < 1e-10
            assert str(means[layer].device) == two.of_layers[layer]


@pytest.mark.every_model
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("store", ["maps", "norms"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_padded_prompts(arch, kind, store, side, two):
    texts = [text(random_ids(n, seed=n)) for n in (4, 7)]
    check_run(two, arch, kind, texts, target=[" w5", " w11"], store=store, padding_side=side)


@pytest.mark.every_model
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_hooks_and_metrics_of_the_user(arch, kind, two):
    def halved(residual, hook):
        return residual * 0.5

    names = as_lens(two.over(arch, kind, torch.float64)).hook_points
    point = next(n for n in ("blocks.2.hook_in", "blocks.2.hook_resid_pre") if n in names)
    found, _ = check_run(
        two,
        arch,
        kind,
        IDS,
        metric=lambda logits: -logits[:, -1].softmax(-1)[:, 5],
        fwd_hooks=[(point, halved)],
    )
    plain = run_with_ra(two.over(arch, kind, torch.float64), IDS, target=TARGETS)[1]
    assert relative(home(found["ra", 0]), home(plain["ra", 0])) > 0.1


@pytest.mark.every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_other_precisions(arch, kind, dtype, two):
    _, found = run_with_ra(two.over(arch, kind, dtype), IDS, target=TARGETS)
    _, wanted = run_with_ra(two.alone(arch, kind, dtype), IDS, target=TARGETS)
    check_equal(found, wanted, two.of_layers, 2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    ("store", "device"),
    [
        ("norms", "cpu"),
        pytest.param("maps", "cpu", marks=pytest.mark.every_model),
        pytest.param("mean", "second", marks=pytest.mark.every_model),
    ],
)
@pytest.mark.parametrize("kind", [KINDS[0], *every_model(*KINDS[1:])])
def test_maps_are_kept_where_they_are_asked_for(kind, store, device, two):
    where = str(two.pair[1]) if device == "second" else device
    over, alone = two.over("gpt2", kind), two.alone("gpt2", kind)
    options = {"target": TARGETS, "store": store}
    logits, found = run_with_ra(over, IDS, device=where, **options)
    _, wanted = run_with_ra(alone, IDS, **options)
    check_equal(found, wanted, [where] * 4, most=1e-5)
    kept = [*found._norms.values(), *found._maps.values(), logits]
    kept += found.mean().by_layer().values() if store == "mean" else []
    assert {str(value.device) for value in kept} == {where}


# ---- what moves ----------------------------------------------------------------------------------

N, POS = IDS.shape
STREAM, MAP, NORMS = (N, POS, D_MODEL), (N, N_HEADS, POS, POS), (N, N_HEADS)


def moved(two, kind, ids=IDS, **options):
    """What a run copies between devices: how often each shape goes from where to where."""
    if not two.is_simulated:
        pytest.skip("only simulated devices count what moves")
    model = two.over("gpt2", kind)
    options = {"target": TARGETS, **options}
    run_with_ra(model, ids, **options)  # what is found out once
    with Copies() as copies:
        run_with_ra(model, ids, **options)
    found = Counter((c.shape, c.source, c.target) for c in copies.made)
    small = {key: n for key, n in found.items() if key[0] == () or key[0] == (N,)}
    return found - Counter(small)


FORTH, BACK = (STREAM, "sim:0", "sim:1"), (STREAM, "sim:1", "sim:0")


@needs_hooked
@pytest.mark.parametrize("store", ["maps", *every_model("norms", "mean")])
def test_nothing_but_the_residual_stream_goes_between_devices(store, two):
    found = moved(two, HOOKED, store=store)
    # The stream once forth, its gradient once back; the ids, and the columns read of the last MLP
    # and of the stream, to the devices that read them.
    assert found.pop(FORTH) == found.pop(BACK) == 1
    assert {shape for shape, *_ in found} <= {(N, POS), (N, 1)}
    assert {source for _, source, _ in found} == {"cpu"}


@needs_bridge
@pytest.mark.every_model
@pytest.mark.parametrize("store", ["maps", "norms", "mean"])
def test_accelerate_brings_the_stream_mask_and_positions(store, two):
    found = moved(two, BRIDGE, store=store)
    assert found.pop(FORTH) == found.pop(BACK) == 1
    between = {shape for shape, source, target in found if "cpu" not in (source, target)}
    # To each layer the mask and the positions, or the ids; and what is read of the last one, whose
    # unembedding is the embedding, on the first device.
    assert between <= {(N, 1, POS, POS), (1, POS), (N, POS), (N, 1, D_MODEL)}


@needs_hooked
@pytest.mark.every_model
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_no_map_goes_to_the_mask_of_padding(padding_side, two):
    texts = [text(random_ids(n, seed=n)) for n in (4, 7)]
    found = moved(two, HOOKED, texts, target=[" w5", " w11"], padding_side=padding_side)
    assert found[MAP, "sim:0", "sim:1"] == found[MAP, "sim:1", "sim:0"] == 0
    width = max(shape[1] for shape, *_ in found if len(shape) == 3)
    between = {shape for shape, source, target in found if "cpu" not in (source, target)}
    assert between <= {(N, width, D_MODEL), (N, width)}  # the mask


@pytest.mark.every_model
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("store", "kept"),
    [
        ("maps", {MAP: 12, NORMS: 12}),
        ("norms", {NORMS: 12}),
        ("mean", {MAP[1:]: 12, NORMS: 12}),
    ],
)
def test_only_what_is_kept_goes_to_the_host(kind, store, kept, two):
    found = moved(two, kind, store=store, device="cpu")
    to_host = Counter()
    for (shape, _, target), n in found.items():
        to_host[shape] += n * (target == "cpu")
    of_logits = [shape for shape in to_host if shape[:2] == (N, 1)]
    for shape in of_logits:
        del to_host[shape]
    assert +to_host == kept


# ---- loading -------------------------------------------------------------------------------------


@needs_hooked
@pytest.mark.every_model
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_blocks_lie_where_transformer_lens_hands_the_stream_on(arch, two):
    model = two.load(arch, HOOKED)
    lens = as_lens(model)
    assert [str(place) for place in lens.layer_devices.values()] == two.of_layers
    assert str(lens.device) == str(model.embed.W_E.device) == str(two.pair[0])
    assert str(model.unembed.W_U.device) == str(model.ln_final.w.device) == str(two.pair[1])
    assert lens.logits_devices == {two.pair[1]}
    nn_parameters = torch.nn.Module.parameters(model)
    assert {str(p.device) for p in nn_parameters} == set(map(str, two.pair))
    torch.nn.Module.to(model.blocks[1], two.pair[1])
    with pytest.raises(
        UnsupportedModel, match=r"block 1 of .* on \w+:1, .* on \w+:0: .*load_model"
    ):
        run_with_ra(model, IDS, target=TARGETS)


@needs_bridge
@pytest.mark.every_model
@pytest.mark.parametrize("arch", ["gpt2", "llama", "opt"])
def test_a_model_that_accelerate_dispatched(arch, two):
    from transformer_lens.model_bridge import TransformerBridge

    hf_model = transformers.AutoModelForCausalLM.from_pretrained(
        str(two.path(arch)), attn_implementation="eager", dtype=torch.float64
    )
    places = device_map(arch, two.pair)
    hf_model = accelerate.dispatch_model(hf_model, places, main_device=str(two.pair[0]))
    model = TransformerBridge.boot_transformers(
        str(two.path(arch)), hf_model=hf_model, dtype=torch.float64
    ).eval()
    assert [str(place) for place in as_lens(model).layer_devices.values()] == two.of_layers
    _, found = run_with_ra(model, IDS, target=TARGETS)
    _, wanted = run_with_ra(two.alone(arch, BRIDGE, torch.float64), IDS, target=TARGETS)
    check_equal(found, wanted, two.of_layers)


@pytest.mark.every_model
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_by_name_and_how_it_is_loaded_again(kind, two):
    path = two.path("gpt2")
    if kind == HOOKED:
        given = {"device": str(two.pair[0]), "n_devices": 2}
    else:
        given = {"device_map": device_map("gpt2", two.pair)}
    model = load_model(path, kind=kind, **given)
    source = source_of(model)
    for device in (two.pair[0].type, "cpu"):
        again = as_lens(source.load(device))
        found = {str(place) for place in again.layer_devices.values()}
        assert found == ({"cpu"} if device == "cpu" else set(two.of_layers))


@needs_bridge
@pytest.mark.parametrize("n", [2, 3])
def test_a_bridge_is_told_how_many_devices(n):
    with patch("torch.cuda.device_count", return_value=n):
        where = Placement.read(None, n, None)
        assert where.of_bridge == {"n_devices": n}
        assert Placement.read("cuda", n, None).of_bridge == {"n_devices": n}
        with pytest.raises(BadInput, match=rf"n_devices={n} from cuda:1 on.*torch sees {n}"):
            Placement.read("cuda:1", n, None)
    with (
        patch("torch.cuda.device_count", return_value=n + 1),
        pytest.raises(BadInput, match=r"from cuda:1 on for a TransformerBridge.*device_map"),
    ):
        assert Placement.read("cuda:1", n, None).of_bridge


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_devices": 2, "device": "cpu"}, "n_devices=2 on the CPU. Leave one of both away"),
        ({"device": "xpu:9"}, "found device='xpu:9', which cannot be used: .*Give 'cpu'"),
        (
            {"device_map": 5},
            "found device_map=5; give a mapping from modules to devices, or one of",
        ),
        ({"device_map": "spread"}, "found device='spread'; give a device of torch"),
        ({"n_devices": 99}, r"n_devices=99, and torch sees \d devices of the kind 'cuda'"),
        ({"n_devices": 0}, "n_devices=0; give a positive number"),
        ({"n_devices": 1.5}, "n_devices=1.5; give a whole number"),
        ({"device_map": "auto", "device": "cpu"}, "device_map='auto' with device='cpu'"),
        ({"device_map": "auto", "n_devices": 2}, "device_map='auto' with n_devices=2"),
        ({"device_map": "auto", "kind": HOOKED}, "which places a TransformerBridge.*n_devices="),
    ],
)
@pytest.mark.parametrize("load", [load_model, load_folder])
def test_what_cannot_be_placed(load, options, message, request):
    wrong_types = options.get("n_devices") == 1.5 or options.get("device_map") == 5
    if wrong_types and request.config.getoption("--check-shapes"):
        pytest.skip("the annotation says so first")
    with pytest.raises(BadInput, match=message):
        load(demo_model_folder(), **options)


@needs_hooked
@pytest.mark.every_model
def test_an_object_over_two_devices(two):
    given = transformers.AutoModelForCausalLM.from_pretrained(str(two.path("gpt2")))
    options = {"tokenizer": tokenizer("gpt2"), "kind": HOOKED}
    model = load_model(given, device=two.pair[0], n_devices=2, **options)
    assert [str(place) for place in as_lens(model).layer_devices.values()] == two.of_layers
    _, found = run_with_ra(model, IDS, target=TARGETS)
    _, wanted = run_with_ra(two.alone("gpt2", HOOKED), IDS, target=TARGETS)
    check_equal(found, wanted, two.of_layers, most=1e-5)


@needs_bridge
def test_an_object_goes_over_several_devices_as_a_hooked_transformer_only(folder):
    given = transformers.AutoModelForCausalLM.from_pretrained(str(folder("gpt2")))
    options = {"tokenizer": tokenizer("gpt2"), "kind": BRIDGE}
    with (
        patch("torch.cuda.device_count", return_value=2),
        pytest.raises(BadInput, match=r"GPT2LMHeadModel that is to be .*boot_transformers\(name"),
    ):
        load_model(given, n_devices=2, **options)


@pytest.mark.skipif(HOOKED not in KINDS or BRIDGE in KINDS, reason="only TransformerLens 2 does")
def test_layers_that_do_not_divide_are_refused_where_they_overshoot(folder, two):
    with pytest.raises(BadInput, match=r"n_devices=2 for 3 layers, which .* over 3 devices"):
        load_folder(folder("gpt2"), device=two.pair[0], n_devices=2)


@pytest.mark.skipif(HOOKED not in KINDS or BRIDGE not in KINDS, reason="TransformerLens 3 does not")
@pytest.mark.every_model
def test_layers_that_do_not_divide(folder, two):
    model = load_folder(folder("gpt2"), kind=HOOKED, device=two.pair[0], n_devices=2)
    places = as_lens(model).layer_devices.values()
    assert list(places) == [two.pair[0], two.pair[0], two.pair[1]]


def test_weights_that_are_brought_in_count_where_they_compute(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder("llama")))
    layer = model.model.layers[1]
    assert device_of(layer) == torch.device("cpu")
    assert device_of(torch.nn.Dropout()) is None
    accelerate.cpu_offload(model, execution_device=torch.device("meta"))
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert device_of(layer) == torch.device("meta")  # where the hooks say, not where they wait
