"""Circuits: heads found against Hugging Face, and rankings scored by these or by a list."""

from __future__ import annotations

from functools import partial

import pandas as pd
import pytest
import torch

from circuit_models import D_HEAD, N_HEADS, N_LAYERS, write_ioi_model
from oracle import HFHeads
from ra_lens.errors import BadInput
from ra_lens.experiments import circuit_heads, circuit_test, read_results
from ra_lens.experiments import circuits as experiment
from ra_lens.heads import localisation_scores, rank_heads
from ra_lens.model import as_lens, load_folder
from ra_lens.tasks import circuit_prompts
from refused import unchecked
from tiny_models import ANY_KIND

QUIET = {"progress": False}
CHEAP = {"methods": ["michel", "ra", "atp", "random"], "random_orders": 3, **QUIET}


@pytest.fixture(scope="module")
def ioi_folder(tmp_path_factory):
    return write_ioi_model(tmp_path_factory.mktemp("ioi"))


@pytest.fixture(scope="module", params=ANY_KIND)
def model(request, ioi_folder):
    return load_folder(ioi_folder, kind=request.param)


def asked(model, n):
    return circuit_prompts("ioi", n, partial(as_lens(model).encode, prepend_bos=None))


def test_exact_effects_and_attention_are_those_of_hugging_face(model, ioi_folder):
    prompts = asked(model, 5)
    frame = circuit_heads(model, "ioi", prompts, top=3, attention=0.03, batch_size=4, **QUIET)
    found = frame.set_index(["layer", "head"])
    reference, lens = HFHeads(ioi_folder), as_lens(model)
    effects = torch.zeros(N_LAYERS, N_HEADS, dtype=torch.float64)
    seen = torch.zeros_like(effects)
    assert len({len(lens.encode(prompt.text, prepend_bos=None)) for prompt in prompts}) > 1

    def logit_diff(ids, right):
        logits = reference.logits(ids)[0, -1].double()
        others = logits.clone()
        others[right] = float("-inf")
        return float(logits[right] - others.max())

    for prompt in prompts:
        ids, twin = (
            torch.tensor([lens.encode(one.text, prepend_bos=None)])
            for one in (prompt, prompt.corrupted)
        )
        [right] = lens.encode_fragment(prompt.answer)
        assert (ids == right).sum() == 1
        before, z = logit_diff(ids, right), reference.z(twin)
        with torch.no_grad():
            patterns = reference.model(ids, output_attentions=True).attentions
        for layer in range(N_LAYERS):
            for head in range(N_HEADS):
                own = z[layer][:, :, head * D_HEAD : (head + 1) * D_HEAD]
                with reference.replaced(layer, head, slice(None), own):
                    effects[layer, head] += (before - logit_diff(ids, right)) / len(prompts)
                row = patterns[layer][0, head, -1]
                seen[layer, head] += float(row[(ids == right)[0]].sum()) / len(prompts)
    for (layer, head), row in found.iterrows():
        assert row["effect"] == pytest.approx(float(effects[layer, head]), abs=1e-4)
        assert row["attention"] == pytest.approx(float(seen[layer, head]), abs=1e-5)
        rank = int((effects > effects[layer, head]).sum())
        wanted = rank < 3 and effects[layer, head] > 0 and seen[layer, head] >= 0.03
        assert row["found"] == bool(wanted)
    assert frame["effect"].is_monotonic_decreasing and 0 < frame["found"].sum() < 6


def test_half_of_the_prompts_find_heads_and_the_other_half_ranks(model):
    options = {"top": 4, "attention": 0.03, **QUIET}
    frame = circuit_test(model, n=9, methods=["michel", "atp"], **options)
    prompts = asked(model, 9)
    heads = circuit_heads(model, "ioi", prompts[:4], **options)
    true = list(heads[heads.found].label)
    assert set(frame.true_heads) == {" ".join(true)} and set(frame.n_rank) == {5}
    assert set(frame.found_by) == {"found"}
    scores = rank_heads(model, prompts[4:], methods=["michel", "atp"], **QUIET)
    rows = frame.set_index(["method", "order"])
    for (method, order), row in rows.iterrows():
        ranked = scores[method].absolute() if order == "absolute" else scores[method]
        wanted = localisation_scores(ranked, true)
        for name in ("auroc", "auroc_pessimistic", "average_precision", "to_verify", "n_true"):
            assert row[name] == getattr(wanted, name), (method, order, name)
    # Sizes stand beside signed scores alone.
    assert set(rows.index) == {("michel", "signed"), ("atp", "signed"), ("atp", "absolute")}
    assert rows.loc[("michel", "signed"), ["forwards", "backwards"]].tolist() == [5, 5]


