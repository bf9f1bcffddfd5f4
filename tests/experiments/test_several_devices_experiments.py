"""Experiments on a model over two devices give the numbers of the model on one."""

from __future__ import annotations

import numpy as np
import pytest

from ra_lens.experiments import (
    faithfulness_test,
    knockout_test,
    patching_ablations,
    patching_sweep,
    perturbation_test,
    rank_tasks,
)
from ra_lens.tasks import Pair, Task
from several_devices import CASES
from tiny_models import KINDS

TASK = Task(
    name="toy",
    kind="icl",
    pairs=tuple(Pair(f"w{i}", f"w{33 - i}") for i in range(3, 31)),
    before_subject="w30 ",
    after_subject=" w31",
    separator=" ",
)
FEW = {"n_rank": 4, "n_test": 5, "shots": [0, 1], "progress": False, "batch_size": 4}
EXPERIMENTS = {
    "perturb": lambda model, **few: perturbation_test(
        model, TASK, methods=["ra", "cm1", "random"], step=0.25, random_orders=2, **few
    ),
    "perturb, resample": lambda model, **few: perturbation_test(
        model, TASK, methods=["ra"], step=0.5, others="resample", **few
    ),
    "perturb, shared": lambda model, **few: perturbation_test(
        model, TASK, methods=["ra"], step=0.5, demonstrations="shared", **few
    ),
    "patch": lambda model, n_rank, **few: patching_sweep(
        model, TASK, scales=[-3.0, 1.0], at_least=12, n_mean=n_rank, **few
    ),
    "ablate": lambda model, n_rank, **few: patching_ablations(
        model, TASK, at_least=12, n_mean=n_rank, from_shots=1, **(few | {"shots": 0})
    ),
    "rank": lambda model, n_test, **few: rank_tasks(model, TASK, methods=["ra", "fa"], **few),
    "knockout": lambda model, n_rank, **few: knockout_test(model, TASK, **few),
    "faithfulness": lambda model, n_test, **few: faithfulness_test(
        model, TASK, methods=["ra", "atp"], ks=[2, 4], **few
    ),
}
SOME = [case for case in CASES if case in (("gpt2", KINDS[0]), ("llama", KINDS[-1]))]


@pytest.mark.every_model
@pytest.mark.filterwarnings("ignore::ra_lens.errors.RALensWarning")
@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize(("arch", "kind"), SOME)
def test_the_numbers_are_those_of_one_device(arch, kind, experiment, two):
    run = EXPERIMENTS[experiment]
    found, wanted = (run(load(arch, kind), **FEW) for load in (two.over, two.alone))
    assert list(found) == list(wanted) and len(found) == len(wanted) > 3
    for name in wanted:
        if name in ("device", "settings_hash", "seconds"):
            continue
        if wanted[name].dtype.kind == "f":
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-3, atol=1e-4)
        else:
            assert found[name].astype(str).tolist() == wanted[name].astype(str).tolist(), name
