"""The experiments: by hand on a toy, against loops over a Hugging Face model, and after a kill."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from folded import fold
from ra_lens import load_demo_model, load_task, patch_hooks, run_with_ra
from ra_lens.errors import BadInput, RALensWarning
from ra_lens.experiments import (
    PAPER_SCALES,
    area_under_curve,
    mean_maps,
    patching_sweep,
    perturbation_test,
    rank_tasks,
    read_results,
)
from ra_lens.experiments import runner as runner_module
from ra_lens.experiments.facts import weights_hash
from ra_lens.experiments.journal import journal_path, settings_hash
from ra_lens.experiments.runner import read_some
from ra_lens.figures import patching_sweep_curve
from ra_lens.heads import rank_heads, ranking_method
from ra_lens.heads import registry as registry_of_methods
from ra_lens.model import as_lens
from ra_lens.model.loading import demo_model_folder
from ra_lens.patching.controls import control_maps
from ra_lens.questions import mark
from ra_lens.scales import SCALES
from ra_lens.shared_prefix import SharedPrefix
from ra_lens.targets import sequence_nll
from ra_lens.tasks import same_length_sets
from refused import refused, unchecked
from tiny_models import ANY_KIND, KINDS, every_model
from toys import knowing_task, load_toy

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def demo():
    return load_demo_model(device="cpu")


@pytest.fixture(scope="module", params=ANY_KIND)
def toy(request, tmp_path_factory):
    return load_toy(tmp_path_factory.mktemp("toy"), request.param)


# ---- by hand ------------------------------------------------------------------------------------


def test_the_head_that_knows_comes_first(toy):
    prompts = knowing_task().sample(6)
    for method in ("ra", "cm1", "cm1_last", "index"):
        ranked = rank_heads(toy, prompts, method=method, progress=False)
        assert ranked.order() == [(0, 0), (0, 1)], method
        if method.startswith("cm1"):
            assert float(ranked.scores[0, 0]) > 1.5 * float(ranked.scores[0, 1]), method


def test_the_curve_of_the_toy_by_hand(toy):
    # Heads kept: none (all logits equal: nothing is right), one, both. Head 0 alone is right, head
    # 1 alone is wrong, both are right. So the areas are 0/2 + ... = (0+1)/4 + (1+1)/4 = 3/4 and
    # (0+0)/4 + (0+1)/4 = 1/4.
    frame = perturbation_test(
        toy, knowing_task(), methods=["ra", "random"], shots=0, step=0.5, random_orders=4,
        n_rank=5, **QUIET,
    )  # fmt: skip
    curves = frame.pivot_table(
        index=["method", "direction", "draw"], columns="share", values="top1"
    )
    assert curves.loc["ra", "forward", 0].tolist() == [0, 1, 1]
    assert curves.loc["ra", "reversed", 0].tolist() == [0, 0, 1]
    for draw in range(4):
        assert curves.loc["random", "none", draw].tolist() in ([0, 1, 1], [0, 0, 1])
    areas = area_under_curve(frame).set_index(["method", "direction"])["auc"]
    assert areas["ra", "forward"] == pytest.approx(0.75)
    assert areas["ra", "reversed"] == pytest.approx(0.25)
    right = [curves.loc["random", "none", draw][0.5] for draw in range(4)]
    assert areas["random", "none"] == pytest.approx(0.25 + 0.5 * sum(right) / 4)
    # With one head the right word and every other differ by what the head alone writes: with head
    # 1 kept the answer has the logit of the words not written, and the wrong word's is above it.
    diffs = frame[(frame.method == "ra") & (frame.direction == "reversed")].set_index("share")
    assert diffs.logit_diff[0.5] < diffs.logit_diff[0.0] < 0 < diffs.logit_diff[1.0]
    assert set(frame.heads_kept[frame.share == 0.5]) == {1}


# ---- against Hugging Face -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def hugging_face():
    folder = str(demo_model_folder())
    load = transformers.GPT2LMHeadModel.from_pretrained
    return load(folder, attn_implementation="eager").eval()


def answered(model, tokenizer, prompt):
    """Logits at the end of a prompt, and the first token of its answer, one prompt at a time."""
    ids = [tokenizer.bos_token_id, *tokenizer(prompt.text, add_special_tokens=False)["input_ids"]]
    answer = tokenizer(prompt.answer, add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double(), answer


def test_masking_is_zeroing_rows_of_the_output_matrix(demo, hugging_face):
    task = load_task("antonym")
    frame = perturbation_test(
        demo, task, methods=["ra"], directions=["forward"], shots=1, n_rank=5, n_test=12,
        batch_size=7, **QUIET,
    )  # fmt: skip
    split = task.split()
    order = rank_heads(demo, split.prompts("train", shots=1, n=5), progress=False).order()
    questions = split.prompts("test", shots=1, n=12)
    originals = [block.attn.c_proj.weight.detach().clone() for block in hugging_face.transformer.h]
    for share in (0.0, 0.3, 0.8, 1.0):
        kept = math.floor(share * 32)
        with torch.no_grad():
            for layer, block in enumerate(hugging_face.transformer.h):
                block.attn.c_proj.weight.copy_(originals[layer])
                for head in range(8):
                    if (layer, head) not in order[:kept]:
                        block.attn.c_proj.weight[16 * head : 16 * head + 16] = 0
        ranks, diffs = [], []
        for prompt in questions:
            logits, answer = answered(hugging_face, demo.tokenizer, prompt)
            ranks.append(logits.argsort(descending=True).tolist().index(answer))
            others = torch.cat([logits[:answer], logits[answer + 1 :]])
            diffs.append(float(logits[answer] - others.max()))
        row = frame[frame.share == share].iloc[0]
        assert row.heads_kept == kept
        for k in (1, 2, 3):
            assert row[f"top{k}"] == pytest.approx(sum(r < k for r in ranks) / 12), (share, k)
        assert row.logit_diff == pytest.approx(sum(diffs) / 12, abs=1e-4)
    with torch.no_grad():
        for layer, block in enumerate(hugging_face.transformer.h):
            block.attn.c_proj.weight.copy_(originals[layer])


def test_patching_is_adding_the_mean_map_to_the_pattern(demo, hugging_face):
    task = same_length_sets(load_task("capitalize"), lambda t: demo.to_tokens(t)[0].tolist())[6]
    assert task.name == "capitalize_len_6_1"
    frame = patching_sweep(
        demo,
        load_task("capitalize"),
        scales=[-30, 1],
        shots=[0, 2],
        n_mean=6,
        n_test=9,
        batch_size=4,
        **QUIET,
    )
    lengths = {0: 6, 2: 6 + 2 * 6}  # <bos> Q: word ⏎ A: answer; Q: word ⏎ A: answer ⏎⏎
    split = task.split()
    for shots in (0, 2):
        sums = {"ra": None, "pattern": None}
        for prompt in split.prompts("train", shots=shots, n=6):
            _, ra = run_with_ra(demo, prompt.text, target=sequence_nll(prompt.answer))
            for kind, total in sums.items():
                sums[kind] = ra.stack(kind)[:, 0] + (0 if total is None else total)
        # The published protocol reads the questions with their answer, so that lengths fit.
        questions = split.prompts("test", shots=shots, n=9)
        for kind, scale in (("none", None), ("ra", -30.0), ("pattern", 1.0)):
            hooks = []
            if scale is not None:
                hooks = [
                    (f"blocks.{i}.attn.hook_pattern", lambda a, hook, m=m, s=scale: a + s * m)
                    for i, m in enumerate(sums[kind] / 6)
                ]
            right, diffs = [], []
            for prompt in questions:
                ids = demo.to_tokens(prompt.text + prompt.answer)
                with torch.no_grad(), demo.hooks(fwd_hooks=hooks):
                    logits = demo(ids)[0, -2]
                answer = ids[0, -1]
                right.append(int(logits.argmax()) == int(answer))
                diffs.append(float(logits[answer] - logits[logits != logits[answer]].max()))
            chosen = (frame.n_shots == shots) & (frame["map"] == kind)
            row = frame[chosen & (frame.scale.isna() if scale is None else frame.scale == scale)]
            assert len(row) == 1
            row = row.iloc[0]
            assert row.top1 == pytest.approx(sum(right) / 9), (shots, kind)
            assert row.logit_diff == pytest.approx(sum(diffs) / 9, rel=1e-3, abs=1e-3)
            if shots == 0 and kind == "none":
                oracle = [answered(hugging_face, demo.tokenizer, q) for q in questions]
                hits = [int(logits.argmax()) == answer for logits, answer in oracle]
                assert row.top1 == pytest.approx(sum(hits) / 9)
        assert set(frame.n_tokens[frame.n_shots == shots]) == {lengths[shots] - 1}


def test_the_variants_of_patching_reach_the_model(demo):
    options = {"scales": [-30], "kinds": ["ra"], "shots": 0, "n_mean": 6, "n_test": 9, **QUIET}
    at_scores = patching_sweep(demo, "capitalize", at="scores", **options).iloc[1]
    task = same_length_sets(load_task("capitalize"), lambda t: demo.to_tokens(t)[0].tolist())[6]
    prompts = task.split().prompts("train", n=6)
    _, ra = run_with_ra(
        demo, [p.text for p in prompts], target=sequence_nll([p.answer for p in prompts])
    )
    mean = ra.stack().mean(dim=1)
    hooks = [
        (f"blocks.{i}.attn.hook_attn_scores", lambda s, hook, m=m: s - 30 * m[:, :5, :5])
        for i, m in enumerate(mean)
    ]
    diffs = []
    for prompt in task.split().prompts("test", n=9):
        with torch.no_grad(), demo.hooks(fwd_hooks=hooks):
            logits = demo(demo.to_tokens(prompt.text))[0, -1]
        answer = int(demo.to_tokens(prompt.answer, prepend_bos=False)[0, 0])
        others = torch.cat([logits[:answer], logits[answer + 1 :]])
        diffs.append(float(logits[answer] - others.max()))
    assert at_scores.logit_diff == pytest.approx(sum(diffs) / 9, rel=1e-3, abs=1e-3)
    renormalised = patching_sweep(demo, "capitalize", renormalise=True, **options).iloc[1]
    plain = patching_sweep(demo, "capitalize", **options).iloc[1]
    assert len({at_scores.logit_diff, renormalised.logit_diff, plain.logit_diff}) == 3


# ---- tables -------------------------------------------------------------------------------------


def test_a_ranking_table_holds_the_scores_of_rank_heads(demo):
    task = load_task("antonym")
    frame = rank_tasks(demo, task, methods=["fa", "cm2"], shots=2, n_rank=4, **QUIET)
    split = task.split()
    prompts = {
        "fa": split.prompts("train", shots=2, n=4),
        "cm2": split.prompts("valid", shots=2, n=4, with_replacement=True),
    }
    for method, given in prompts.items():
        ranked = rank_heads(demo, given, method=method, batch_size=64, progress=False)
        found = frame[frame.method == method].sort_values("rank")
        assert list(zip(found.layer, found["head"], strict=True)) == ranked.order()
        assert (
            found.sort_values(["layer", "head"]).score.tolist() == ranked.scores.flatten().tolist()
        )
        assert found["rank"].tolist() == list(range(1, 33))


def test_rows_say_how_they_were_made(demo):
    frame = perturbation_test(
        demo, ["antonym", load_task("natural/present-past")], methods="index", shots=[0, 1],
        n_rank=2, n_test=3, seed=5, **QUIET,
    )  # fmt: skip
    one = frame.iloc[0]
    assert (one.experiment, one.model, one["dtype"]) == ("perturbation", "ra-lens-demo", "float32")
    assert one.model_class == as_lens(demo).kind
    assert (one.seed, one.n_rank, one.n_test, one.split) == (5, 2, 3, "code")
    assert one.torch.startswith(torch.__version__.split("+")[0])
    assert not one.value_biases_folded
    assert set(frame.n_test) == {3}
    assert frame.groupby(["task", "n_shots"]).prompts_hash.nunique().tolist() == [1, 1, 1, 1]
    assert frame.prompts_hash.nunique() == 4
    assert frame.settings_hash.nunique() == 1
    assert frame.kind[frame.task == "natural/present-past"].unique().tolist() == ["natural"]
    # Without ranking prompts or draws there is nothing else that a seed could change.
    other = perturbation_test(demo, "antonym", methods="index", shots=1, n_test=3, **QUIET)
    whole = perturbation_test(demo, "antonym", methods="index", shots=0, **QUIET)
    assert set(whole.n_test) == {len(load_task("antonym").split().test)}
    same = frame[(frame.task == "antonym") & (frame.n_shots == 1)]
    assert other.prompts_hash.iloc[0] != same.prompts_hash.iloc[0]


def test_all_means_the_twenty_one_tasks(demo):
    frame = rank_tasks(demo, "all", methods="index", shots=0, n_rank=1, **QUIET)
    assert frame.task.nunique() == 21
    assert frame.groupby("kind").task.nunique().to_dict() == {"icl": 15, "natural": 6}


def test_a_method_of_ones_own_is_tested_like_the_others(demo):
    @ranking_method("late", title="last layer first")
    def late(context):
        n_layers, n_heads = context.shape
        return torch.arange(n_layers)[:, None].expand(n_layers, n_heads).double()

    try:
        frame = perturbation_test(demo, "antonym", methods="late", shots=0, n_test=5, **QUIET)
    finally:
        registry_of_methods._methods.pop("late")
    assert frame.method.unique().tolist() == ["late"]
    assert frame.groupby("direction").size().to_dict() == {"forward": 11, "reversed": 11}


def test_a_folded_model_is_warned_about_and_recorded(fresh):
    model = fold(fresh("gpt2", KINDS[0]), KINDS[0])
    with pytest.warns(RALensWarning, match="folded into its output biases"):
        frame = perturbation_test(
            model, knowing_task(), methods="index", shots=0, n_rank=2, n_test=2, step=0.5, **QUIET
        )
    assert frame.value_biases_folded.all()


# ---- killed -------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from ra_lens import load_demo_model
from ra_lens.experiments import perturbation_test
perturbation_test(
    load_demo_model(device="cpu"), ["antonym", "capitalize"], out=sys.argv[1], **{options!r}
)
"""
RUNS = {
    "perturbation_test": {
        "methods": ["ra", "cm1", "random"], "shots": [0, 1], "random_orders": 6, "n_rank": 3,
        "n_test": 9, "step": 0.2, "progress": False,
    },
    "patching_sweep": {"shots": [0, 1], "n_mean": 5, "n_test": 9, "scales": [-30.0, -3.0, 0.0, 1.0],
                       "progress": False},
}  # fmt: skip


