"""Journals and results files: what is done stays done, and nothing else is taken for it."""

from __future__ import annotations

import json
import math
import re

import pandas as pd
import pytest

from disks import disk_of, folder_of_others
from ra_lens.errors import BadFile, BadInput
from ra_lens.experiments import read_results, write_results
from ra_lens.experiments.journal import (
    as_frame,
    differences,
    finished_results,
    journal_path,
    open_journal,
    settings_hash,
)

SETTINGS = {"experiment": "patching", "model": "toy", "seed": 1, "shots": [0, 1]}


class Killed(Exception):
    pass


def run(out, upto, settings=SETTINGS):
    """Three units, stopping before number `upto`; gives the results and which were computed."""
    computed = []

    def compute(i):
        if i == upto:
            raise Killed
        computed.append(i)
        return {"value": 0.1 * i + 1 / 3, "name": f"unit “{i}”"}

    with open_journal(out, settings) as journal:
        results = [journal.unit(f"unit {i}", lambda i=i: compute(i)) for i in range(3)]
    return results, computed


def stopped(tmp_path, upto=2):
    """Where a run that was stopped before number `upto` would have written."""
    out = tmp_path / "results.csv"
    with pytest.raises(Killed):
        run(out, upto=upto)
    return out


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    whole, _ = run(tmp_path / "other.csv", upto=None)
    out = stopped(tmp_path)
    assert journal_path(out).exists()
    results, computed = run(out, upto=None)
    assert computed == [2]
    assert results == whole
    assert not journal_path(out).exists()


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_cut_in_the_middle_is_computed_again(tmp_path, cut):
    out = stopped(tmp_path)
    path = journal_path(out)
    path.write_bytes(path.read_bytes()[:-cut])
    results, computed = run(out, upto=None)
    assert computed == [1, 2]
    assert results == run(None, upto=None)[0]


def test_a_journal_cut_in_its_first_line_starts_afresh(tmp_path):
    out = stopped(tmp_path)
    path = journal_path(out)
    path.write_bytes(path.read_bytes()[:10])
    assert run(out, upto=None)[1] == [0, 1, 2]


def test_a_journal_of_other_settings_is_refused_and_kept(tmp_path):
    out = stopped(tmp_path, upto=1)
    before = journal_path(out).read_bytes()
    differing = r"\(seed: there 1, here 2; extra: there nothing, here x\)"
    with pytest.raises(BadInput, match=rf"other settings {differing}\. Repeat that run to finish"):
        run(out, upto=None, settings={**SETTINGS, "seed": 2, "extra": "x"})
    assert journal_path(out).read_bytes() == before


LINES = [
    b"not a journal\n",
    b"\xff\xfe\x00 no text\n",
    b"[]\n",
    b'{"ra_lens_journal": 1, "settings": []}\n',
    b'{"ra_lens_journal": 1, "settings": {}}\n\xff\n',
    b'{"ra_lens_journal": 1, "settings": {}}\n{"key": []}\n',
    b"\x00" * 40 + b"\n",
]


@pytest.mark.parametrize("damage", LINES)
def test_a_damaged_journal_is_refused_and_kept(tmp_path, damage):
    out = tmp_path / "results.csv"
    journal_path(out).write_bytes(damage)
    with pytest.raises(BadFile, match=r"is not the journal of an experiment .*Delete it to start"):
        run(out, upto=None)
    assert journal_path(out).read_bytes() == damage


def test_a_journal_of_another_format_says_so(tmp_path):
    out = tmp_path / "results.csv"
    journal_path(out).write_text('{"ra_lens_journal": 2, "settings": {}}\n')
    with pytest.raises(BadInput, match=r"a journal of format 2; this ra_lens writes 1\."):
        run(out, upto=None)


# ---- what cannot be written ---------------------------------------------------------------------


def test_a_full_disk_keeps_what_is_done(tmp_path):
    out = stopped(tmp_path)
    size = journal_path(out).stat().st_size
    journal_path(out).unlink()
    with disk_of(size + 5), pytest.raises(BadInput) as info:  # the third unit does not fit
        run(out, upto=None)
    told = f"cannot write {journal_path(out)}, which keeps what is done: File too large. Free some"
    assert told in str(info.value)
    assert str(info.value).endswith(
        "What is done is kept: the same call with the same output file goes on from there."
    )
    assert [p.name for p in tmp_path.iterdir()] == [journal_path(out).name]
    results, computed = run(out, upto=None)
    assert (computed, results) == ([2], run(None, upto=None)[0])


def test_a_disk_that_takes_nothing_leaves_nothing(tmp_path):
    out = tmp_path / "results.csv"
    with disk_of(10), pytest.raises(BadInput, match=r"Free some space\.$"):
        run(out, upto=None)
    assert list(tmp_path.iterdir()) == []


