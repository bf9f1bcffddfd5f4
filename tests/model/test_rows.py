"""Attention in blocks of query rows: the same norms, no whole map, and what cannot is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ra_lens.memory
import ra_lens.rows
from conformance.build import write_folder
from conformance.configs import ARCHITECTURES
from left_behind import Oops, changes, raises, snapshot
from ra_lens import run_with_ra
from ra_lens.errors import BadInput, NotEnoughMemory, NotStored, RALensWarning, UnsupportedModel
from ra_lens.model import load_folder
from tiny_models import (
    ANY_KIND,
    CASES,
    D_HEAD,
    KINDS,
    N_HEADS,
    every_model,
    random_ids,
    relative,
)

IDS, TARGET = random_ids(2, 11), 8
NORMS = {"store": "norms", "recompute": True}


ANSWERS = (
    {"target": [[5, 9], [7, 3]]},
    *every_model({"target": TARGET}, {"layers": [1]}, {"target": TARGET, "backward": "relp"}),
)


@pytest.mark.parametrize("options", ANSWERS)
@pytest.mark.parametrize("rows", [4, *every_model(1, 5, 11, 40)])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_norms_are_those_of_whole_maps(arch, kind, rows, options, shared):
    model = shared(arch, kind)
    logits, plain = run_with_ra(model, IDS, **options)
    again_logits, blockwise = run_with_ra(model, IDS, **options, **NORMS, query_rows=rows)
    torch.testing.assert_close(again_logits, logits, rtol=1e-4, atol=1e-5)
    for what in ("ra", "pattern"):
        torch.testing.assert_close(blockwise.norms(what), plain.norms(what), rtol=1e-4, atol=1e-8)
    assert float(plain.norms("ra").min()) > 0
    with pytest.raises(NotStored, match="in blocks of rows, whose queries meet no later keys"):
        blockwise.norms("pattern_grad")


@pytest.mark.parametrize("shape", [(2, D_HEAD), *every_model((1, N_HEADS), (D_HEAD, D_HEAD))])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_may_be_as_long_as_something_else_is_wide(kind, shape, shared):
    model, ids = shared("llama", kind), random_ids(*shape)
    plain = run_with_ra(model, ids, target=TARGET)[1]
    blockwise = run_with_ra(model, ids, target=TARGET, **NORMS, query_rows=3)[1]
    assert relative(blockwise.norms(), plain.norms()) < 1e-5


@pytest.mark.every_model
@pytest.mark.parametrize("kind", ANY_KIND)
def test_in_float64_they_are_equal_to_the_last_digits(kind, shared):
    model = shared("llama", kind, dtype=torch.float64)
    plain = run_with_ra(model, IDS, target=TARGET)[1]
    blockwise = run_with_ra(model, IDS, target=TARGET, **NORMS, query_rows=3)[1]
    assert relative(blockwise.norms(), plain.norms()) < 1e-13


@pytest.mark.parametrize("kind", ANY_KIND)
def test_half_precision_rounds_and_is_not_refused(kind, shared):
    model = shared("llama", kind, dtype=torch.bfloat16)
    plain = run_with_ra(model, IDS, target=TARGET)[1]
    blockwise = run_with_ra(model, IDS, target=TARGET, **NORMS, query_rows=3)[1]
    assert relative(blockwise.norms(), plain.norms()) < 0.05


class Largest(TorchDispatchMode):
    """Notes the most entries of any tensor made that has a row for each head and query."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else (found,):
            if isinstance(one, torch.Tensor) and one.ndim == 4 and one.shape[1] == N_HEADS:
                self.most = max(self.most, one.shape[-2] * one.shape[-1])
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_whole_map_is_made(kind, shared):
    model, n = shared("llama", kind), IDS.shape[1]
    most = {}
    for rows in (None, 2):
        run_with_ra(model, IDS, target=TARGET, **NORMS, query_rows=rows)  # the proof, once
        with Largest() as seen:
            run_with_ra(model, IDS, target=TARGET, **NORMS, query_rows=rows)
        most[rows] = seen.most
    assert most[None] >= n * n
    assert most[2] <= max(2 * n, n * 6)  # a block's map; keys and values of all tokens


