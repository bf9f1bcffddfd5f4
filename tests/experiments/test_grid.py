"""Grids in folders: cells one by one, shared among processes, and their table."""

from __future__ import annotations

import gc
import json
import re
import socket
import subprocess
import sys
import types
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import fsspec
import pandas as pd
import pytest
import torch

from command_line import call, refused_line
from ra_lens import load_demo_model, load_model
from ra_lens.errors import BadFile, BadInput, NotEnoughMemory, RALensWarning, UnfinishedGrid
from ra_lens.experiments import (
    RayEngine,
    knockout_test,
    patching_sweep,
    perturbation_test,
    rank_tasks,
    read_results,
    write_results,
)
from ra_lens.experiments.engines import Request, compute_on_ray, read_engine
from ra_lens.experiments.grid import Folder, open_grid, read_grid
from ra_lens.experiments.grid_run import gpus_of_worker
from ra_lens.heads import ranking_method, registry
from ra_lens.memory import worker_memory
from ra_lens.model import as_lens
from ra_lens.model.source import source_of
from ra_lens.questions import read_questions
from refused import refused
from tiny_models import ANY_KIND, every_model
from toys import knowing_task, load_toy

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return load_toy(tmp_path_factory.mktemp("toy"), ANY_KIND[0])


@pytest.fixture
def counted():
    """Name of a ranking method, and the prompts that it ranked heads on."""

    class Counted:  # a list that grows would make another method of it
        asked: ClassVar[list[str]] = []
        refusing: ClassVar[set[str]] = set()

    @ranking_method("counted")
    def scores(context):
        Counted.asked.append(context.prompts[0].text)
        if Counted.asked[-1] in Counted.refusing:
            raise ValueError("no scores today")
        return torch.tensor([[1.0, 2.0]])

    yield "counted", Counted.asked, Counted.refusing
    registry._methods.pop("counted")


def perturbed(model, out, **options):
    """Two tasks and three pieces of each: 6 cells, or 12 with two numbers of demonstrations."""
    one = knowing_task("one")
    other = replace(one, name="other", pairs=one.pairs[::-1])
    options = {"methods": ["ra", "random"], "random_orders": 7, "shots": 0, **options}
    return perturbation_test(
        model, [one, other], n_rank=2, n_test=2, step=0.5, out=out, **QUIET, **options
    )


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("_"))


# ---- the same bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["parquet", *every_model("csv")])
def test_a_folder_gives_the_bytes_of_a_file(toy, tmp_path, ending):
    wanted, found = tmp_path / f"file.{ending}", tmp_path / f"merged.{ending}"
    in_one_piece = perturbed(toy, wanted, shots=[0, 2])
    frame = perturbed(toy, tmp_path / "grid", shots=[0, 2])
    write_results(frame, found)
    assert found.read_bytes() == wanted.read_bytes()
    assert len(names(tmp_path / "grid")) == 12
    found.unlink()
    result = call("results", str(tmp_path / "grid"), "--merge", str(found))
    assert result.exit_code == 0, result.output
    assert found.read_bytes() == wanted.read_bytes()
    rank_tasks(toy, knowing_task(), methods="index", shots=0, n_rank=2, out=tmp_path / "ranks")
    mixed = call(
        "results", *(str(tmp_path / at) for at in ("grid", "ranks")), "--merge", str(found)
    )
    assert "grids of perturbation and ranking; a table has the rows of one" in mixed.output
    # Whoever reads the folder itself finds the same rows.
    rows = pd.read_parquet(tmp_path / "grid")
    assert sorted(rows.logit_diff) == sorted(in_one_piece.logit_diff)
    assert list(rows) == list(in_one_piece)


