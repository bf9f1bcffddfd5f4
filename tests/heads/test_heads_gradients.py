"""Scores of one forward and one backward pass: by hand, by autograd, by what zeroing a share does.

And what the pass is shared by.
"""

from __future__ import annotations

import math

import pytest
import torch

from arch_models import has, write
from left_behind import changes, snapshot
from oracle import HFHeads, Wide
from ra_lens import load_demo_model, load_task, run_with_ra
from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NotStored, UnsupportedModel
from ra_lens.heads import (
    Needs,
    gradients,
    one_run_method,
    rank_heads,
    ranking_method,
    ranking_methods,
    registry,
)
from ra_lens.model import Site, Sites, load_folder
from ra_lens.tasks import Prompt
from refused import unchecked
from tiny_models import BOS, CASES, D_HEAD, KINDS, N_HEADS, N_LAYERS, every_model, relative
from tiny_questions import PROMPTS, TASK, WORDS

OF_ONE_RUN = ["ra", "w_norm", "michel", "atp", "knockout", "grad_sam", "ag", "grad_norm"]
OPTIONS = {"prepend_bos": True, "progress": False}
SCALE = 1 / math.sqrt(D_HEAD)


@pytest.fixture
def own(monkeypatch):
    """Methods that are registered here are gone afterwards."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


# ---- on paper -----------------------------------------------------------------------------------


def test_they_are_what_they_are_on_paper():
    """Two heads, two tokens, numbers of one dimension: z = A v, G = e v."""
    ra = RACache(Sites({0: Site(0, "blocks.0.attn", 2, 2, 0.5)}))
    a = torch.tensor([[[1.0, 0.0], [0.25, 0.75]], [[1.0, 0.0], [0.5, 0.5]]])
    # v = (1, −1) and e = (3, 4) in the first head, v = (1, 3) and e = (0, −2) in the second; above
    # the diagonal stands e·v, which no query can look at.
    g = torch.tensor([[[3.0, -3.0], [4.0, -4.0]], [[0.0, 0.0], [-2.0, -6.0]]])
    # A ⊙ G is (3; 1, −3) with rows of 3 and −2, and (0; −1, −3) with rows of 0 and −4.
    r = 0.5 * torch.tensor([[[0.0, 0.0], [1.5, -1.5]], [[0.0, 0.0], [1.0, -1.0]]])
    for kind, value in (("pattern", a), ("pattern_grad", g), ("ra", r)):
        ra._put(0, kind, value[None])
    z, e = torch.tensor([[1.0, 1.0], [-0.5, 2.0]]), torch.tensor([[3.0, 0.0], [4.0, -2.0]])
    for kind, value in (("z", z), ("z_grad", e)):
        ra._keep(0, kind, value[None, :, :, None])
    wanted = {
        "ra": [0.75 * 2**0.5, 0.5 * 2**0.5],
        "michel": [1, 4],  # 1·3 − .5·4 and 0 − 2·2
        "atp": [-1, 4],  # without the first the loss falls
        "knockout": [8, 4],  # 1.5/.75 + 1.5/.25 and 1/.5 + 1/.5
        "grad_sam": [3, 4],
        "ag": [7, 4],
        "grad_norm": [41**0.5, 40**0.5],  # of 3, 4, 4 and 2, 6
    }
    for name, scores in wanted.items():
        found = ranking_methods()[name].function(ra)
        assert found.shape == (1, 1, 2)
        assert found[0, 0].tolist() == pytest.approx(scores), name


# ---- autograd -----------------------------------------------------------------------------------


def read(arch, ids, answer):
    """Prompt with BOS and with the answer appended, and its mean cross-entropy."""
    n = 1 + len(ids)

    def loss(logits):
        rows = logits[0, n - 1 : n - 1 + len(answer)].double().log_softmax(-1)
        return -sum(rows[i, token] for i, token in enumerate(answer)) / len(answer)

    return torch.tensor([[BOS[arch], *ids, *answer]]), loss


def of_patterns(arch, reference):
    """Scores from A, ∂L/∂A and ∂L/∂S as autograd gives them in Hugging Face's model."""
    total = {name: torch.zeros(N_LAYERS, N_HEADS).double() for name in OF_ONE_RUN}
    for ids, answer in WORDS:
        tokens, loss = read(arch, ids, answer)
        found = reference(arch).all_gradients(tokens, loss, range(N_LAYERS))
        n, rows = tokens.shape[1], []
        seen = torch.ones(n, n).tril()  # what a query may look at
        for by_score, a, by_pattern in (found[layer] for layer in range(N_LAYERS)):
            s, a, g = by_score[0] * seen, a[0] * seen, by_pattern[0] * seen
            rest = (1 - a).where((a < 1) & (seen > 0), torch.inf)
            rows.append(
                {
                    "ra": (SCALE * s).square().sum((1, 2)).sqrt(),
                    "michel": (a * g).sum((1, 2)).abs(),
                    "atp": -(a * g).sum((1, 2)),
                    "knockout": (s / rest).abs().sum((1, 2)),
                    "grad_sam": (-a * g).clamp(min=0).sum((1, 2)),
                    "ag": (a * g).abs().sum((1, 2)),
                    "grad_norm": g.square().sum((1, 2)).sqrt(),
                }
            )
        for name in rows[0]:
            total[name] += torch.stack([row[name] for row in rows]) / len(WORDS)
    return {name: value for name, value in total.items() if name != "w_norm"}


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_they_are_those_of_autograd(arch, kind, shared, reference):
    wanted = of_patterns(arch, reference)
    found = rank_heads(shared(arch, kind), PROMPTS, methods=list(wanted), **OPTIONS)
    assert list(found) == list(wanted)
    for name, scores in wanted.items():
        assert relative(found[name].scores, scores) < 2e-5, name
        assert (found[name].method, found[name].n_examples) == (name, 3)
    assert wanted["atp"].min() < 0 < wanted["atp"].max()
    assert not torch.allclose(wanted["atp"].abs(), wanted["michel"], rtol=1e-2)


