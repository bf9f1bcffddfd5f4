"""Memory of a model over two devices: each is counted by itself, on paper, before anything runs."""

from __future__ import annotations

import re

import pytest
import torch

import ra_lens.memory
from ra_lens import run_with_ra
from ra_lens.errors import NotEnoughMemory
from ra_lens.memory import Plan
from ra_lens.model import as_lens
from tiny_models import D_MODEL, D_VOCAB, KINDS, N_HEADS, every_model, random_ids

BRIDGE = "TransformerBridge"
ANY = [KINDS[0], *every_model(*KINDS[1:])]
IDS, TARGET = random_ids(2, 7), 8
MAP = 2 * N_HEADS * 7 * 7 * 4  # of one layer
STREAM = 2 * 7 * D_MODEL * 4
LAYER = MAP + 2 * 7 * (5 * D_MODEL + 4 * D_MODEL) * 4  # what the graph holds of one
PLENTY = 10**12


@pytest.fixture
def free(monkeypatch):
    """What is free on each device, by its name; where nothing is said, plenty."""
    left: dict[str, int] = {}
    monkeypatch.setattr(ra_lens.memory, "free_memory", lambda device: left.get(str(device), PLENTY))
    monkeypatch.setattr(ra_lens.memory, "_spelled", lambda n: f"{n / 1e6} MB")
    return left


def refusal(model, **options):
    """Why a run is refused, and the bytes of maps and graph that it names; nothing has run."""
    ran = []
    hook = ("hook_embed", lambda x, hook: ran.append(x))
    with pytest.raises(NotEnoughMemory) as refused:
        run_with_ra(model, IDS, target=TARGET, fwd_hooks=[hook], **options)
    assert ran == []
    found = re.search(r"\(([\d.e-]+) MB of maps, ([\d.e-]+) MB of graph", str(refused.value))
    return str(refused.value), round(float(found[1]) * 1e6), round(float(found[2]) * 1e6)


@pytest.mark.parametrize("kind", ANY)
def test_the_device_that_is_short_is_named(kind, two, free):
    model, (first, second) = two.over("gpt2", kind), map(str, two.pair)
    need = max(2 * 3 * MAP, 2 * LAYER)
    free[second] = need - 1
    why, maps, graph = refusal(model)
    assert (maps, graph) == (2 * 3 * MAP, 2 * LAYER)
    assert f"of memory on {second} (" in why
    assert f"and 2 of 4 layers), and {free[second] / 1e6} MB are free on {second}." in why
    free[second] = need
    free[first] = need
    run_with_ra(model, IDS, target=TARGET)
    free[first] = need - 1
    assert f"free on {first}." in refusal(model)[0]
    # All of it on one device needs as much as both, and its message is that of one.
    alone = two.alone("gpt2", kind)
    place = str(next(iter(as_lens(alone).layer_devices.values())))
    free[place] = 2 * need
    run_with_ra(alone, IDS, target=TARGET)
    free[place] = 2 * need - 1
    why, maps, graph = refusal(alone)
    assert (maps, graph) == (4 * 3 * MAP, 4 * LAYER)
    assert f"of memory ({maps / 1e6} MB of maps" in why and "time and 4 layers)" in why


