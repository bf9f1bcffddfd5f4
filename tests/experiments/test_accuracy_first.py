"""How the whole model answers is told before all else, once, with a warning where few are right."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ra_lens import load_demo_model, load_task, perturbation_test
from ra_lens.errors import RALensWarning
from ra_lens.experiments import patching_sweep, rank_tasks, runner
from ra_lens.experiments.journal import Journal
from ra_lens.tasks import Task, same_length_sets

CURVES: dict[str, Any] = {"methods": ["index", "random"], "random_orders": 2, "step": 0.5,
                          "directions": ["forward"], "n_rank": 2}  # fmt: skip
SWEEP: dict[str, Any] = {"scales": [-30.0, 1.0], "kinds": ["ra"], "n_mean": 2}
EXPERIMENTS = [(perturbation_test, CURVES), (patching_sweep, SWEEP)]
NAMES = ["antonym", "capitalize"]
FEW = r"the whole model answers less than \.30 of the questions right: "


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_demo_model(device="cpu")


def asked(demo: Any, function: Any, name: str) -> Task:
    """The task of that name, as the experiment asks it."""
    task = load_task(name)
    if function is perturbation_test:
        return task
    every = same_length_sets(task, lambda text: demo.to_tokens(text)[0].tolist())
    return max(every.values(), key=lambda one: len(one.pairs))


def right(demo: Any, task: Task, shots: int) -> float:
    """Share of its first 9 test questions that the model answers right, asked one at a time."""
    prompts = task.split().prompts("test", shots=shots, n=9)
    with torch.no_grad():
        said = [int(demo(demo.to_tokens(prompt.text))[0, -1].argmax()) for prompt in prompts]
    wanted = [int(demo.to_tokens(prompt.answer, prepend_bos=False)[0, 0]) for prompt in prompts]
    return sum(a == b for a, b in zip(said, wanted, strict=True)) / len(prompts)


def two(value: float) -> str:
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else "1.0"


@pytest.mark.parametrize(("function", "options"), EXPERIMENTS, ids=lambda value: str(value)[:20])
def test_it_is_told_a_line_for_each_task_and_few_are_warned_of(
    demo: Any, function: Any, options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []
    few: list[str] = []
    for task in (asked(demo, function, name) for name in NAMES):
        of_each = {k: right(demo, task, k) for k in (0, 5)}
        said = {k: f"{two(share)} with {k} shots" for k, share in of_each.items()}
        told.append(f"Whole model, {task.name}: accuracy {said[0]}, {said[5]}")
        poor = [said[k] for k, share in of_each.items() if share < 0.3]
        few += [f"{task.name} ({', '.join(poor)})"] * bool(poor)
    assert few, "a model that can do all of it shows no warning"
    with pytest.warns(RALensWarning, match=FEW) as caught:
        function(demo, NAMES, shots=[0, 5], n_test=9, **options)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert f"right: {'; '.join(few)}. " in message
    assert "more examples (shots), or another token in front (prepend_bos=, --bos)." in message
    assert ("An area under nothing ranks nothing" in message) == (function is perturbation_test)
    lines = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines()]
    assert [line for line in lines if line.startswith("Whole model")] == told


@pytest.mark.parametrize(("function", "options"), EXPERIMENTS, ids=lambda value: str(value)[:20])
def test_it_comes_first_and_once_for_each_cell(
    demo: Any, function: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    times = [0]
    unit, ask = Journal.unit, runner.ask

    def noted(self: Journal, key: str, compute: Any) -> Any:
        def computed() -> Any:
            done.append(key)
            return compute()

        return unit(self, key, computed)

    def counted(*given: Any, **how: Any) -> Any:
        times[0] += 1
        return ask(*given, **how)

    monkeypatch.setattr(Journal, "unit", noted)
    monkeypatch.setattr(runner, "ask", counted)
    function(demo, NAMES, shots=[0, 1], n_test=3, progress=False, **options)
    whole = "ends" if function is perturbation_test else "none|None"
    cells = [(asked(demo, function, name).name, k) for name in NAMES for k in (0, 1)]
    assert done[:4] == [f"{name}|{k}|{whole}" for name, k in cells]
    assert sum(key.endswith(whole) for key in done) == 4
    # Of each cell: the whole model, with none of the heads beside it, and one order or map a time.
    assert times[0] == 4 * (1 + (3 if function is perturbation_test else 2))


def test_nothing_is_told_of_what_is_known_or_not_marked(
    demo: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def quiet(function: Any, task: str, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return function(demo, task, shots=[5], **options)

    options = {**CURVES, "n_test": 9, "out": tmp_path / "curves.csv"}
    frame = quiet(perturbation_test, "capitalize", **options, progress=False)
    every = frame[frame["share"] == 1.0]
    assert every["top1"].min() >= 0.3
    assert capfd.readouterr().err == ""
    quiet(perturbation_test, "capitalize", **options)  # which reads what is finished
    quiet(rank_tasks, "antonym", methods="index", n_rank=2)
    assert "Whole model" not in capfd.readouterr().err


def test_a_whole_model_is_marked_as_the_experiment_marks(demo: Any) -> None:
    options = {**CURVES, "shots": 0, "n_test": 9, "progress": False}
    for accuracy in ("first token", "answer"):
        with pytest.warns(RALensWarning, match=FEW) as caught:
            frame = perturbation_test(demo, "antonym", accuracy=accuracy, **options)
        share = frame[frame["share"] == 1.0]["top1"].iloc[0]
        assert f"antonym ({two(share)} with 0 shots)" in str(caught[0].message)
    with pytest.warns(RALensWarning, match=FEW) as caught:
        frame = perturbation_test(demo, "antonym", each_question=True, **options)
    every = frame[(frame["share"] == 1.0) & (frame["method"] == "index")]
    assert len(every) == 9
    assert f"antonym ({two(every['top1'].mean())} with 0 shots)" in str(caught[0].message)


def test_lines_go_to_standard_error_as_it_is_when_they_are_told(
    demo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "told").open("w+", encoding="utf-8") as other:
        monkeypatch.setattr(sys, "stderr", other)
        perturbation_test(demo, "capitalize", shots=[5], n_test=3, **CURVES)
        monkeypatch.undo()
        other.seek(0)
        assert "Whole model, capitalize: accuracy " in other.read()
