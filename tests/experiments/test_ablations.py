"""Ablations of attention patching: each variant by hand, and what keeps everything as the sweep."""

from __future__ import annotations

import math
from functools import partial

import pandas as pd
import pytest
import torch
import transformers

from ra_lens import load_demo_model, load_task, patch_hooks, rank_heads, run_with_ra
from ra_lens.errors import BadInput, RALensWarning, UnsupportedModel
from ra_lens.experiments import (
    ablation_effects,
    bootstrap_intervals,
    mean_over_questions,
    patching_ablations,
    patching_sweep,
    read_results,
)
from ra_lens.experiments import runner as runner_module
from ra_lens.experiments.journal import journal_path
from ra_lens.experiments.side_effects import PlainText, plain_sentences
from ra_lens.experiments.variants import n_of_share, thirds
from ra_lens.model import as_lens
from ra_lens.model.loading import demo_model_folder
from ra_lens.patching.masking import mask_heads
from ra_lens.scales import best_scale
from ra_lens.targets import sequence_nll
from ra_lens.tasks import Pair, Task, same_length_sets
from refused import refused, unchecked
from tiny_models import CASES, OBSERVE_ONLY

QUIET = {"progress": False}
SMALL = {"n_mean": 3, "n_test": 4, "each_question": True, **QUIET}
N = 5  # tokens of a question of capitalize: <bos> Q: word ⏎ A:


@pytest.fixture(scope="module")
def demo():
    return load_demo_model(device="cpu")


@pytest.fixture(scope="module")
def split(demo):
    encode = partial(as_lens(demo).encode, prepend_bos=None)
    return same_length_sets(load_task("capitalize"), encode, at_least=40)[N + 1].split()


@pytest.fixture(scope="module")
def mean(demo, split):
    return maps_of(demo, split.prompts("train", n=3))


def maps_of(model, prompts):
    answers = sequence_nll([prompt.answer for prompt in prompts])
    _, ra = run_with_ra(model, [p.text for p in prompts], target=answers, **QUIET)
    return ra.mean()


def logits_of(model, prompt, maps, scale=-30.0):
    """Logits after a question with these added to each pattern by hand, and the answer's id."""
    hooks = [
        (f"blocks.{i}.attn.hook_pattern", lambda a, hook, m=m: a + scale * m[:, :N, :N])
        for i, m in maps.items()
    ]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits = model(model.to_tokens(prompt.text))[0, -1]
    return logits, int(model.to_tokens(prompt.answer, prepend_bos=False)[0, 0])


def differences(model, split, maps, scale=-30.0):
    """What a table calls `logit_diff`, of the first four test questions."""
    found = []
    for prompt in split.prompts("test", n=4):
        logits, answer = logits_of(model, prompt, maps, scale)
        found.append(float(logits[answer] - logits[logits != logits[answer]].max()))
    return found


def of(frame, variant, scale_from="paper"):
    rows = frame[(frame.variant == variant) & (frame.scale_from.isin([scale_from, "none"]))]
    assert len(rows) == 4, variant
    return rows


def agrees(frame, variant, wanted):
    assert of(frame, variant).logit_diff.tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-4)


# ---- what keeps everything ----------------------------------------------------------------------


def test_the_whole_map_and_controls_are_the_rows_of_the_sweep(demo):
    kinds = ["ra", "shuffled", "grad", "centred_grad", "a_grad", "pattern"]
    frame = patching_ablations(demo, "capitalize", ablations=["controls"], **SMALL)
    sweep = patching_sweep(demo, "capitalize", scales=[-30, 1], kinds=kinds, shots=0, **SMALL)
    marks = ["question", "top1", "top2", "top3", "logit_diff", "n_tokens", "prompts_hash"]
    for kind in ["none", *kinds]:
        scale = {"none": math.nan, "pattern": 1.0}.get(kind, -30.0)
        here, there = frame[frame["map"] == kind], sweep[sweep["map"] == kind]
        there = there if kind == "none" else there[there.scale == scale]
        pd.testing.assert_frame_equal(
            here[marks].reset_index(drop=True), there[marks].reset_index(drop=True)
        )
        assert here.scale.iloc[0] == scale or kind == "none"
    assert len(set(frame.groupby("map").logit_diff.mean())) == len(kinds) + 1