EXPERIMENTS = {
    "every question": lambda model, **to: perturbation_test(
        model, "antonym", methods=["cm2", "fa", "ra", "random"], shots=[0, 1], n_rank=3, n_test=3,
        step=0.5, random_orders=2, each_question=True, prepend_bos=False, **to,
    ),
    "answers": lambda model, **to: perturbation_test(
        model, "antonym", methods="ra", shots=2, n_rank=3, n_test=3, step=0.5,
        accuracy="answer", demonstrations="shared", prepend_bos="<|endoftext|>", **to,
    ),
    "patching": lambda model, **to: patching_sweep(
        model, "capitalize", scales=[-30, 1], shots=[0, 1], n_mean=3, n_test=3, **to,
    ),
    "scales found": lambda model, **to: patching_sweep(
        model, "capitalize", scales="best", kinds=["ra", "shuffled"], shots=[0, 1], n_mean=3,
        n_test=3, each_question=True, **to,
    ),
    "ranking": lambda model, **to: rank_tasks(
        model, ["antonym", "capitalize"], methods=["ra", "cm1", "cm2", "fa", "random"],
        shots=[0, 1], n_rank=3, **to,
    ),
    "knockouts": lambda model, **to: knockout_test(
        model, "antonym", shots=[0, 1], n_test=2, steps=[1], ends=True, **to
    ),
}  # fmt: skip


@pytest.mark.every_model
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_gives_the_same_bytes(name, tmp_path):
    model = load_demo_model(device="cpu")
    run = partial(EXPERIMENTS[name], model, **QUIET)
    run(out=tmp_path / "file.parquet")
    write_results(run(out=tmp_path / "grid"), tmp_path / "merged.parquet")
    merged = (tmp_path / "merged.parquet").read_bytes()
    assert merged == (tmp_path / "file.parquet").read_bytes()


# ---- what is finished stays ---------------------------------------------------------------------


def test_what_is_finished_is_not_computed_again(toy, tmp_path, counted):
    method, asked, _ = counted
    out = tmp_path / "grid"
    wanted = perturbed(toy, out, methods=[method])
    assert len(asked) == 2
    cells = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    gone = out / names(out)[1]
    gone.unlink()
    (out / ".half").write_bytes(b"PAR1 of a process that was killed")
    again = perturbed(toy, out, methods=[method], batch_size=3)
    assert len(asked) == 3
    rest = ["batch_size"]
    pd.testing.assert_frame_equal(again.drop(columns=rest), wanted.drop(columns=rest))
    assert sorted(set(again.batch_size)) == [3, 64]  # each row says how it was made
    changed = [path for path, when in cells.items() if path.stat().st_mtime_ns != when]
    assert changed == [gone]


def test_parts_share_a_grid_and_no_cell_is_in_two(toy, tmp_path, counted):
    method, asked, _ = counted
    options = {"methods": [method, "random"]}
    wanted, out, sizes = perturbed(toy, None, **options), tmp_path / "grid", []
    asked.clear()
    for i in range(1, 9):
        before = set(names(out)) if out.exists() else set()
        frame = perturbed(toy, out, part=f"{i}/8", **options)
        new = set(names(out)) - before
        sizes.append(len(new))
        assert len(frame) == sum(len(pd.read_parquet(out / name)) for name in new)
    assert sorted(sizes) == [0, 0, 1, 1, 1, 1, 1, 1]  # of 6, each once
    found = perturbed(toy, out, **options)
    assert len(asked) == 2
    pd.testing.assert_frame_equal(found, wanted)
    # Parts are of like size.
    grid = read_grid(out)
    assert [len(grid.share((i, 4))) for i in (1, 2, 3, 4)] == [2, 2, 1, 1]
    shares = [cell for i in (1, 2, 3, 4) for cell in grid.share((i, 4))]
    assert sorted(cell.name for cell in shares) == sorted(cell.name for cell in grid.cells)


