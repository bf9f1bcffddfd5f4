"""Functions of one's own, told apart by what they compute with, alike in every process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch

from ra_lens.errors import BadInput
from ra_lens.experiments import head_effect_table
from ra_lens.experiments.facts import methods_facts
from ra_lens.experiments.own_code import Untold, code_hash
from ra_lens.heads import one_run_method, ranking_method, registry
from ra_lens.heads.gradients import michel_scores, nap_ig_scores
from tiny_models import KINDS
from tiny_questions import TASK


@pytest.fixture
def own(monkeypatch):
    """Methods that are registered here are gone afterwards."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


SOURCE = """
STEPS, NAMES, ROWS = 5, {"b", "a"}, [1, 2]

def helped(x):
    return x + STEPS

def mine(x, power=2, *, least=0):
    def each(y):
        return helped(y) if y in {"one", "two", 3} else [z**power for z in ROWS]

    return sorted(map(each, NAMES), key=lambda one: (one, x))

found = mine
"""


def made(source=SOURCE, **names):
    """The function `found` of some source, made anew."""
    space = dict(names)
    exec(source, space)
    return space["found"]


def test_a_function_that_is_made_again_is_the_same():
    assert code_hash(made()) == code_hash(made())


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("x + STEPS", "x - STEPS"),
        ("STEPS, NAMES, ROWS = 5", "STEPS, NAMES, ROWS = 6"),
        ("power=2", "power=3"),
        ("least=0", "least=1"),
        ('"two", 3', '"two", 4'),
        ("(one, x)", "(x, one)"),
        ("{\"b\", \"a\"}", "{\"b\", \"c\"}"),
        ("[1, 2]", "[2, 1]"),
    ],
)  # fmt: skip
def test_a_function_that_computes_with_something_else_is_another(was, now):
    assert was in SOURCE
    assert code_hash(made()) != code_hash(made(SOURCE.replace(was, now)))


@dataclass
class Bounds:
    low: float
    high: float


def around(value):
    def mine(context):
        return context, value

    return mine


def calling_itself(least):
    def mine(n):
        return least if n <= least else mine(n - 1)

    return mine


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (True, 1),
        (None, 0),
        ("ra", b"ra"),
        ([3, 4], (3, 4)),
        ({"a": [1]}, {"a": [2]}),
        ({0, 8}, {0, 16}),
        (torch.arange(2000.0), torch.arange(2000.0).where(torch.arange(2000) != 900, 0.0)),
        (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16)),
        (np.arange(3), np.arange(3.0)),
        (np.array(["a", None], dtype=object), np.array(["b", None], dtype=object)),
        (torch.relu, torch.sigmoid),
        (torch.float32, torch.float16),
        (len, sum),
        (Bounds(0.0, 1.0), Bounds(0.0, 2.0)),
        (partial(pow, 2), partial(pow, 3)),
        (partial(max, key=len), partial(max, key=sum)),
        (around(1), around(2)),
        (torch.nn.Linear, torch.nn.Identity),
        (np, torch),
    ],
)  # fmt: skip
def test_what_is_around_a_function_counts(one, other):
    assert code_hash(around(one)) == code_hash(around(one))
    assert code_hash(around(one)) != code_hash(around(other))
    assert code_hash(partial(pow, one)) != code_hash(partial(pow, other))


def test_values_of_its_file_count_and_its_docstring_does_not():
    source = (
        'def found(x):\n    """Weigh {}."""\n    return helped(x) * W\n\ndef helped(x): return x'
    )

    def weighing(weights, said="it"):
        return code_hash(made(source.format(said), W=weights))

    ramp = torch.arange(8.0)
    for one, other in ((ramp, ramp.flip(0)), ({"w": ramp}, {"w": ramp + 1}), (np.ones(2), None)):
        assert weighing(one) == weighing(one, said="them") != weighing(other)
    assert weighing(torch) == weighing(torch)  # by its name
    with pytest.raises(Untold, match="at 0x"):
        weighing(object())
    one, other = made(), made()
    one.weights, other.weights = ramp, ramp.flip(0)
    assert len({code_hash(one), code_hash(other), code_hash(made())}) == 3


def test_values_that_are_equal_are_told_alike():
    assert code_hash(around({0, 8})) == code_hash(around({8, 0}))
    assert code_hash(around(torch.ones(()))) == code_hash(around(torch.ones(())))
    assert code_hash(calling_itself(3)) == code_hash(calling_itself(3))
    assert code_hash(calling_itself(3)) != code_hash(calling_itself(4))
    probe, copy = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    copy.load_state_dict(probe.state_dict())
    assert code_hash(around(probe)) == code_hash(around(copy))
    with torch.no_grad():
        copy.weight[1, 1] += 1
    assert code_hash(around(probe)) != code_hash(around(copy))


@pytest.mark.parametrize("value", [object(), iter([1]), [lambda: 0, {"a": object()}]])
def test_what_does_not_show_itself_is_told_of(value):
    with pytest.raises(Untold, match="at 0x"):
        code_hash(around(value))


@pytest.mark.every_model
def test_every_process_says_the_same():
    said = {code_hash(made()), code_hash(around(1))}
    script = (
        f"source = {SOURCE!r}\nspace = {{}}\nexec(source, space)\n"
        "from ra_lens.experiments.own_code import code_hash\n"
        "print(code_hash(space['found']))\n"
    )
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        )  # fmt: skip
        assert run.stdout.strip() in said


# ---- methods ------------------------------------------------------------------------------------


def facts(name="mine", out="a.parquet"):
    [found] = methods_facts([name], out)
    return found


def test_methods_that_read_something_else_are_others(own):
    seen = []
    for steps in (2, 30):
        register = one_run_method("mine", vectors=["z"], corrupted=True, steps=steps, replace=True)
        register(nap_ig_scores)
        seen.append(facts())
    assert [one["steps"] for one in seen] == [2, 30]
    assert seen[0]["code"] == seen[1]["code"]
    for backward in ("exact", "relp"):
        register = one_run_method("mine", vectors=["z", "z_grad"], backward=backward, replace=True)
        register(michel_scores)
        seen.append(facts())
    for twins in (False, True):
        ranking_method("mine", twins=twins, replace=True)(around(3))
        seen.append(facts())
    assert len({str(one) for one in seen}) == 6


def test_built_in_methods_are_what_they_were_until_they_are_replaced(own):
    assert facts("nap") == {"name": "nap", "split": "train", "random": False}
    one_run_method("nap", vectors=["z"], corrupted=True, replace=True)(nap_ig_scores)
    assert facts("nap")["steps"] == 1


def test_results_of_a_method_that_cannot_be_told_go_to_no_file(own, shared, tmp_path):
    class Mine:
        def __call__(self, context):
            return torch.zeros(context.shape)

    ranking_method("mine")(Mine())
    options = {"methods": "mine", "ablations": (), "shots": 0, "n_rank": 2, "progress": False}
    model, out = shared("gpt2", KINDS[0]), tmp_path / "a.parquet"
    told = r"found method 'mine', which computes with <.*Mine object at 0x.* and out=: .*Register"
    with pytest.raises(BadInput, match=told):
        head_effect_table(model, TASK, out=out, **options)
    assert not list(tmp_path.iterdir())
    assert set(head_effect_table(model, TASK, **options).score_mine) == {0.0}
    ranking_method("mine", replace=True)(around(3))
    assert facts()["code"] == code_hash(around(3))
