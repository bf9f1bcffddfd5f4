"""Answers that all begin with one token: said, counted, and marked as a whole where asked for."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import pandas as pd
import pytest
import torch

from command_line import call
from ra_lens import load_demo_model, load_task, perturbation_test, rank_heads, run_with_ra
from ra_lens.errors import BadInput, RALensWarning
from ra_lens.experiments import compare_with_paper, patching_sweep, rank_tasks, read_results
from ra_lens.figures import patching_sweep_curve, perturbation_curves
from ra_lens.model import as_lens
from ra_lens.patching.masking import mask_hooks
from ra_lens.targets import sequence_nll
from ra_lens.tasks import Pair, Task, same_length_sets
from tiny_models import ANY_KIND, load
from toys import GUESS, digits_task, write_digits

QUIET = {"progress": False}
FIRST = {"n_rank": 2, "step": 0.5, "methods": "index", "directions": ["forward"], **QUIET}


@pytest.fixture(scope="module", params=ANY_KIND)
def guesser(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Writes a space and a 3, whatever it is asked."""
    return load(write_digits(tmp_path_factory.mktemp("digits")), request.param)


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_demo_model(device="cpu")


def silently(function: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **options)


def decoded(model: Any, prompt: str, n: int, hooks: Any = ()) -> list[int]:
    """A greedy decode of `n` tokens, the whole text read anew for each."""
    ids = as_lens(model).encode(prompt, prepend_bos=None)
    start = len(ids)
    for _ in range(n):
        with torch.no_grad():
            logits = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=list(hooks))
        ids.append(int(logits[0, -1].argmax()))
    return ids[start:]


# ---- a task of digits ---------------------------------------------------------------------------


def test_the_first_token_of_digits_says_nothing_and_the_whole_answer_does(guesser: Any) -> None:
    task = digits_task()
    questions = task.split().test
    with pytest.warns(RALensWarning, match=r"all \d+ answers asked for in task 'digits' begin with "
                      r"the token ' ' of .*accuracy='answer'") as caught:  # fmt: skip
        first = perturbation_test(guesser, task, shots=[0, 1], **FIRST)
    assert len(caught) == 1  # of several numbers of shots once
    assert set(first["top1"]) == {1.0}  # for a model that knows nothing
    assert set(first["n_first_tokens"]) == {1}
    assert set(first["accuracy"]) == {"first token"}
    whole = silently(perturbation_test, guesser, task, shots=[0, 1], accuracy="answer", **FIRST)
    share = sum(pair.output == GUESS for pair in questions) / len(questions)
    assert 0 < share < 0.5
    assert whole["top1"].tolist() == pytest.approx([share] * len(whole))
    assert set(whole["n_first_tokens"]) == {1}
    assert set(whole["accuracy"]) == {"answer"}
    assert first["settings_hash"].iloc[0] != whole["settings_hash"].iloc[0]


def test_patching_marks_digits_by_the_whole_answer(guesser: Any) -> None:
    task = digits_task()
    options = {"scales": [-3.0], "kinds": ["ra"], "shots": 0, "n_mean": 3, "at_least": 5, **QUIET}
    with pytest.raises(BadInput, match=r"no 5 pairs with a one-token answer.*answer_tokens="):
        patching_sweep(guesser, task, **options)
    with pytest.warns(RALensWarning, match="task 'digits_len_6_2' begin with the token ' '"):
        first = patching_sweep(guesser, task, answer_tokens=2, **options)
    assert set(first["top1"]) == {1.0}
    whole = silently(patching_sweep, guesser, task, answer_tokens=2, accuracy="answer", **options)
    assert (first["map"] == whole["map"]).all()
    assert whole["top1"].max() < 0.5
    assert set(whole["n_first_tokens"]) == {1}
    assert set(whole["answer_tokens"]) == {2}


def test_rankings_by_the_first_token_are_warned_of(guesser: Any) -> None:
    options = {"shots": 0, "n_rank": 3, **QUIET}
    with pytest.warns(RALensWarning, match="cm1 rank heads by the probability of that token alone"):
        rank_tasks(guesser, digits_task(), methods=["cm1", "fa"], **options)
    with pytest.warns(RALensWarning, match="begin with the token ' ' .*: ra rank heads by"):
        rank_tasks(guesser, digits_task(), methods="ra", answer_in_input=False, **options)
    silently(rank_tasks, guesser, digits_task(), methods=["ra", "fa", "index"], **options)
    marked = {**FIRST, "methods": ["cm1", "index"], "shots": 0, "accuracy": "answer"}
    with pytest.warns(RALensWarning, match="cm1 rank heads by"):
        perturbation_test(guesser, digits_task(), **marked)