@pytest.mark.every_model
def test_an_address_is_a_folder_too(toy, tmp_path):
    wanted = perturbed(toy, None)
    fs, where = fsspec.filesystem("memory"), "memory://grids/one"
    try:
        perturbed(toy, where, part="2/3")
        there = fs.ls("/grids/one", detail=False)
        assert len(there) == 1 + 2
        times = {path: fs.created(path) for path in there}
        pd.testing.assert_frame_equal(perturbed(toy, where), wanted)
        assert {path: fs.created(path) for path in there} == times
        assert len(fs.ls("/grids/one")) == 1 + 6
        result = call("results", where, "--merge", str(tmp_path / "merged.csv"))
        assert result.exit_code == 0, result.output
        write_results(wanted, tmp_path / "wanted.csv")
        assert (tmp_path / "merged.csv").read_bytes() == (tmp_path / "wanted.csv").read_bytes()
    finally:
        fs.rm("/grids", recursive=True)
    with pytest.raises(BadInput, match=r"cannot use the address nosuch://x: .* that fsspec reads"):
        perturbed(toy, "nosuch://x")


# ---- what fails ---------------------------------------------------------------------------------


def test_a_cell_that_fails_is_told_and_the_rest_is_finished(toy, tmp_path, counted):
    method, asked, refusing = counted
    out = tmp_path / "grid"
    perturbed(toy, None, methods=[method])
    refusing.add(asked[1])
    asked.clear()
    with pytest.raises(UnfinishedGrid) as info:
        perturbed(toy, out, methods=[method, "index"])
    assert str(info.value) == (
        "1 of 4 cells failed (other, 0 shots, counted: ValueError: no scores today). The others "
        f"are in {out}, and the same call tries these again. ra-lens results {out} lists them; "
        "with --partial --merge FILE it makes the table without them."
    )
    assert len(asked) == 2
    [(cell, failure)] = read_grid(out).failures().items()
    assert (cell.task, cell.shots, cell.piece) == ("other", 0, "counted")
    assert failure.traceback.splitlines()[-1] == "ValueError: no scores today"
    told = call("results", str(out))
    assert told.exit_code == 4
    assert (
        told.stdout.replace("\n", " ").split()
        == (
            f"{out}: perturbation of {as_lens(toy).name}: 3 of 4 cells done, 1 failed "
            "failed: other, 0 shots, counted: ValueError: no scores today"
        ).split()
    )
    refusing.clear()
    asked.clear()
    frame = perturbed(toy, out, methods=[method, "index"])
    assert len(asked) == 1
    assert len(frame) == 24
    assert read_grid(out).failures() == {}
    assert not [path for path in out.iterdir() if path.name.startswith("_failed")]


def test_without_a_folder_what_the_others_gave_is_lost(monkeypatch):
    """Only Ray computes cells one by one where there is no folder."""
    from ra_lens.experiments.grid import Failure, GridCell
    from ra_lens.experiments.grid_run import _failures

    cells = {GridCell("t", n, "", str(n)): Failure(f"E: {n}") for n in range(5)}
    assert _failures(cells, 9, None) == (
        "5 of 9 cells failed (t, 0 shots: E: 0; t, 1 shot: E: 1; t, 2 shots: E: 2; and 2 more). "
        "What the others gave is lost; with out=FOLDER it is kept."
    )


def test_warnings_of_cells_are_given_once(toy, tmp_path):
    @ranking_method("warning")
    def scores(context):
        import warnings

        warnings.warn("heads are few", RALensWarning, stacklevel=1)
        return torch.tensor([[1.0, 2.0]])

    try:
        with pytest.warns(RALensWarning) as caught:
            perturbed(toy, tmp_path / "grid", methods="warning")
    finally:
        registry._methods.pop("warning")
    told = [str(one.message) for one in caught]
    assert told.count("heads are few") == 1