def kill(out, _demo):
    """In a process of its own, killed by the system when seven units are written."""
    script = SCRIPT.format(options=RUNS["perturbation_test"])
    process = subprocess.Popen([sys.executable, "-c", script, str(out)], stderr=subprocess.PIPE)
    journal = journal_path(out)
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def interrupt(out, demo):
    """Ctrl-C while the eighth unit is asked."""
    ask, units = runner_module.ask, iter(range(7))

    def asked(*args, **kwargs):
        if next(units, None) is None:
            raise KeyboardInterrupt
        return ask(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner_module, "ask", asked)
        with pytest.raises(KeyboardInterrupt):
            patching_sweep(demo, ["antonym", "capitalize"], out=out, **RUNS["patching_sweep"])


@pytest.mark.parametrize(
    ("function", "ending", "stop"),
    [
        pytest.param(perturbation_test, "csv", kill, marks=pytest.mark.every_model),
        (patching_sweep, "parquet", interrupt),
    ],
)
def test_a_run_that_was_stopped_gives_the_identical_result(tmp_path, demo, function, ending, stop):
    options, tasks = RUNS[function.__name__], ["antonym", "capitalize"]
    out = tmp_path / f"stopped.{ending}"
    stop(out, demo)
    done = journal_path(out).read_bytes().count(b"\n")
    assert not out.exists(), "the run ended before it was stopped"
    resumed = function(demo, tasks, out=out, **options)
    assert not journal_path(out).exists()
    whole = function(demo, tasks, out=tmp_path / f"whole.{ending}", **options)
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert out.read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    assert done > 4
    # Asked again, the finished results are read, and other settings are refused.
    again = function(demo, tasks, out=out, **options)
    pd.testing.assert_frame_equal(again, read_results(out), check_exact=True)
    with pytest.raises(BadInput, match="holds the results of a run with other settings"):
        function(demo, tasks, out=out, **{**options, "seed": 1})