def test_a_list_of_ones_own(model):
    frame = circuit_test(model, heads=["L0H1", "L1H2"], n=4, **CHEAP)
    assert set(frame.n_rank) == {4} and set(frame.found_by) == {"given"}
    assert set(frame.true_heads) == {"L0H1 L1H2"}
    draws = frame[frame.method == "random"]
    assert draws.draw.tolist() == [0, 1, 2] and draws.auroc.nunique() > 1
    # All of a head, and nothing of it: the worst order and the best.
    michel = rank_heads(model, asked(model, 4), method="michel", **QUIET)
    first, last = (f"L{a}H{b}" for a, b in (michel.order()[0], michel.order()[-1]))
    for head, auroc in ((first, 1.0), (last, 0.0)):
        one = circuit_test(model, heads=head, n=4, **{**CHEAP, "methods": ["michel"]})
        assert one.auroc.tolist() == [auroc]


def test_random_orders_have_an_auroc_of_a_half(model):
    options = {**CHEAP, "methods": ["random"], "random_orders": 100}
    frame = circuit_test(model, heads=["L0H1", "L1H2"], n=2, **options)
    # The mean of 100: a single one has a deviation of sqrt((2 + 4 + 1) / (12 · 2 · 4)) = .27.
    assert frame.auroc.mean() == pytest.approx(0.5, abs=4 * 0.27 / 10)


def test_a_run_that_was_stopped_goes_on(model, tmp_path, monkeypatch):
    out = tmp_path / "ioi.parquet"
    run = partial(circuit_test, model, n=6, top=4, attention=0.03, **CHEAP)
    whole = run()

    def stop(*_args, **options):
        if "random" in options["methods"]:
            raise KeyboardInterrupt
        return rank_heads(*_args, **options)

    monkeypatch.setattr(experiment, "rank_heads", stop)
    with pytest.raises(KeyboardInterrupt):
        run(out=out)
    assert not out.exists()
    monkeypatch.setattr(experiment, "rank_heads", rank_heads)
    monkeypatch.setattr(experiment, "head_effects", None)  # heads were found before
    frame = run(out=out)
    columns = [name for name in frame if name != "seconds"]
    pd.testing.assert_frame_equal(frame[columns], whole[columns])
    monkeypatch.setattr(experiment, "rank_heads", None)  # and all is there
    pd.testing.assert_frame_equal(run(out=out), read_results(out))
    with pytest.raises(BadInput, match="settings"):
        circuit_test(model, n=6, top=5, attention=0.03, out=out, **CHEAP)


def test_what_cannot_be_tested_is_refused(model):
    run = partial(circuit_test, model, n=4, **CHEAP)
    with pytest.raises(BadInput, match=r"found 0 of 6 heads .* at least 100% of their attention"):
        run(attention=1.0)
    with pytest.raises(BadInput, match="circuit 'io'"):
        run("io")
    with pytest.raises(BadInput, match="no published list of heads 'copying'"):
        run("copying", heads="published")
    with pytest.raises(BadInput, match="n=1"):
        circuit_test(model, n=1)


@pytest.mark.parametrize(
    ("heads", "told"),
    [
        (
            "published",
            r"head L9H9, but .* layers 0.*\. The published list is of gpt2.* heads='found'",
        ),
        (["L0H0", "L0H9"], r"head L0H9, but layer 0 has heads 0 to 2"),
        ("foundd", r"found 'foundd' among heads\. Give .* labels like 'L3H5'"),
        ([], r"found 0 true heads, 0 different ones, of 6 of .*; give each once, at least one"),
        ([(-1, 0), (1, 0)], r"found 2 true heads, 1 different ones"),
        ([(i, j) for i in range(2) for j in range(3)], r"found 6 true heads.* and not all"),
    ],
)
def test_heads_that_the_model_does_not_have_are_told_before_the_work(
    heads, told, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(experiment, "circuit_prompts", None)  # nothing is begun
    with pytest.raises(BadInput, match=told):
        unchecked(circuit_test)(model, heads=heads, out=tmp_path / "a.parquet", **CHEAP)
    assert not list(tmp_path.iterdir())


def test_negative_numbers_of_heads_count_from_the_end(model):
    frame = circuit_test(model, heads=[(-1, 2), (0, -3)], n=2, **{**CHEAP, "methods": "index"})
    assert set(frame.true_heads) == {"L1H2 L0H0"}
