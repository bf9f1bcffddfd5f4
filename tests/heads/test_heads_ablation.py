"""Exact effects of heads, against one head at a time in a Hugging Face model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from folded import fold
from left_behind import changes, snapshot
from oracle import HFHeads
from ra_lens.errors import BadInput, RALensWarning, UnsupportedModel
from ra_lens.heads import head_effects, rank_heads, ranking_methods
from ra_lens.model import Lens, as_lens
from ra_lens.tasks import Prompt, with_corrupted
from refused import unchecked
from tiny_models import ANY_KIND, BOS, CASES, KINDS, N_HEADS, N_LAYERS, every_model, relative, text
from tiny_questions import PROMPTS, TASK, WORDS

SOME = [*every_model("mean"), "zero", "resample"]
EVERY = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
OPTIONS = {"prepend_bos": True, "progress": False}
# As long each; they differ from their prompts from the first word on, or only at the last.
OTHERS = [[20, 21, 22], [4, 23], [24, 25, 26, 27, 28]]
PAIRED = [
    replace(prompt, corrupted=Prompt(text(ids), " w29"))
    for prompt, ids in zip(PROMPTS, OTHERS, strict=True)
]


class Asked:
    """Prompts and their twins as ids, with the answers that are read behind both."""

    def __init__(self, arch, reference, *, whole=True):
        self.reference = reference
        self.ids, self.twins, self.answers = [], [], []
        for (ids, answer), other in zip(WORDS, OTHERS, strict=True):
            behind = answer[:-1] if whole else []
            self.ids.append(torch.tensor([[BOS[arch], *ids, *behind]]))
            self.twins.append(torch.tensor([[BOS[arch], *other, *behind]]))
            self.answers.append(answer if whole else answer[:1])
        rows = [torch.cat([reference.z(ids)[i][0] for ids in self.ids]) for i in range(N_LAYERS)]
        self.means = [of_layer.double().mean(dim=0) for of_layer in rows]

    def measured(self, i):
        """Loss of a prompt, and its logit difference."""
        logits, answer = self.reference.logits(self.ids[i])[0].double(), self.answers[i]
        rows = logits[-len(answer) :]
        losses = [-row.log_softmax(-1)[token] for row, token in zip(rows, answer, strict=True)]
        others = rows[0].clone()
        others[answer[0]] = -torch.inf
        return torch.stack([sum(losses) / len(answer), rows[0][answer[0]] - others.max()])

    def values(self, ablation, i, layer, head):
        """What a head gives in place of its z, [pos, d_head]."""
        _, rows = self.reference.rows(layer, head)
        z = self.reference.z(self.twins[i])[layer][0, :, rows]
        if ablation == "resample":
            return z
        return torch.zeros_like(z) if ablation == "zero" else self.means[layer][rows].expand_as(z)

    def effects(self, ablation):
        """Rise of the loss and fall of the logit difference, [prompt, layer, head] each."""
        found = torch.zeros(2, len(WORDS), N_LAYERS, N_HEADS, dtype=torch.float64)
        for i in range(len(WORDS)):
            before = self.measured(i)
            for layer, head in EVERY:
                value = self.values(ablation, i, layer, head)
                with self.reference.replaced(layer, head, slice(None), value):
                    after = self.measured(i)
                found[0, i, layer, head] = after[0] - before[0]
                found[1, i, layer, head] = before[1] - after[1]
        return found


@pytest.mark.parametrize("ablation", SOME)
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_effects_are_those_of_one_head_at_a_time(arch, kind, ablation, shared, folder):
    asked = Asked(arch, HFHeads(folder(arch)))
    model = shared(arch, kind)
    found = head_effects(model, PAIRED, ablation=ablation, batch_size=7, **OPTIONS)
    wanted, differences = asked.effects(ablation)
    assert wanted.min() < 0 < wanted.max()
    assert relative(found.effects, wanted) < 1e-4
    assert relative(found.logit_diff_effects, differences) < 1e-4
    before = torch.stack([asked.measured(i) for i in range(len(WORDS))])
    assert relative(found.loss, before[:, 0]) < 1e-5
    assert relative(found.logit_diff, before[:, 1]) < 1e-4
    scores = rank_heads(model, PAIRED, method=ablation, batch_size=7, each_prompt=True, **OPTIONS)
    assert torch.equal(scores.scores, found.effects.mean(dim=0))
    assert torch.equal(scores.each, found.effects)
    assert found.scores().order() == scores.order()
    assert scores.title == ranking_methods()[ablation].title == found.scores().title


@pytest.mark.parametrize("ablation", SOME)
@pytest.mark.parametrize("kind", ANY_KIND)
def test_the_first_token_alone_is_read_where_that_is_asked_for(kind, ablation, shared, folder):
    asked = Asked("gpt2", HFHeads(folder("gpt2")), whole=False)
    options = {"answer_in_input": False, **OPTIONS}
    found = head_effects(shared("gpt2", kind), PAIRED, ablation=ablation, **options)
    assert relative(found.effects, asked.effects(ablation)[0]) < 1e-4
    # It ranks as CM1 does, in another unit, on each prompt.
    if ablation == "zero":
        lost = rank_heads(shared("gpt2", kind), PAIRED, method="cm1", each_prompt=True, **OPTIONS)
        p = (-found.loss).exp()[:, None, None]
        assert relative(lost.each, p - p * (-found.effects).exp()) < 1e-4


@pytest.mark.parametrize("ablation", SOME)
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_shared_demonstrations_run_once_and_change_nothing(arch, kind, ablation, fresh):
    model = fresh(arch, kind)
    prompts = TASK.sample(3, shots=2, demonstrations="shared")
    paired = with_corrupted(prompts, lambda words: words.split())
    assert all(one.corrupted.demonstrations == prompts[0].demonstrations for one in paired)
    found = head_effects(model, paired, ablation=ablation, **OPTIONS)
    # With a hook on the model nothing is shared.
    model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: x)
    in_full = head_effects(model, paired, ablation=ablation, **OPTIONS)
    assert relative(found.effects, in_full.effects) < 1e-4


@pytest.mark.parametrize("kind", ANY_KIND)
def test_twins_with_other_demonstrations_are_put_in_place_of_all_tokens(kind, fresh):
    model = fresh("gpt2", kind)
    prompts = TASK.sample(3, shots=2, demonstrations="shared")
    shown = prompts[0].demonstrations
    others = [[shown[1], shown[0]], shown, TASK.sample(1, shots=2, seed=5)[0].demonstrations]
    paired = [
        replace(one, corrupted=one.with_demonstrations(pairs))
        for one, pairs in zip(prompts, [others[0], others[2], others[2]], strict=True)
    ]
    found = head_effects(model, paired, ablation="resample", **OPTIONS)
    each = [head_effects(model, [one], ablation="resample", **OPTIONS).effects for one in paired]
    assert relative(found.effects, torch.cat(each)) < 1e-4


@pytest.mark.every_model
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ablation", ["zero", "resample"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_they_depend_neither_on_batches_nor_on_padding(arch, kind, ablation, side, fresh):
    model = fresh(arch, kind)
    model.tokenizer.padding_side = side
    options = {"ablation": ablation, "progress": False, "prepend_bos": False}
    each = [head_effects(model, [prompt], **options).effects for prompt in PAIRED]
    for batch_size in (5, 64):
        found = head_effects(model, PAIRED, batch_size=batch_size, **options)
        assert relative(found.effects, torch.cat(each)) < 1e-4


@pytest.mark.parametrize("kind", ANY_KIND)
def test_folded_value_biases_stay_behind_a_zero_only(kind, fresh, shared):
    folded, model = fold(fresh("gpt2", kind), kind), shared("gpt2", kind)
    with pytest.warns(RALensWarning, match="folded into its output biases.*load_model") as seen:
        found = head_effects(folded, PAIRED, **OPTIONS)
    if unchecked(head_effects) is head_effects:  # else the checks of shapes stand in between
        assert seen[0].filename == __file__
    assert relative(found.effects, head_effects(model, PAIRED, **OPTIONS).effects) > 1e-2
    for ablation in ("mean", "resample"):
        found = head_effects(folded, PAIRED, ablation=ablation, **OPTIONS)
        wanted = head_effects(model, PAIRED, ablation=ablation, **OPTIONS)
        assert relative(found.effects, wanted.effects) < 1e-4


def test_what_cannot_be_ablated_says_so_and_leaves_nothing(fresh, monkeypatch):
    model = fresh("gpt2", KINDS[0])
    with torch.no_grad():
        model(torch.tensor([[3, 4]]))
    before = snapshot(model)
    with pytest.raises(BadInput, match="ablation='noise'; give one of 'zero', 'mean', 'resample'"):
        unchecked(head_effects)(model, PROMPTS, ablation="noise", **OPTIONS)
    with pytest.raises(BadInput, match=r"prompt 0 \('w3 w5 w7'\) is of no task.*corrupted=Prompt"):
        head_effects(model, PROMPTS, ablation="resample", **OPTIONS)
    longer = replace(PROMPTS[0], corrupted=Prompt("w3 w5 w7 w9", " w8"))
    needed = r"twin of prompt 0 \('w3 w5 w7', 4 tokens\) has 5 tokens. Give a twin as long"
    with pytest.raises(BadInput, match=needed):
        head_effects(model, [longer], ablation="resample", **OPTIONS)
    same = replace(PROMPTS[0], corrupted=Prompt("w3 w5 w7", " w8"))
    with pytest.raises(BadInput, match="has the same tokens"):
        head_effects(model, [same], ablation="resample", **OPTIONS)
    found = head_effects(model, PAIRED, ablation="resample", **OPTIONS)
    assert not changes(before, snapshot(model))
    said = repr(found)
    assert "ablation 'resample': layers 0…2, 3 prompts, loss " in said
    assert f"without: {found.scores().top(1)[0].label} +" in said
    points = {n: p for n, p in as_lens(model).hook_points.items() if n != "blocks.1.attn.hook_z"}
    monkeypatch.setattr(Lens, "hook_points", points)
    with pytest.raises(UnsupportedModel, match=r"no hook point 'blocks.1.attn.hook_z'"):
        head_effects(model, PAIRED, **OPTIONS)