# Settings and their hashes as an earlier version wrote them: runs that were begun with it are gone
# on with, and its files are found again.
FACTS = {
    "model": "demo", "model_class": "HookedTransformer", "dtype": "float32", "device": "cpu",
    "weights_hash": "00", "value_biases_folded": False, "ra_lens": "0.1.0",
    "transformer_lens": "3.9", "transformers": "5", "torch": "2",
}  # fmt: skip
HASHES = [
    (
        perturbation_test, "antonym",
        {"methods": "index", "shots": [0, 1], "step": 0.5, "n_rank": 2, "n_test": 3, "seed": 5},
        "d7e0930b0fd85c1a",
    ),
    (perturbation_test, "antonym", {}, "04aa1b0c431fa805"),
    (
        patching_sweep, "capitalize",
        {"scales": [-30, 1], "shots": [0, 2], "n_mean": 6, "n_test": 9, "seed": 5, "length": 6,
         "at_least": 40},
        "9406effc0a07fe5c",
    ),
    (patching_sweep, "capitalize", {}, "67d7cecabeb71539"),
    (
        rank_tasks, "antonym",
        {"methods": ["ra", "random"], "shots": 2, "n_rank": 4, "seed": 5},
        "791fe530e5a58d0a",
    ),
    (rank_tasks, "antonym", {}, "12100828a05a23de"),
]  # fmt: skip
# Runs of the toy as an earlier version began and finished them.
OLD_RUNS = Path(__file__).parent / "old_runs"
OLD = {"shots": [0, 1], "seed": 5, "batch_size": 7, **QUIET}
PLACES = ("n_shots", "method", "direction", "draw", "share", "map", "scale", "layer", "head")
OLD_OPTIONS = [
    (rank_tasks, "ranking", {"methods": ["cm1", "ra"], "n_rank": 3}, ["score"]),
    (
        perturbation_test, "perturbation",
        {"methods": ["ra", "random"], "random_orders": 2, "step": 0.5, "n_rank": 3, "n_test": 4},
        ["top1", "top2", "top3", "logit_diff"],
    ),
    (
        patching_sweep, "patching",
        {"scales": [-3, 1], "n_mean": 3, "n_test": 4, "at_least": 10},
        ["top1", "top2", "top3", "logit_diff"],
    ),
]  # fmt: skip