@pytest.mark.every_model
def test_the_commands_share_a_grid_and_tell_how_far_it_is(tmp_path, monkeypatch, toy):
    monkeypatch.setattr("ra_lens.cli.session.load", lambda *a, **k: toy)
    monkeypatch.setattr("ra_lens.cli.setup.Setup.tasks", lambda _: [knowing_task()])
    out, table, whole = (str(tmp_path / name) for name in ("grid", "t.parquet", "w.parquet"))
    command = ["perturb", "-t", "three-on", "--shots", "0", "1", "--methods", "ra", "index"]
    command += ["--n-rank", "2", "--n-test", "2", "--step", "0.5", "-q", "-o"]
    first = call(*command, out, "--part", "1/2", "--json")
    assert first.exit_code == 0, first.output
    [grid] = json.loads(first.stdout)["grids"]
    done = [name.partition(".")[0] for name in names(out)]
    every = {cell.hash: cell.name for cell in read_grid(out).cells}
    assert sorted(every.values()) == [
        f"three-on, {shots}, {method}" for shots in ("0 shots", "1 shot")
        for method in ("index", "ra")
    ]  # fmt: skip
    missing = [name for key, name in every.items() if key not in done]
    assert grid == {
        "folder": out, "experiment": "perturbation", "model": as_lens(toy).name, "cells": 4,
        "done": 2, "failed": {}, "missing": missing,
    }  # fmt: skip
    told = call("results", out, "--merge", table)
    assert told.exit_code == 4
    assert told.stdout.count("missing: ") == 2
    assert "cells are missing or failed. Give the commands that compute them" in told.stderr
    assert not Path(table).exists()
    some = call("results", out, "--merge", table, "--partial")
    assert some.exit_code == 4
    assert some.stdout.endswith(f"Results: {table}\n")
    assert len(pd.read_parquet(table)) == 12
    assert call(*command, whole).exit_code == 0
    # A table without some cells is not taken for that of a run that has ended.
    assert "other settings" in refused_line(*command, table)
    Path(table).unlink()
    assert call(*command, out, "--part", "2/2").exit_code == 0
    assert call("results", out, "--merge", table, "--partial").exit_code == 0
    assert Path(table).read_bytes() == Path(whole).read_bytes()
    shown = call(*command, out)
    assert shown.stdout == call(*command, table).stdout.replace(table, out)
    twice = call("results", out, out, "--merge", str(tmp_path / "both.csv"), "--json")
    assert len(json.loads(twice.stdout)["grids"]) == 2
    assert len(pd.read_csv(tmp_path / "both.csv")) == 2 * len(pd.read_parquet(whole))


def test_a_command_whose_cells_fail_exits_with_4(toy, tmp_path, monkeypatch, counted):
    method, asked, refusing = counted
    monkeypatch.setattr("ra_lens.cli.session.load", lambda *a, **k: toy)
    monkeypatch.setattr("ra_lens.cli.setup.Setup.tasks", lambda _: [knowing_task()])
    refusing.update(pair.input for pair in knowing_task().pairs)
    command = ["rank", "-t", "three-on", "--shots", "0", "--methods", method, "index", "-q"]
    failed = call(*command, "--n-rank", "1", "-o", str(tmp_path / "grid"))
    assert (failed.exit_code, failed.stdout) == (4, "")
    assert failed.stderr.startswith("error: 1 of 2 cells failed (three-on, 0 shots, counted: Val")
    refusing.clear()
    assert call(*command, "--n-rank", "1", "-o", str(tmp_path / "grid")).exit_code == 0
    assert len(asked) == 2


@pytest.mark.every_model
def test_processes_that_share_a_grid_compute_no_cell_twice(tmp_path):
    """As a Slurm array starts them, at once."""
    command = ["perturb", "-t", "antonym", "capitalize", "--shots", "0", "1", "--methods", "ra",
               "index", "random", "--random-orders", "6", "--n-rank", "3", "--n-test", "3",
               "--step", "0.5"]  # fmt: skip
    grid, whole, merged = (str(tmp_path / name) for name in ("grid", "w.parquet", "m.parquet"))
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "ra_lens.cli", *command, "-o", grid, "--part", f"{i}/3"],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for i in (1, 2, 3)
    ]  # fmt: skip
    told = [one.communicate(timeout=300)[1] for one in started]
    assert [one.returncode for one in started] == [0, 0, 0], told
    computed = 0
    for text in told:
        counts = re.findall(r"(\d+)/(\d+) \[", text)
        assert counts[0][0] == "0"  # nobody had done any of its cells
        assert counts[-1][0] == counts[-1][1]
        computed += int(counts[-1][1])
    assert computed == len(names(grid)) == 16
    assert call("results", grid, "--merge", merged).exit_code == 0
    assert call(*command, "-q", "-o", whole).exit_code == 0
    assert Path(merged).read_bytes() == Path(whole).read_bytes()


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.fixture
def ray_seems_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))