def test_a_range_of_all_layers_is_the_whole_map(demo):
    options = {"ablations": ["layers"], "layer_ranges": [(0, 3), (1, 2)], **SMALL}
    frame = patching_ablations(demo, "capitalize", **options)
    whole, every, some = (
        of(frame, name) for name in ("whole map", "layers 0 to 3", "layers 1 to 2")
    )
    for column in ("top1", "logit_diff", "kl", "top1_same"):
        assert every[column].tolist() == whole[column].tolist()
    assert some.logit_diff.tolist() != whole.logit_diff.tolist()


@pytest.mark.every_model
def test_maps_of_a_task_on_itself_are_its_own(demo):
    task = load_task("capitalize")
    twin = Task(
        "twin", "icl", task.pairs, task.before_subject, task.after_subject, source="builtin"
    )
    frame = patching_ablations(demo, [task, twin], ablations=["transfer"], **SMALL)
    for name, other in (("capitalize", "twin"), ("twin", "capitalize")):
        rows = frame[frame.task == f"{name}_len_6_1"]
        moved, whole = of(rows, f"maps of {other}_len_6_1"), of(rows, "whole map")
        if name == "twin":  # the same questions, whose split is that of their pairs
            assert moved.prompts_hash.iloc[0] == whole.prompts_hash.iloc[0]
        assert moved.logit_diff.tolist() == whole.logit_diff.tolist()
        assert moved.kl.tolist() == whole.kl.tolist()
    assert len(frame) == 2 * 3 * 4  # unpatched, whole, the other's; none of its own


# ---- by hand ------------------------------------------------------------------------------------


@pytest.mark.every_model
def test_rows_signs_and_layers_by_hand(demo, split, mean):
    frame = patching_ablations(demo, "capitalize", ablations=["layers", "rows", "sign"], **SMALL)
    ra = mean.by_layer("ra")

    def changed(change):
        return {layer: change(value) for layer, value in ra.items()}

    def rows(first, last):
        keep = torch.zeros(N + 1, 1)
        keep[first:last] = 1
        return changed(lambda value: value * keep)

    agrees(frame, "whole map", differences(demo, split, ra))
    agrees(frame, "last row", differences(demo, split, rows(N - 1, N)))
    agrees(frame, "all but the last row", differences(demo, split, rows(0, N - 1)))
    agrees(frame, "first half", differences(demo, split, rows(0, 2)))
    agrees(frame, "second half", differences(demo, split, rows(2, N)))
    more, less = changed(lambda v: v.clamp(max=0)), changed(lambda v: v.clamp(min=0))
    agrees(frame, "R < 0 only", differences(demo, split, more))
    agrees(frame, "R > 0 only", differences(demo, split, less))
    assert all(torch.equal(more[layer] + less[layer], ra[layer]) for layer in ra)
    # Four layers in three parts: 0, 1, and the last two.
    agrees(frame, "layer 0", differences(demo, split, {0: ra[0]}))
    agrees(frame, "layers 2 to 3", differences(demo, split, {2: ra[2], 3: ra[3]}))
    assert (frame.n_tokens == N).all()


def test_the_first_heads_and_the_others_are_the_whole_map(demo, split, mean):
    options = {"ablations": ["heads"], "methods": ["ra", "index"], "head_shares": 0.25, **SMALL}
    frame = patching_ablations(demo, "capitalize", **options)
    ra = mean.by_layer("ra")
    for method, label in (("ra", "RA"), ("index", "Index")):
        order = rank_heads(demo, split.prompts("train", n=3), method=method, **QUIET).order()
        assert len(order) == 32
        parts = {}
        for name, heads in (("first 25 %", order[:8]), ("all but first 25 %", order[8:])):
            parts[name] = {layer: torch.zeros_like(value) for layer, value in ra.items()}
            for layer, head in heads:
                parts[name][layer][head] = ra[layer][head]
            agrees(frame, f"{label}: {name}", differences(demo, split, parts[name]))
        add = partial(patch_hooks, ra, mean.sites, scale=-30, align="left")
        together = [*add(heads=order[:8]), *add(heads=order[8:])]
        [one, other] = [
            demo.run_with_hooks("Q: good\nA:", fwd_hooks=hooks) for hooks in (together, add())
        ]
        torch.testing.assert_close(one, other)


