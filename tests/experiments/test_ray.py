"""Grids on Ray: a cluster of two workers on this machine, killed and failing in every way.

`nox -s ray` runs these, in an environment with Ray. Each worker is a process that imports PyTorch,
so cells are few.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time

import pytest
import torch

from command_line import call
from ra_lens import load_demo_model
from ra_lens.errors import BadInput, RALensWarning, UnfinishedGrid
from ra_lens.experiments import RayEngine, perturbation_test, write_results
from ra_lens.experiments.engines import Request, compute_on_ray
from ra_lens.experiments.grid import read_grid
from ra_lens.heads import ranking_method, registry

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.every_model,
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
QUIET_RAY = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}
SMALL = {"include_dashboard": False, "num_cpus": 2, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster():
    """Ray with two CPUs, so with two workers."""
    before = dict(os.environ)
    os.environ.update(QUIET_RAY)
    import ray

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # its sockets need a short name
    for tries_left in (3, 2, 1, 0):  # a machine that is busy is given 15 seconds to start it
        try:
            ray.init(**SMALL, _temp_dir=folder, logging_level="error", log_to_driver=False)
            break
        except Exception:
            ray.shutdown()
            if not tries_left:
                raise
    yield ray
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def demo():
    return load_demo_model(device="cpu")


def perturbed(model, **options):
    """Two tasks, two numbers of demonstrations, and some methods."""
    options = {"methods": ["ra", "fa", "random"], "progress": False, **options}
    return perturbation_test(
        model, ["antonym", "capitalize"], shots=[0, 1], n_rank=3, n_test=3, step=0.5,
        random_orders=6, **options,
    )  # fmt: skip


def bytes_of(frame, tmp_path):
    path = tmp_path / "bytes.parquet"
    write_results(frame, path)
    data = path.read_bytes()
    path.unlink()
    return data


@pytest.fixture
def method(tmp_path):
    """`method(body)`: a ranking method of the user's own; each call of it is a line of a file."""
    made = []
    log = tmp_path / "calls.log"

    def make(before):
        # Of the script that is run, as a user's is: workers cannot import this file.
        names = {"__name__": "__main__"}
        code = f"""
import os, signal
def scores(context):
    with open({str(log)!r}, "a") as file:
        file.write(context.prompts[0].text.replace(chr(10), " ") + chr(10))
    {before}
    n_layers, n_heads = context.shape
    import torch
    return torch.arange(n_layers * n_heads).reshape(n_layers, n_heads).double() % 7
"""
        exec(code, names)
        ranking_method("mine")(names["scores"])
        made.append("mine")
        return "mine"

    make.calls = lambda: log.read_text().splitlines() if log.exists() else []
    yield make
    for name in made:
        registry._methods.pop(name)


# ---- through Ray as here ------------------------------------------------------------------------


def test_a_cluster_gives_the_bytes_of_this_process(cluster, demo, tmp_path, capfd):
    wanted = perturbed(demo)
    out = tmp_path / "grid"
    found = perturbed(demo, out=out, engine="ray", progress=True)
    assert bytes_of(found, tmp_path) == bytes_of(wanted, tmp_path)
    told = capfd.readouterr().err
    assert "16/16" in told
    assert "running: 1, failed: 0" in told
    assert told.count("Whole model, antonym: accuracy") == 2
    assert len(list(out.glob("[!_]*.parquet"))) == 4 * (2 + 2)  # six random orders, five a piece
    # Nobody is needed, and nobody is asked, where all is finished.
    again = perturbed(demo, out=out, engine=RayEngine(gpus=100))
    assert bytes_of(again, tmp_path) == bytes_of(wanted, tmp_path)


def test_what_is_warned_of_in_a_worker_is_warned_of_here_once(cluster, demo, method):
    name = method("import warnings, ra_lens.errors as e; warnings.warn('few', e.RALensWarning)")
    with pytest.warns(RALensWarning) as caught:
        perturbed(demo, methods=name, engine="ray")
    assert [str(one.message) for one in caught].count("few") == 1


# ---- workers that die, cells that fail ----------------------------------------------------------


def test_the_cell_of_a_worker_that_is_killed_is_computed_again(cluster, demo, method, tmp_path):
    mark = tmp_path / "killed"
    once = f"if not os.path.exists({str(mark)!r}): open({str(mark)!r}, 'x').close(); "
    name = method(f"{once}os.kill(os.getpid(), signal.SIGKILL)")
    found = perturbed(demo, methods=[name, "ra"], engine="ray")
    assert mark.exists()
    calls = method.calls()
    assert len(calls) == 4 + 1  # of four cells one was begun twice
    assert len(set(calls)) == 4
    wanted = perturbed(demo, methods=[name, "ra"])
    assert bytes_of(found, tmp_path) == bytes_of(wanted, tmp_path)