def test_answers_that_are_all_the_same_are_warned_of_whatever_is_marked(guesser: Any) -> None:
    pairs = tuple(Pair(str(i), "7") for i in range(10, 30))
    task = Task("sevens", "icl", pairs, "", ":", separator="\n")
    for accuracy in ("first token", "answer"):
        with pytest.warns(RALensWarning, match=r"'sevens'.*they are all the same; take a task"):
            perturbation_test(guesser, task, shots=0, accuracy=accuracy, **FIRST)
    # One question has one answer; nothing is amiss.
    silently(perturbation_test, guesser, digits_task(), shots=0, n_test=1, **FIRST)


# ---- against decoding by hand -------------------------------------------------------------------


def words_task() -> Task:
    """Answers of two words, all beginning with w9."""
    pairs = tuple(Pair(f"w{i}", f"w9 w{3 + i * 7 % 30}") for i in range(3, 34))
    return Task("two-words", "icl", pairs, "w4 ", " w5", separator=" ")


@pytest.mark.parametrize("kind", ANY_KIND)
def test_masked_heads_decode_as_the_table_says(kind: Any, shared: Any) -> None:
    model, task = shared("gpt2", kind), words_task()
    lens = as_lens(model)
    prompts = task.split().prompts("test")
    sites, order = lens.sites, rank_heads(model, [], method="index")
    # Two of the words are made the answer that the model itself gives with half of the heads.
    half = mask_hooks(sites, order.keep_mask(6))
    own = {
        prompt.query: "".join(map(lens.decode, decoded(model, prompt.text, 2, half)))
        for prompt in prompts[:2]
    }
    pairs = tuple(
        Pair(pair.input, own[pair].replace("w", " w").strip()) if pair in own else pair
        for pair in task.pairs
    )
    task = Task("two-words", "icl", pairs, "w4 ", " w5", separator=" ")
    prompts = task.split().prompts("test")
    frame = perturbation_test(model, task, shots=0, accuracy="answer", **FIRST)
    found = frame.set_index("heads_kept")["top1"]
    assert found[6] > 0
    for kept in (0, 6, 12):
        hooks = mask_hooks(sites, order.keep_mask(kept))
        hits = [
            decoded(model, prompt.text, 2, hooks) == lens.encode_fragment(prompt.answer)
            for prompt in prompts
        ]
        assert found[kept] == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("kind", ANY_KIND)
def test_patched_models_decode_as_the_table_says(kind: Any, shared: Any) -> None:
    model, task = shared("gpt2", kind), words_task()
    lens = as_lens(model)
    options = {"n_mean": 4, "n_test": 6, "at_least": 5, "answer_tokens": 2, **QUIET}
    frame = patching_sweep(
        model, task, scales=[-20.0], kinds=["ra"], shots=0, accuracy="answer", **options
    ).set_index("map")
    read = {"prepend_bos": None}
    (only,) = same_length_sets(
        task, lambda text: lens.encode(text, **read), answer_tokens=2, at_least=5
    ).values()
    split = only.split()
    learned = split.prompts("train", n=4)
    _, ra = run_with_ra(
        model,
        [prompt.text for prompt in learned],
        target=sequence_nll([prompt.answer for prompt in learned]),
        progress=False,
    )
    for name, hooks in (("none", ()), ("ra", ra.mean().patch_hooks(scale=-20, align="left"))):
        differences, hits = [], []
        for prompt in split.prompts("test", n=6):
            answer = lens.encode(prompt.text + prompt.answer, **read)[-2:]
            hits.append(decoded(model, prompt.text, 2, hooks) == answer)
            smallest = math.inf
            for step in (0, 1):
                ids = [*lens.encode(prompt.text, **read), *answer[:step]]
                with torch.no_grad():
                    logits = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=list(hooks))
                row, token = logits[0, -1].double(), answer[step]
                others = torch.cat([row[:token], row[token + 1 :]])
                smallest = min(smallest, float(row[token] - others.max()))
            differences.append(smallest)
        assert frame["top1"][name] == pytest.approx(sum(hits) / 6)
        assert frame["logit_diff"][name] == pytest.approx(sum(differences) / 6, rel=1e-4, abs=1e-4)
    assert abs(frame["logit_diff"]["ra"] - frame["logit_diff"]["none"]) > 1e-3


# ---- tables, files, figures, the command line ---------------------------------------------------


