"""Passes that begin at a later block: the same effects as in full, in every kind of model."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from arch_models import load_bridge
from left_behind import Oops, changes, raises, snapshot
from ra_lens.heads import rank_heads
from ra_lens.model import as_lens
from ra_lens.model.blocks import SkippedBlocks
from ra_lens.patching.masking import mask_hooks
from ra_lens.questions import last_logits, mark, read_questions
from ra_lens.tasks import Prompt
from tiny_models import CASES, KINDS, N_HEADS, N_LAYERS, relative
from tiny_questions import PROMPTS, TASK

# What it is for is tested in test_shared_prefix.py.
pytestmark = pytest.mark.every_model

SIDES = ("left", "right")
# The lengths differ; words are in the vocabulary of both sets of tiny models.
QUESTIONS = [
    Prompt("w3 w4 w5 w6", " w7"),
    Prompt("w9 w4 w11", " w5"),
    Prompt("w3 w4 w8 w6 w10 w12 w11", " w8"),
]
# The last two layers take keys and values from the first two.
SHARING = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def in_full(model, prompts, hooks_of):
    """Effect of each head, one forward pass at a time: p(answer) − p(answer, head changed)."""
    lens = as_lens(model)
    questions = read_questions(lens, prompts)
    n_layers, n_heads = len(lens.sites), next(iter(lens.sites.values())).n_heads
    effects = torch.zeros(n_layers, n_heads, dtype=torch.float64)
    for i in range(len(prompts)):
        one, answer = questions.prompts.chosen([i]), questions.first_tokens[[i]]
        before = mark(last_logits(lens, one), answer).probability
        for layer in range(n_layers):
            for head in range(n_heads):
                logits = last_logits(lens, one, hooks_of(lens, layer, head))
                after = mark(logits, answer).probability
                effects[layer, head] += float(before - after) / len(prompts)
    return effects


def zeroed(lens, layer, head):
    keep = torch.ones(len(lens.sites), next(iter(lens.sites.values())).n_heads, dtype=torch.bool)
    keep[layer, head] = False
    return mask_hooks(lens.sites, keep)


def zeroed_last(lens, layer, head):
    def at_z(z, hook):
        new = z.clone()
        new.reshape(*z.shape[:2], N_HEADS, -1)[:, -1, head] = 0.0
        return new

    return [(lens.sites[layer].z_name, at_z)]


@contextmanager
def calls(model):
    """Count the calls of each block's attention, by block, while it is open."""
    counts = [0] * len(as_lens(model).sites)

    def count(i):
        def at_pattern(_module, _args):
            counts[i] += 1

        return at_pattern

    lens = as_lens(model)
    handles = [
        lens.module.get_submodule(site.prefix).register_forward_pre_hook(count(i))
        for i, site in enumerate(lens.sites.values())
    ]
    yield counts
    for handle in handles:
        handle.remove()


