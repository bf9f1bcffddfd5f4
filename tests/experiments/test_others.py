"""What masked heads get in a perturbation test: by really replacing it in a Hugging Face model."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest
import torch

from oracle import HFHeads
from ra_lens.errors import BadInput, RALensWarning
from ra_lens.experiments import head_only_cpr_cmd, perturbation_test
from ra_lens.heads import ranking_method
from ra_lens.heads import registry as registry_of_methods
from ra_lens.model import as_lens
from ra_lens.tasks import Pair, Task, with_corrupted
from tiny_models import ANY_KIND, CASES, N_HEADS, N_LAYERS

QUIET = {"progress": False}
ONE = [Pair(f"w{i}", f"w{i + 10}") for i in range(3, 11)]
TWO = [Pair(f"w{i} w{i + 1}", f"w{i + 11}") for i in range(3, 11)]
# Questions of two lengths, each with others as long.
RAGGED = Task("ragged", "icl", tuple(ONE + TWO), "w30 ", " w31", separator=" ")
HEADS = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]


def asked(lens, seed=0):
    prompts = RAGGED.split("text").prompts("test", shots=1, seed=seed)
    return with_corrupted(prompts, encoder(lens), seed=seed)


def encoder(lens):
    return partial(lens.encode, prepend_bos=None)


def ids_of(lens, text):
    return torch.tensor([encoder(lens)(text)])


def answered(reference, lens, prompt, masked, value_of):
    """Logit of the answer minus that of the wrong one, and minus that of the best other one."""
    with ExitStack() as stack:
        for layer, head in masked:
            value = value_of(layer, head)
            stack.enter_context(reference.replaced(layer, head, slice(None), value))
        logits = reference.logits(ids_of(lens, prompt.text))[0, -1].double()
    right, wrong = (lens.encode_fragment(one.answer)[0] for one in (prompt, prompt.corrupted))
    others = logits.clone()
    others[right] = float("-inf")
    return float(logits[right] - logits[wrong]), float(logits[right] - others.max())


def check(frame, wanted_of, lens):
    """`wanted_of(question, masked heads)`; heads are kept in the order of the model."""
    questions = asked(lens)
    assert sorted(set(frame.heads_kept)) == [0, 5, 12]
    for row in frame.itertuples():
        wanted = wanted_of(questions[row.question], HEADS[row.heads_kept :])
        assert row.answer_diff == pytest.approx(wanted[0], rel=1e-4, abs=1e-4)
        assert row.logit_diff == pytest.approx(wanted[1], rel=1e-4, abs=1e-4)
    assert len(frame) == 3 * len(questions)


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_masked_heads_get_what_they_gave_on_the_twin(arch, kind, shared, folder):
    model, reference = shared(arch, kind), HFHeads(folder(arch))
    lens = as_lens(model)
    frame = perturbation_test(
        model, RAGGED, methods=["index"], directions=["forward"], shots=1, heads_kept=[5],
        others="resample", split="text", each_question=True, n_rank=2, batch_size=7, **QUIET,
    )  # fmt: skip
    lengths = {ids_of(lens, prompt.text).shape[1] for prompt in asked(lens)}
    assert len(lengths) > 1
    size = {}

    def wanted(prompt, masked):
        z = reference.z(ids_of(lens, prompt.corrupted.text))

        def value(layer, head):
            size[layer] = z[layer].shape[-1] // N_HEADS
            return z[layer][:, :, head * size[layer] : (head + 1) * size[layer]]

        return answered(reference, lens, prompt, masked, value)

    check(frame, wanted, lens)
    assert set(frame.others) == {"resample"}
    # With all heads replaced it is neither the model nor its twin.
    none, every = (frame[frame.heads_kept == n].answer_diff.to_numpy() for n in (0, 12))
    assert abs(none - every).max() > 1e-3


@pytest.mark.every_model
@pytest.mark.parametrize("kind", ANY_KIND)
def test_masked_heads_get_their_mean_over_all_tokens_of_the_ranking_questions(kind, shared, folder):
    model, reference = shared("gpt2", kind), HFHeads(folder("gpt2"))
    lens = as_lens(model)
    options = {"directions": ["forward"], "shots": 1, "heads_kept": [5], "split": "text", **QUIET}
    frame = perturbation_test(
        model, RAGGED, methods=["index"], others="mean", n_rank=4, each_question=True, batch_size=3,
        **options,
    )  # fmt: skip
    assert "answer_diff" not in frame
    learned = RAGGED.split("text").prompts("train", shots=1, n=4)
    seen = [reference.z(ids_of(lens, prompt.text)) for prompt in learned]
    for row in frame.itertuples():

        def mean(layer, head):
            tokens = torch.cat([z[layer][0] for z in seen])
            return tokens.mean(dim=0)[head * 6 : (head + 1) * 6]

        prompt = asked(lens)[row.question]
        wanted = answered(reference, lens, prompt, HEADS[row.heads_kept :], mean)
        assert row.logit_diff == pytest.approx(wanted[1], rel=1e-4, abs=1e-4)
    # After shared demonstrations the same comes out, whether or not these run once.
    shared_ones = {"demonstrations": "shared", "n_rank": 4}
    first = perturbation_test(
        model, RAGGED, methods=["index"], others="mean", **options, **shared_ones
    )
    assert len(first) == 3 and first.logit_diff.nunique() == 3


@pytest.mark.every_model
@pytest.mark.parametrize("kind", ANY_KIND)
def test_whole_answers_read_the_right_answer_after_the_twin(kind, shared, folder):
    # Answers of two tokens: the logit of the second hangs on heads that read the first.
    pairs = [Pair(f"w{i}", f"w{i + 10} w{i + 12}") for i in range(3, 14)]
    task = Task("two", "icl", tuple(pairs), "w30 ", " w31", separator=" ")
    model, reference = shared("gpt2", kind), HFHeads(folder("gpt2"))
    lens = as_lens(model)
    frame = perturbation_test(
        model, task, methods=["index"], directions=["forward"], shots=0, heads_kept=[0],
        others="resample", accuracy="answer", each_question=True, n_rank=2, **QUIET,
    )  # fmt: skip
    questions = with_corrupted(task.split().prompts("test"), encoder(lens))
    for row in frame[frame.heads_kept == 0].itertuples():
        prompt = questions[row.question]
        first, second = lens.encode_fragment(prompt.answer)
        z = reference.z(torch.tensor([[*encoder(lens)(prompt.corrupted.text), first]]))
        with ExitStack() as stack:
            for layer, head in HEADS:
                value = z[layer][:, :, head * 6 : (head + 1) * 6]
                stack.enter_context(reference.replaced(layer, head, slice(None), value))
            logits = reference.logits(torch.tensor([[*encoder(lens)(prompt.text), first]]))[0]
        [wrong, _] = lens.encode_fragment(prompt.corrupted.answer)
        assert row.answer_diff == pytest.approx(
            float(logits[-2, first] - logits[-2, wrong]), abs=1e-4
        )
        diffs = []
        for at, right in ((-2, first), (-1, second)):
            others = logits[at].clone()
            others[right] = float("-inf")
            diffs.append(float(logits[at, right] - others.max()))
        assert row.logit_diff == pytest.approx(min(diffs), abs=1e-4)


def test_transformer_lens_measures_the_same_circuits_of_heads(shared):
    theirs = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    if not hasattr(theirs, "faithfulness"):
        pytest.skip("needs TransformerLens 4.3")
    model = shared("gpt2", "TransformerBridge")
    lens = as_lens(model)
    frame = perturbation_test(
        model, RAGGED, methods=["index"], directions=["forward"], shots=1, heads_kept=[5],
        others="resample", split="text", each_question=True, n_rank=2, **QUIET,
    )  # fmt: skip
    prompt = asked(lens)[0]
    clean, twin = ids_of(lens, prompt.text), ids_of(lens, prompt.corrupted.text)
    right, wrong = (lens.encode_fragment(one.answer)[0] for one in (prompt, prompt.corrupted))

    def diff(logits):
        return (logits[0, -1, right] - logits[0, -1, wrong]).double()

    every = theirs.attribution_patch(
        model, clean, twin, diff, theirs.EdgeAttributionConfig(granularity="edge")
    ).edge_scores
    for kept in (0, 5):
        # A head that is not kept gives to every reader what it gave on the twin.
        circuit = [
            edge
            for edge in every
            if edge[0].kind != "attn_head_out" or (edge[0].layer, edge[0].head) in HEADS[:kept]
        ]
        found = theirs.faithfulness(model, clean, twin, diff, circuit)
        m = found.recovered * (found.full_metric - found.corrupt_metric) + found.corrupt_metric
        [row] = frame[(frame.heads_kept == kept) & (frame.question == 0)].itertuples()
        assert row.answer_diff == pytest.approx(m, rel=1e-3, abs=1e-3)


# ---- which heads --------------------------------------------------------------------------------


@pytest.fixture
def signed(monkeypatch):
    """A method whose largest score by size is the smallest by sign."""
    monkeypatch.setattr(registry_of_methods, "_methods", dict(registry_of_methods._methods))
    scores = torch.arange(12.0).reshape(3, 4)
    scores[1, 2] = -50

    @ranking_method("signed")
    def method(_context):
        return scores

    @ranking_method("sizes")
    def sizes(_context):
        return scores.abs()

    return scores


def test_by_size_the_head_that_hurts_comes_first(signed, shared, folder):
    model, reference = shared("gpt2", ANY_KIND[0]), HFHeads(folder("gpt2"))
    lens = as_lens(model)
    frame = perturbation_test(
        model, RAGGED, methods=["signed", "sizes"], directions=["forward", "absolute"], shots=1,
        heads_kept=[1], split="text", each_question=True, n_rank=2, **QUIET,
    )  # fmt: skip
    one = frame[frame.heads_kept == 1].set_index(["method", "direction", "question"]).logit_diff
    for question, prompt in enumerate(asked(lens)):
        for direction, kept in (("forward", (2, 3)), ("absolute", (1, 2))):
            masked = [head for head in HEADS if head != kept]
            zero = lambda _layer, _head: torch.zeros(6)  # noqa: E731
            wanted = answered(reference, lens, prompt, masked, zero)[1]
            assert one["signed", direction, question] == pytest.approx(wanted, abs=1e-4)
        assert one["sizes", "forward", question] == one["sizes", "absolute", question]
        assert one["sizes", "forward", question] == one["signed", "absolute", question]


def test_a_curve_over_all_heads_begins_at_0_and_ends_at_1(shared):
    model = shared("gpt2", ANY_KIND[0])
    frame = perturbation_test(
        model, RAGGED, methods=["michel", "random"], shots=1, shares=(0.001, 0.3, 0.5),
        others="resample", split="text", each_question=True, random_orders=2, n_rank=2,
        directions=["forward", "reversed", "absolute"], **QUIET,
    )  # fmt: skip
    assert sorted(set(frame.share)) == [0, 0.001, 0.3, 0.5, 1]
    kept = frame.groupby("share").heads_kept.agg(set)
    assert kept.tolist() == [{0}, {0}, {3}, {6}, {12}]
    with pytest.warns(RALensWarning, match="divide by the difference"):  # a random model
        scores = head_only_cpr_cmd(frame, resamples=50)
    assert len(scores) == 4
    m = frame.groupby(["method", "direction", "draw", "share"]).answer_diff.mean()
    for row in scores.itertuples():
        areas = []
        for draw in (0, 1) if row.method == "random" else (0,):
            at = m[row.method, row.direction, draw]
            f = (at - row.m_none) / (row.m_all - row.m_none)
            assert f[[0.0, 1.0]].tolist() == pytest.approx([0, 1])
            areas.append(
                0.001 * (f[0.0] + f[0.001]) / 2
                + 0.299 * (f[0.001] + f[0.3]) / 2
                + 0.2 * (f[0.3] + f[0.5]) / 2
                + 0.5 * (f[0.5] + f[1.0]) / 2
            )
        assert row.cpr == pytest.approx(sum(areas) / len(areas))


def test_costs_are_those_of_the_ranking(shared):
    model = shared("gpt2", ANY_KIND[0])
    options = {"shots": 0, "heads_kept": [3], "split": "text", "n_rank": 4, **QUIET}
    methods = ["michel", "atp", "cm1", "random"]
    frame = perturbation_test(
        model, RAGGED, methods=methods, random_orders=1, costs=True, **options
    )
    costs = frame.groupby("method")[["forwards", "backwards", "seconds"]].agg(["min", "max"])
    assert (costs.xs("min", axis=1, level=1) == costs.xs("max", axis=1, level=1)).all().all()
    one = costs.xs("min", axis=1, level=1)
    assert one.loc["michel"].tolist() == one.loc["atp"].tolist()  # they share the run
    assert one.loc["michel", ["forwards", "backwards"]].tolist() == [4, 4]
    assert one.loc["cm1", ["forwards", "backwards"]].tolist() == [4 * 13, 0]
    assert one.loc["random", ["forwards", "backwards"]].tolist() == [0, 0]
    assert (one.seconds.drop("random") > 0).all()
    plain = perturbation_test(model, RAGGED, methods=methods, random_orders=1, **options)
    assert not {"forwards", "backwards", "seconds", "others"} & set(plain)
    assert plain.top1.tolist() == frame.top1.tolist()


# ---- questions without a twin -------------------------------------------------------------------


def test_questions_without_a_twin_are_left_out_and_told(shared):
    model = shared("gpt2", ANY_KIND[0])
    # Of this one there is no other as long.
    long = Pair("w3 w4 w5 w6", "w20")
    options = {"methods": ["index"], "shots": 0, "heads_kept": [3], "n_rank": 1, "split": "text"}
    mixed = Task("mixed", "icl", (long, *ONE[:5]), "w30 ", " w31", separator=" ")
    assert long in mixed.split("text").test
    with pytest.warns(RALensWarning, match=r"1 of 2 questions of task 'mixed' are left out"):
        frame = perturbation_test(model, mixed, others="resample", **options, **QUIET)
    assert set(frame.n_test) == {1}
    pairs = tuple(Pair(" ".join(["w3"] * n), f"w{n}") for n in range(3, 8))
    none = Task("none", "icl", pairs, "w30 ", " w31")
    with pytest.raises(BadInput, match=r"none of the 2 questions of task 'none' has a corrupted"):
        perturbation_test(model, none, others="resample", **options, **QUIET)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"others": "noise"}, "others='noise'; give 'zero', 'resample' or 'mean'"),
        ({"heads_kept": [13]}, r"heads_kept=\[0, 13\]; .* has 12 heads"),
        ({"heads_kept": [-1]}, "heads_kept=-1"),
        ({"shares": [0.5, 1.2]}, "give shares of the heads, from 0 to 1"),
        ({"shares": [0.5], "heads_kept": [1]}, "found heads_kept and shares; give one"),
        ({"directions": ["sideways"]}, "'forward', 'reversed', 'absolute' or several"),
    ],
)
def test_wrong_options_are_refused(options, said, shared):
    with pytest.raises(BadInput, match=said):
        perturbation_test(shared("gpt2", ANY_KIND[0]), RAGGED, n_rank=2, **options, **QUIET)
