"""Models that padding gets through to: their prompts compute in a batch what they compute alone.

Some ignore the mask, some lose causality with it, some count positions from the first column. The
oracle is each prompt run by itself, where nothing is padded; without a mask that is checked against
Hugging Face in `test_architectures`.
"""

from __future__ import annotations

import re
from contextlib import contextmanager, nullcontext

import pytest
import torch

import arch_models
from padded_rows import padded, part
from ra_lens import check_model, rank_heads, run_with_ra
from ra_lens.errors import NothingToDifferentiate, RALensWarning, UnsupportedModel
from ra_lens.experiments import perturbation_test
from ra_lens.model import as_lens, load_folder
from ra_lens.padding import padding_is_hidden
from ra_lens.paths import read_maps, trace_layers, trace_paths
from ra_lens.prompts import Prompts
from ra_lens.questions import ask, read_questions
from ra_lens.targets import sequence_nll
from ra_lens.tasks import Pair, Prompt, Task
from tiny_models import KINDS, copied, relative

BRIDGE, HOOKED = "TransformerBridge", "HookedTransformer"
needs_bridge = pytest.mark.skipif(BRIDGE not in KINDS, reason="no TransformerBridge here")
KINDS_OF_MAP = ("ra", "pattern", "pattern_grad")
ROWS = [torch.tensor(row) for row in ([3, 9, 4, 7, 5], [8, 3, 6, 9, 4, 11, 5], [6, 5, 12, 3, 8])]
TARGETS = [5, 8, 11]

# What is wrong with a model, the class it is loaded with, and the sides on which it shows.
FAULTY = [("columns", kind, ("left",)) for kind in KINDS]
if BRIDGE in KINDS:
    FAULTY.append(("openai_gpt", BRIDGE, ("left", "right")))
if HOOKED in KINDS:
    FAULTY.append(("bidirectional", HOOKED, ("left", "right")))
# Those that answer questions.
CAUSAL = [(fault, kind) for fault, kind, _ in FAULTY if fault != "bidirectional"]


def counting_columns(model, kind):
    """Make a GPT-2 count its positions from the first column, padding or not."""
    if kind == BRIDGE:

        def from_the_first(_module, args, kwargs):
            return (torch.arange(args[0].shape[-1]).expand_as(args[0]), *args[1:]), kwargs

        model.pos_embed.register_forward_pre_hook(from_the_first, with_kwargs=True)
    else:
        own = model.pos_embed.forward
        vars(model.pos_embed)["forward"] = lambda tokens, offset=0, mask=None: own(tokens, offset)
    return model


