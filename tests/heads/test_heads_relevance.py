"""Scores of other backward passes: against models written anew, and what they share."""

from __future__ import annotations

import pytest
import torch

from left_behind import changes, snapshot
from other_backward import OtherBackward
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.heads import Needs, one_run_method, rank_heads, ranking_methods, registry
from ra_lens.tasks import Prompt
from refused import unchecked
from tiny_models import BOS, CASES, KINDS, N_HEADS, N_LAYERS, relative
from tiny_questions import PROMPTS, WORDS

OPTIONS = {"prepend_bos": True, "progress": False}


@pytest.fixture
def own(monkeypatch):
    """Methods that are registered here are gone afterwards."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


def read(arch, ids, answer):
    """Prompt with BOS and with the answer appended, and its mean cross-entropy."""
    n = 1 + len(ids)

    def loss(logits):
        rows = logits[0, n - 1 : n - 1 + len(answer)].double().log_softmax(-1)
        return -sum(rows[i, token] for i, token in enumerate(answer)) / len(answer)

    return torch.tensor([[BOS[arch], *ids, *answer]]), loss


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_they_are_those_of_models_written_anew(arch, kind, shared, reference):
    found = rank_heads(shared(arch, kind), PROMPTS, methods=["relp", "michel", "gim"], **OPTIONS)
    for backward in ("relp", "gim"):
        other = OtherBackward(reference(arch), backward)
        wanted = torch.zeros(N_LAYERS, N_HEADS).double()
        for ids, answer in WORDS:
            maps, _, _ = other.gradients(*read(arch, ids, answer))
            # z is A·v, so that Σ z·∂L/∂z is Σ A ⊙ G.
            rows = [(pattern * grad)[0].sum((1, 2)).abs() for _, pattern, grad in maps]
            wanted += torch.stack(rows) / len(WORDS)
        assert relative(found[backward].scores, wanted) < 2e-5
        assert relative(found["michel"].scores, wanted) > 0.05


def test_methods_of_one_backward_pass_share_it(own, fresh):
    model, seen = fresh("gpt2", KINDS[0]), {"forward": 0, "backward": 0}
    asked = []

    def count(_module, _args, output):
        seen["forward"] += 1
        if output.requires_grad:
            output.register_hook(lambda _: seen.update(backward=seen["backward"] + 1))

    model.blocks[0].attn.hook_pattern.register_forward_hook(count)

    @one_run_method("norm_of_relp", maps=["ra"], backward="relp")
    def norm_of_relp(ra):
        asked.append(ra.info.backward)
        return ra.norms("ra")

    assert ranking_methods()["norm_of_relp"].needs == Needs(maps=("ra",), backward="relp")
    names = ["norm_of_relp", "ra", "relp", "michel", "gim"]
    found = rank_heads(model, PROMPTS, methods=names, batch_size=2, **OPTIONS)
    assert list(found) == names
    assert seen == {"forward": 6, "backward": 6}  # two batches, three backward passes
    assert asked == ["relp", "relp"]
    assert relative(found["norm_of_relp"].scores, found["ra"].scores) > 0.05
    with pytest.raises(BadInput, match=r"backward='lrp' for method 'm'; give one of 'exact', 'r"):
        unchecked(one_run_method)("m", backward="lrp")


def test_a_model_without_rules_is_refused_and_left_alone(fresh):
    model = fresh("gpt2", KINDS[0])
    with torch.no_grad():
        model(torch.tensor([[3, 4]]))  # a bridge attaches hooks of its own in its first run

    def squashed(value, hook):
        return torch.sigmoid(value)

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", squashed)]):
        before = snapshot(model)
        with pytest.raises(UnsupportedModel, match="SigmoidBackward0 in the graph of"):
            rank_heads(model, [Prompt("w3 w4", " w5")], method="relp", **OPTIONS)
        assert changes(before, snapshot(model)) == {}