@pytest.mark.parametrize("kind", [KINDS[0], *every_model(*KINDS[1:])])
def test_the_prompt_alone_is_read_where_that_is_asked_for(kind, shared, reference):
    tokens = torch.tensor([[BOS["llama"], 3, 5, 7]])
    found = reference("llama").all_gradients(
        tokens, lambda logits: -logits[0, -1].log_softmax(-1)[9], range(N_LAYERS)
    )
    wanted = torch.stack([-(a * g)[0].sum((1, 2)) for _, a, g in found.values()])
    options = {"answer_in_input": False, **OPTIONS}
    scores = rank_heads(shared("llama", kind), PROMPTS[:1], method="atp", **options).scores
    assert relative(scores, wanted) < 2e-5


# ---- what is really done ------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_atp_is_the_slope_of_really_taking_a_little_of_a_head_away(arch, kind, shared, folder):
    """Rows of W_O are made a little smaller and a little larger in Hugging Face's own model."""
    heads, share = HFHeads(folder(arch), torch.float64), 1e-4
    asked = [read(arch, ids, answer) for ids, answer in WORDS]

    def loss(layer, head, factor):
        weight, rows = heads.rows(layer, head)
        before = weight[rows].clone()
        try:
            weight[rows] = before * factor
            with Wide():
                return sum(float(of(heads.logits(tokens))) for tokens, of in asked) / len(asked)
        finally:
            weight[rows] = before

    found = rank_heads(shared(arch, kind), PROMPTS, method="atp", **OPTIONS).scores
    wanted = torch.zeros_like(found)
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            rise = loss(layer, head, 1 - share) - loss(layer, head, 1 + share)
            wanted[layer, head] = rise / (2 * share)
    assert relative(found, wanted) < 1e-4