def test_a_cell_that_always_fails_is_told_and_the_rest_is_finished(cluster, demo, method, tmp_path):
    mark, out = tmp_path / "mended", tmp_path / "grid"
    capitals = "context.prompts[0].answer[1].isupper()"
    name = method(
        f"if {capitals} and context.prompts[0].text.count('Q:') == 1 and not "
        f"os.path.exists({str(mark)!r}): raise ValueError('no scores today')"
    )
    with pytest.raises(UnfinishedGrid) as info:
        perturbed(demo, methods=[name, "ra"], out=out, engine="ray")
    assert str(info.value).startswith(
        "1 of 8 cells failed (capitalize, 0 shots, mine: ValueError: no scores today). The others "
        f"are in {out}, and the same call tries these again."
    )
    calls = method.calls()
    assert max(map(calls.count, calls)) == 3  # tried so often, where another worker might help
    assert len(calls) == 3 + 3
    grid = read_grid(out)
    assert len(grid.done()) == 7
    [(cell, failure)] = grid.failures().items()
    assert (cell.task, cell.shots, cell.piece) == ("capitalize", 0, "mine")
    assert "ValueError: no scores today" in failure.traceback
    mark.touch()
    found = perturbed(demo, methods=[name, "ra"], out=out, engine="ray")
    assert len(method.calls()) == 3 + 3 + 1
    wanted = perturbed(demo, methods=[name, "ra"])
    assert bytes_of(found, tmp_path) == bytes_of(wanted, tmp_path)


# Workers cannot import this file, so they are given these functions themselves.
SENT = {"__name__": "__main__", "BadInput": BadInput}
exec(
    """
import os, signal

def double(state, job):
    if job == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return job * 2

def refuse_for_good():
    raise BadInput("another model")
""",
    SENT,
)


def computed(jobs, start=int):
    request = Request(2, 0, 10**6)  # one worker after the other: each takes long to start
    found = compute_on_ray(
        {str(job): job for job in jobs}, start, SENT["double"], engine=RayEngine(), request=request,
        running=lambda n: None,
    )  # fmt: skip
    return dict(found)


def test_a_job_that_kills_its_workers_fails_in_the_end(cluster):
    found = computed(["deadly", 1, 2, 3])
    assert [found[str(n)].result for n in (1, 2, 3)] == [2, 4, 6]
    assert found["deadly"].failure.error.startswith("the worker was lost: ")


def test_workers_that_cannot_start_are_one_error(cluster):
    with pytest.raises(BadInput, match="a worker could not start: BadInput: another model Each l"):
        computed([1, 2], SENT["refuse_for_good"])
    # A function that they cannot import is told with what is missing.
    with pytest.raises(BadInput, match=r"a worker could not start: .*No module named 'test_ray'"):
        computed([1], cells_in)


def test_a_model_that_was_changed_is_not_mixed_with_the_one_loaded(cluster):
    model = load_demo_model(device="cpu")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    with pytest.raises(BadInput, match=r"found another model, .* \(weights_hash: there \w+, here"):
        perturbation_test(
            model, "antonym", methods="index", shots=0, n_rank=1, n_test=1, step=0.5,
            progress=False, engine="ray",
        )  # fmt: skip


# ---- a driver that is killed --------------------------------------------------------------------

COMMAND = ["perturb", "-t", "antonym", "capitalize", "--shots", "0", "1", "2", "3", "--methods",
           "ra", "index", "random", "--random-orders", "6", "--n-rank", "3", "--n-test", "3",
           "--step", "0.5", "-q"]  # fmt: skip


def until(what, seconds=200):
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < seconds, "nothing came of it"
        time.sleep(0.02)


def cells_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("[!_.]*.parquet")}


def test_a_driver_that_is_killed_goes_on_with_what_is_finished(cluster, tmp_path, monkeypatch):
    """First with the cluster that is there, then with one that the command starts itself."""
    folder, grid = tempfile.mkdtemp(prefix="ray", dir="/tmp"), tmp_path / "grid"
    monkeypatch.setenv("RAY_TMPDIR", folder)
    command = [sys.executable, "-m", "ra_lens.cli", *COMMAND, "--engine", "ray", "-o", str(grid)]
    address = cluster.get_runtime_context().gcs_address
    first = subprocess.Popen([*command, "--address", address])
    until(lambda: len(cells_in(grid)) >= 2 or first.poll() is not None)
    first.kill()
    first.wait()
    finished = cells_in(grid)
    assert 2 <= len(finished) < 32
    for _ in range(4):
        again = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if "cannot reach a Ray cluster" not in again.stderr:  # a machine that is busy, as above
            break
    assert again.returncode == 0, again.stderr
    every = cells_in(grid)
    assert len(every) == 32
    assert {path: when for path, when in every.items() if path in finished} == finished
    whole, merged = tmp_path / "whole.parquet", tmp_path / "merged.parquet"
    assert call("results", str(grid), "--merge", str(merged)).exit_code == 0
    assert call(*COMMAND, "-o", str(whole)).exit_code == 0
    assert merged.read_bytes() == whole.read_bytes()
    shutil.rmtree(folder, ignore_errors=True)