def with_facts(patch, facts):
    patch.setattr(runner_module, "model_facts", lambda lens: facts)


@pytest.mark.parametrize(("function", "task", "options", "wanted"), HASHES)
def test_settings_are_hashed_as_ever(demo, monkeypatch, function, task, options, wanted):
    class Hashed(Exception):
        pass

    def stop(out, settings):
        raise Hashed(settings_hash(settings))

    with_facts(monkeypatch, FACTS)
    monkeypatch.setattr(runner_module, "finished_results", stop)
    arrays = {name: value if isinstance(value, str) else np.array(value)
              for name, value in options.items()}  # fmt: skip
    for given in (options, arrays):
        with pytest.raises(Hashed, match=wanted):
            function(demo, task, **given, **QUIET)


@pytest.mark.parametrize(("function", "name", "options", "measures"), OLD_OPTIONS)
def test_runs_of_an_older_version_are_gone_on_with(
    toy, monkeypatch, tmp_path, function, name, options, measures
):
    journal = (OLD_RUNS / f"{name}.journal").read_text()
    settings = json.loads(journal.splitlines()[0])["settings"]
    with_facts(monkeypatch, {fact: settings[fact] for fact in FACTS})
    out, task = tmp_path / "a.csv", knowing_task()
    # The first number of the first unit is another one, so that it shows who computed it.
    journal_path(out).write_text(re.sub(r"(?<=\n)(.*?)\d+\.\d+", r"\g<1>0.123", journal, count=1))
    begun = function(toy, task, out=out, **OLD, **options)
    whole = function(toy, task, **OLD, **options)
    assert not journal_path(out).exists()
    assert list(begun) == list(whole) == list(read_results(OLD_RUNS / f"{name}.csv"))
    places = [c for c in PLACES if c in whole]
    begun, whole = (frame.sort_values(places)[measures].to_numpy() for frame in (begun, whole))
    assert set(begun[~np.isclose(begun, whole, rtol=1e-4)]) == {0.123}
    # What is finished is found, and stays as it is.
    shutil.copy(OLD_RUNS / f"{name}.csv", out)
    found = function(toy, task, out=out, **OLD, **options)
    pd.testing.assert_frame_equal(found, read_results(out), check_exact=True)
    assert out.read_bytes() == (OLD_RUNS / f"{name}.csv").read_bytes()
    with pytest.raises(BadInput, match=r"other settings \(seed: there 5, here 6\)"):
        function(toy, task, out=out, **{**OLD, "seed": 6}, **options)