@pytest.mark.parametrize("arch", ["bitnet", "qwen3_5_text"])
def test_where_a_norm_or_a_gate_stands_behind_the_pattern_it_is_z_that_goes(arch, tmp_path):
    if KINDS[-1] != "TransformerBridge" or not has(arch):
        pytest.skip(f"{arch} is not known here")
    model = load_folder(write(arch, tmp_path), kind=KINDS[-1], device="cpu", dtype=torch.float64)
    prompt, share = Prompt("w3 w8 w5 w40 w7", " w9"), 1e-4
    ids = torch.tensor([[3, 8, 5, 40, 7, 9]])
    options = {"prepend_bos": False, "progress": False}
    found = rank_heads(model, [prompt], methods=["atp", "ag"], **options)
    n_heads = found["atp"].n_heads

    def loss(layer, head, factor):
        def scale(z, hook):
            by_head = z.reshape(*z.shape[:2], n_heads, -1).clone()
            by_head[:, :, head] *= factor
            return by_head.reshape(z.shape)

        hooks = [(f"blocks.{layer}.attn.hook_z", scale)]
        with torch.no_grad(), Wide():
            logits = model.run_with_hooks(ids, fwd_hooks=hooks)
        return float(-logits[0, -2].double().log_softmax(-1)[9])

    wanted = torch.zeros_like(found["atp"].scores)
    for row, layer in enumerate(found["atp"].layers):
        for head in range(n_heads):
            rise = loss(layer, head, 1 - share) - loss(layer, head, 1 + share)
            wanted[row, head] = rise / (2 * share)
    assert relative(found["atp"].scores, wanted) < 1e-4
    _, ra = run_with_ra(model, ids[:, :-1], target=9)
    of_maps = -torch.stack([(ra["pattern", i] * ra["pattern_grad", i])[0] for i in ra.layers])
    same = relative(of_maps.sum((2, 3)), wanted) < 1e-3
    assert same == (arch != "bitnet")  # a norm takes the size of z away, a gate does not


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_transformer_lens_attributes_the_same_to_zeroed_heads(arch, shared):
    theirs = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    model = shared(arch, "TransformerBridge")
    ids, answer = WORDS[0]
    tokens, loss = read(arch, ids, answer)
    runs = []

    def zero(z, hook):
        runs.append(hook.name)
        clean = runs.count(hook.name) == 1  # theirs runs the clean prompt first
        return torch.zeros_like(z) if clean else z

    names = [f"blocks.{layer}.attn.hook_z" for layer in range(N_LAYERS)]
    with model.hooks(fwd_hooks=[(name, zero) for name in names]):
        scores = theirs.attribution_patch(model, tokens, tokens, loss).node_scores
    assert len(runs) == 2 * N_LAYERS
    wanted = torch.zeros(N_LAYERS, N_HEADS, dtype=torch.float64)
    for node, score in scores.items():
        if node.kind == "attn_head_out":
            wanted[node.layer, node.head] += score
    found = rank_heads(model, PROMPTS[:1], method="atp", **OPTIONS).scores
    assert relative(found, wanted) < 1e-4


# ---- padding, batches, dtypes -------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_they_depend_neither_on_batches_nor_on_padding(arch, kind, side, fresh):
    model = fresh(arch, kind)
    model.tokenizer.padding_side = side
    prompts = [TASK.sample(1, shots=shots, seed=shots)[0] for shots in (0, 2, 3)]
    options = {"methods": OF_ONE_RUN, "progress": False, "prepend_bos": False}
    each = [rank_heads(model, [prompt], **options) for prompt in prompts]
    for batch_size in (2, 64):
        found = rank_heads(model, prompts, batch_size=batch_size, **options)
        for name in OF_ONE_RUN:
            alone = torch.stack([one[name].scores for one in each]).mean(0)
            assert relative(found[name].scores, alone) < 1e-4, name


@pytest.mark.parametrize("kind", [KINDS[0], *every_model(*KINDS[1:])])
def test_in_float16_they_are_close_to_those_of_float32(kind, shared, fresh):
    names = [name for name in OF_ONE_RUN if name != "w_norm"]
    wide = rank_heads(shared("gpt2", kind), PROMPTS, methods=names, **OPTIONS)
    half = rank_heads(fresh("gpt2", kind, torch.float16), PROMPTS, methods=names, **OPTIONS)
    for name in names:
        assert relative(half[name].scores, wide[name].scores) < 0.05, name


# ---- one pass for all ---------------------------------------------------------------------------


@pytest.fixture
def passes(fresh):
    """A model, and the passes through the pattern of its first layer: forwards, backwards."""
    model, seen = fresh("gpt2", KINDS[0]), {"forward": 0, "backward": 0}

    def count(_module, _args, output):
        seen["forward"] += 1
        if output.requires_grad:
            output.register_hook(lambda _: seen.update(backward=seen["backward"] + 1))

    model.blocks[0].attn.hook_pattern.register_forward_hook(count)
    return model, seen


def test_all_of_them_take_one_forward_and_one_backward_pass_for_each_batch(passes):
    model, seen = passes
    prompts = [Prompt("w3 w4 w5", " w6"), Prompt("w7 w8 w9", " w9"), Prompt("w7 w3 w9", " w4")]
    found = rank_heads(model, prompts, methods=OF_ONE_RUN, batch_size=2, **OPTIONS)
    assert seen == {"forward": 2, "backward": 2}
    for name in OF_ONE_RUN:
        seen.update(forward=0, backward=0)
        alone = rank_heads(model, prompts, method=name, batch_size=2, **OPTIONS)
        assert seen == {"forward": 2, "backward": 2}
        assert relative(found[name].scores, alone.scores) < 1e-6, name
    seen.update(forward=0, backward=0)
    rank_heads(model, prompts, methods=[*OF_ONE_RUN, "fa", "index"], batch_size=8, **OPTIONS)
    assert seen == {"forward": 2, "backward": 1}


