"""Scores beside exact effects: what is in the table, after a kill, and which prompts are taken."""

from __future__ import annotations

import sys
from functools import partial
from typing import ClassVar

import pandas as pd
import pytest
import torch

from left_behind import changes, snapshot
from ra_lens.errors import BadInput
from ra_lens.experiments import (
    faithfulness,
    faithfulness_test,
    head_effect_table,
    rank_tasks,
    read_results,
    write_results,
)
from ra_lens.experiments.journal import journal_path
from ra_lens.heads import head_effects, rank_heads, ranking_method, registry
from ra_lens.tasks import Pair, Task, with_corrupted
from refused import unchecked
from tiny_models import ANY_KIND, KINDS, N_HEADS, N_LAYERS, every_model
from tiny_questions import TASK

METHODS = ["zero", "atp", "nap", "cm2", "random"]
OPTIONS = {"shots": 1, "n_rank": 3, "progress": False, "methods": METHODS}
N = 3 * N_LAYERS * N_HEADS


@pytest.fixture
def own(monkeypatch):
    """Methods that are registered here are gone afterwards."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


def without_seconds(frame):
    return frame[[name for name in frame if not name.startswith("seconds")]]


@pytest.mark.parametrize("kind", ANY_KIND)
def test_scores_and_effects_stand_beside_each_other(kind, fresh):
    model = fresh("gpt2", kind)
    with torch.no_grad():
        model(torch.tensor([[3, 4]]))
    before = snapshot(model)
    frame = head_effect_table(model, TASK, **OPTIONS)
    assert not changes(before, snapshot(model))
    assert len(frame) == N
    asked = TASK.split().prompts("train", shots=1, n=3)
    prompts = with_corrupted(asked, lambda words: words.split())
    options = {"progress": False, "batch_size": 64}
    for name in ("zero", "resample"):
        found = head_effects(model, prompts, ablation=name, **options)
        assert frame[f"effect_{name}"].tolist() == found.effects.flatten().tolist()
        assert frame[f"logit_diff_effect_{name}"].tolist() == (
            found.logit_diff_effects.flatten().tolist()
        )
        assert frame.groupby("question")["loss"].first().tolist() == found.loss.tolist()
        assert (frame[f"seconds_{name}"] > 0).all()
    assert (frame["score_zero"] == frame["effect_zero"]).all()
    for name in ("atp", "nap", "cm2"):
        found = rank_heads(model, prompts, method=name, each_prompt=True, **options).each
        assert frame[f"score_{name}"].tolist() == found.flatten().tolist()
    found = rank_heads(model, prompts, method="random").scores
    assert frame["score_random"].tolist() == found.flatten().tolist() * 3
    labels = [f"L{layer}H{head}" for layer in range(N_LAYERS) for head in range(N_HEADS)]
    assert frame.label.tolist() == labels * 3
    table = faithfulness_test(model, TASK, ks=2, resamples=50, splits=5, **OPTIONS)
    names = [name for name in METHODS for _ in range(2)]
    assert table.method.tolist() == names
    assert table.ablation.tolist() == ["zero", "resample"] * len(METHODS)
    [itself] = table[(table.method == "zero") & (table.ablation == "zero")].to_dict("records")
    assert itself["spearman_signed"] == itself["precision_signed_2"] == 1.0
    wanted = faithfulness(frame, ks=2, resamples=50, splits=5)
    pd.testing.assert_frame_equal(without_seconds(table), without_seconds(wanted))


@pytest.mark.parametrize("ending", ["parquet", *every_model("csv")])
def test_a_run_that_was_killed_goes_on_and_is_summed_up_from_its_file(ending, own, fresh, tmp_path):
    class Killed(Exception):
        pass

    class Now:  # of a list the method would be another one when it grows
        dying: ClassVar[bool] = True
        ran: ClassVar[list[object]] = []

    model = fresh("gpt2", KINDS[0])

    @ranking_method("between")
    def between(context):
        Now.ran.append(context)
        if Now.dying:
            raise Killed
        return torch.arange(12.0).reshape(context.shape)

    out, options = tmp_path / f"table.{ending}", {**OPTIONS, "methods": ["atp", "between", "zero"]}
    with pytest.raises(Killed):
        faithfulness_test(model, TASK, out=out, ks=2, **options)
    kept = journal_path(out).read_text().splitlines()
    done = [f"toy|1|{key}" for key in ("effects|zero", "effects|resample", "scores|atp")]
    assert [line.split('"')[3] for line in kept[1:]] == done
    Now.dying = False
    went_on = faithfulness_test(model, TASK, out=out, ks=2, **options)
    assert not journal_path(out).exists()
    in_one = faithfulness_test(model, TASK, ks=2, **options)
    pd.testing.assert_frame_equal(without_seconds(went_on), without_seconds(in_one))
    n_runs = len(Now.ran)
    again = faithfulness_test(model, TASK, out=out, ks=2, **options)
    assert len(Now.ran) == n_runs
    pd.testing.assert_frame_equal(again, faithfulness(read_results(out), ks=2))
    with pytest.raises(BadInput, match=r"n_rank: there 3, here 2"):
        faithfulness_test(model, TASK, out=out, ks=2, **{**options, "n_rank": 2})
    summary = tmp_path / f"summary.{ending}"
    write_results(again, summary)
    assert read_results(summary).spearman_signed.tolist() == again.spearman_signed.tolist()


# Of the others each has one as long.
MIXED = Task(
    "mixed",
    "icl",
    (*TASK.pairs, *(Pair(" ".join(["w3"] * n), f"w{20 + n}") for n in range(2, 8))),
    "w30 ",
    " w31",
    separator=" ",
)


@pytest.mark.parametrize("demonstrations", ["own", "shared"])
def test_prompts_without_a_twin_are_left_out_where_twins_are_needed(demonstrations, shared):
    model = shared("gpt2", KINDS[0])
    options = {"shots": 0, "progress": False, "demonstrations": demonstrations}
    train = MIXED.split().train
    lengths = [len(pair.input.split()) for pair in train]
    assert lengths[:4] != [1] * 4 and lengths.count(1) >= 4
    with_one = head_effect_table(
        model, MIXED, methods="atp", ablations="resample", n_rank=4, **options
    )
    first = [pair for pair, n in zip(train, lengths, strict=True) if n == 1][:4]
    for i, pair in enumerate(first):
        found = with_one[with_one.question == i]["score_atp"].tolist()
        wanted = rank_heads(model, [MIXED.build(pair)], method="atp", progress=False)
        assert found == pytest.approx(wanted.scores.flatten().tolist(), rel=1e-4, abs=1e-7)
    without = head_effect_table(model, MIXED, methods="atp", ablations="zero", n_rank=4, **options)
    assert set(without.prompts_hash) != set(with_one.prompts_hash)
    for methods, ablations in (("nap", "zero"), ("resample", "zero"), ("atp", "resample")):
        needed = rf"n_rank=10, but of \d+ training prompts of task 'mixed' {lengths.count(1)} have"
        with pytest.raises(BadInput, match=needed + r" a corrupted twin.*smaller n_rank"):
            head_effect_table(
                model, MIXED, methods=methods, ablations=ablations, n_rank=10, **options
            )


def test_options_that_cannot_be_used_say_what_is_needed(shared):
    run = partial(unchecked(faithfulness_test), shared("gpt2", KINDS[0]), TASK, ks=2)
    with pytest.raises(BadInput, match=r"ablations=\['noise'\]; give 'zero', 'mean', 'resample'"):
        run(ablations=["noise"], **OPTIONS)
    with pytest.raises(BadInput, match=r"n_rank=1"):
        run(**{**OPTIONS, "n_rank": 1})
    with pytest.raises(BadInput, match="no ranking method 'xyzzy'"):
        run(**{**OPTIONS, "methods": "xyzzy"})
    run = partial(unchecked(head_effect_table), shared("gpt2", KINDS[0]), TASK)
    with pytest.raises(BadInput, match="found methods=None; give the name of a ranking method"):
        run(**{**OPTIONS, "methods": None})
    with pytest.raises(BadInput, match="found answer_in_input='no'; give True or False"):
        run(**OPTIONS, answer_in_input="no")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"ks": (10, 40)},
            r"ks=\[10, 40\] for a model of 12 heads\. Give numbers",
        ),
        ({"ks": 12}, r"ks=\[12\] for a model of 12 heads"),
        ({}, r"ks=\[10, 20\] for a model of 12 heads"),
        ({"ks": []}, "ks without a number in it"),
        ({"ks": 2, "level": 2}, r"level=2.0; give a share between 0 and 1"),
        ({"ks": 2, "seed": -1}, "seed=-1; give at least 0"),
        ({"ks": 2, "resamples": 0}, "resamples=0; give at least 1"),
        ({"ks": 2, "splits": 0}, "splits=0; give at least 1"),
        (
            {"ks": 2, "ablations": ()},
            r"ablations=\(\), without which .* to foretell\. Give",
        ),
    ],
)
def test_how_a_table_is_summed_up_is_read_before_it_is_made(options, told, shared, monkeypatch):
    monkeypatch.setattr(sys.modules[faithfulness_test.__module__], "head_effect_table", None)
    run = partial(unchecked(faithfulness_test), shared("gpt2", KINDS[0]), TASK)
    with pytest.raises(BadInput, match=told):
        run(**OPTIONS, **options)


def test_too_many_shared_demonstrations_are_told_as_such(shared):
    run = partial(head_effect_table, shared("gpt2", KINDS[0]), TASK, demonstrations="shared")
    told = r"shots=5 with demonstrations='shared', but .* has 3 pairs beside the 3 that are asked"
    with pytest.raises(BadInput, match=told):
        run(**{**OPTIONS, "shots": 5})


def test_rankings_of_other_experiments_take_prompts_that_have_twins_too(shared):
    options = {"shots": 0, "n_rank": 4, "progress": False}
    frame = rank_tasks(shared("gpt2", KINDS[0]), MIXED, methods=["nap", "atp"], **options)
    first = [pair for pair in MIXED.split().train if len(pair.input.split()) == 1][:4]
    prompts = [MIXED.build(pair) for pair in first]
    for name in ("nap", "atp"):
        wanted = rank_heads(shared("gpt2", KINDS[0]), prompts, method=name, progress=False)
        rows = frame[frame.method == name].sort_values("rank")
        assert list(zip(rows.layer, rows["head"], strict=True)) == wanted.order()


def test_scores_alone_are_those_that_stand_beside_effects(shared, tmp_path):
    model, out = shared("gpt2", KINDS[0]), tmp_path / "scores.parquet"
    options = {**OPTIONS, "methods": ["nap", "atp"]}
    beside = head_effect_table(model, TASK, **options, ablations="zero")
    alone = head_effect_table(model, TASK, **options, ablations=(), out=out)
    for name in ("score_nap", "score_atp"):
        assert alone[name].tolist() == beside[name].tolist()
    assert not {"loss", "logit_diff", "effect_zero"} & set(alone)
    assert read_results(out)["score_nap"].tolist() == alone["score_nap"].tolist()
    with pytest.raises(BadInput, match="effect"):
        faithfulness(alone)