@pytest.mark.every_model
def test_fewer_questions_and_maps_of_prompts_with_examples_by_hand(demo, split):
    options = {"ablations": ["prompts", "shots"], "from_shots": 2, **SMALL}
    frame = patching_ablations(demo, "capitalize", n_prompts=[1, 2], **options)
    train = split.prompts("train", n=3)
    for n, name in ((1, "1 training question"), (2, "2 training questions")):
        agrees(frame, name, differences(demo, split, maps_of(demo, train[:n]).by_layer("ra")))
    longer = maps_of(demo, split.prompts("train", shots=2, n=3)).by_layer("ra")
    n = N + 2 * 6  # an example: Q: word ⏎ A: answer ⏎⏎
    assert longer[0].shape[-1] == n + 1
    ends = {layer: value[:, n - N : n, n - N : n] for layer, value in longer.items()}
    agrees(frame, "maps with 2 examples", differences(demo, split, ends))
    told = r"^left out: 'shots', which is for questions without demonstrations \(shots=0\)\.$"
    with pytest.warns(RALensWarning, match=told):
        with_examples = patching_ablations(demo, "capitalize", shots=1, **{**options, "n_test": 2})
    assert set(with_examples.ablation) == {"none", "whole", "prompts"}


def test_shorter_maps_lie_at_the_end_and_longer_ones_are_left_out(demo, split, mean):
    longer = Task(
        "longer", "icl", load_task("capitalize").pairs, "Q: the ", "\nA:", source="builtin"
    )
    options = {"ablations": ["transfer"], **SMALL}
    with pytest.warns(
        RALensWarning,
        match=r"^left out: maps of longer_len_7_1 \(6 tokens\) on capitalize_len_6_1 \(5\), whose "
        r"questions are shorter\.$",
    ):
        frame = patching_ablations(demo, ["capitalize", longer], **options)
    assert set(frame[frame.task == "capitalize_len_6_1"].ablation) == {"none", "whole"}
    moved = of(frame, "maps of capitalize_len_6_1")
    encode = partial(as_lens(demo).encode, prepend_bos=None)
    [questions] = same_length_sets(longer, encode, at_least=40).values()
    for prompt, found in zip(questions.split().prompts("test", n=4), moved.logit_diff, strict=True):
        hooks = []
        for layer, value in mean.by_layer("ra").items():
            laid = torch.zeros(8, 6, 6)
            laid[:, 1:, 1:] = value[:, :N, :N]  # the end of one on the end of the other
            name = f"blocks.{layer}.attn.hook_pattern"
            hooks.append((name, lambda a, hook, laid=laid: a - 30 * laid))
        with torch.no_grad(), demo.hooks(fwd_hooks=hooks):
            logits = demo(demo.to_tokens(prompt.text))[0, -1]
        answer = int(demo.to_tokens(prompt.answer, prepend_bos=False)[0, 0])
        wanted = float(logits[answer] - logits[logits != logits[answer]].max())
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.every_model
def test_the_best_scale_of_each_is_found_on_the_training_questions(demo, split, mean):
    tried = [-3, -60]
    options = {"ablations": ["rows"], "scales": ["best", "paper"], "tried": tried, **SMALL}
    frame = patching_ablations(demo, "capitalize", **options)
    train = split.prompts("train", n=3)
    answers = sequence_nll([prompt.answer for prompt in train])
    texts = [prompt.text for prompt in train]
    for variant, rows in (("whole map", None), ("last row", [N - 1]), ("first half", [0, 1])):
        best = best_scale(demo, mean, texts, answers, scales=tried, rows=rows, **QUIET)
        found = of(frame, variant, "best")
        assert set(found.scale) == {best.scale}
        assert found.train_loss.iloc[0] == pytest.approx(best.loss, rel=1e-5)
        assert found.train_loss_unpatched.iloc[0] == pytest.approx(best.unpatched_loss, rel=1e-5)
        at_paper = of(frame, variant, "paper")
        assert set(at_paper.scale) == {-30.0}
        assert at_paper.train_loss.isna().all()
    whole = of(frame, "whole map", "best")
    assert set(whole.scale) == {-60.0}
    wanted = differences(demo, split, mean.by_layer("ra"), -60.0)
    assert whole.logit_diff.tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-3)