@pytest.mark.every_model
@pytest.mark.parametrize("kind", ANY_KIND)
def test_large_maps_are_split_unless_hooks_or_padding_need_them(kind, shared, monkeypatch):
    model = shared("llama", kind)
    used = []
    real = ra_lens.rows.read_rows
    monkeypatch.setattr(ra_lens.rows, "LARGEST", 2 * N_HEADS * 11 * 3)

    def noted(*args, **kwargs):
        used.append(real(*args, **kwargs))
        return used[-1]

    monkeypatch.setattr("ra_lens.run.read_rows", noted)
    plain = run_with_ra(model, IDS, target=TARGET)[1]
    again = run_with_ra(model, IDS, target=TARGET, **NORMS)[1]
    torch.testing.assert_close(again.norms(), plain.norms(), rtol=1e-4, atol=1e-8)
    assert used == [3, 3]  # the first keeps whole maps all the same

    hook = ("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern * 0.5)
    halved = run_with_ra(model, IDS, target=TARGET, fwd_hooks=[hook])[1]
    with pytest.warns(RALensWarning, match="hooks on .* may need whole maps"):
        again = run_with_ra(model, IDS, target=TARGET, fwd_hooks=[hook], **NORMS)[1]
    torch.testing.assert_close(again.norms(), halved.norms(), rtol=1e-4, atol=1e-8)
    assert used[2:] == [None, None]


@pytest.mark.every_model
@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_run_that_fits_in_blocks_only_is_advised_to(kind, shared, monkeypatch):
    model = shared("llama", kind)
    monkeypatch.setattr(ra_lens.rows, "LARGEST", N_HEADS * 11)
    plans = []
    monkeypatch.setattr("ra_lens.run.refuse_what_cannot_fit", lambda plan: plans.append(plan.need))
    run_with_ra(model, IDS[:1], target=TARGET, **NORMS)
    monkeypatch.undo()
    monkeypatch.setattr(ra_lens.rows, "LARGEST", N_HEADS * 11)
    monkeypatch.setattr(ra_lens.memory, "free_memory", lambda device: plans[0])
    with pytest.raises(NotEnoughMemory, match="Use store='norms' and recompute=True"):
        run_with_ra(model, IDS[:1], target=TARGET)


@pytest.mark.parametrize("kind", ANY_KIND)
def test_what_needs_whole_maps_is_refused(kind, shared):
    model = shared("llama", kind)
    for options in ({}, {"store": "norms"}, {**NORMS, "vectors": True}):
        with pytest.raises(BadInput, match=r"query_rows=2 with store=.*recompute=True, without"):
            run_with_ra(model, IDS, target=TARGET, query_rows=2, **options)
    with pytest.raises(BadInput, match="query_rows=2 with prompts of different lengths"):
        run_with_ra(model, ["w5 w6", "w7 w8 w9"], target=TARGET, query_rows=2, **NORMS)
    with pytest.raises(BadInput, match="query_rows"):
        run_with_ra(model, IDS, target=TARGET, query_rows=0, **NORMS)
    hook = ("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern)
    with pytest.raises(UnsupportedModel, match="hooks on it may need whole maps"):
        run_with_ra(model, IDS, target=TARGET, query_rows=2, fwd_hooks=[hook], **NORMS)


@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_model_whose_blocks_mix_tokens_otherwise_is_refused(kind, fresh):
    model = fresh("gpt2", kind)
    mlp = model.blocks[1].mlp
    own = mlp.forward

    def shifted(x, *args, **kwargs):  # each token gets some of the one before
        return own(x, *args, **kwargs) + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]

    vars(mlp)["forward"] = shifted  # a bridge hands an attribute on to what it wraps
    with pytest.raises(UnsupportedModel, match="cannot run in blocks of rows: on 7 tokens"):
        run_with_ra(model, IDS, target=TARGET, query_rows=2, **NORMS)
    assert run_with_ra(model, IDS, target=TARGET, **NORMS)[1].norms().isfinite().all()


def _of_a_gpu():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "take", [lambda: torch.empty(2**48), *every_model(lambda: bytearray(2**62), _of_a_gpu)]
)
def test_a_lack_of_memory_says_nothing_of_the_model(take, fresh):
    model, full = fresh("gpt2", ANY_KIND[0]), [True]
    mlp = model.blocks[1].mlp
    own = mlp.forward

    def full_at_first(x, *args, **kwargs):
        if full:
            take()
        return own(x, *args, **kwargs)

    vars(mlp)["forward"] = full_at_first
    with pytest.raises((RuntimeError, MemoryError)) as info:
        run_with_ra(model, IDS, target=TARGET, query_rows=2, **NORMS)
    assert not isinstance(info.value, UnsupportedModel)
    full.clear()
    run_with_ra(model, IDS, target=TARGET, query_rows=2, **NORMS)


@pytest.mark.parametrize("kind", ANY_KIND)
def test_nothing_is_left_behind(kind, fresh):
    model = fresh("llama", kind)
    with torch.no_grad():
        model(IDS)  # a bridge attaches hooks of its own in its first forward pass
    before = snapshot(model)
    run_with_ra(model, IDS, target=TARGET, **NORMS, query_rows=2)
    assert changes(before, snapshot(model)) == {}
    with pytest.raises(Oops):
        run_with_ra(model, IDS, metric=raises(Oops()), **NORMS, query_rows=2)
    assert changes(before, snapshot(model)) == {}


@pytest.mark.every_model
@pytest.mark.skipif("TransformerBridge" not in KINDS, reason="these are loaded as bridges")
def test_every_architecture_comes_out_the_same_or_is_refused(tmp_path):
    outcomes: dict[str, list[str]] = {"same": [], "refused": [], "not read": []}
    for name, architecture in ARCHITECTURES.items():
        folder = tmp_path / name
        try:
            write_folder(architecture, folder)
            model = load_folder(folder, kind="TransformerBridge", device="cpu")
            prompts = [random_ids(1, 9), random_ids(2, model.cfg.d_head)]
            plain = [run_with_ra(model, ids, target=5)[1] for ids in prompts]
        except Exception:
            outcomes["not read"].append(name)  # what the conformance tests look at
            continue
        for ids, wanted in zip(prompts, plain, strict=True):
            try:
                found = run_with_ra(model, ids, target=5, **NORMS, query_rows=3)[1]
            except UnsupportedModel:
                outcomes["refused"].append(name)
                break
            torch.testing.assert_close(found.norms(), wanted.norms(), rtol=1e-3, atol=1e-7)
        else:
            outcomes["same"].append(name)
    assert {"gpt2", "llama", "gemma2", "bloom", "gptj", "qwen3_5_text"} <= set(outcomes["same"])
    assert len(outcomes["same"]) > 5 * len(outcomes["refused"]), outcomes