def test_an_experiment_ranks_by_all_of_them_in_one_pass(passes):
    from ra_lens.experiments import perturbation_test, rank_tasks

    model, seen = passes
    options = {"shots": 0, "n_rank": 4, "progress": False}
    frame = rank_tasks(model, TASK, methods=["ra", "index", "atp", "ag"], **options)
    assert seen == {"forward": 1, "backward": 1}
    prompts = TASK.split().prompts("train", shots=0, n=4)
    for name in ("ra", "atp", "ag"):
        wanted = rank_heads(model, prompts, method=name, batch_size=64, progress=False)
        rows = frame[frame.method == name].sort_values("rank")
        assert list(zip(rows.layer, rows["head"], strict=True)) == wanted.order()
    seen.update(forward=0, backward=0)
    perturbation_test(model, TASK, methods=["ra", "michel"], n_test=2, step=0.5, **options)
    assert seen["backward"] == 1


def test_a_run_that_was_killed_goes_on_with_one_more_pass(own, passes, tmp_path):
    from ra_lens.experiments import rank_tasks
    from ra_lens.experiments.journal import journal_path

    class Killed(Exception):
        pass

    class Method:  # what a class holds is no part of what a method is known by
        dying = True

    model, seen = passes

    @ranking_method("between")
    def between(context):
        if Method.dying:
            raise Killed
        return torch.zeros(context.shape)

    options = {"shots": 0, "n_rank": 4, "progress": False, "methods": ["ra", "between", "atp"]}
    out = tmp_path / "table.csv"
    with pytest.raises(Killed):
        rank_tasks(model, TASK, out=out, **options)
    assert '|ra"' in journal_path(out).read_text()
    Method.dying = False
    seen.update(forward=0, backward=0)
    rank_tasks(model, TASK, out=out, **options)
    assert seen["backward"] == 1
    rank_tasks(model, TASK, out=tmp_path / "other.csv", **options)
    whole, went_on = ((tmp_path / f"{name}.csv").read_text() for name in ("other", "table"))
    assert went_on == whole


def test_methods_come_in_the_order_given_with_the_same_scores(shared):
    model = shared("gpt2", KINDS[0])
    found = rank_heads(model, PROMPTS, methods=("index", "ra", "random"), seed=3, **OPTIONS)
    assert list(found) == ["index", "ra", "random"]
    for name, scores in found.items():
        alone = rank_heads(model, PROMPTS, method=name, seed=3, **OPTIONS)
        assert torch.equal(scores.scores, alone.scores)
        assert (scores.method, scores.title, scores.seed) == (name, alone.title, 3)
    assert list(rank_heads(model, PROMPTS, methods="index")) == ["index"]


def test_what_cannot_be_asked_for_is_said(shared):
    model = shared("gpt2", KINDS[0])
    both = r"method='fa' and methods=\['ra'\]; give method= for the scores of one, or methods="
    with pytest.raises(BadInput, match=both):
        unchecked(rank_heads)(model, PROMPTS, method="fa", methods=["ra"])
    for methods in ([], ["ra", "ra"]):
        with pytest.raises(BadInput, match=r"found methods=\[.*give at least one, each once"):
            rank_heads(model, PROMPTS, methods=methods)
    with pytest.raises(BadInput, match=r"no ranking method 'mitchel'. Did you mean 'michel'"):
        rank_heads(model, PROMPTS, methods=["ra", "mitchel"])


# ---- one's own ----------------------------------------------------------------------------------


