"""Files: what is written replaces only its own kind, whole or not at all; `~` is a home."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from safetensors.torch import save_file

from disks import disk_of, folder_of_others
from made_caches import make
from ra_lens import RACache, load_task, trace_paths
from ra_lens.errors import BadFile, BadInput, RALensError
from ra_lens.experiments import read_results, write_results
from ra_lens.experiments.journal import as_frame
from ra_lens.experiments.paper import read_paper
from ra_lens.figures import save_figure
from ra_lens.files import check_input, check_output, write_whole
from ra_lens.model import load_model
from ra_lens.report import write_report
from ra_lens.report.experiments import write_sweep_page
from ra_lens.tasks.download import cache_folder, fetch

RA = make()
TRACE = trace_paths(torch.tensor([[1.0, 0.0], [0.3, 0.7]]))
ROW = {"task": "antonym", "kind": "icl", "n_shots": 0, "top1": 0.5, "n_test": 2}
SWEEP = as_frame(
    [{**ROW, "map": name, "scale": scale} for name, scale in (("none", None), ("ra", -30.0))],
    {"experiment": "patching", "model": "toy", "seed": 1},
)
RANKS = SWEEP.assign(experiment="ranking")
COMPARED = pd.DataFrame({"paper": [0.1], "ours": [0.2], "difference": [0.1]})
PAIRS = '[{"input": "hot", "output": "cold"}, {"input": "big", "output": "small"}]'

WRITERS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "report": (".html", lambda path: write_report(RA, path)),
    "to_html": (".html", lambda path: RA.to_html(path)),
    "paths": (".html", lambda path: TRACE.save_html(path)),
    "sweep": (".htm", lambda path: write_sweep_page(SWEEP, path, metric="top1")),
    "figure": (".html", lambda path: save_figure(go.Figure(), path)),
    "cache": (".safetensors", lambda path: RA.save(path)),
    "parquet": (".parquet", lambda path: write_results(SWEEP, path)),
    "csv": (".csv", lambda path: write_results(SWEEP, path)),
    "comparison": (".csv", lambda path: write_results(COMPARED, path)),
}
PAGES = ("report", "to_html", "paths", "sweep", "figure")
each_writer = pytest.mark.parametrize("name", WRITERS)


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What may lie where something is going to be written."""
    folder = tmp_path_factory.mktemp("contents")
    for name, (ending, write) in WRITERS.items():
        write(folder / f"{name}{ending}")
    write_results(RANKS, folder / "ranks.csv")
    save_file({"weight": torch.ones(2)}, folder / "weights.safetensors")
    (folder / "notes.txt").write_text("Do not lose me.\n")
    (folder / "task.json").write_text(PAIRS)
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    return {path.stem: path.read_bytes() for path in folder.iterdir()}


# ---- what is replaced ---------------------------------------------------------------------------


@each_writer
def test_only_its_own_kind_is_replaced(
    name: str, contents: dict[str, bytes], tmp_path: Path
) -> None:
    ending, write = WRITERS[name]
    own = PAGES if name in PAGES else (name,)
    for other, content in contents.items():
        path = tmp_path / f"{other}{ending}"
        path.write_bytes(content)
        if other in own:
            write(path)
            assert path.stat().st_size == len(contents[name])
            continue
        with pytest.raises(BadInput, match=r"cannot write .*(there is not|it holds).*delete it"):
            write(path)
        assert path.read_bytes() == content, other
    assert len(os.listdir(tmp_path)) == len(contents)


@each_writer
def test_an_empty_file_is_nothing_to_lose(name: str, tmp_path: Path) -> None:
    ending, write = WRITERS[name]
    path = tmp_path / f"empty{ending}"
    path.touch()
    write(path)
    assert path.stat().st_size > 0


def test_tables_say_what_they_are(tmp_path: Path) -> None:
    write_results(SWEEP, tmp_path / "a.csv")
    for frame, is_one in (
        (COMPARED, "a comparison with the paper"),
        (RANKS, r"the results of an experiment \(ranking\)"),
        (pd.DataFrame({"mine": [1]}), "another table"),
    ):
        there = r"it holds the results of an experiment \(patching\)"
        with pytest.raises(BadInput, match=f"{there}, and this is {is_one}. Give another name"):
            write_results(frame, tmp_path / "a.csv")
    write_results(SWEEP.assign(note="mine"), tmp_path / "a.csv")  # with a column more: the same


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_so_in_its_name(name: str, tmp_path: Path) -> None:
    write = WRITERS[name][1]
    for wrong in ("page", "page.parquet", "page.csv", "page.txt", ".html", "html"):
        with pytest.raises(BadInput, match=r"name must end in \.html or \.htm|found the suffix"):
            write(tmp_path / wrong)
    assert os.listdir(tmp_path) == []
    write(tmp_path / "PAGE.HTML")
    assert os.listdir(tmp_path) == ["PAGE.HTML"]


def test_an_input_is_no_output(tmp_path: Path) -> None:
    read = tmp_path / "read.csv"
    read.write_text("a\n1\n")
    (tmp_path / "soft.csv").symlink_to(read)
    (tmp_path / "hard.csv").hardlink_to(read)
    for name in ("read.csv", "./read.csv", "soft.csv", "hard.csv"):
        with pytest.raises(BadInput, match=r"it is the input .*read\.csv, which stays"):
            check_output(os.path.join(tmp_path, name), inputs=[tmp_path / "missing", read])
    check_output(tmp_path / "other.csv", inputs=[tmp_path / "missing", read])


# ---- home ---------------------------------------------------------------------------------------


@each_writer
def test_home_is_written_out_where_something_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, write = WRITERS[name]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(f"~/file{ending}")
    assert os.listdir(tmp_path) == [f"file{ending}"]
    with pytest.raises(BadInput, match="no home folder for its ~"):
        write(f"~nobody-of-this-name/file{ending}")