def same_out(demo, tmp_path, **options):
    """Runs with one output file: the given options, over a small run that is already there."""
    defaults = {"methods": "index", "shots": 0, "n_test": 3, "n_rank": 2, "out": tmp_path / "a.csv"}
    return perturbation_test(demo, "antonym", **{**defaults, **QUIET, **options})


def test_a_method_redefined_under_its_name_is_another_setting(demo, tmp_path):
    try:
        ranking_method("mine")(lambda context: torch.zeros(context.shape))
        same_out(demo, tmp_path, methods="mine")
        ranking_method("mine", replace=True)(lambda context: torch.ones(context.shape))
        with pytest.raises(BadInput, match="other settings"):
            same_out(demo, tmp_path, methods="mine")
    finally:
        registry_of_methods._methods.pop("mine")


def test_what_changes_the_numbers_is_a_setting(tmp_path):
    model = load_demo_model(device="cpu")
    same_out(model, tmp_path)
    assert set(same_out(model, tmp_path, batch_size=7).batch_size) == {64}  # changes no number
    with pytest.raises(BadInput, match=r"\(seed: there 0, here 1\)"):
        same_out(model, tmp_path, seed=1)
    before = model.cfg.default_prepend_bos
    model.cfg.default_prepend_bos = not before
    with pytest.raises(BadInput, match="other settings"):
        same_out(model, tmp_path)
    model.cfg.default_prepend_bos = before
    same_out(model, tmp_path)
    parameter = next(p for p in model.parameters() if p.ndim == 2 and p.numel() > 5000)
    with torch.no_grad():
        parameter[7, 3:9] = 0
    with pytest.raises(BadInput, match="weights_hash"):
        same_out(model, tmp_path)
    name = "blocks.0.attn.hook_z"
    with model.hooks(fwd_hooks=[(name, lambda z, hook: z)]), pytest.raises(BadInput) as info:
        same_out(model, tmp_path)
    assert "found hooks on the model (blocks.0.attn" in str(info.value)
    assert "and out=" in str(info.value)