def test_results_that_do_not_fit_any_more_are_not_lost(tmp_path):
    out = tmp_path / "results.csv"
    with (
        pytest.raises(BadInput, match=r"cannot write .*results\.csv: .*What is done is kept"),
        open_journal(out, SETTINGS) as journal,
    ):
        journal.unit("unit", lambda: 1)
        with disk_of(10):
            write_results(frame(), out)
    assert [p.name for p in tmp_path.iterdir()] == [journal_path(out).name]


def test_a_journal_that_cannot_be_opened_is_one_error(tmp_path):
    out = tmp_path / ("x" * 251 + ".csv")  # its own name is just short enough
    with pytest.raises(BadInput, match=r"journal, which keeps what is done: File name too long\."):
        run(out, upto=None)
    journal_path(tmp_path / "a.csv").mkdir()
    with pytest.raises(BadInput, match=r"which keeps what is done: Is a directory\. Give another"):
        run(tmp_path / "a.csv", upto=None)
    with folder_of_others() as folder, pytest.raises(BadInput, match="Permission denied"):
        run(folder / "a.csv", upto=None)


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(None, upto=None)[1] == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def frame():
    rows = [
        {"task": "antonym", "map": "none", "scale": None, "top1": 0.1 + 0.2, "ok": True},
        {"task": "NA", "map": "ra", "scale": -30.0, "top1": 1 / 3, "ok": False},
    ]
    same = {"kind": "icl", "top2": 0.5, "top3": 0.75, "logit_diff": -1 / 3}
    rows = [{**row, **same, "n_shots": n} for n, row in zip(SETTINGS["shots"], rows, strict=True)]
    return as_frame(rows, SETTINGS).astype({"scale": float})


@pytest.mark.parametrize("name", ["results.csv", "results.parquet"])
def test_tables_come_back_as_they_were_written(tmp_path, name):
    write_results(frame(), tmp_path / name)
    back = read_results(tmp_path / name)
    pd.testing.assert_frame_equal(back, frame(), check_exact=True, check_dtype=False)
    assert back["task"].tolist() == ["antonym", "NA"]
    assert math.isnan(back["scale"][0])
    assert back["seed"].tolist() == [1, 1]
    assert "shots" not in back  # a list; it is in the hash of the settings and in the rows
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_finished_results_are_found_again_and_others_are_refused(tmp_path):
    out = tmp_path / "results.parquet"
    assert finished_results(None, SETTINGS) is None
    assert finished_results(out, SETTINGS) is None
    write_results(frame(), out)
    found = finished_results(out, SETTINGS)
    assert found is not None
    assert found["top1"].tolist() == frame()["top1"].tolist()
    for other, told in [
        ({"seed": 2}, "seed: there 1, here 2"),
        ({"seed": 2, "model": "other"}, "model: there toy, here other; seed: there 1, here 2"),
        ({"shots": [0]}, r"shots: there \[0, 1\], here \[0\]"),
        # The toy table has no column of it.
        ({"limit": 4}, "in what the table does not show: limit, here 4"),
        ({"kinds": ["ra", "pattern"]}, r"kinds: there \['ra'\], here \['ra', 'pattern'\]"),
        ({"scales": [-30.0, 1.0]}, r"scales: there \[-30.0\], here \[-30.0, 1.0\]"),
    ]:
        wanted = rf"holds the results of a run with other settings \({told}\)\. Give another name"
        with pytest.raises(BadInput, match=wanted):
            finished_results(out, {**SETTINGS, **other})


def test_what_differs_is_said_where_it_differs():
    task = {"name": "a", "format": "Q: , A:", "tokens": "x"}
    long = list(range(60))
    for was, now, told in [
        ({"a": 1}, {"a": 1}, ""),
        ({"a": None}, {}, "a: there None, here nothing"),
        ({"a": 1}, {"b": 2}, "a: there 1, here nothing; b: there nothing, here 2"),
        ({"t": [task]}, {"t": [{**task, "format": "Q"}]}, "format of a: there Q: , A:, here Q"),
        ({"t": [task]}, {"t": [{**task, "name": "b"}]}, "t: there ['a'], here ['b']"),
        ({"s": long}, {"s": [*long, 99]}, "s: only there [], only here [99]"),
        ({"s": "y" * 80 + "a"}, {"s": "y" * 80 + "b"}, f"s: there …{'y' * 10}a, here …{'y' * 10}b"),
        (dict.fromkeys("abcdefg", 1), {}, "e: there 1, here nothing; and 2 more"),
    ]:
        assert differences(was, now).endswith(told), differences(was, now)
        assert bool(differences(was, now)) == bool(told)