def test_a_function_of_a_batch_becomes_a_method(own, shared):
    model, seen = shared("gpt2", KINDS[0]), []

    @one_run_method("last_row", title="R of the last row", maps=["ra"], vectors=["z"], label="L")
    def last_row(ra):
        seen.append((ra.batch_size, sorted({name.rpartition("hook_")[2] for name in ra})))
        return torch.stack([ra["ra", i][:, :, -1].norm(dim=-1) for i in ra.layers], dim=1)

    one = ranking_methods()["last_row"]
    assert (one.function, one.needs, one.label) == (last_row, Needs(("ra",), ("z",)), "L")
    assert (one.split, one.random) == ("train", False)
    prompts = [Prompt("w3 w4 w5", " w6"), Prompt("w7 w8 w9", " w9"), Prompt("w7 w3 w9", " w4")]
    found = rank_heads(model, prompts, method="last_row", batch_size=2, **OPTIONS).scores
    assert seen == [(2, ["ra", "z"]), (1, ["ra", "z"])]
    _, ra = run_with_ra(
        model, [p.text for p in prompts], target=[p.answer for p in prompts], prepend_bos=True
    )
    # The loss is read at the last token of the prompt, whose answer of one token comes after it.
    rank = rank_heads(model, prompts, method="last_row", answer_in_input=False, **OPTIONS).scores
    wanted = torch.stack([ra["ra", i][:, :, -1].norm(dim=-1) for i in ra.layers], dim=1).mean(0)
    assert relative(rank, wanted) < 1e-5
    assert relative(found, wanted) > 1e-2  # its last row is that of the answer

    with pytest.raises(BadInput, match=r"already is a ranking method 'ra' \(norm.*replace=True"):
        one_run_method("ra")(lambda ra: ra.norms())
    with pytest.raises(BadInput, match="empty name"):
        ranking_method("")
    with pytest.raises(NotStored, match="'attention'"):
        unchecked(one_run_method)("x", maps=["attention"])
    with pytest.raises(BadInput, match="vectors='querry'; give True, or some of query"):
        unchecked(one_run_method)("x", vectors=["querry"])


def test_norms_are_there_without_being_asked_for_and_maps_are_not(own, shared):
    one_run_method("size")(lambda ra: ra.norms("pattern"))
    one_run_method("greedy")(lambda ra: ra["ra", 0].sum((2, 3)))
    model = shared("gpt2", KINDS[0])
    fa = rank_heads(model, PROMPTS, method="fa", **OPTIONS)
    assert relative(rank_heads(model, PROMPTS, method="size", **OPTIONS).scores, fa.scores) < 1e-6
    with pytest.raises(NotStored, match=r"'ra', 0.*was not kept"):
        rank_heads(model, PROMPTS, method="greedy", **OPTIONS)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(N_LAYERS, N_HEADS), r"'bad' gave scores of shape \(3, 4\) for a batch; a"),
        ([[0.0]], r"gave a list for a batch; a tensor \[example, layer, head\] = \[3, 3, 4\]"),
        (torch.full((3, 3, 4), torch.nan), r"'bad' gave NaN for 12 of 12 heads \(L0H0, "),
    ],
)
def test_scores_of_a_batch_that_cannot_be_used_name_their_method(result, message, own, shared):
    one_run_method("bad")(lambda _: result)
    with pytest.raises(BadInput, match=message):
        rank_heads(shared("gpt2", KINDS[0]), PROMPTS, methods=["ra", "bad"], **OPTIONS)


def test_a_model_that_does_not_show_z_is_refused(shared, monkeypatch):
    from ra_lens.model import as_lens

    model = shared("gpt2", KINDS[0])
    lens = as_lens(model)
    points = {k: v for k, v in lens.hook_points.items() if k != "blocks.1.attn.hook_z"}
    monkeypatch.setattr(type(lens), "hook_points", points)
    with pytest.raises(UnsupportedModel, match=r"no hook point 'blocks.1.attn.hook_z'.*as 'ra'"):
        rank_heads(model, PROMPTS, methods=["ra", "michel"], **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_on_the_model(kind, fresh):
    model = fresh("opt", kind)
    rank_heads(model, PROMPTS[:1], method="index")
    with torch.no_grad():
        model(torch.tensor([[3, 4]]))  # a bridge attaches hooks of its own in its first run
    before = snapshot(model)
    rank_heads(model, PROMPTS, methods=OF_ONE_RUN, **OPTIONS)
    assert not changes(before, snapshot(model))


def test_sums_of_cells_bound_each_other_on_the_embedded_model():
    model, prompts = load_demo_model(), load_task("antonym").sample(6, shots=2)
    found = rank_heads(model, prompts, methods=OF_ONE_RUN, progress=False)
    scores = {name: one.scores for name, one in found.items()}
    slack = 1e-9
    assert bool((scores["atp"].abs() <= scores["michel"] + slack).all())
    assert bool((scores["michel"] <= scores["ag"] + slack).all())
    assert bool((scores["grad_sam"] <= scores["ag"] + slack).all())
    assert bool((scores["atp"] <= scores["grad_sam"] + slack).all())
    assert gradients.__doc__ is not None
    for name in OF_ONE_RUN:
        assert f"    {name} " in gradients.__doc__
