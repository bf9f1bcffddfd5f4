"""NAP and NAP-IG: against autograd in a Hugging Face model, and TransformerLens's own."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from left_behind import changes, snapshot
from oracle import HFHeads, Wide
from ra_lens.cache import RACache
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.heads import CorruptedRun, one_run_method, rank_heads, ranking_methods, registry
from ra_lens.heads.gradients import nap_ig_scores
from ra_lens.model import Lens, Site, Sites, as_lens
from ra_lens.tasks import Prompt, with_corrupted
from tiny_models import ANY_KIND, BOS, CASES, KINDS, N_HEADS, N_LAYERS, relative, text
from tiny_questions import PROMPTS, TASK, WORDS

OPTIONS = {"prepend_bos": True, "progress": False}
OTHERS = [[20, 21, 22], [4, 23], [24, 25, 26, 27, 28]]
PAIRED = [
    replace(prompt, corrupted=Prompt(text(ids), " w29"))
    for prompt, ids in zip(PROMPTS, OTHERS, strict=True)
]


@pytest.fixture
def own(monkeypatch):
    """Methods that are registered here are gone afterwards."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


def test_they_are_what_they_are_on_paper():
    """Two heads, two tokens, numbers of one dimension."""
    ra = RACache(Sites({0: Site(0, "blocks.0.attn", 2, 2, 0.5)}))
    z, e = torch.tensor([[1.0, 1.0], [-0.5, 2.0]]), torch.tensor([[3.0, 0.0], [4.0, -2.0]])
    for kind, value in (("z", z), ("z_grad", e)):
        ra._keep(0, kind, value[None, :, :, None])
    other = torch.tensor([[2.0, 7.0], [-0.5, 1.0]])[None, :, :, None]
    half = {0: e[None, :, :, None] / 2}  # a mean gradient of half the size
    for name, factor in (("nap", 1.0), ("nap_ig", 0.5)):
        run = CorruptedRun({0: other}, {0: factor * e[None, :, :, None]} if factor == 1 else half)
        # (2 − 1)·3 + 0·4, and 6·0 + (1 − 2)·(−2): the loss rises in both.
        found = ranking_methods()[name].function(ra, run)
        assert (found / factor).tolist() == [[[3.0, 2.0]]]


class Moved:
    """A Hugging Face model in float64 whose embeddings are moved; sees z and ∂L/∂z."""

    def __init__(self, folder):
        self.heads = HFHeads(folder, torch.float64)
        self.embedding = self.heads.model.get_input_embeddings()
        with torch.no_grad():
            self.heads.model.requires_grad_(requires_grad=False)

    @contextmanager
    def embedding_of(self, twin, share):
        """Every embedding lies this share of the way from that of the twin to its own."""

        def move(module, _args, own):
            other = torch.nn.functional.embedding(twin, module.weight)
            return (other + share * (own - other)).requires_grad_()

        handle = self.embedding.register_forward_hook(move)
        try:
            yield
        finally:
            handle.remove()

    def z_and_gradient(self, ids, loss, twin=None, share=1.0):
        """z of every layer, [pos, heads · d_head], and the gradient there."""
        seen = []

        def see(_module, args):
            seen.append(args[0])

        handles = [
            self.heads.output(layer).register_forward_pre_hook(see) for layer in range(N_LAYERS)
        ]
        try:
            with self.embedding_of(ids if twin is None else twin, share), Wide():
                of = loss(self.heads.model(ids).logits)
                grads = torch.autograd.grad(of, seen)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([z.detach() for z in seen]), torch.cat(grads)

    def score(self, ids, twin, loss, steps):
        """Σ (z′ − z) · mean gradient, [layer, head]."""
        z, _ = self.z_and_gradient(ids, loss)
        other, _ = self.z_and_gradient(twin, loss)
        path = [self.z_and_gradient(ids, loss, twin, k / steps)[1] for k in range(1, steps + 1)]
        product = (other - z) * torch.stack(path).mean(dim=0)
        return product.unflatten(-1, (N_HEADS, -1)).sum(dim=(1, 3))


def read(arch, ids, answer):
    """Ids with BOS and with the answer appended, and the mean cross-entropy of the answer."""
    n = 1 + len(ids)

    def loss(logits):
        rows = logits[0, n - 1 : n - 1 + len(answer)].double().log_softmax(-1)
        return -sum(rows[i, token] for i, token in enumerate(answer)) / len(answer)

    return torch.tensor([[BOS[arch], *ids, *answer]]), loss


def by_autograd(arch, folder, steps):
    moved, found = Moved(folder(arch)), []
    for (ids, answer), other in zip(WORDS, OTHERS, strict=True):
        tokens, loss = read(arch, ids, answer)
        found.append(moved.score(tokens, read(arch, other, answer)[0], loss, steps))
    return torch.stack(found)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_they_are_those_of_autograd(arch, kind, shared, folder):
    model, names = shared(arch, kind), ["nap", "nap_ig"]
    found = rank_heads(model, PAIRED, methods=names, each_prompt=True, **OPTIONS)
    for name, steps in (("nap", 1), ("nap_ig", 5)):
        wanted = by_autograd(arch, folder, steps)
        assert relative(found[name].each, wanted) < 1e-4, name
        assert relative(found[name].scores, wanted.mean(0)) < 1e-4, name
        assert wanted.mean(0).min() < 0 < wanted.mean(0).max()
    assert relative(found["nap"].scores, found["nap_ig"].scores) > 1e-2