# ---- side effects -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hugging_face():
    load = transformers.GPT2LMHeadModel.from_pretrained
    return load(str(demo_model_folder()), attn_implementation="eager").eval()


def test_kl_on_unrelated_text_is_that_of_hugging_face(demo, hugging_face):
    """A head is taken away: of the hooks' model by masking, of Hugging Face's by its weights."""
    text = PlainText.read(as_lens(demo), 9)
    assert text.prompts.lengths == (9,) * 8
    rows = torch.tensor(text.prompts.ids)
    tokens = demo.tokenizer(plain_sentences()[0], add_special_tokens=False)["input_ids"]
    assert rows[0].tolist() == [demo.tokenizer.bos_token_id, *tokens][:9]
    weight = hugging_face.transformer.h[0].attn.c_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        before = hugging_face(rows).logits.double().log_softmax(-1)
        weight[16 * 3 : 16 * 4] = 0
        after = hugging_face(rows).logits.double().log_softmax(-1)
        weight.copy_(kept)
    wanted = sum(
        float(p.exp() @ (p - q)) for one, other in zip(before, after, strict=True)
        for p, q in zip(one, other, strict=True)
    ) / (8 * 9)  # fmt: skip
    same = (before.argmax(-1) == after.argmax(-1)).double().mean()
    found = text.under(mask_heads(demo, ["L0H3"]))
    assert wanted > 1e-3
    assert found.kl == pytest.approx(wanted, rel=1e-3)
    assert found.top1_same == pytest.approx(float(same))
    nothing = text.under(())
    assert (nothing.kl, nothing.top1_same) == (0, 1)


def test_side_effects_are_those_of_the_same_hooks(demo, mean):
    frame = patching_ablations(demo, "capitalize", ablations=["rows"], **SMALL)
    text = PlainText.read(as_lens(demo), N)
    for variant, rows in (("whole map", None), ("last row", [N - 1])):
        effect = text.under(mean.patch_hooks(scale=-30, rows=rows, align="left"))
        row = of(frame, variant).iloc[0]
        assert row.kl == pytest.approx(effect.kl, rel=1e-4)
        assert row.top1_same == effect.top1_same
        assert row.kl > 0
    unpatched = of(frame, "unpatched").iloc[0]
    assert (unpatched.kl, unpatched.top1_same) == (0, 1)
    assert not any(point.fwd_hooks for point in demo.hook_dict.values())


def test_sentences_are_cut_to_the_shortest(demo):
    lengths = [len(as_lens(demo).encode(text, prepend_bos=None)) for text in plain_sentences()]
    assert len(lengths) == 8
    assert set(PlainText.read(as_lens(demo), 500).prompts.lengths) == {min(lengths)}


# ---- tables -------------------------------------------------------------------------------------


@pytest.mark.every_model
def test_a_run_that_was_stopped_gives_the_identical_result(demo, tmp_path, monkeypatch):
    options = {**SMALL, "ablations": ["rows", "sign"], "scales": ["paper", "best"], "tried": -3}
    out, ask, units = tmp_path / "a.parquet", runner_module.ask, iter(range(6))

    def asked(*args, **kwargs):
        if next(units, None) is None:
            raise KeyboardInterrupt
        return ask(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "ask", asked)
        with pytest.raises(KeyboardInterrupt):
            patching_ablations(demo, "capitalize", out=out, **options)
    assert journal_path(out).read_bytes().count(b"\n") == 7
    resumed = patching_ablations(demo, "capitalize", out=out, **options)
    whole = patching_ablations(demo, "capitalize", **options)
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    again = patching_ablations(demo, "capitalize", out=out, **options)
    pd.testing.assert_frame_equal(again, read_results(out), check_exact=True)
    pd.testing.assert_frame_equal(again, whole, check_exact=True, check_dtype=False)
    other = {**options, "seed": 5}
    with pytest.raises(BadInput, match=r"with other settings \(seed: there 0, here 5\)"):
        patching_ablations(demo, "capitalize", out=out, **other)