def test_home_is_written_out_where_something_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Callable[..., Path]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    RA.save(tmp_path / "cache")
    write_results(SWEEP, tmp_path / "sweep.csv")
    (tmp_path / "task.json").write_text(PAIRS)
    (tmp_path / "model").symlink_to(folder("gpt2"))
    table = "table,model,task,kind,n_shots,method,direction,auc,note\n1,m,t,icl,0,RA,forward,.5,\n"
    (tmp_path / "table1.csv").write_text(table)
    assert RACache.load("~/cache").layers == RA.layers
    assert len(read_results("~/sweep.csv")) == 2
    assert len(read_paper("~")) == 1
    assert len(load_task("task", "~").pairs) == 2
    assert isinstance(load_model("~/model", device="cpu"), torch.nn.Module)
    monkeypatch.delenv("RA_LENS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "~/kept")
    assert cache_folder() == tmp_path / "kept" / "ra_lens"
    for read in (RACache.load, read_results, read_paper, load_model, lambda p: load_task("t", p)):
        with pytest.raises(BadInput, match="no home folder for its ~"):
            read("~nobody-of-this-name/file.csv")


# ---- what cannot be written ---------------------------------------------------------------------


@each_writer
def test_a_full_disk_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    ending, write = WRITERS[name]
    path = tmp_path / f"file{ending}"
    with disk_of(10), pytest.raises(BadInput, match=f"cannot write {path}: .*Free some space"):
        write(path)
    assert os.listdir(tmp_path) == []
    write(path)
    before = path.read_bytes()
    with disk_of(10), pytest.raises(BadInput, match="Free some space"):
        write(path)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (before, [path.name])


@each_writer
def test_a_folder_of_others_is_refused(name: str, tmp_path: Path) -> None:
    ending, write = WRITERS[name]
    write(tmp_path / f"file{ending}")  # everything that this needs is imported
    for mode in (0o555, 0):  # not to be written to, not even to be looked into
        with folder_of_others(mode) as folder:
            told = r"Permission denied\. Give a path in a folder that can be written to\."
            with pytest.raises(BadInput, match=told):
                write(folder / f"new{ending}")
            assert mode == 0 or os.listdir(folder) == ["file"]


@each_writer
def test_a_name_too_long_is_refused(name: str, tmp_path: Path) -> None:
    ending, write = WRITERS[name]
    with pytest.raises(BadInput, match=r"File name too long\. Give a shorter name\."):
        write(tmp_path / ("x" * 252 + ending))
    # As long as can be, in bytes of four each: nothing beside it may be longer.
    write(tmp_path / ("🙂" * ((255 - len(ending)) // 4) + ending))
    assert len(os.listdir(tmp_path)) == 1


def test_other_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, why in (("a\0b", "null"), (tmp_path / "loop" / "a", "no folder|[Ll]oop|Too many")):
        with pytest.raises(BadInput, match=why):
            write_whole(path, "text")


def test_a_download_that_finds_the_disk_full_is_one_error(tmp_path: Path) -> None:
    from web_site import CONTENT, SHA256, Site, serving

    with serving(Site({"/x.json": CONTENT})) as site:
        kept = tmp_path / "tasks" / "x.json"
        with disk_of(1000), pytest.raises(BadInput, match=r"Free some space.*Set RA_LENS_CACHE"):
            fetch(f"{site.url}/x.json", SHA256, kept, timeout=5.0)
        assert os.listdir(kept.parent) == []
        with folder_of_others() as folder, pytest.raises(BadInput, match="Set RA_LENS_CACHE"):
            fetch(f"{site.url}/x.json", SHA256, folder / "x.json", timeout=5.0)
        assert fetch(f"{site.url}/x.json", SHA256, kept, timeout=5.0).read_bytes() == CONTENT


# ---- what cannot be read ------------------------------------------------------------------------

READERS: dict[str, Callable[[Path], object]] = {
    "cache": RACache.load,
    "results": read_results,
    "paper": read_paper,
    "tasks": lambda path: load_task("hot", path),
    "model": lambda path: load_model(path, device="cpu"),
}


@pytest.mark.parametrize("name", READERS)
def test_what_cannot_be_read_is_one_error(name: str, tmp_path: Path) -> None:
    read = READERS[name]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.csv").write_text("no table")
    os.mkfifo(tmp_path / "pipe")
    for place in ("missing", "empty", "file.csv", "file.csv/below", "pipe", "x" * 300):
        with pytest.raises(RALensError) as info:
            read(tmp_path / place)
        assert str(info.value).count("\n") == 0
        assert place in str(info.value)
    with folder_of_others(mode=0) as folder:
        for place in (folder, folder / "file"):
            with pytest.raises(RALensError, match=str(place)):
                read(place)


def test_inputs_say_why() -> None:
    with folder_of_others() as folder:
        with pytest.raises(BadFile, match=r"there is no file .*other\. Give another\."):
            check_input(folder / "other", "Give another.")
        with pytest.raises(BadFile, match=r"is a folder; a file is needed\. Give another\."):
            check_input(folder, "Give another.")
        with pytest.raises(BadFile, match=r"is no folder; a folder is needed\. Give another\."):
            check_input(folder / "file", "Give another.", folder=True)
        check_input(folder / "file", "Give another.")
        check_input(folder, "Give another.", folder=True)
    with folder_of_others(mode=0) as folder:
        for place, is_folder in ((folder, True), (folder / "file", False)):
            with pytest.raises(
                BadFile, match=r"cannot be read: Permission denied\. Give another\."
            ):
                check_input(place, "Give another.", folder=is_folder)