def test_weights_of_the_largest_layers_are_told_apart():
    embedding = torch.nn.Embedding(50257, 768)  # more numbers than float32 can count
    first = weights_hash(embedding)
    assert weights_hash(embedding) == first
    with torch.no_grad():
        embedding.weight[50256, 767] += 1.0
    assert weights_hash(embedding) != first


def test_a_mistake_leaves_no_journal_and_comes_before_the_work(demo, tmp_path):
    out = tmp_path / "a.csv"
    calls = []

    @ranking_method("counted")
    def counted(context):
        calls.append(1)
        return torch.zeros(context.shape)

    try:
        with pytest.raises(BadInput, match="shots=500"):
            same_out(demo, tmp_path, methods="counted", shots=[0, 500])
        with pytest.raises(BadInput, match=r"found n_rank=800, but task 'antonym' has"):
            same_out(demo, tmp_path, methods="counted", n_rank=800)
    finally:
        registry_of_methods._methods.pop("counted")
    assert not calls
    assert not journal_path(out).exists()
    same_out(demo, tmp_path)
    assert out.exists()


def test_ties_count_by_their_chance():
    # The right answer is token 0. Above it: none, one, none; tied with it: none, none, three.
    logits = torch.tensor([[3.0, 1, 2, 0], [1, 3, 0, -1], [2, 2, 2, 2]])
    marks = mark(logits, torch.tensor([0, 0, 0]))
    assert marks.accuracy(1) == pytest.approx((1 + 0 + 1 / 4) / 3)
    assert marks.accuracy(2) == pytest.approx((1 + 1 + 2 / 4) / 3)
    assert marks.logit_diff.tolist() == [1, -2, 0]
    p = math.exp(3) / (math.exp(3) + math.e + math.exp(2) + 1)
    assert float(marks.probability[0]) == pytest.approx(p)


# ---- mistakes -----------------------------------------------------------------------------------