@pytest.mark.every_model
def test_a_folder_of_cells_holds_what_one_process_gives(demo, tmp_path):
    tasks, options = ["capitalize", "singular-plural"], {**SMALL, "at_least": 30, "n_test": 2}
    options["ablations"] = ["transfer"]
    whole = patching_ablations(demo, tasks, **options)
    half = patching_ablations(demo, tasks, **options, out=tmp_path / "cells", part="1/2")
    assert 0 < len(half) < len(whole)
    both = patching_ablations(demo, tasks, **options, out=tmp_path / "cells")
    columns = ["task", "variant", "question", "scale", "top1", "logit_diff", "kl", "top1_same"]
    pd.testing.assert_frame_equal(both[columns], whole[columns])
    assert set(whole.variant) >= {f"maps of {task}_len_6_1" for task in tasks}


def test_a_row_for_each_question_or_their_mean(demo):
    options = {**SMALL, "ablations": ["sign"], "n_mean": 2}
    each = patching_ablations(demo, "capitalize", **options)
    means = patching_ablations(demo, "capitalize", **{**options, "each_question": False})
    taken = mean_over_questions(each)
    assert each.question.tolist() == [0, 1, 2, 3] * len(means)
    for column in ("variant", "scale_from", "scale", "top1", "logit_diff", "kl"):
        pd.testing.assert_series_equal(taken[column], means[column])