@pytest.mark.parametrize("kind", ANY)
@pytest.mark.parametrize(
    ("options", "first", "second", "host"),
    [
        ({"store": "norms"}, (0, 2 * LAYER), (0, 2 * LAYER), None),
        ({"store": "mean"}, (3 * MAP, 2 * LAYER), (3 * MAP, 2 * LAYER), None),
        ({"device": "cpu"}, (0, 2 * LAYER), (0, 2 * LAYER), (12 * MAP, 0)),
        ({"device": "second"}, (0, 2 * LAYER), (12 * MAP, 2 * LAYER), None),
        # From the second layer on there is a graph; of the last there are maps.
        ({"layers": [1, 3]}, (3 * MAP, LAYER), (3 * MAP, 2 * LAYER), None),
        ({"layers": [3]}, None, (3 * MAP, LAYER), None),
        (
            {"store": "norms", "recompute": True},
            (0, LAYER + 2 * STREAM),
            (0, LAYER + 2 * STREAM),
            None,
        ),
        (
            {"store": "norms", "vectors": ["query", "z"], "layers": [0, 2, 3]},
            (2 * STREAM, 2 * LAYER),
            (4 * STREAM, 2 * LAYER),
            None,
        ),
    ],
)
def test_each_device_is_counted_by_itself(options, first, second, host, kind, two, free):
    model = two.over("gpt2", kind)
    places = dict(zip(map(str, two.pair), (first, second), strict=True))
    if options.get("device") == "second":
        options = {**options, "device": str(two.pair[1])}
    for place, counted in {**places, "cpu": host}.items():
        free.clear()
        free[place] = 0
        if counted is None:
            run_with_ra(model, IDS, target=TARGET, **options)
        else:
            why, *found = refusal(model, **options)
            assert (f"free on {place}" in why, *found) == (True, *counted)


@pytest.mark.every_model
@pytest.mark.parametrize("kind", KINDS)
def test_advice_fits_on_every_device(kind, two, free):
    model, (first, second) = two.over("gpt2", kind), map(str, two.pair)
    free[second] = LAYER  # one prompt at a time, or one layer
    free[first] = 2 * LAYER
    why, *_ = refusal(model, store="norms")
    assert why.partition("Use ")[2].startswith(f"batch_size=1 ({LAYER / 1e6} MB)")
    assert "layers=[3]" in why
    run_with_ra(model, IDS, target=TARGET, store="norms", batch_size=1, progress=False)
    free[first] = LAYER // 2  # where no layer of the second alone helps
    why, *_ = refusal(model, store="norms")
    assert "Use batch_size=1 (" not in why
    assert "layers=[3], store='norms', recompute=True and batch_size=1 (" in why
    free[second] = 0
    free[first] = PLENTY
    assert "shorten the prompt" in refusal(model, store="norms")[0]


@pytest.mark.every_model
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 1])
def test_auto_takes_what_fits_on_every_device(which, kind, two, free):
    model, place, sizes = two.over("gpt2", kind), str(two.pair[which]), []
    hook = ("hook_embed", lambda x, hook: sizes.append(len(x)))
    # A bridge brings logits back to the first device; a HookedTransformer has them on the last.
    logits = D_VOCAB * 4 * (which == 1 or kind == BRIDGE)
    if kind == BRIDGE and which == 1:  # of GPT-2, whose unembedding is its embedding
        logits = 0
    of_prompt = 2 * LAYER // 2 + 3 * logits
    for n in (5, 3, 1):
        for missing, wanted in ((0, n), (1, max(1, n - 1))):
            sizes.clear()
            free[place] = 6 * logits + 2 * n * of_prompt - missing
            run_with_ra(
                model,
                random_ids(6, 7),
                target=TARGET,
                store="norms",
                batch_size="auto",
                fwd_hooks=[hook],
                progress=False,
            )
            assert sizes[0] == wanted


def test_a_device_without_its_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    places = [ra_lens.memory._exact(torch.device(name)) for name in ("cuda", "cuda:1", "cpu:0")]
    assert places == [torch.device("cuda", 3), torch.device("cuda", 1), torch.device("cpu")]


def test_what_all_devices_need_together(two):
    lens = as_lens(two.over("gpt2", KINDS[0]))
    from ra_lens.prompts import read_prompts

    plan = Plan(
        lens=lens,
        sites=lens.sites,
        prompts=read_prompts(lens, IDS),
        encoded=None,
        batch_size=None,
        store="norms",
        wanted=lambda _name: True,
        device=None,
        dtype=None,
        recompute=False,
    )
    assert plan.need == 4 * LAYER