def test_first_tokens_are_counted_and_the_default_is_as_it_was(demo: Any, tmp_path: Any) -> None:
    options = {"shots": 0, "n_test": 6, "out": tmp_path / "a.csv", **FIRST}
    frame = perturbation_test(demo, "antonym", **options)
    prompts = load_task("antonym").split().prompts("test", n=6)
    firsts = {int(demo.to_tokens(p.answer, prepend_bos=False)[0, 0]) for p in prompts}
    assert set(frame["n_first_tokens"]) == {len(firsts)}
    back = read_results(tmp_path / "a.csv")
    assert set(back["accuracy"]) == {"first token"}
    with pytest.raises(BadInput, match=r"\(accuracy: there first token, here answer\)"):
        perturbation_test(demo, "antonym", accuracy="answer", **options)
    # A file of an earlier version has neither column and is found again all the same.
    old = back.drop(columns=["accuracy", "n_first_tokens"])
    old.to_csv(tmp_path / "a.csv", index=False)
    again = perturbation_test(demo, "antonym", **options)
    assert "n_first_tokens" not in again
    assert perturbation_curves(again).layout.annotations


def test_what_counts_as_right_is_checked_and_named(demo: Any) -> None:
    for function in (perturbation_test, patching_sweep):
        with pytest.raises(BadInput, match="found accuracy='all'; give 'first token' or 'answer'"):
            function(demo, "antonym", accuracy="all", **QUIET)
    frame = perturbation_test(demo, "antonym", shots=0, n_test=4, accuracy="answer", **FIRST)
    titles = [a.text for a in perturbation_curves(frame).layout.annotations]
    assert "accuracy (whole answer, greedily)" in titles
    other = perturbation_test(demo, "capitalize", shots=0, n_test=4, **FIRST)
    titles = [a.text for a in perturbation_curves(other).layout.annotations]
    assert "accuracy (answer ranked first)" in titles
    with pytest.raises(BadInput, match=r"two kinds \(answer and first token\); a figure shows one"):
        perturbation_curves(pd.concat([frame, other]))


def test_the_command_line_marks_whole_answers(tmp_path: Any) -> None:
    out = tmp_path / "a.parquet"
    words = ["-t", "antonym", "--shots", "0", "--n-test", "4", "-q", "--accuracy", "answer"]
    small = ["--methods", "index", "--n-rank", "2", "--step", "0.5", "--out", str(out)]
    result = call("perturb", *words, *small, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["accuracy"] == "answer"
    assert found["all_heads"][0]["n_first_tokens"] == 4
    shown = call("perturb", *words, *small)
    assert "accuracy (whole answer, greedily)" in shown.stdout
    assert set(read_results(out)["accuracy"]) == {"answer"}
    patch = ["patch", *words, "--scales", "1", "--n-mean", "3", "--answer-tokens", "1", "--json"]
    cells = json.loads(call(*patch).stdout)
    assert cells["accuracy"] == "answer"
    assert {cell["n_first_tokens"] for cell in cells["cells"]} == {4}
    wrong = call("perturb", "-t", "antonym", "--accuracy", "all")
    assert wrong.exit_code == 2


def test_the_command_line_shows_the_warning(tmp_path: Any) -> None:
    write_digits(tmp_path / "model")
    (tmp_path / "icl").mkdir()
    pairs = [{"input": pair.input, "output": pair.output} for pair in digits_task().pairs]
    (tmp_path / "icl" / "digits.json").write_text(json.dumps(pairs))
    command = ["perturb", "-m", str(tmp_path / "model"), "--source", str(tmp_path), "-t", "digits",
               "--shots", "0", "--methods", "index", "--step", "0.5", "-q"]  # fmt: skip
    shown = call(*command)
    assert "begin with the token ' '" in shown.stderr, shown.output
    assert "--accuracy answer" in shown.stderr


def test_the_paper_is_compared_with_a_warning(tmp_path: Any) -> None:
    (tmp_path / "table13.csv").write_text(
        "table,model,task,kind,n_shots,method,direction,scale,accuracy,note\n"
        "13,GPT2-xl,antonym,icl_same_length,1,original,none,,0.18,\n"
    )
    ours = pd.DataFrame(
        [{"experiment": "patching", "model": "gpt2-xl", "task": "antonym_len_8_1", "kind": "icl",
          "n_shots": 1, "map": "none", "scale": math.nan, "top1": 0.2, "accuracy": "answer"}]
    )  # fmt: skip
    with pytest.warns(RALensWarning, match="marked by the whole answer"):
        compare_with_paper(ours, tmp_path)
    assert patching_sweep_curve(ours).data