def test_wrong_options_are_refused_before_anything_runs(demo, tmp_path):
    cases = [
        ({"methods": "rra"}, r"no ranking method 'rra'"),
        ({"methods": ["ra", "ra"]}, r"give at least one, each once"),
        ({"shots": [0, -1]}, r"found shots=\[0, -1\]; give different numbers from 0"),
        ({"step": 0.3}, r"found step=0.3; give a share of the heads that divides 1"),
        ({"directions": []}, r"give 'forward', 'reversed', 'absolute' or several"),
        ({"n_rank": 0}, r"found n_rank=0; give at least 1"),
        ({"shots": 500}, r"shots=500"),
        ({"out": tmp_path / "x.json"}, r"must end in \.parquet or \.csv"),
    ]
    perturbed = partial(perturbation_test, demo, n_test=2, **QUIET)
    for options, message in cases:
        refused(perturbed, {"task": "antonym", **options}, message)
    refused(perturbed, {"task": ["antonym", "all"]}, "task 'antonym' twice")
    refused(perturbed, {"task": []}, "found no task")
    for options, message in [
        ({"kinds": []}, r"give 'ra', 'pattern', 'shuffled', 'grad', .* or several"),
        ({"scales": []}, r"found scales without a number in it; give at least one"),
        ({"length": 99}, r"has no 40 pairs of 99 tokens .* \(pairs by length .*: 6 tokens: \d+\)"),
        ({"at_least": 5000}, r"has no 5000 pairs"),
    ]:
        refused(partial(patching_sweep, demo, "capitalize", **QUIET), options, message)
    assert list(tmp_path.iterdir()) == []


def test_one_choice_alone_is_a_list_of_one():
    choices = ("forward", "reversed")
    assert read_some("directions", "forward", choices) == ["forward"]
    assert read_some("directions", (one for one in choices), choices) == list(choices)
    for wrong in (5, None, "forwards", "", [["forward"]], ["forward", "forward"]):
        with pytest.raises(BadInput, match=r"found directions=.*; give 'forward', 'reversed' or b"):
            unchecked(read_some)("directions", wrong, choices)


@pytest.mark.parametrize("kind", ["ra", *every_model("shuffled")])
def test_a_scale_is_found_on_the_questions_averaged_and_on_no_other(demo, kind, monkeypatch):
    options = {"shots": 1, "n_mean": 3, "n_test": 5, "kinds": [kind], **QUIET}
    asked = []
    find = mean_maps.best_scale

    def watched(model, maps, prompts, targets, **options):
        asked.append((prompts, options))
        return find(model, maps, prompts, targets, **options)

    monkeypatch.setattr(mean_maps, "best_scale", watched)
    frame = patching_sweep(demo, "choose_middle_of_3", scales="best", at_least=20, **options)
    [(prompts, _)] = asked
    [none, best] = [row for _, row in frame.iterrows()]
    assert (none["map"], best["map"]) == ("none", kind)
    task = load_task("choose_middle_of_3")
    sets = same_length_sets(task, lambda text: demo.to_tokens(text)[0].tolist(), at_least=20)
    split = max(sets.values(), key=lambda one: len(one.pairs)).split()
    learned = split.prompts("train", shots=1, n=3, seed=0)
    tests = {prompt.text for prompt in split.prompts("test", shots=1, seed=0)}
    assert prompts == [prompt.text for prompt in learned]
    assert not tests & set(prompts)
    # The losses of the questions averaged by hand, prompt by prompt.
    _, ra = run_with_ra(demo, prompts, target=sequence_nll([p.answer for p in learned]))
    maps = {layer: ra.mean()["ra", layer] for layer in ra.layers}
    if kind == "shuffled":
        maps = control_maps(ra.mean(), "shuffled", seed=0)
    losses = {}
    for scale in SCALES:
        each = []
        for prompt in learned:
            tokens = demo.to_tokens(prompt.text + prompt.answer)
            hooks = patch_hooks(maps, ra.sites, scale=scale)
            with torch.no_grad(), demo.hooks(fwd_hooks=hooks):
                log_p = demo(tokens)[0, -2].double().log_softmax(-1)
            each.append(-float(log_p[tokens[0, -1]]))
        losses[scale] = sum(each) / len(each)
    wanted = min(losses, key=losses.__getitem__)
    assert best["scale"] == wanted
    assert best["train_loss"] == pytest.approx(losses[wanted], rel=1e-4, abs=1e-6)
    assert best["train_loss_unpatched"] == pytest.approx(losses[0.0], rel=1e-4)
    assert math.isnan(none["train_loss"])
    # The test questions are answered as at that scale when it is given.
    given = patching_sweep(demo, "choose_middle_of_3", scales=wanted, at_least=20, **options)
    assert best["top1"] == given["top1"].iloc[1]
    assert best["logit_diff"] == given["logit_diff"].iloc[1]
    assert set(frame["scales"]) == {"best"}