def bidirectional():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=24,
        d_head=6,
        n_heads=4,
        d_vocab=34,
        n_ctx=16,
        act_fn="gelu",
        attention_dir="bidirectional",
        seed=3,
    )
    model = HookedTransformer(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def loaded(fresh, tmp_path_factory):
    """`loaded(fault, kind)`: a model with that fault; `fresh=True` for one of the test's own."""
    models, as_loaded = {}, {}

    def load(fault, kind):
        if fault == "bidirectional":
            return bidirectional()
        if fault == "columns":
            return counting_columns(fresh("gpt2", kind), kind)
        if (fault, kind) not in as_loaded:
            folder = arch_models.write(fault, tmp_path_factory.mktemp(fault))
            as_loaded[fault, kind] = load_folder(folder, kind=kind, device="cpu")
        return copied(as_loaded[fault, kind])

    def get(fault, kind, *, fresh=False):
        if fresh:
            return load(fault, kind)
        if (fault, kind) not in models:
            models[fault, kind] = load(fault, kind)
        return models[fault, kind]

    return get


def options_of(fault):
    return {"position": -1} if fault == "bidirectional" else {}


def same(found, wanted):
    assert found.shape == wanted.shape
    return bool((found - wanted).norm() <= 1e-5 * wanted.norm())  # which may be 0


# ---- maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("fault", "kind", "sides"), FAULTY)
def test_maps_loss_and_logits_are_those_of_the_prompt_alone(fault, kind, sides, side, loaded):
    model, options = loaded(fault, kind), options_of(fault)
    tokens, mask = padded(side, 1, ROWS)
    logits, ra = run_with_ra(model, tokens, attention_mask=mask, target=TARGETS, **options)
    width = tokens.shape[1]
    assert ra.info.starts == tuple(width - len(r) if side == "left" else 0 for r in ROWS)
    for i, row in enumerate(ROWS):
        own_logits, alone = run_with_ra(model, row, target=TARGETS[i], **options)
        assert same(logits[i], own_logits[0])
        assert same(ra.loss[i], alone.loss[0])
        assert same(ra.norms()[i], alone.norms()[0])
        for layer in ra.layers:
            for kind_of_map in KINDS_OF_MAP:
                found = part(ra[kind_of_map, layer], i, side, len(row))
                assert same(found, alone[kind_of_map, layer][0])
    # The model's own padded logits are others: that is what this is about.
    with torch.no_grad():
        own = model(tokens, attention_mask=mask)
        shows = not all(
            same(own[i, mask[i].bool()][-1], model(row[None])[0, -1]) for i, row in enumerate(ROWS)
        )
    assert shows is (side in sides)


@pytest.mark.parametrize(("fault", "kind", "sides"), FAULTY)
def test_every_way_of_running_gives_the_same(fault, kind, sides, loaded):
    model = loaded(fault, kind)
    tokens, mask = padded("left", 1, ROWS)
    given = {"attention_mask": mask, "target": TARGETS, "progress": False, **options_of(fault)}
    logits, ra = run_with_ra(model, tokens, return_logits="all", **given)
    for i, row in enumerate(ROWS):
        with torch.no_grad():
            assert same(logits[i, -len(row) :], model(row[None])[0])
        assert not bool(logits[i, : -len(row)].any())
    for more in ({"batch_size": 2}, {"recompute": True}, {"layers": [-1]}):
        read, other = run_with_ra(model, tokens, **given, **more)
        assert same(read[:, -1], logits[:, -1])
        assert same(other.loss, ra.loss)
        assert all(same(other["ra", layer], ra["ra", layer]) for layer in other.layers)
        assert other.str_tokens == ra.str_tokens
    for batch_size in (None, 2):
        _, norms = run_with_ra(model, tokens, store="norms", batch_size=batch_size, **given)
        assert same(norms.norms(), ra.norms())
    alike = [row[:5] for row in ROWS]
    wide = torch.cat([torch.ones(3, 2).long(), torch.stack(alike)], dim=1)
    given["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1]]).expand(3, -1)
    _, mean = run_with_ra(model, wide, store="mean", **given)
    del given["attention_mask"]
    _, wanted = run_with_ra(model, torch.stack(alike), store="mean", **given)
    assert same(mean.mean()["ra", 0], wanted.mean()["ra", 0])


@pytest.mark.parametrize(("fault", "kind"), CAUSAL)
def test_answers_of_different_lengths_and_top_predictions(fault, kind, loaded):
    model = loaded(fault, kind)
    answers = [[5, 9], [8], [11]]  # two prompts of one length, answers included
    tokens, mask = padded("left", 1, ROWS)
    _, forced = run_with_ra(model, tokens, attention_mask=mask, target=sequence_nll(answers))
    _, top = run_with_ra(model, tokens, attention_mask=mask)
    for i, row in enumerate(ROWS):
        _, alone = run_with_ra(model, row, target=sequence_nll([answers[i]]))
        assert same(forced.loss[i], alone.loss[0])
        for layer in forced.layers:
            found = part(forced["ra", layer], i, "left", len(row) + len(answers[i]))
            assert same(found, alone["ra", layer][0])
        _, alone = run_with_ra(model, row)
        assert top.info.targets[i] == alone.info.targets[0]
        assert same(top.loss[i], alone.loss[0])


@pytest.mark.parametrize(("fault", "kind"), CAUSAL)
def test_a_metric_of_ones_own_sees_all_examples_in_one_tensor(fault, kind, loaded):
    model = loaded(fault, kind)
    tokens, mask = padded("left", 1, ROWS)
    wrong = [4, 6, 9]

    def differences(logits):
        last = logits[:, -1]
        assert last.shape[0] == 3
        return last[torch.arange(3), wrong] - last[torch.arange(3), TARGETS]

    def both(logits):  # of the first two examples; the third has no part in it
        each = differences(logits)
        return each[0] * each[1]

    def constant(logits):
        return torch.ones(3) + 0 * logits.detach()[:, -1, 0]

    given = {"attention_mask": mask}
    logits, ra = run_with_ra(model, tokens, metric=differences, **given)
    _, mixed = run_with_ra(model, tokens, metric=both, **given)
    assert mixed.loss.ndim == 0
    factors = [ra.loss[1], ra.loss[0], torch.zeros(())]
    for i, row in enumerate(ROWS):
        read, alone = run_with_ra(
            model, row, metric=lambda x, i=i: x[:, -1, wrong[i]] - x[:, -1, TARGETS[i]]
        )
        assert same(logits[i], read[0])
        assert same(ra.loss[i], alone.loss[0])
        for layer in ra.layers:
            wanted = alone["ra", layer][0]
            assert same(part(ra["ra", layer], i, "left", len(row)), wanted)
            found = part(mixed["ra", layer], i, "left", len(row))
            torch.testing.assert_close(found, factors[i] * wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(NothingToDifferentiate, match="does not depend on the attention"):
        run_with_ra(model, tokens, metric=constant, **given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_metric_in_float16_keeps_its_digits(kind, folder):
    """A gradient at the logits of 1e-7 would have a bit or two in float16."""
    model = load_folder(folder("gpt2"), kind=kind, device="cpu", dtype=torch.float16)
    model = counting_columns(model, kind)
    tokens, mask = padded("left", 1, ROWS)

    def metric(logits):
        return -(2.0**-20) * logits[:, -1].float().log_softmax(-1)[:, 5]

    _, ra = run_with_ra(model, tokens, attention_mask=mask, metric=metric)
    for i, row in enumerate(ROWS):
        _, alone = run_with_ra(model, row, metric=metric)
        for layer in ra.layers:
            found = part(ra["ra", layer], i, "left", len(row))
            assert relative(found, alone["ra", layer][0]) < 1e-3


@needs_bridge
def test_a_tokenizer_that_pads_left_does_nothing_to_a_prompt_alone(loaded):
    model = loaded("openai_gpt", BRIDGE, fresh=True)
    _, wanted = run_with_ra(model, ROWS[0], target=5)
    model.tokenizer.padding_side = "left"
    _, ra = run_with_ra(model, ROWS[0], target=5)
    assert same(ra.stack(), wanted.stack())
    assert float(ra["pattern", 0].triu(1).abs().max()) == 0


@needs_bridge
@pytest.mark.parametrize("side", ["left", "right"])
def test_encoders_that_count_columns(side, loaded):
    model = loaded("bart", BRIDGE)
    tokens, mask = padded(side, arch_models.PAD, ROWS)
    answers = [[7, 9], [4], [3, 5]]

    def metric(logits):
        return -logits[:, -1].log_softmax(-1)[:, 7]

    _, ra = run_with_ra(model, tokens, attention_mask=mask, target=sequence_nll(answers))
    _, own = run_with_ra(model, tokens, attention_mask=mask, metric=metric)
    for i, row in enumerate(ROWS):
        columns = slice(-len(row), None) if side == "left" else slice(0, len(row))
        for together, objective in ((ra, sequence_nll([answers[i]])), (own, metric)):
            _, alone = run_with_ra(
                model,
                row,
                target=objective if together is ra else None,
                metric=None if together is ra else objective,
            )
            assert same(together.loss[i], alone.loss[0])
            for layer, site in together.sites.items():
                wanted, found = alone["ra", layer][0], together["ra", layer][i]
                sides = zip((site.query_side, site.key_side), wanted.shape[-2:], strict=True)
                spans = [columns if of == "input" else slice(0, n) for of, n in sides]
                assert same(found[:, spans[0], spans[1]], wanted)
                rest = found.clone()
                rest[:, spans[0], spans[1]] = 0
                assert not bool(rest.any())


# ---- how it is found -----------------------------------------------------------------------------


def passes(model):
    """Count the forward passes of a model: calls of its first block."""
    counted = []
    model.blocks[0].register_forward_pre_hook(lambda _module, _args: counted.append(1))
    return counted


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_looked_at_once_and_again_for_wider_batches_only(kind, fresh):
    model = fresh("gpt2", kind)
    tokens, mask = padded("left", 1, ROWS)
    counted, seen = passes(model), []
    looking = [("blocks.1.hook_resid_pre", lambda x, hook: seen.append(tuple(x.shape[:2])))]
    given = {"attention_mask": mask, "target": TARGETS}

    def cost(*args, **kwargs):
        counted.clear()
        run_with_ra(*args, **kwargs)
        return len(counted)

    assert cost(model, tokens[:, :5], target=5) == 1  # nothing is padded
    with model.hooks(fwd_hooks=looking):
        assert cost(model, tokens, **given) == 1 + 3  # two prompts in a batch, and each alone
    assert seen == [(3, 7)]  # hooks see their own run
    assert cost(model, tokens, **given) == 1
    assert cost(model, *[tokens[:2, 1:]], attention_mask=mask[:2, 1:], target=TARGETS[:2]) == 1
    wide = torch.cat([torch.ones(3, 1).long(), tokens], dim=1)
    more = torch.cat([torch.zeros(3, 1).long(), mask], dim=1)
    assert cost(model, wide, attention_mask=more, target=TARGETS) == 1 + 3
    assert cost(model, tokens, **given) == 1
    right, mask = padded("right", 1, ROWS)
    assert cost(model, right, attention_mask=mask, target=TARGETS) == 1 + 3


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_that_show_padding_to_the_model_are_found_too(kind, fresh):
    model = fresh("llama", kind)
    tokens, mask = padded("left", 1, ROWS)

    def flat(scores, hook):
        return 0 * scores.nan_to_num(0.0, 0.0, 0.0)

    hooks = [("blocks.1.attn.hook_attn_scores", flat)]
    given = {"attention_mask": mask, "target": TARGETS, "progress": False}
    for store in ("maps", "norms"):
        with pytest.warns(RALensWarning, match="groups of one length: hooks get one group"):
            _, ra = run_with_ra(model, tokens, fwd_hooks=hooks, store=store, **given)
        for i, row in enumerate(ROWS):
            _, alone = run_with_ra(model, row, target=TARGETS[i], fwd_hooks=hooks)
            assert same(ra.norms()[i], alone.norms()[0])
    run_with_ra(model, tokens, **given)  # without a warning: it is the hooks, not the model
    lens = as_lens(model)
    questions = read_questions(lens, QUESTIONS, prepend_bos=False)
    refused = r"attend to padding, or to later tokens, at layer 1 of .* Give prompts of one length"
    with pytest.raises(UnsupportedModel, match=refused):
        ask(lens, questions, lambda _: hooks)
    ask(lens, questions, lambda _: hooks, batch_size=1)
    texts = [question.text for question in QUESTIONS]
    with model.hooks(fwd_hooks=hooks):
        with pytest.raises(UnsupportedModel, match=refused):
            rank_heads(model, QUESTIONS, method="fa", **QUIET)
        with pytest.raises(UnsupportedModel, match=refused):
            read_maps(model, texts, layers=0, prepend_bos=False)


@pytest.mark.every_model
@needs_bridge
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["gpt_oss", "bert", "t5"])
def test_rounding_is_not_taken_for_padding(arch, dtype, tmp_path):
    model = arch_models.load_bridge(arch, tmp_path, dtype)
    try:
        report = check_model(model)
    except UnsupportedModel as error:
        pytest.skip(str(error))
    assert (report.padded_left, report.padded_right) == ("together", "together")


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_less_precision_than_the_model_has_are_not_taken_for_padding(
    kind, fresh, loaded
):
    rows = tuple(tuple(row.tolist()) for row in ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        right, left = (Prompts(rows, None, side) for side in ("right", "left"))
        assert padding_is_hidden(as_lens(fresh("gpt2", kind)), right)
        assert not padding_is_hidden(as_lens(loaded("columns", kind, fresh=True)), left)


# ---- questions -----------------------------------------------------------------------------------

QUESTIONS = [
    Prompt(" ".join(f"w{i}" for i in row.tolist()), f" w{answer}")
    for row, answer in zip([*ROWS, ROWS[0] + 3], [*TARGETS, 7], strict=True)
]
TASK = Task(
    name="lengths",
    kind="icl",
    pairs=tuple(
        Pair(" ".join(f"w{3 + (i * k) % 11}" for k in range(1, 2 + i % 3)), f"w{14 + i}")
        for i in range(16)
    ),
    before_subject="w30 ",
    after_subject=" w31",
    separator=" ",
)
QUIET = {"prepend_bos": False, "progress": False}


@pytest.fixture(params=CAUSAL, ids="-".join)
def left(request, loaded):
    """A model with a fault whose tokenizer pads on the left."""
    model = loaded(*request.param, fresh=True)
    model.tokenizer.padding_side = "left"
    return model


@contextmanager
def no_mask(model):
    """Padding on the right, with which a single prompt gets no mask from anybody."""
    model.tokenizer.padding_side = "right"
    yield
    model.tokenizer.padding_side = "left"


def test_questions_are_answered_as_each_is_alone(left):
    lens = as_lens(left)
    questions = read_questions(lens, QUESTIONS, prepend_bos=False)
    told = []
    marks = ask(lens, questions, lambda which: told.append(which) or ())
    assert told == [[0, 2, 3], [1]]
    for i, question in enumerate(QUESTIONS):
        with no_mask(left):
            alone = ask(lens, read_questions(lens, [question], prepend_bos=False))
        assert float(marks.probability[i]) == pytest.approx(float(alone.probability), rel=1e-5)
        assert int(marks.above[i]) == int(alone.above)


@pytest.mark.parametrize("method", ["ra", "fa", "cm1", "cm1_last"])
def test_heads_are_ranked_as_by_each_question_alone(method, left):
    found = rank_heads(left, QUESTIONS, method=method, batch_size=32, **QUIET)
    with no_mask(left):
        alone = [rank_heads(left, [one], method=method, **QUIET).scores for one in QUESTIONS]
    wanted = torch.stack(alone).mean(dim=0)
    assert relative(found.scores, wanted) < 1e-4


def test_means_of_heads_are_taken_from_each_question_as_it_is(left):
    prompts = [TASK.sample(1, shots=2, seed=seed)[0] for seed in range(4)]
    assert len({len(prompt.text.split()) for prompt in prompts}) > 1
    found = rank_heads(left, prompts, method="cm2", batch_size=32, **QUIET)
    with no_mask(left):
        wanted = rank_heads(left, prompts, method="cm2", batch_size=1, **QUIET)
    assert relative(found.scores, wanted.scores) < 1e-4


def test_the_perturbation_test_does_not_depend_on_its_batches(left):
    options = {"methods": "index", "shots": 1, "step": 0.5, "n_rank": 2, **QUIET}
    found = perturbation_test(left, TASK, batch_size=64, **options)
    with no_mask(left):
        wanted = perturbation_test(left, TASK, batch_size=1, **options)
    assert found["logit_diff"].tolist() == pytest.approx(wanted["logit_diff"].tolist(), rel=1e-4)


@pytest.mark.parametrize("follow", ["pattern", "more", "value_norm"])
def test_paths_are_those_of_each_prompt_alone(follow, left):
    texts = [question.text for question in QUESTIONS]
    trace = trace_layers if follow == "value_norm" else trace_paths
    together = [trace(maps) for maps in read_maps(left, texts, follow=follow, prepend_bos=False)]
    for text, found in zip(texts, together, strict=True):
        with no_mask(left):
            alone = trace(left, text, follow=follow, prepend_bos=False)
        assert found.tokens == alone.tokens
        assert [path.positions for path in found.beams] == [p.positions for p in alone.beams]
        scores = [path.score_raw for path in alone.beams]
        assert [path.score_raw for path in found.beams] == pytest.approx(scores, rel=1e-4)


# ---- what check_model says -----------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "kind", "sides"), FAULTY)
def test_the_check_runs_a_padded_pair_and_says_how(fault, kind, sides, loaded):
    model = loaded(fault, kind, fresh=True)
    report = check_model(model)
    assert report.ok
    routes = {"left": report.padded_left, "right": report.padded_right}
    wanted = {side: "by length" if side in sides else "together" for side in routes}
    assert routes == wanted
    said = f"Padding on the {' or '.join(sides)} changes what the model computes"
    assert f"{said}: prompts run in groups of one length" in str(report)
    assert check_model(loaded(fault, kind), prompt=ROWS[0][:1]).padded_left is None


@pytest.mark.parametrize(("fault", "kind", "sides"), FAULTY)
def test_the_check_finds_maps_that_padding_changes(fault, kind, sides, loaded, monkeypatch):
    monkeypatch.setattr("ra_lens.run.padding_is_hidden", lambda *_: True)
    monkeypatch.setattr("ra_lens.run.watched", lambda *_: nullcontext())
    report = check_model(loaded(fault, kind, fresh=True))
    assert not report.ok
    for side, problem in zip(sides, report.problems, strict=True):
        assert re.match(
            rf"R of a prompt changes by \d+% in a batch padded on the {side}: run", problem
        )
