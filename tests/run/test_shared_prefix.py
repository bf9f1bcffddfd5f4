"""Shared beginnings of prompts run once: the same answers as in full, in every kind of model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import arch_models
from arch_models import BRIDGE, load_bridge
from left_behind import Oops, changes, raises, snapshot
from ra_lens.heads import rank_heads
from ra_lens.model import as_lens, load_folder
from ra_lens.patching.masking import mask_hooks
from ra_lens.prompts import Prompts
from ra_lens.questions import Questions, ask, last_logits, logits_at, mark, read_questions
from ra_lens.shared_prefix import SharedPrefix
from ra_lens.tasks import Pair, Task
from tiny_models import CASES, KINDS, N_HEADS, N_LAYERS, every_model, relative

BEGIN = (3, 8, 5, 12, 9, 4, 14)
# Of several lengths; one that begins otherwise; answers of one and two tokens.
RESTS = ((6, 7), (11,), (13, 4, 10, 6), (9, 9))
ODD = (3, 8, 6, 12, 9, 4, 14, 5, 6)
ANSWERS = ((5,), (7, 8), (9,), (10, 3), (6,))
N_VARIANTS = 3
HOOKED = [kind for kind in KINDS if kind != BRIDGE]


def questions(side="right"):
    ids = (*((*BEGIN, *rest) for rest in RESTS[:2]), ODD, *((*BEGIN, *rest) for rest in RESTS[2:]))
    return Questions(Prompts(tuple(ids), None, side), ANSWERS)


def masks(lens):
    """Heads kept, by variant; in the first one all."""
    drawn = torch.rand(N_VARIANTS, *lens.sites.shape, generator=torch.Generator().manual_seed(1))
    keep = drawn < 0.6
    keep[0] = True
    return keep


def counting(lens, counts):
    """A hook that notes how many tokens the last layer reads."""
    *_, site = lens.sites.values()

    def count(z, hook):
        counts.append(z.shape[0] * z.shape[1])

    return [(site.z_name, count)]


def one_by_one(lens, asked, keep, accuracy):
    """Logit differences and ranks, each question in full and alone."""
    found = []
    for mask in keep:
        for ids, answer in zip(asked.prompts.ids, asked.answers, strict=True):
            own = answer if accuracy == "answer" else answer[:1]
            prompt = Prompts(((*ids, *own[:-1]),), None, "right")
            at = [[len(ids) - 1 + i for i in range(len(own))]]
            logits = logits_at(lens, prompt, at, mask_hooks(lens.sites, mask))[0]
            marks = mark(logits, torch.tensor(own))
            found.append((float(marks.logit_diff.min()), marks.above.tolist()))
    return found


def reused(model, *, accuracy="first token", side="right"):
    """Whether the beginning was run once for each variant; the answers are the same anyway."""
    lens, asked = as_lens(model), questions(side)
    keep, n = masks(lens), len(asked)
    variant = torch.arange(N_VARIANTS).repeat_interleave(n)

    counts = []

    def hooks_of(part):
        return [*mask_hooks(lens.sites, keep[variant[part]]), *counting(lens, counts)]

    wanted = one_by_one(lens, asked, keep, accuracy)
    assert len({difference for difference, _ in wanted}) == len(wanted)
    several = asked.repeated(N_VARIANTS)
    for _ in range(2):
        counts.clear()
        found = ask(
            lens, several, hooks_of, accuracy=accuracy, batch_size=4, variants=variant.tolist()
        )
        pairs = zip(found.logit_diff.tolist(), found.above.tolist(), wanted, strict=True)
        for difference, above, (wanted_difference, wanted_above) in pairs:
            assert difference == pytest.approx(wanted_difference, abs=1e-4)
            assert above[: len(wanted_above)] == wanted_above
    # The second time nothing is compared: three variants of the beginning, then no more than what
    # is behind it, with an answer and padding, and the one that begins otherwise.
    odd = N_VARIANTS * (len(ODD) + 1)
    most = N_VARIANTS * (len(BEGIN) + sum(map(len, RESTS)) + 3 * len(RESTS)) + odd
    return sum(counts) <= most


@pytest.mark.parametrize(
    "accuracy", ["first token", pytest.param("answer", marks=pytest.mark.every_model)]
)
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_answers_are_those_of_prompts_in_full(arch, kind, accuracy, shared):
    model = shared(arch, kind)
    side = "left" if arch == "llama" else "right"
    assert reused(model, accuracy=accuracy, side=side)


@pytest.mark.parametrize(
    "arch",
    ["bloom", "gpt_neox", *every_model("qwen2", "mistral_nowindow", "phi3", "olmo2")],
)
def test_positions_groups_and_biases_go_on_in_a_bridge(arch, tmp_path):
    assert reused(load_bridge(arch, tmp_path))


@pytest.mark.skipif(not HOOKED, reason="this TransformerLens has no HookedTransformer")
@pytest.mark.parametrize("arch", ["bloom", "gpt_neox", "qwen2", "mistral_nowindow", "phi3"])
def test_positions_groups_and_biases_go_on_in_a_hooked_transformer(arch, tmp_path):
    folder = arch_models.write(arch, tmp_path)
    assert reused(load_folder(folder, kind=HOOKED[0], device="cpu"))


# ---- one head at a time -------------------------------------------------------------------------

TASK = Task(
    "toy",
    "icl",
    tuple(
        Pair(" ".join(f"w{3 + (i + k) % 20}" for k in range(1 + i % 3)), f"w{i + 4}")
        for i in range(16)
    ),
    "w25 ",
    " w26",
    separator=" ",
)


def in_full(model, prompts, at):
    """Effect of each head, one forward pass at a time: p(answer) − p(answer, head zeroed)."""
    lens = as_lens(model)
    asked = read_questions(lens, prompts)
    effects = torch.zeros(lens.sites.shape, dtype=torch.float64)

    def zero(head, n_heads):
        def at_z(z, hook):
            new = z.clone()
            new.reshape(*z.shape[:2], n_heads, -1)[:, at, head] = 0.0
            return new

        return at_z

    for i in range(len(prompts)):
        one, answer = asked.prompts.chosen([i]), asked.first_tokens[[i]]
        before = mark(last_logits(lens, one), answer).probability
        for layer, site in lens.sites.items():
            for head in range(site.n_heads):
                hooks = [(site.z_name, zero(head, site.n_heads))]
                after = mark(last_logits(lens, one, hooks), answer).probability
                effects[layer, head] += float(before - after) / len(prompts)
    return effects


@pytest.mark.every_model
@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_effects_of_heads_are_those_of_prompts_in_full(arch, kind, batch_size, shared, monkeypatch):
    model = shared(arch, kind)
    prompts = TASK.sample(3, shots=2, seed=1, demonstrations="shared")
    rows = []
    read = SharedPrefix.read

    def noted(self, n_rows=1, *args, **options):
        rows.append(n_rows)
        return read(self, n_rows, *args, **options)

    monkeypatch.setattr(SharedPrefix, "read", noted)
    for method, at in (("cm1", slice(None)), ("cm1_last", -1)):
        rows.clear()
        found = rank_heads(model, prompts, method=method, batch_size=batch_size, progress=False)
        assert relative(found.scores, in_full(model, prompts, at)) < 1e-4
        # As it is, and once with each head of each layer changed; at the last token nothing is.
        assert rows == [1, *([N_HEADS] * N_LAYERS if method == "cm1" else [])]
    rows.clear()
    rank_heads(model, TASK.sample(3, shots=2), method="cm1", progress=False)
    assert rows == []


@pytest.mark.parametrize(("arch", "kind"), [("llama", kind) for kind in KINDS])
def test_a_wrong_prefix_is_noticed_and_prompts_run_in_full(arch, kind, fresh, monkeypatch):
    model = fresh(arch, kind)
    prompts = TASK.sample(3, shots=2, seed=1, demonstrations="shared")
    read = SharedPrefix.read

    def wrong(self, *args, **options):
        return read(replace(self, ids=self.ids[::-1]), *args, **options)

    monkeypatch.setattr(SharedPrefix, "read", wrong)
    assert not reused(model)
    found = rank_heads(model, prompts, method="cm1", progress=False)
    assert relative(found.scores, in_full(model, prompts, slice(None))) < 1e-4


@pytest.mark.parametrize(("arch", "kind"), [("llama", kind) for kind in KINDS])
def test_hooks_on_the_model_see_whole_prompts(arch, kind, fresh):
    model, seen = fresh(arch, kind), set()

    def look(pattern, hook):
        seen.add(tuple(pattern.shape[-2:]))

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", look)]):
        assert not reused(model)
    assert all(n_queries == n_keys for n_queries, n_keys in seen)


@pytest.mark.parametrize("method", ["cm1", pytest.param("cm1_last", marks=pytest.mark.every_model)])
@pytest.mark.parametrize(("arch", "kind"), [("llama", kind) for kind in KINDS])
def test_nothing_is_left_behind(arch, kind, method, fresh):
    model = fresh(arch, kind)
    prompts = TASK.sample(2, shots=2, demonstrations="shared")
    rank_heads(model, prompts, method=method, progress=False)
    before = snapshot(model)
    rank_heads(model, prompts, method=method, progress=False)
    reused(model)
    assert changes(before, snapshot(model)) == {}
    model.blocks[2].hook_resid_pre.add_hook(raises(Oops()))
    with pytest.raises(Oops):
        rank_heads(model, prompts, method=method, progress=False)
    model.reset_hooks()
    assert changes(before, snapshot(model)) == {}


# ---- which tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "begin", "members"),
    [
        # Two questions save 3 tokens, three would save 2.
        ([(1, 2, 3, 4), (1, 2, 3, 5), (1, 6, 7)], (1, 2, 3), (0, 1)),
        # Three of four that save 2 each, rather than all four that save one.
        ([(1, 2, 4), (1, 2, 5), (1, 2, 6), (1, 7)], (1, 2), (0, 1, 2)),
        # At least the last token is left; one that is given twice counts once.
        ([(1, 2, 3), (1, 2, 3, 4), (1, 2, 3)], (1, 2), (0, 1, 2)),
        ([(1, 2), (3, 4)], None, ()),
        ([(1,), (1,)], None, ()),
    ],
)
def test_the_tokens_that_save_most_are_shared(ids, begin, members, shared):
    lens = as_lens(shared("gpt2", KINDS[0]))
    found = SharedPrefix.of(lens, Prompts(tuple(ids), None, "right"))
    if begin is None:
        assert found is None
    else:
        assert found is not None
        assert (found.ids, found.members) == (begin, members)