@pytest.mark.parametrize("kind", ANY_KIND)
def test_the_prompt_alone_is_read_where_that_is_asked_for(kind, shared, folder):
    tokens, other = (torch.tensor([[BOS["llama"], *ids]]) for ids in (WORDS[0][0], OTHERS[0]))
    moved = Moved(folder("llama"))
    options = {"answer_in_input": False, **OPTIONS}
    for name, steps in (("nap", 1), ("nap_ig", 5)):
        wanted = moved.score(tokens, other, lambda x: -x[0, -1].log_softmax(-1)[9], steps)
        found = rank_heads(shared("llama", kind), PAIRED[:1], method=name, **options)
        assert relative(found.scores, wanted) < 1e-4


@pytest.mark.parametrize("kind", ANY_KIND)
def test_with_one_step_ig_is_nap_and_with_many_another(kind, own, shared):
    model = shared("gpt2", kind)
    for steps in (1, 12):
        register = one_run_method(f"ig_{steps}", vectors=["z"], corrupted=True, steps=steps)
        register(nap_ig_scores)
    found = rank_heads(model, PAIRED, methods=["nap", "ig_1", "nap_ig", "ig_12"], **OPTIONS)
    scores = {name: one.scores for name, one in found.items()}
    assert torch.equal(scores["ig_1"], scores["nap"])
    assert relative(scores["ig_12"], scores["nap_ig"]) > 1e-3
    of_one = ranking_methods()["ig_12"].passes
    assert (of_one.forwards(12), of_one.backward) == (13, 12)
    with pytest.raises(BadInput, match=r"steps=3 without corrupted=True for method 'mine'"):
        one_run_method("mine", steps=3)
    with pytest.raises(BadInput, match=r"steps=3 with backward='relp' for method 'mine'"):
        one_run_method("mine", steps=3, corrupted=True, backward="relp")


@pytest.mark.parametrize("kind", ANY_KIND)
def test_the_slope_towards_the_twin_is_that_of_really_going_a_little(kind, shared, folder):
    """z is moved a little towards that of the twin, and away, in Hugging Face's own model."""
    found = rank_heads(shared("gpt2", kind), PAIRED[:1], method="nap", **OPTIONS).scores
    heads, share = HFHeads(folder("gpt2"), torch.float64), 1e-4
    tokens, loss = read("gpt2", *WORDS[0])
    own, other = heads.z(tokens), heads.z(read("gpt2", OTHERS[0], WORDS[0][1])[0])
    wanted = torch.zeros_like(found)
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            _, rows = heads.rows(layer, head)
            z, towards = own[layer][0, :, rows], (other[layer] - own[layer])[0, :, rows]
            ends = []
            for t in (share, -share):
                with heads.replaced(layer, head, slice(None), z + t * towards):
                    ends.append(float(loss(heads.logits(tokens))))
            wanted[layer, head] = (ends[0] - ends[1]) / (2 * share)
    assert relative(found, wanted) < 1e-4


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_transformer_lens_attributes_the_same_to_corrupted_prompts(arch, shared):
    theirs = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    model = shared(arch, "TransformerBridge")
    tokens, loss = read(arch, *WORDS[0])
    twin, _ = read(arch, OTHERS[0], WORDS[0][1])
    # Theirs differentiates at the second prompt, and moves from it to the first.
    scores = theirs.attribution_patch(model, twin, tokens, loss).node_scores
    wanted = torch.zeros(N_LAYERS, N_HEADS, dtype=torch.float64)
    for node, score in scores.items():
        if node.kind == "attn_head_out":
            wanted[node.layer, node.head] += score
    found = rank_heads(model, PAIRED[:1], method="nap", **OPTIONS).scores
    assert relative(found, wanted) < 1e-4


@pytest.mark.every_model
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_they_depend_neither_on_batches_nor_on_padding(arch, kind, side, fresh):
    model = fresh(arch, kind)
    model.tokenizer.padding_side = side
    options = {"methods": ["nap", "nap_ig"], "progress": False, "prepend_bos": False}
    each = [rank_heads(model, [prompt], **options) for prompt in PAIRED]
    for batch_size in (2, 64):
        found = rank_heads(model, PAIRED, batch_size=batch_size, **options)
        for name in options["methods"]:
            alone = torch.stack([one[name].scores for one in each]).mean(0)
            assert relative(found[name].scores, alone) < 1e-4, name


@pytest.mark.parametrize("kind", ANY_KIND)
def test_twins_are_drawn_where_prompts_have_none(kind, shared):
    model, prompts = shared("gpt2", kind), TASK.sample(3, shots=1)
    found = rank_heads(model, prompts, method="nap", seed=2, **OPTIONS)
    paired = with_corrupted(prompts, lambda words: words.split(), seed=2)
    wanted = rank_heads(model, paired, method="nap", **OPTIONS)
    assert torch.equal(found.scores, wanted.scores)
    with pytest.raises(BadInput, match=r"prompt 0 \('w3 w5 w7'\) is of no task"):
        rank_heads(model, PROMPTS, method="nap", **OPTIONS)


def test_a_model_that_hides_its_embeddings_has_nap_only_and_nothing_is_left(fresh, monkeypatch):
    model = fresh("gpt2", KINDS[0])
    with torch.no_grad():
        model(torch.tensor([[3, 4]]))
    before = snapshot(model)
    rank_heads(model, PAIRED, methods=["nap", "nap_ig"], **OPTIONS)
    assert not changes(before, snapshot(model))
    points = {n: p for n, p in as_lens(model).hook_points.items() if n != "hook_embed"}
    monkeypatch.setattr(Lens, "hook_points", points)
    rank_heads(model, PAIRED, method="nap", **OPTIONS)
    with pytest.raises(UnsupportedModel, match=r"no hook point 'hook_embed'.*'nap', which moves"):
        rank_heads(model, PAIRED, method="nap_ig", **OPTIONS)
    assert not changes(before, snapshot(model))
