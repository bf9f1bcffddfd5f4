"""Results beside the paper's numbers: the right cells side by side, and none dropped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ra_lens.errors import BadFile, BadInput
from ra_lens.experiments.paper import compare_with_paper, count_cells, paper_model, read_paper

PUBLISHED = Path(__file__).parents[3] / "shared" / "paper"

AUC = """table,model,task,kind,n_shots,method,direction,auc,note
9,GPT2-xl,country-capital,natural,0,Random,none,0.02,
9,GPT2-xl,country-capital,natural,0,Index,reversed,0.03,
9,GPT2-xl,country-capital,natural,0,Index,forward,0.05,
9,GPT2-xl,country-capital,natural,0,CM2,reversed,0.07,
9,GPT2-xl,country-capital,natural,0,CM2,forward,0.11,
9,GPT2-xl,country-capital,natural,0,CM1,reversed,0.61,
9,GPT2-xl,country-capital,natural,0,CM1,forward,0.13,"a note, with a comma"
9,GPT2-xl,country-capital,natural,0,FA,reversed,0.17,
9,GPT2-xl,country-capital,natural,0,FA,forward,0.19,
9,GPT2-xl,country-capital,natural,0,RA,reversed,0.23,
9,GPT2-xl,country-capital,natural,0,RA,forward,0.29,
9,OPT-1.3B,country-capital,natural,0,RA,forward,0.31,
"""
PRINTED = """table,model,task,kind,n_shots,method,direction,auc,note
2,GPT2-xl,country-capital,natural,0,CM,reversed,0.61,
2,GPT2-xl,country-capital,icl,1,CM,reversed,0.15,
"""
PATCHING = """table,model,task,kind,n_shots,method,direction,scale,accuracy,note
13,GPT2-xl,antonym,icl_same_length,1,original,none,,0.18,
13,GPT2-xl,antonym,icl_same_length,1,FA,none,+1,0.43,
13,GPT2-xl,antonym,icl_same_length,1,RA,none,-30,0.56,
"""


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    folder = tmp_path / "paper"
    folder.mkdir()
    (folder / "table9.csv").write_text(AUC)
    (folder / "table2.csv").write_text(PRINTED)
    (folder / "table13.csv").write_text(PATCHING)
    return folder


def curve(method: str, direction: str, height: float, **about: Any) -> list[dict[str, Any]]:
    """A curve that is `height` from 0 to 1, so that its area is `height`."""
    cell = {
        "experiment": "perturbation", "model": "gpt2-xl", "task": "natural/country-capital",
        "kind": "natural", "n_shots": 0, "method": method, "direction": direction, "draw": 0,
        **about,
    }  # fmt: skip
    return [{**cell, "share": s, "top1": height, "top3": 1.0} for s in (0.0, 0.5, 1.0)]


def perturbed(**about: Any) -> pd.DataFrame:
    rows = [
        *curve("ra", "forward", 0.30, **about), *curve("ra", "reversed", 0.31, **about),
        *curve("fa", "forward", 0.32, **about), *curve("fa", "reversed", 0.33, **about),
        *curve("cm1", "forward", 0.34, **about), *curve("cm1", "reversed", 0.35, **about),
        *curve("cm2", "forward", 0.36, **about), *curve("cm2", "reversed", 0.37, **about),
        *curve("index", "forward", 0.38, **about), *curve("index", "reversed", 0.39, **about),
        *curve("random", "none", 0.40, **about), *curve("random", "none", 0.50, draw=1, **about),
    ]  # fmt: skip
    return pd.DataFrame(rows)


def patched(task: str = "antonym_len_8_1", model: str = "gpt2-xl") -> pd.DataFrame:
    cells = [("none", math.nan, 0.2), ("ra", -30.0, 0.6), ("ra", 1.0, 0.0), ("pattern", 1.0, 0.4)]
    return pd.DataFrame(
        [
            {"experiment": "patching", "model": model, "task": task, "kind": "icl", "n_shots": 1,
             "map": kind, "scale": scale, "top1": top1, "top3": 1.0}
            for kind, scale, top1 in cells
        ]
    )  # fmt: skip


def cell(compared: pd.DataFrame, table: int, method: str, direction: str = "none") -> Any:
    found = compared[
        (compared.table == table)
        & (compared.method == method)
        & (compared.direction == direction)
        & (compared.model == "GPT2-xl")
    ]
    assert len(found) == 1
    return found.iloc[0]


def test_each_order_stands_beside_the_published_one_of_the_same_meaning(paper: Path) -> None:
    compared = compare_with_paper(perturbed(), paper)
    pairs = {
        ("RA", "forward"): (0.29, 0.30), ("RA", "reversed"): (0.23, 0.31),
        ("FA", "forward"): (0.19, 0.32), ("FA", "reversed"): (0.17, 0.33),
        # Their CM1 is the effect of removing a head: most important last.
        ("CM1", "reversed"): (0.61, 0.34), ("CM1", "forward"): (0.13, 0.35),
        ("CM2", "forward"): (0.11, 0.36), ("CM2", "reversed"): (0.07, 0.37),
        # Their plain index order begins with the last layer.
        ("Index", "reversed"): (0.03, 0.38), ("Index", "forward"): (0.05, 0.39),
        ("Random", "none"): (0.02, 0.45),
    }  # fmt: skip
    for (method, direction), (theirs, ours) in pairs.items():
        found = cell(compared, 9, method, direction)
        assert (found.paper, found.ours) == pytest.approx((theirs, ours))
        assert found.difference == pytest.approx(ours - theirs)
        assert found.found == "both"
    assert cell(compared, 9, "CM1", "reversed").our_cell == "cm1 forward"
    assert cell(compared, 9, "CM1", "forward").note == "a note, with a comma"
    printed = cell(compared[compared.kind == "natural"], 2, "CM", "reversed")
    assert (printed.paper, printed.our_cell) == (0.61, "cm1 forward")
    assert printed.ours == pytest.approx(0.34)


def test_patching_is_compared_at_the_scale_of_the_cell(paper: Path) -> None:
    compared = compare_with_paper(patched(), paper)
    for method, theirs, ours, name in (
        ("original", 0.18, 0.2, "unpatched"),
        ("FA", 0.43, 0.4, "pattern × +1"),
        ("RA", 0.56, 0.6, "ra × −30"),
    ):
        found = cell(compared, 13, method)
        assert (found.paper, found.ours) == (theirs, ours)
        assert (found.task, found.our_task, found.our_cell) == ("antonym", "antonym_len_8_1", name)
    extra = compared[compared.found == "ours"]
    assert [(row.method, row.scale, row.ours) for row in extra.itertuples()] == [("RA", 1.0, 0.0)]


def test_no_cell_is_dropped(paper: Path) -> None:
    frames = [perturbed(), patched(), perturbed(task="country-capital", kind="icl", n_shots=1)]
    extra = pd.DataFrame(curve("mine", "forward", 0.9))
    compared = compare_with_paper([*frames, extra], paper)
    # Published of this model: 11 + 3 + 2, all found. Ours: 11 + 4 + 11 + 1.
    assert count_cells(compared) == {"both": 16, "paper": 0, "ours": 1 + 10 + 1}
    ours = compared[compared.found == "ours"]
    assert set(ours.table) == {0}
    assert ours.paper.isna().all()
    assert ours.difference.isna().all()
    assert "mine forward" in set(ours.our_cell)
    only = compare_with_paper(patched(), paper)
    assert count_cells(only) == {"both": 3, "paper": 13, "ours": 1}
    assert only[only.found == "paper"].ours.isna().all()
    assert list(only.table) == [2, 2, *[9] * 11, 13, 13, 13, 0]
    assert set(only.model) == {"GPT2-xl"}


def test_kinds_keep_tasks_of_one_name_apart(paper: Path) -> None:
    compared = compare_with_paper(perturbed(task="country-capital", kind="icl", n_shots=1), paper)
    both = compared[compared.found == "both"]
    assert [(row.table, row.method, row.paper) for row in both.itertuples()] == [(2, "CM", 0.15)]
    assert (both.kind == "icl").all()


def test_models_are_recognised_by_their_names() -> None:
    for names, known in (
        (("gpt2-xl", "openai-community/gpt2-xl", "GPT2-XL"), "GPT2-xl"),
        (("opt-1.3b", "facebook/opt-1.3b"), "OPT-1.3B"),
        (("gpt-j-6b", "EleutherAI/gpt-j-6B", "gpt-j-6B"), "GPT-j"),
        (("Llama-2-7b", "meta-llama/Llama-2-7b-hf", "llama-2-7b-hf"), "Llama2-7B"),
        (("gpt2", "ra-lens-demo", "Llama-2-7b-chat-hf", "opt-125m", "Llama-2-70b"), None),
    ):
        assert {paper_model(name) for name in names} == {known}


def test_a_model_can_be_laid_beside_another(paper: Path) -> None:
    for name in ("OPT-1.3B", "facebook/opt-1.3b"):
        compared = compare_with_paper(perturbed(model="ra-lens-demo"), paper, as_model=name)
        both = compared[compared.found == "both"]
        assert [(row.model, row.our_model) for row in both.itertuples()] == [
            ("OPT-1.3B", "ra-lens-demo")
        ]
    with pytest.raises(BadInput, match=r"as_model='gpt5'; .*GPT2-xl, OPT-1\.3B"):
        compare_with_paper(perturbed(), paper, as_model="gpt5")


def test_metric_and_rule_are_as_asked(paper: Path) -> None:
    assert cell(compare_with_paper(patched(), paper, metric="top3"), 13, "RA").ours == 1
    frame = perturbed()
    frame.loc[frame.share == 0.5, "top1"] = 0.0
    by = {
        rule: cell(compare_with_paper(frame, paper, rule=rule), 9, "RA", "forward").ours
        for rule in ("trapezoid", "mean")
    }
    assert by == pytest.approx({"trapezoid": 0.15, "mean": 0.2})


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (lambda: perturbed(model="gpt2"), r"results are of gpt2, .*GPT2-xl, OPT-1\.3B.*as_model"),
        (
            lambda: perturbed(task="synonym", kind="icl", n_shots=5),
            r"results have auc of icl tasks synonym with 5 shots\. Published: "
            r"auc of natural tasks country-capital with 0 shots; auc of icl .*; accuracy of icl",
        ),
        (lambda: [perturbed(), perturbed()], "each has to be there once|2 results for"),
        (
            lambda: [patched(), patched("antonym_len_9_1")],
            "2 results for antonym, 1 shots, unpatch",
        ),
        (lambda: perturbed().assign(experiment="ranking"), "found no results to compare"),
        (lambda: pd.DataFrame({"a": [1]}), "no result of an experiment"),
        (lambda: [], "found no results to compare"),
        (lambda: patched().drop(columns="map"), "without 'map'.*patching_sweep"),
        (lambda: patched().drop(columns="top1"), "without 'top1'.*patching_sweep"),
        (lambda: patched().assign(top1=math.nan), "in which 'top1' is empty"),
        (lambda: patched().assign(scale="x"), "the text 'x' for scale in row 2"),
        (lambda: perturbed().drop(columns="share"), "without 'share'.*perturbation_test"),
        (lambda: perturbed().assign(top1=math.nan), "in which 'top1' is empty"),
        (lambda: perturbed().assign(top1="x"), "the text 'x' for top1 in row 1"),
    ],
)
def test_what_cannot_be_compared_is_said(paper: Path, results: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        compare_with_paper(results(), paper)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"table9\.csv has columns a, b; needed are table, model"),
        (AUC.replace(",auc,", ",accuracy,"), "either auc, or scale and accuracy"),
        (AUC.replace("0.61", "n/a"), r"table9\.csv, line 7: found auc='n/a'; a number"),
        (AUC.replace("9,GPT2-xl", ",GPT2-xl", 1), "line 2: found table=''"),
        (AUC.replace(",natural,0,Random", ",natural,0.5,Random"), "fraction as n_shots"),
        (AUC + '9,"', "cannot be read as a table"),
        ("", "cannot be read as a table"),
    ],
)
def test_tables_that_are_damaged_are_refused(paper: Path, text: str, message: str) -> None:
    (paper / "table9.csv").write_text(text)
    with pytest.raises(BadFile, match=message):
        read_paper(paper)


def test_a_folder_that_holds_no_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"there is no folder .*nowhere"):
        read_paper(tmp_path / "nowhere")
    with pytest.raises(BadFile, match=r"has no table\*\.csv"):
        read_paper(tmp_path)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the paper's numbers are not at hand")
def test_the_published_tables_are_read_whole() -> None:
    paper = read_paper(PUBLISHED)
    assert paper.groupby("table").size().to_dict() == {
        1: 48, 2: 24, 3: 96, 9: 264, 10: 264, 11: 264, 12: 264, 13: 312,
    }  # fmt: skip
    assert set(paper.kind) == {"icl", "natural"}
    assert paper.paper.between(0, 1).all()
    assert set(paper[paper.metric == "accuracy"].scale.dropna()) == {1.0, -30.0}
    # Table 2 prints four columns of tables 9 and 12: "CM" is CM1 reversed, FA and RA are plain.
    named = paper.assign(method=paper.method.replace("CM", "CM1"))
    cell = ["model", "task", "n_shots", "method", "direction"]
    both = named[named.table == 2].merge(named[named.table.isin([9, 12])], on=cell)
    assert len(both) == 24
    assert (both.paper_x == both.paper_y).all()