def test_files_that_are_no_results_are_refused(tmp_path):
    with pytest.raises(BadInput, match=r"must end in \.parquet or \.csv"):
        write_results(frame(), tmp_path / "results.json")
    with pytest.raises(BadInput, match="there is no folder"):
        write_results(frame(), tmp_path / "nowhere" / "results.csv")
    with pytest.raises(BadFile, match="there is no file"):
        read_results(tmp_path / "missing.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(BadFile, match="cannot be read as a table"):
        read_results(tmp_path / "broken.parquet")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadFile, match="without the columns of an experiment"):
        read_results(tmp_path / "other.csv")
    with pytest.raises(BadInput, match="exists and is something else"):
        finished_results(tmp_path / "other.csv", SETTINGS)


def rows_of(experiment):
    """Results of each experiment, as little as can be."""
    cell = {"experiment": experiment, "model": "toy", "task": "t", "kind": "icl", "n_shots": 0}
    marks = {"top1": 0.5, "top2": 0.6, "top3": 0.7, "logit_diff": -1.5}
    if experiment == "perturbation":
        order = {"method": "ra", "direction": "forward", "draw": 0}
        return [{**cell, **order, "share": share, **marks} for share in (0.0, 0.5, 1.0)]
    if experiment == "patching":
        maps = [("none", None), ("ra", -30.0), ("pattern", 1.0)]
        return [{**cell, "map": name, "scale": scale, **marks} for name, scale in maps]
    return [
        {**cell, "method": "ra", "layer": 0, "head": head, "score": 0.1, "rank": head + 1}
        for head in range(3)
    ]


def without(name):
    return lambda table: table.drop(columns=name)


def with_text(name, value):
    return lambda table: table.assign(**{name: [*table[name][:-1], value]})


def empty(name):
    return lambda table: table.assign(**{name: None})


DAMAGED = [
    ("perturbation", without("share"), "without 'share'"),
    ("perturbation", without(["draw", "kind"]), "without 'kind', 'draw'"),
    ("perturbation", with_text("top1", "n/a"), "the text 'n/a' for top1 in row 3, not a number"),
    ("perturbation", with_text("n_shots", "none"), "the text 'none' for n_shots in row 3"),
    ("perturbation", empty("logit_diff"), "in which 'logit_diff' is empty"),
    ("perturbation", with_text("top2", None), "without a value for top2 in row 3"),
    ("perturbation", with_text("share", None), "without a value for share in row 3"),
    ("perturbation", with_text("task", None), "without a value for task in row 3"),
    ("perturbation", empty("model"), "in which 'model' is empty"),
    ("patching", without("map"), "without 'map'"),
    ("patching", with_text("scale", "-30x"), "the text '-30x' for scale in row 3"),
    ("patching", with_text("scale", None), "without a value for scale in row 3"),
    ("patching", empty("top1"), "in which 'top1' is empty"),
    ("ranking", without("layer"), "without 'layer'"),
    ("ranking", with_text("score", "high"), "the text 'high' for score in row 3"),
]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("experiment", "damage", "message"),
    DAMAGED,
    ids=lambda v: v if isinstance(v, str) else "damage",
)
def test_a_table_that_lacks_something_is_named_with_the_column(
    tmp_path, experiment, damage, message, ending
):
    path = tmp_path / f"damaged.{ending}"
    whole = pd.DataFrame(rows_of(experiment))
    table = damage(whole)
    if ending == "csv":
        table.to_csv(path, index=False)
    else:  # whose columns hold one type
        texts = {c: str for c in table if table[c].map(lambda v: isinstance(v, str)).any()}
        table.astype(texts).replace("None", None).to_parquet(path, index=False)
    with pytest.raises(
        BadFile, match=rf"damaged\.{ending} is a table .*{re.escape(message)}.*wrote"
    ):
        read_results(path)
    write_results(whole, tmp_path / f"whole.{ending}")
    assert len(read_results(tmp_path / f"whole.{ending}", measures=["top1"])) == 3


def test_a_column_that_is_asked_for_is_needed(tmp_path):
    trimmed = pd.DataFrame(rows_of("patching")).drop(columns=["top2", "top3"])
    write_results(trimmed, tmp_path / "trimmed.csv")
    assert list(read_results(tmp_path / "trimmed.csv").columns) == list(trimmed.columns)
    with pytest.raises(BadFile, match=r"trimmed\.csv is a table without 'top3'"):
        read_results(tmp_path / "trimmed.csv", measures=["top3"])
    several = pd.DataFrame([*rows_of("ranking"), *rows_of("patching"), *rows_of("perturbation")])
    write_results(several, tmp_path / "several.csv")
    assert len(read_results(tmp_path / "several.csv")) == 9


def test_the_hash_depends_on_what_settings_say_and_not_on_their_order():
    assert settings_hash(SETTINGS) == settings_hash(dict(reversed(SETTINGS.items())))
    assert settings_hash(SETTINGS) != settings_hash({**SETTINGS, "shots": [0]})
    assert settings_hash(SETTINGS) == settings_hash(json.loads(json.dumps(SETTINGS)))