def test_scales_that_were_found_make_no_curve_and_are_found_again(demo, tmp_path):
    options = {"shots": 0, "n_mean": 3, "n_test": 3, "out": tmp_path / "found.csv", **QUIET}
    frame = patching_sweep(demo, "capitalize", scales="best", **options)
    again = patching_sweep(demo, "capitalize", scales="best", **options)
    assert again["scale"].tolist()[1:] == frame["scale"].tolist()[1:]
    assert read_results(tmp_path / "found.csv")["train_loss"].notna().sum() == 2
    with pytest.raises(BadInput, match="one for each task, which make no curve"):
        patching_sweep_curve(frame)
    with pytest.raises(BadInput, match="found scales='most'; give a number, or several"):
        patching_sweep(demo, "capitalize", scales="most", **QUIET)


def test_the_scales_are_those_of_the_paper():
    assert len(PAPER_SCALES) == len(set(PAPER_SCALES)) == 24
    assert {-30.0, 1.0, 0.0, 3.0, -120.0} <= set(PAPER_SCALES)


# ---- shared demonstrations ----------------------------------------------------------------------

SHARED = {"shots": 3, "n_test": 6, "demonstrations": "shared"}
COLUMNS = ["top1", "top2", "top3", "logit_diff"]


def perturbed(model, **options):
    return perturbation_test(
        model,
        "antonym",
        methods=["index", "cm1"],
        n_rank=4,
        step=0.25,
        **SHARED,
        **QUIET,
        **options,
    )


def patched(model, **options):
    return patching_sweep(
        model, "antonym", scales=[-30, 1], n_mean=4, at_least=20, **SHARED, **QUIET, **options,
    )  # fmt: skip


@pytest.mark.parametrize("run", [perturbed, patched])
@pytest.mark.parametrize("kind", ANY_KIND)
@pytest.mark.parametrize("accuracy", ["first token", *every_model("answer")])
def test_shared_demonstrations_run_once_and_give_what_they_give_in_full(
    run, kind, accuracy, monkeypatch
):
    model, read = load_demo_model(kind=kind, device="cpu"), []

    def noted(self, *args, **options):
        read.append(len(self.ids))
        return own(self, *args, **options)

    own = SharedPrefix.read
    monkeypatch.setattr(SharedPrefix, "read", noted)
    found = run(model, accuracy=accuracy)
    assert len(read) >= 5
    assert min(read) > 15
    monkeypatch.setattr(SharedPrefix, "of", staticmethod(lambda *_: None))
    wanted = run(model, accuracy=accuracy)
    assert list(found) == list(wanted)
    np.testing.assert_allclose(found[COLUMNS], wanted[COLUMNS], atol=1e-4)
    assert found["prompts_hash"].equals(wanted["prompts_hash"])
    assert found[COLUMNS].nunique().min() > 1


def test_demonstrations_are_a_setting_where_they_are_shared(demo, tmp_path):
    own = same_out(demo, tmp_path, shots=2)
    assert "demonstrations" not in own
    again = same_out(demo, tmp_path, shots=2, demonstrations="own")
    assert again["settings_hash"].equals(own["settings_hash"])
    with pytest.raises(BadInput, match="other settings"):
        same_out(demo, tmp_path, shots=2, demonstrations="shared")
    there = {"shots": 2, "demonstrations": "shared", "out": tmp_path / "b.csv"}
    shared = same_out(demo, tmp_path, **there)
    assert set(shared["demonstrations"]) == {"shared"}
    assert not shared["prompts_hash"].equals(own["prompts_hash"])
    again = same_out(demo, tmp_path, **there)
    assert list(again) == list(shared)
    np.testing.assert_allclose(again[COLUMNS], shared[COLUMNS])
    ranked = rank_tasks(demo, "antonym", methods="index", n_rank=3, shots=2,
                        demonstrations="shared", **QUIET)  # fmt: skip
    assert set(ranked["demonstrations"]) == {"shared"}
    for function in (perturbation_test, patching_sweep, rank_tasks):
        with pytest.raises(BadInput, match="found demonstrations='mine'; give 'own'"):
            function(demo, "antonym", demonstrations="mine", **QUIET)