def test_without_ray_its_engine_says_what_to_install(toy, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    for engine in ("ray", RayEngine()):
        with pytest.raises(BadInput, match=r"Install it: pip install 'ra-lens\[ray\]'; or leave"):
            perturbed(toy, None, engine=engine)
    said = refused_line("rank", "-t", "antonym", "--engine", "ray", "-q")
    assert "Ray is not installed. Install it: pip install 'ra-lens[ray]'" in said


def test_wrong_engines_and_parts_are_refused(toy, tmp_path, ray_seems_there):
    run = partial(perturbed, toy, tmp_path / "grid")
    for options, message in [
        ({"engine": "mpi"}, r"found engine='mpi', which is no RayEngine; give 'local' or 'ray'"),
        ({"part": "0/2"}, r"found part='0/2'; give which of how many, such as '1/8' to '8/8'"),
        ({"part": "3/2"}, r"found part='3/2'"),
        ({"part": "1/2", "engine": "ray"}, r"found part= and engine='ray', which splits a grid"),
        ({"engine": "ray"}, r"a model that ra_lens did not load by a name or from a folder"),
    ]:
        refused(run, options, message)
    with pytest.raises(BadInput, match=r"found part='1/2' and out=None, which is no folder\. Give"):
        perturbed(toy, None, part="1/2")
    with pytest.raises(BadInput, match=r"found engine='ray' and out='.*x\.csv', which is no"):
        perturbed(toy, tmp_path / "x.csv", engine="ray")
    assert list(tmp_path.iterdir()) == []
    for words, message in [
        (["--part", "1/2"], "found part='1/2' and out=None"),
        (["--address", "auto"], "found --address auto without --engine ray"),
        (
            ["--part", "1/2", "-o", str(tmp_path / "new"), "--figure", "x.html"],
            "--figure with --part",
        ),
    ]:
        assert message in refused_line("perturb", "-t", "antonym", "-q", *words)


def test_how_many_rows_fit_is_no_matter_of_the_results(toy, tmp_path, counted, monkeypatch):
    method, asked, _ = counted
    run = partial(perturbed, toy, methods=[method])
    wanted = run(tmp_path / "grid")
    (tmp_path / "grid" / names(tmp_path / "grid")[1]).unlink()
    before = len(asked)
    mixed = run(tmp_path / "grid", batch_size="auto")  # goes on with it
    assert len(asked) == before + 1
    rest = ["batch_size"]
    pd.testing.assert_frame_equal(mixed.drop(columns=rest), wanted.drop(columns=rest))
    assert set(mixed.batch_size) == {64, "auto"}
    for name in ("mixed.parquet", "mixed.csv"):
        write_results(mixed, tmp_path / name)
        assert list(read_results(tmp_path / name).batch_size) == list(mixed.batch_size)
    files = set()
    for free in (10**9, 1, None):  # machines of which one has room for a row
        monkeypatch.setattr("ra_lens.fitting.free_memory", lambda device, free=free: free)
        out = tmp_path / f"{free}.parquet"
        run(out, batch_size="auto")
        files.add(out.read_bytes())
    assert len(files) == 1
    assert set(read_results(out).batch_size) == {"auto"}


@pytest.mark.every_model
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_as_many_rows_as_fit(name, tmp_path, monkeypatch):
    model = load_demo_model(device="cpu")
    run = partial(EXPERIMENTS[name], model, **QUIET)
    wanted = run()
    for free in (2 * 10**7, 10**10):
        monkeypatch.setattr("ra_lens.fitting.free_memory", lambda device, free=free: free)
        found = run(batch_size="auto")
        pd.testing.assert_frame_equal(
            found.drop(columns=["batch_size", "seconds"], errors="ignore"),
            wanted.drop(columns=["batch_size", "seconds"], errors="ignore"),
            rtol=1e-3, atol=1e-4,
        )  # fmt: skip


def test_workers_of_one_memory_do_not_each_take_it_all(folder, ray_seems_there):
    model = load_model(folder("gpt2"), kind=ANY_KIND[0], device="cpu")
    given = {"engine": "ray", "batch_size": "auto"}
    with pytest.raises(BadInput, match=r"found batch_size='auto' with engine='ray' and workers"):
        perturbed(model, None, **given)


def test_hooks_do_not_go_to_workers(folder, ray_seems_there):
    model = load_model(folder("gpt2"), kind=ANY_KIND[0])
    name = as_lens(model).sites[0].pattern_name
    with (
        model.hooks(fwd_hooks=[(name, lambda value, hook: value)]),
        pytest.raises(BadInput, match="which workers of Ray do not have"),
    ):
        perturbed(model, None, engine="ray")


def test_folders_of_other_settings_and_of_none_are_refused(toy, tmp_path):
    out = tmp_path / "grid"
    perturbed(toy, out, part="1/9")
    before = {path: path.read_bytes() for path in out.iterdir()}
    wanted = r"the cells of a run with other settings \(random_orders: there 7, here 8\)\. Repeat"
    with pytest.raises(BadInput, match=wanted):
        perturbed(toy, out, random_orders=8)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(BadFile, match=r"holds no grid \(it has no _grid\.json\)"):
        read_grid(tmp_path)
    assert "holds no grid" in refused_line("results", str(tmp_path / "nowhere"))
    facts = json.loads((out / "_grid.json").read_text())
    for content, message in [
        ("[]", "is not that of a grid"),
        ("{", "is not that of a grid"),
        ('{"ra_lens_grid": 1}', "is not that of a grid"),
        (json.dumps({**facts, "ra_lens_grid": 2}), "is a grid of format 2; this ra_lens writes 1"),
    ]:
        (out / "_grid.json").write_text(content)
        with pytest.raises(BadFile, match=message):
            perturbed(toy, out)
    (out / "_grid.json").write_text(json.dumps(facts))
    cell = out / names(out)[0]
    cell.write_bytes(b"PAR1 and no more")
    told = rf"{re.escape(str(cell))} cannot be read as a table: .* Delete it: the same call"
    with pytest.raises(BadFile, match=told):
        perturbed(toy, out, part="1/9")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(BadInput, match=r"must end in \.parquet or \.csv"):
        perturbed(toy, tmp_path / "file")


@pytest.mark.parametrize("disk", ["links", "no links", "memory"])
def test_of_two_runs_that_begin_a_folder_at_once_one_is_refused(disk, tmp_path, monkeypatch):
    out = f"memory://{tmp_path.name}/grid" if disk == "memory" else f"{tmp_path}/grid"
    if disk == "no links":
        monkeypatch.setattr("os.link", None)
    first, other, again = (
        open_grid(out, {"experiment": "perturbation", "seed": seed}, [("antonym", 0, "ra")])
        for seed in (1, 2, 1)
    )
    # Both have looked, and there was nothing.
    looked = iter([[], []])
    monkeypatch.setattr(Folder, "names", lambda folder: next(looked))
    first.begin()
    told = r"holds the cells of a run with other settings \(seed: there 1, here 2\)\. Repeat"
    with pytest.raises(BadInput, match=told):
        other.begin()
    monkeypatch.undo()
    again.begin()
    assert read_grid(out).settings["seed"] == 1
    assert first.folder.names() == ["_grid.json"]


def test_a_folder_that_cannot_be_written_is_one_error(toy, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(BadInput, match=r"cannot write .*file/grid/_grid\.json: .*Give a folder"):
        perturbed(toy, f"{tmp_path}/file/grid")


# ---- what workers are given ---------------------------------------------------------------------


def test_a_model_is_loaded_again_as_it_was(folder, tmp_path, monkeypatch):
    where = folder("gpt2")
    monkeypatch.chdir(where.parent)
    model = load_model(where.name, kind=ANY_KIND[0], dtype=torch.float64)
    source = source_of(model)
    assert source is not None
    monkeypatch.chdir(tmp_path)
    again = source.load("cpu")
    for (name, one), (_, other) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert as_lens(again).kind == as_lens(model).kind
    assert next(again.parameters()).dtype == torch.float64
    demo = load_demo_model(device="cpu")
    assert source_of(demo).load("cpu").cfg.model_name == "ra-lens-demo"
    alive = weakref.ref(demo)
    del demo
    gc.collect()
    assert alive() is None  # what is remembered of a model does not keep it


def test_the_memory_of_a_worker_by_hand(fresh):
    model = fresh("gpt2", ANY_KIND[0])
    lens = as_lens(model)
    texts = ["w5 w6 w7", "w5 w6 w7 w8 w9"]
    prompts = read_questions(lens, [_prompt(text) for text in texts], prepend_bos=True).prompts
    n_layers, heads, width = len(lens.sites), lens.sites.n_heads[0], lens.d_model
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    tokens = 6
    layer = heads * tokens**2 + tokens * (5 * width + 4 * width)
    assert worker_memory(lens, prompts, batch_size=10) == (
        weights + 10 * 4 * n_layers * layer + 2**30
    )


def _prompt(text):
    from ra_lens.tasks import Prompt

    return Prompt(text, " w3")


def test_a_worker_gets_as_many_gpus_as_the_model_given_lies_on(two):
    over, alone = as_lens(two.over("gpt2", ANY_KIND[0])), as_lens(two.alone("gpt2", ANY_KIND[0]))
    assert gpus_of_worker(over, RayEngine(), "cuda") == 2
    assert gpus_of_worker(alone, RayEngine(), "cuda") == 1
    assert gpus_of_worker(over, RayEngine(), "cpu") == 0
    assert gpus_of_worker(over, RayEngine(gpus=0.5), "cuda") == 0.5
    with pytest.raises(BadInput, match="found device='auto' for workers of Ray"):
        read_engine(RayEngine(device="auto"))


def test_a_machine_has_room_for_as_many_workers_as_its_scarcest_part():
    request = Request(cpus=2, gpus=0.5, memory=10)
    assert request.room({"CPU": 8.0, "GPU": 1.0, "memory": 100.0}) == 2
    assert request.room({"CPU": 8.0, "GPU": 4.0, "memory": 35.0}) == 3
    assert request.room({"CPU": 3.0, "GPU": 4.0, "memory": 35.0}) == 1
    assert request.room({"CPU": 8.0, "memory": 35.0}) == 0
    assert Request(cpus=1, gpus=0, memory=10).room({"CPU": 8.0, "memory": 35.0}) == 3


def test_a_cluster_without_room_is_refused(monkeypatch):
    ray = types.ModuleType("ray")
    ray.is_initialized = lambda: True
    ray.nodes = lambda: [{"Alive": True, "Resources": {"CPU": 4.0, "memory": 5e9}},
                         {"Alive": False, "Resources": {"CPU": 4.0, "memory": 9e9}}]  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", ray)
    told = r"no machine of the Ray cluster has 1 CPU and 6\.0 GB of memory, which one worker needs"
    with pytest.raises(NotEnoughMemory, match=told):
        list(
            compute_on_ray(
                {"job": 1}, int, pow, engine=RayEngine(), request=Request(1, 0, int(6e9)),
                running=print,
            )
        )  # fmt: skip


def test_a_cluster_that_is_not_there_is_told_at_once(monkeypatch):
    ray = types.ModuleType("ray")
    ray.is_initialized = lambda: False
    monkeypatch.setitem(sys.modules, "ray", ray)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for given in (address, f"ray://{address}"):
            told = rf"cannot reach a Ray cluster at {given}: .*refused Start one with ray start --h"
            with pytest.raises(BadInput, match=told):
                list(
                    compute_on_ray(
                        {"job": 1}, int, pow, engine=RayEngine(given), request=Request(1, 0, 1),
                        running=print,
                    )
                )  # fmt: skip