def test_effects_are_paired_differences_on_the_same_tasks():
    rows = [
        {"model": "tiny", "task": task, "n_shots": 0, "ablation": ablation, "variant": variant,
         "map": "none" if ablation == "none" else "ra", "scale_from": scale_from, "scale": scale,
         "question": question, "top1": float(hit), "logit_diff": 0.5 * question, "kl": kl,
         "top1_same": 1 - kl, "n_test": 3}
        for task, ablation, variant, scale_from, scale, kl, hits in [
            ("a", "none", "unpatched", "none", math.nan, 0.0, (0, 0, 1)),
            ("a", "whole", "whole map", "paper", -30.0, 0.1, (1, 1, 1)),
            ("a", "transfer", "maps of b", "paper", -30.0, 0.2, (0, 1, 1)),
            ("a", "rows", "last row", "paper", -30.0, 0.3, (1, 1, 0)),
            ("b", "none", "unpatched", "none", math.nan, 0.0, (0, 0, 0)),
            ("b", "whole", "whole map", "paper", -20.0, 0.3, (1, 0, 0)),
            ("b", "rows", "last row", "paper", -10.0, 0.5, (1, 0, 1)),
        ]
        for question, hit in enumerate(hits)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    found = ablation_effects(frame).set_index("variant")
    assert found.index.tolist() == ["unpatched", "whole map", "last row", "maps of b"]
    last = found.loc["last row"]
    assert (last.value, last.unpatched, last.whole) == pytest.approx((2 / 3, 1 / 6, 2 / 3))
    assert (last.minus_unpatched, last.minus_whole) == pytest.approx((1 / 2, 0))
    assert (last.kl, last.top1_same) == pytest.approx((0.4, 0.6))
    assert (last.scale_low, last.scale_high) == (-30, -10)
    assert (last.n_tasks, last.n_questions) == (2, 6)
    other = found.loc["maps of b"]  # on one task, and compared on it
    assert (other.value, other.unpatched, other.whole) == pytest.approx((2 / 3, 1 / 3, 1))
    assert other.n_tasks == 1
    assert math.isnan(found.loc["unpatched"].minus_whole)
    # The interval is that of the paired differences.
    wide = frame.pivot(index=["task", "n_shots", "question"], columns="variant", values="top1")
    paired = wide[["last row"]].sub(wide["whole map"], axis=0)
    [[_, low, high, _]] = bootstrap_intervals(paired).to_numpy()
    assert (last.minus_whole_low, last.minus_whole_high) == pytest.approx((low, high))
    assert low < 0 < high
    means = ablation_effects(mean_over_questions(frame)).set_index("variant")
    assert means.value.tolist() == pytest.approx(found.value.tolist())
    assert means[["low", "high", "minus_whole_low"]].isna().all(axis=None)
    assert means.n_questions.tolist() == [6, 6, 6, 3]
    for table, message in [
        (frame.drop(columns="kl"), r"without 'kl'; give the result of patching_ablations\(\)"),
        (frame.iloc[:0], "without rows"),
        ([frame], r"found a table that is a list, not a DataFrame; give the result of"),
        (pd.concat([frame, frame.assign(model="b")]), r"2 models \(tiny, b\)"),
        (pd.concat([frame, frame]), "found unpatched of a twice, with none scales"),
    ]:
        refused(partial(unchecked(ablation_effects), table), {}, message)
    refused(partial(ablation_effects, frame), {"metric": "top9"}, "found metric='top9'; give one")


def test_wrong_options_are_refused_before_anything_runs(demo):
    asked = partial(patching_ablations, demo, "capitalize", **QUIET)
    for options, message in [
        ({"ablations": ["layer"]}, r"found ablations=\['layer'\]; give 'layers', 'heads', .* or"),
        ({"scales": []}, r"found scales=\[\]; give 'paper', 'best' or both"),
        ({"layer_ranges": [(4, 9)]}, r"found \[4, 9\] in layer_ranges; .* has layers 0…3"),
        ({"layer_ranges": [(0, 1, 2)]}, r"found \[0, 1, 2\] in layer_ranges; give pairs"),
        ({"layer_ranges": []}, r"found layer_ranges=\[\]; give at least one, each once"),
        ({"head_shares": [0.5, 1]}, r"found head_shares=\[0.5, 1.0\]; give different shares"),
        ({"n_prompts": [5, 25]}, r"found n_prompts=\[5, 25\]; .* below n_mean=25, which the whole"),
        ({"methods": "rra"}, "no ranking method 'rra'"),
        ({"from_shots": 0}, "from_shots=0; give at least 1"),
        ({"length": 99}, "has no 40 pairs of 99 tokens"),
        ({"n_mean": 999}, "found n_mean=999, but task"),
    ]:
        refused(asked, options, message)


def test_what_is_asked_for_by_name_and_is_not_there_is_told(demo):
    options = {"ablations": ["transfer", "prompts"], "n_mean": 1, "n_test": 1, **QUIET}
    told = "^left out: 'transfer', maps of other tasks, as there is one task; 'prompts', fewer than"
    with pytest.warns(RALensWarning, match=told + r" n_mean=1\.$"):
        frame = patching_ablations(demo, "capitalize", **options)
    assert frame.ablation.tolist() == ["none", "whole"]


def test_parts_of_few_layers_and_heads():
    assert thirds([4]) == [[4, 4]]
    assert thirds([0, 2]) == [[0, 0], [2, 2]]
    assert thirds(range(30)) == [[0, 9], [10, 19], [20, 29]]
    assert [n_of_share(part, 9) for part in (0.01, 0.25, 0.5, 0.99)] == [1, 2, 4, 8]


# ---- other models -------------------------------------------------------------------------------

TOY = Task("three-on", "icl", tuple(Pair(f"w{i}", f"w{i + 3}") for i in range(3, 30)), "", "",
           separator=" ", source="builtin")  # fmt: skip


@pytest.mark.every_model
@pytest.mark.parametrize("case", sorted(OBSERVE_ONLY & set(CASES)))
def test_models_that_only_show_their_pattern_are_patched_but_at_one_place(shared, case):
    model = shared(*case)
    options = {"at_least": 10, "from_shots": 1, **SMALL}
    ablations = ["rows", "sign", "controls", "shots", "layers", "prompts"]
    frame = patching_ablations(model, TOY, ablations=ablations, **options)
    assert frame.groupby("variant").logit_diff.mean().nunique() > 6
    with pytest.raises(UnsupportedModel, match="is observe-only in this model"):
        patching_ablations(model, TOY, ablations=["place"], **options)