# Each architecture with one side per class, in turn.
@pytest.mark.parametrize(
    ("arch", "kind", "side"),
    [(*case, SIDES[(i + i // len(KINDS)) % 2]) for i, case in enumerate(CASES)],
)
def test_effects_are_those_of_full_passes_and_blocks_before_a_head_are_skipped(
    arch, kind, side, fresh
):
    model = fresh(arch, kind)
    model.tokenizer.padding_side = side
    with calls(model) as counts:
        found = rank_heads(model, QUESTIONS, method="cm1", batch_size=4, progress=False)
    # The shortest and longest question padded and alone; 3 questions as they are, each the only one
    # of its batches; a row of each layer in full; then 3 batches of 4 rows per layer.
    rows = len(QUESTIONS) * N_HEADS
    assert counts == [3 + 3 + 1 + rows // 4 * (layer + 1) for layer in range(N_LAYERS)]
    wanted = in_full(model, QUESTIONS, zeroed)
    assert float((found.scores - wanted).abs().max()) < 1e-5
    assert relative(found.scores, wanted) < 1e-4
    found = rank_heads(model, QUESTIONS, method="cm1_last", batch_size=2, progress=False)
    wanted = in_full(model, QUESTIONS, zeroed_last)
    assert relative(found.scores, wanted) < 1e-4


@pytest.mark.parametrize(
    ("arch", "side"),
    [
        ("gemma4", "left"),
        ("afmoe", "right"),
        ("gpt_oss", "left"),
        ("bitnet", "right"),
        ("gpt2_unscaled", "left"),
        ("gpt_neo", "right"),
        ("deepseek_v3", "left"),
    ],
)
def test_windows_experts_gates_and_latents_pass_on_no_more_than_they_return(arch, side, tmp_path):
    model = load_bridge(arch, tmp_path)
    model.tokenizer.padding_side = side
    with calls(model) as counts:
        found = rank_heads(model, QUESTIONS, method="cm1", batch_size=6, progress=False)
    assert counts == [3 + 4, 3 + 6]
    wanted = in_full(model, QUESTIONS, zeroed)
    assert relative(found.scores, wanted) < 1e-4


@pytest.mark.parametrize(
    ("arch", "changed"),
    [pytest.param("gemma4", SHARING, id="keys and values shared"), ("hrm_text", {})],
)
def test_layers_that_pass_on_more_or_run_again_are_run_in_full(arch, changed, tmp_path):
    model = load_bridge(arch, tmp_path, **changed)
    lens = as_lens(model)
    with calls(model) as counts:
        found = rank_heads(model, QUESTIONS, method="cm1", batch_size=12, progress=False)
    assert counts[0] / counts[-1] > 0.5
    wanted = in_full(model, QUESTIONS, zeroed)
    assert len(lens.sites) == 4
    assert relative(found.scores, wanted) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_hook_that_carries_something_past_a_block_is_noticed(kind, fresh):
    model, kept = fresh("llama", kind), {}

    def take(resid, hook):
        kept["resid"] = resid.clone()

    def put(resid, hook):
        return resid + 3 * kept["resid"].flip(-1)

    carrying = [("blocks.0.hook_resid_post", take), ("blocks.2.hook_resid_pre", put)]
    plain = in_full(model, PROMPTS, zeroed)
    with model.hooks(fwd_hooks=carrying):
        wanted = in_full(model, PROMPTS, zeroed)
        for batch_size in (3, N_HEADS * len(PROMPTS)):
            found = rank_heads(model, PROMPTS, method="cm1", batch_size=batch_size, progress=False)
            assert relative(found.scores, wanted) < 1e-4
    assert relative(plain, wanted) > 1e-2


@pytest.mark.parametrize("method", ["cm1", "cm1_last", "cm2"])
@pytest.mark.parametrize(("arch", "kind"), [("llama", kind) for kind in KINDS])
def test_nothing_is_left_behind(arch, kind, method, fresh):
    model = fresh(arch, kind)
    prompts = [TASK.sample(1, shots=2, seed=seed)[0] for seed in range(2)]
    rank_heads(model, prompts, method=method, progress=False)

    def own(*args, **kwargs):
        return type(block).forward(block, *args, **kwargs)

    block = model.blocks[1]
    vars(block)["forward"] = own  # as accelerate does
    before = snapshot(model)
    rank_heads(model, prompts, method=method, progress=False)
    assert changes(before, snapshot(model)) == {}
    for error in (Oops(), KeyboardInterrupt()):
        calls_left = [9]

        def fails(value, hook, error=error, calls_left=calls_left):
            calls_left[0] -= 1
            if calls_left[0] < 0:
                raise error

        with model.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", fails)]):
            before = snapshot(model)
            with pytest.raises(type(error)):
                rank_heads(model, prompts, method=method, batch_size=3, progress=False)
            assert changes(before, snapshot(model)) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_gives_each_row_the_example_asked_for(kind, shared):
    model = shared("gpt2", kind)
    lens = as_lens(model)
    prompts = read_questions(lens, QUESTIONS).prompts.widened()
    prefix = SkippedBlocks(lens)
    with prefix.recorded(3):
        wanted = last_logits(lens, prompts)
    which = [2, 0, 0, 1, 2]
    for layer in lens.sites:
        with prefix.reused(layer, torch.tensor(which)):
            found = last_logits(lens, prompts.chosen(which))
        assert relative(found, wanted[which]) < 1e-5
    skipped = [("blocks.0.hook_resid_pre", raises(Oops()))]
    with model.hooks(fwd_hooks=skipped):
        with prefix.reused(2, torch.tensor([1, 1])):
            found = last_logits(lens, prompts.chosen([1, 1]))
        with pytest.raises(Oops):
            last_logits(lens, prompts.chosen([1, 1]))
    assert relative(found, wanted[[1, 1]]) < 1e-5
