"""Memory: what a run needs at least, counted on paper; what cannot fit is refused first."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ra_lens.memory
from ra_lens import run_with_ra
from ra_lens.errors import BadInput, NotEnoughMemory
from tiny_models import ANY_KIND, D_MODEL, D_VOCAB, KINDS, N_HEADS, N_LAYERS, random_ids

IDS, TARGET = random_ids(2, 7), 8
MAP = 2 * N_HEADS * 7 * 7 * 4
REST = 2 * 7 * (5 * D_MODEL + 4 * D_MODEL) * 4


def needed(error):
    """Maps and graph, in bytes, as the message gives them."""
    found = re.search(r"\(([\d.]+) MB of maps, ([\d.]+) MB of graph", str(error))
    return float(found[1]) * 1e6, float(found[2]) * 1e6


@pytest.mark.parametrize("kind", ANY_KIND)
@pytest.mark.parametrize(
    ("options", "maps", "graph"),
    [
        ({}, 3 * N_LAYERS * MAP, N_LAYERS * (MAP + REST)),
        ({"names_filter": lambda n: n.endswith("ra")}, N_LAYERS * MAP, N_LAYERS * (MAP + REST)),
        ({"dtype": torch.float16}, 3 * N_LAYERS * MAP / 2, N_LAYERS * (MAP + REST)),
        ({"store": "norms"}, 0, N_LAYERS * (MAP + REST)),
        # Fifteen kinds as wide as the model, of which three are one tensor.
        (
            {"store": "norms", "vectors": True},
            N_LAYERS * 13 * 2 * 7 * D_MODEL * 4,
            N_LAYERS * (MAP + REST),
        ),
        (
            {"vectors": ["query", "key_in"], "layers": [2]},
            3 * MAP + 2 * 2 * 7 * D_MODEL * 4,
            MAP + REST,
        ),
        ({"store": "mean"}, 3 * N_LAYERS * MAP / 2, N_LAYERS * (MAP + REST)),
        ({"batch_size": 1}, 3 * N_LAYERS * MAP, N_LAYERS * (MAP + REST) / 2),
        ({"layers": [2]}, 3 * MAP, MAP + REST),
        ({"layers": [1], "device": "meta"}, 0, 2 * (MAP + REST)),
        (
            {"store": "norms", "recompute": True},
            0,
            MAP + REST + N_LAYERS * 2 * 7 * D_MODEL * 4,
        ),
    ],
)
def test_what_a_run_needs_is_counted(options, maps, graph, kind, shared, monkeypatch):
    model, ran = shared("gpt2", kind), []
    monkeypatch.setattr(ra_lens.memory, "free_memory", lambda device: 1)
    monkeypatch.setattr(ra_lens.memory, "_spelled", lambda n: f"{n / 1e6} MB")
    hook = ("hook_embed", lambda x, hook: ran.append(x))
    with pytest.raises(NotEnoughMemory) as refused:
        run_with_ra(model, IDS, target=TARGET, fwd_hooks=[hook], **options)
    assert needed(refused.value) == pytest.approx((maps, graph))
    assert ran == []


@pytest.mark.parametrize("kind", ANY_KIND)
def test_advice_names_what_fits_and_it_then_runs(kind, shared, monkeypatch):
    model = shared("gpt2", kind)
    for free, wanted in (
        (3 * N_LAYERS * MAP - 1, "store='norms'"),
        (N_LAYERS * (MAP + REST) - 1, "recompute=True"),
        (MAP, "layers=[2]"),
    ):
        monkeypatch.setattr(ra_lens.memory, "free_memory", lambda device, free=free: free)
        with pytest.raises(NotEnoughMemory, match=r"Use .*fewer layers|shorten") as refused:
            run_with_ra(model, IDS, target=TARGET)
        if "Use" in str(refused.value):
            advice = str(refused.value).partition("Use ")[2].partition(" (")[0]
            code = "dict(" + advice.replace(" and ", ", ") + ")"
            options = eval(code)
            assert len(run_with_ra(model, IDS, target=TARGET, **options)[1].layers) in (1, 3)
            assert any(part in str(refused.value) for part in (wanted, "batch_size=1"))
    monkeypatch.setattr(ra_lens.memory, "free_memory", lambda device: None)  # it does not say
    run_with_ra(model, IDS, target=TARGET)


@pytest.mark.skipif("TransformerBridge" not in KINDS, reason="no TransformerBridge before 3.0")
def test_a_prompt_that_no_machine_holds_is_refused(shared):
    model = shared("llama", "TransformerBridge", max_position_embeddings=300_000)
    ids = random_ids(1, 200_000)
    with pytest.raises(NotEnoughMemory, match=r"at least 5760\.\d GB.*free on cpu.*shorten"):
        run_with_ra(model, ids, target=TARGET)


VOCAB = 4 * D_VOCAB
ALL_LOGITS = {"return_logits": "all", "metric": lambda logits: logits[:, -1, 3]}


GRAPH = N_LAYERS * (MAP + REST) // 2  # of one prompt


@pytest.mark.parametrize("kind", ANY_KIND)
@pytest.mark.parametrize(
    ("options", "kept", "of_prompt", "share"),
    [
        ({"store": "norms"}, VOCAB, GRAPH + 3 * VOCAB, 2),
        ({}, 3 * N_LAYERS * MAP // 2 + VOCAB, GRAPH + 3 * VOCAB, 2),
        (
            {"store": "norms", "recompute": True},
            VOCAB,
            (MAP + REST) // 2 + N_LAYERS * 7 * D_MODEL * 4 + 3 * VOCAB,
            5,
        ),
        ({"store": "norms", **ALL_LOGITS}, 7 * VOCAB, GRAPH + 3 * 7 * VOCAB, 2),
    ],
)
def test_auto_takes_as_many_prompts_as_fit(
    options, kept, of_prompt, share, kind, shared, monkeypatch
):
    model, ids, sizes = shared("gpt2", kind), random_ids(6, 7), []
    hook = ("hook_embed", lambda x, hook: sizes.append(len(x)))
    target = None if "metric" in options else TARGET
    options = {"target": target, "batch_size": "auto", "progress": False, **options}

    def run(free):
        monkeypatch.setattr(ra_lens.memory, "free_memory", lambda device: free)
        sizes.clear()
        logits, ra = run_with_ra(model, ids, fwd_hooks=[hook], **options)
        return list(sizes), logits, ra

    batches, logits, ra = run(None)  # it does not say
    assert batches == [6]
    for fitting, wanted in ((6, [6]), (5, [5, 1]), (4, [4, 2]), (3, [3, 3])):
        free = 6 * kept + share * fitting * of_prompt
        batches, same_logits, same = run(free)
        assert batches == wanted
        torch.testing.assert_close(same_logits, logits, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(same.norms(), ra.norms(), rtol=1e-4, atol=1e-7)
        batches, *_ = run(free - 1)
        assert batches[0] == fitting - 1


def test_auto_runs_one_at_a_time_where_nothing_is_sure_to_fit(shared, monkeypatch):
    model, sizes = shared("gpt2", KINDS[0]), []
    hook = ("hook_embed", lambda x, hook: sizes.append(len(x)))
    options = {"target": TARGET, "store": "norms", "batch_size": "auto", "progress": False}
    monkeypatch.setattr(ra_lens.memory, "free_memory", lambda device: GRAPH)
    run_with_ra(model, IDS, fwd_hooks=[hook], **options)
    assert sizes == [1, 1]
    monkeypatch.setattr(ra_lens.memory, "free_memory", lambda device: GRAPH - 1)
    with pytest.raises(NotEnoughMemory, match="for 1 prompts"):
        run_with_ra(model, IDS, **options)


def test_auto_is_the_only_word(shared, request):
    if request.config.getoption("--check-shapes"):
        pytest.skip("the annotation says so first")
    with pytest.raises(BadInput, match=r"found batch_size='half'; give a whole number"):
        run_with_ra(shared("gpt2", KINDS[0]), IDS, target=TARGET, batch_size="half")


class Copies(TorchDispatchMode):
    """Sizes of what is copied to another device."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") is not None:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ANY_KIND)
def test_norms_on_another_device_move_no_map(kind, shared):
    model = shared("gpt2", kind)
    with Copies() as copies:
        _, ra = run_with_ra(model, IDS, target=TARGET, store="norms", device="meta")
    moved = [size for size in copies.sizes if size >= MAP // 4]
    assert moved == []
    assert ra.norms().device.type == "meta"
    assert copies.sizes.count(2 * N_HEADS) == 3 * N_LAYERS


@pytest.mark.parametrize("kind", ANY_KIND)
def test_joining_batches_lets_go_of_the_parts(kind, shared):
    model = shared("gpt2", kind)
    whole = run_with_ra(model, IDS, target=TARGET)[1]
    parts = run_with_ra(model, IDS, target=TARGET, batch_size=1, progress=False)[1]
    assert parts.n_bytes == whole.n_bytes
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-7)


def test_free_memory_is_that_of_the_machine():
    free = ra_lens.memory.free_memory(torch.device("cpu"))
    assert 1e8 < free < 1e14
    assert ra_lens.memory.free_memory(torch.device("meta")) is None
