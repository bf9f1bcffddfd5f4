"""The commands of the experiments: what they read, what they print, and what they leave behind."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from command_line import HEAVY, call, printed_without, refused_line
from disks import disk_of
from ra_lens import load_demo_model, load_task
from ra_lens.cli import main
from ra_lens.errors import BadInput, RALensWarning
from ra_lens.experiments import (
    area_under_curve,
    knockout_agreement,
    knockout_test,
    patching_sweep,
    perturbation_test,
    rank_tasks,
    read_results,
)
from ra_lens.experiments.paper import compare_with_paper
from ra_lens.text import scale_name, short
from tiny_models import every_model

SMALL = ["-t", "antonym", "--n-test", "6", "-q"]
PERTURB = ["perturb", *SMALL, "--shots", "0", "1", "--methods", "ra", "random", "index",
           "--n-rank", "3", "--random-orders", "2", "--step", "0.5"]  # fmt: skip
KNOCKOUT = ["knockout", "-t", "country-capital", "--n-test", "2", "--n-edges", "2", "--n-sets", "1",
            "--windows", "1", "2", "--steps", "1", "-q"]  # fmt: skip
PATCH = ["patch", *SMALL, "--shots", "0", "1", "--scales", "-30", "1", "--n-mean", "4"]

TABLE = """table,model,task,kind,n_shots,method,direction,auc,note
1,GPT2-xl,antonym,icl,1,Random,none,0.02,
1,GPT2-xl,antonym,icl,1,RA,forward,0.07,
1,GPT2-xl,synonym,icl,1,RA,forward,0.09,
"""


def two(value: float) -> str:
    """As the tables write an accuracy."""
    return f"{value:.2f}".removeprefix("0") if value < 0.995 else "1.0"


def done(*arguments: str) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    assert _beside_few_right(result.stderr) == []
    return result.stdout


def _beside_few_right(stderr: str) -> list[str]:
    """Lines but for the warning that the embedded model does few antonyms without an example."""
    few = "warning: the whole model answers less than .30 of the questions right: antonym"
    return [line for line in stderr.splitlines() if not line.startswith(few)]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_demo_model()


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a small perturbation test, as the command wrote them."""
    path = tmp_path_factory.mktemp("results") / "curves.parquet"
    done(*PERTURB, "--out", str(path))
    return path


# ---- results ------------------------------------------------------------------------------------


def test_perturb_prints_the_areas_that_the_function_gives(model: Any, curves: Path) -> None:
    frame = perturbation_test(
        model, "antonym", methods=("ra", "random", "index"), shots=(0, 1), n_rank=3, n_test=6,
        random_orders=2, step=0.5, progress=False,
    )  # fmt: skip
    written = read_results(curves)
    pd.testing.assert_frame_equal(written, frame, check_dtype=False)
    found = json.loads(done(*PERTURB, "--out", str(curves), "--json"))  # finished: read back
    expected = area_under_curve(frame)
    assert len(found["auc"]) == len(expected) == 2 * 5
    for got, row in zip(found["auc"], expected.to_dict("records"), strict=True):
        assert {k: row[k] for k in got} == got
    assert found["model"] == "ra-lens-demo"
    assert (found["tasks"], found["shots"]) == (["antonym"], [0, 1])
    assert (found["seed"], found["split"], found["n_rank"]) == (0, "code", 3)
    assert found["out"] == str(curves)
    text = done(*PERTURB, "--out", str(curves))
    areas = {(r["n_shots"], r["method"], r["direction"]): r["auc"] for r in found["auc"]}
    line = next(line.split() for line in text.splitlines() if line.startswith("1 shot"))
    full = frame[(frame.n_shots == 1) & (frame.share == 1.0)].top1.iloc[0]

    both = [
        f"{two(areas[1, m, 'forward'])}/{two(areas[1, m, 'reversed'])}" for m in ("ra", "index")
    ]
    assert line == ["1", "shot", *both, two(areas[1, "random", "none"]), two(full)]
    assert f"Results: {curves}" in text


def test_rule_and_metric_reach_the_areas(curves: Path) -> None:
    options = ["--metric", "top3", "--auc-rule", "mean"]
    found = json.loads(done(*PERTURB, "--out", str(curves), "--json", *options))
    expected = area_under_curve(read_results(curves), metric="top3", rule="mean")
    assert [row["auc"] for row in found["auc"]] == list(expected.auc)
    assert (found["metric"], found["auc_rule"]) == ("top3", "mean")


def test_patch_prints_what_the_function_gives(model: Any, tmp_path: Path) -> None:
    out, page = tmp_path / "sweep.csv", tmp_path / "sweep.html"
    frame = patching_sweep(
        model, "antonym", scales=(-30.0, 1.0), shots=(0, 1), n_mean=4, n_test=6, progress=False
    )
    text = done(*PATCH, "--out", str(out), "--figure", str(page))
    top1 = {(r.n_shots, r.map, r.scale): r.top1 for r in frame.itertuples() if r.map != "none"}
    plain = {r.n_shots: r.top1 for r in frame.itertuples() if r.map == "none"}

    rows = [line.split() for line in text.splitlines() if line.startswith("antonym")]
    assert rows == [
        ["antonym_len_6_1", f"{two(plain[0])}/{two(plain[1])}"]
        + [two(top1[n, kind, scale]) for kind in ("ra", "pattern") for scale in (-30.0, 1.0)]
        for n in (0, 1)
    ]
    assert "RA −30" in text
    found = json.loads(done(*PATCH, "--out", str(out), "--json"))
    assert len(found["cells"]) == len(frame)
    assert {c["scale"] for c in found["cells"] if c["map"] == "none"} == {None}
    assert [c["top1"] for c in found["cells"]] == list(frame.top1)
    html = page.read_text()
    assert "Attention patching: ra-lens-demo" in html
    assert "src=" not in html.split("<body>")[1].split("<script")[0]


def test_knockout_prints_the_agreement_and_goes_on_from_its_results(
    model: Any, tmp_path: Path
) -> None:
    out, page = tmp_path / "cuts.parquet", tmp_path / "cuts.html"
    printed = done(*KNOCKOUT, "--out", str(out), "--figure", str(page))
    wanted = knockout_test(
        model, "country-capital", n_test=2, n_edges=2, n_sets=1, windows=(1, 2), steps=1,
        progress=False,
    )  # fmt: skip
    found = read_results(out)
    assert set(found.n_shots) == {1}
    pd.testing.assert_frame_equal(found, wanted, check_exact=False, rtol=1e-4, atol=1e-5)
    agreement = knockout_agreement(found).set_index(["what", "window", "method"])
    lines = {line[:20].strip(): line[20:].split() for line in printed.splitlines() if line}
    for method, label in (("predicted", "foretold"), ("pattern", "A"), ("gauss_1", "1 step")):
        cells = [
            short(agreement.loc[(*group, method), "spearman"])
            for group in (("edge", 1), ("set", 1), ("set", 2))
            if (*group, method) in agreement.index
        ]
        assert lines[label] == cells, label
    assert lines["cuts"] == [str((found.what == "edge").sum()), "6", "6"]
    assert "renormalised cuts" in printed
    assert "2 prompts." in printed
    assert f"Results: {out}" in printed
    html = page.read_text()
    for title in ("Attention knockouts: ra-lens-demo", "Single edges by attention", "Sets by the"):
        assert title in html
    # With the results there nothing is cut again, and the table is the same.
    again = json.loads(done(*KNOCKOUT, "--out", str(out), "--json"))
    assert again["n_cuts"] == len(found)
    assert again["n_prompts"] == 2
    rows = [row for row in again["agreement"] if row["method"] == "predicted"]
    assert [row["n"] for row in rows] == [int(n) for n in lines["cuts"]]
    assert again["n_edges"] == 2


def test_rank_lists_the_top_heads(model: Any, tmp_path: Path) -> None:
    out = tmp_path / "ranks.csv"
    command = ["rank", "-t", "antonym", "--shots", "1", "--methods", "ra,fa", "--n-rank", "3",
               "--top", "4", "-q", "--out", str(out)]  # fmt: skip
    text = done(*command)
    frame = rank_tasks(model, "antonym", methods=("ra", "fa"), shots=1, n_rank=3, progress=False)
    for method, name in (("ra", "RA"), ("fa", "FA")):
        top = frame[frame.method == method].sort_values("rank").label.head(4)
        assert [name, *top] in [line.split() for line in text.splitlines()]
    found = json.loads(call(*command, "--json").stdout)
    assert [r["method"] for r in found["rankings"]] == ["ra", "fa"]
    first = frame[(frame.method == "ra") & (frame["rank"] == 1)].iloc[0]
    assert found["rankings"][0]["heads"][0]["label"] == first.label
    assert found["rankings"][0]["heads"][0]["score"] == pytest.approx(first.score)
    assert len(read_results(out)) == len(frame)


def test_several_tasks_have_their_mean(tmp_path: Path) -> None:
    command = ["perturb", "-t", "antonym", "natural/country-capital", "--shots", "1", "--n-test",
               "4", "--methods", "index", "--step", "0.5", "-q"]  # fmt: skip
    page = tmp_path / "p.html"
    text = done(*command, "--figure", str(page))
    assert "mean of 2 tasks" in text
    found = json.loads(call(*command, "--json").stdout)
    for direction in ("forward", "reversed"):
        values = [r["auc"] for r in found["auc"] if r["direction"] == direction]
        mean = next(m for m in found["means"] if m["direction"] == direction)
        assert (mean["tasks"], mean["auc"]) == (2, pytest.approx(sum(values) / 2))
    assert "natural/country-capital" in page.read_text()


def test_patch_finds_the_scale_and_says_it_by_task_and_shots(model: Any) -> None:
    words = ["patch", *SMALL, "--shots", "0", "1", "--scales", "best", "--n-mean", "4"]
    frame = patching_sweep(
        model, "antonym", scales="best", shots=(0, 1), n_mean=4, n_test=6, progress=False
    )
    text = done(*words)
    assert "RA found" in text
    for _, row in frame[frame["map"] != "none"].iterrows():
        assert f"{two(row['top1'])} at {scale_name(row['scale'])}" in text
    assert "smallest loss on the training questions" in text
    assert "best on these same test questions" not in text
    facts = json.loads(done(*words, "--json"))
    assert facts["scales"] == "best"
    found = [cell["scale"] for cell in facts["cells"]]
    wanted = [None if math.isnan(scale) else scale for scale in frame["scale"]]
    assert found == wanted
    losses = [cell["train_loss"] for cell in facts["cells"] if cell["map"] == "ra"]
    assert losses == pytest.approx(frame[frame["map"] == "ra"]["train_loss"].tolist())
    refused = refused_line(*words, "--figure", "a.html")
    assert "found --figure with --scales best, which gives one scale for each task" in refused
    assert "found --scales best -30; give numbers" in refused_line(*words[:-2], "-30")


def test_format_options_reach_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def recorded(model: Any, tasks: Any, **options: Any) -> Any:
        seen.append((tasks, options))
        raise BadInput("seen")

    monkeypatch.setattr("ra_lens.experiments.rank_tasks", recorded)
    monkeypatch.setattr("ra_lens.cli.session.load", lambda *a, **k: None)
    call("rank", "-t", "all", "--natural", "qa", "--separator", r"\n", "--prompt-only", "--no-bos",
         "--split", "text", "--seed", "7", "--n-rank", "9", "--batch-size", "3")  # fmt: skip
    tasks, options = seen[0]
    assert len(tasks) == 21
    assert {task.separator for task in tasks} == {"\n"}
    by_name = {task.name: task for task in tasks}
    capital = by_name["natural/country-capital"]
    assert capital.prompt("France") == "Q: The capital city of France is\nA:"
    assert by_name["antonym"].prompt("hot") == load_task("antonym").prompt("hot")
    assert options["shots"] == [0, 1, 5, 10]
    assert (options["answer_in_input"], options["prepend_bos"]) == (False, False)
    assert (options["split"], options["seed"], options["n_rank"]) == ("text", 7, 9)
    assert (options["batch_size"], options["progress"]) == (3, True)
    call("rank", "-t", "natural", "--bos", r"\n", "-q", "--batch-size", "auto")
    tasks, options = seen[1]
    assert len(tasks) == 6
    assert {task.separator for task in tasks} == {"\n\n"}
    assert (options["prepend_bos"], options["progress"]) == ("\n", False)
    assert options["batch_size"] == "auto"
    assert capital.name in {task.name for task in tasks}


@pytest.mark.parametrize("command", [["rank", "-t", "antonym"], ["circuits"]])
@pytest.mark.parametrize("wrong", ["0", "half", "1.5", "-3"])
def test_batch_sizes_are_numbers_or_auto(command: list[str], wrong: str) -> None:
    told = f"found --batch-size {wrong}; give a whole number from 1 on, or auto"
    assert told in refused_line(*command, f"--batch-size={wrong}")


def test_advice_of_a_command_names_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ra_lens.memory.free_memory", lambda device: 1_500_000)
    words = ["rank", "-t", "antonym", "--shots", "0", "--methods", "ra", "--n-rank", "20", "-q"]
    assert "Use --batch-size 1 (" in refused_line(*words)
    assert call(*words, "--batch-size", "1").exit_code == 0
    monkeypatch.setattr("ra_lens.memory.free_memory", lambda device: 1)
    assert "Nothing that can be chosen here makes it fit" in refused_line(
        "head", "L0H0", "--prompt", "hot"
    )


def test_tasks_come_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [{"input": f"w{i}", "output": f"v{i}"} for i in range(30)]
    (tmp_path / "mine.json").write_text(json.dumps(pairs))
    seen: list[Any] = []
    monkeypatch.setattr("ra_lens.cli.session.load", lambda *a, **k: None)

    def recorded(model: Any, tasks: Any, **options: Any) -> Any:
        seen.extend(tasks)
        raise BadInput("seen")

    monkeypatch.setattr("ra_lens.experiments.rank_tasks", recorded)
    call("rank", "-t", "all", "--source", str(tmp_path))
    assert [(task.name, len(task.pairs)) for task in seen] == [("mine", 30)]
    assert "no such tasks" in refused_line("rank", "-t", "natural", "--source", str(tmp_path))


def test_compare_lists_paper_ours_and_the_difference(curves: Path, tmp_path: Path) -> None:
    paper = tmp_path / "paper"
    paper.mkdir()
    (paper / "table1.csv").write_text(TABLE)
    out = tmp_path / "cells.csv"
    command = ["compare", "--paper", str(paper), str(curves), "--as-model", "gpt2-xl"]
    result = call(*command, "--out", str(out))
    assert result.exit_code == 0
    assert "warning: the results for antonym are on ra_lens's own word lists" in result.stderr
    text = result.stdout
    with pytest.warns(RALensWarning, match="not on the paper's data"):
        compared = compare_with_paper(read_results(curves), paper, as_model="gpt2-xl")
    ra = compared[(compared.method == "RA") & (compared.found == "both")].iloc[0]
    row = next(line.split() for line in text.splitlines() if "ra forward" in line)
    assert row[:4] == ["antonym", "1", "RA", ".07"]
    assert row[5] == f"{ra.difference:+.2f}"
    assert "Table 1, GPT2-xl" in text
    flat = " ".join(text.split())
    assert "2 published numbers with a result" in flat
    assert "1 of these models without a result; 8 results without a published number" in flat
    assert "synonym" in call(*command, "--all").stdout
    assert len(pd.read_csv(out)) == len(compared)
    found = json.loads(call(*command, "--json").stdout)
    assert found["counts"] == {"both": 2, "paper": 1, "ours": 8}
    assert len(found["cells"]) == 11
    assert found["cells"][-1]["paper"] is None


def test_json_is_all_that_is_on_standard_output(
    curves: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word for word in PERTURB if word != "-q"]
    monkeypatch.setattr(sys, "argv", ["ra-lens", *words, "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    written = capfd.readouterr()
    found = json.loads(written.out)
    expected = area_under_curve(read_results(curves))
    assert [row["auc"] for row in found["auc"]] == list(expected.auc)
    assert not any(math.isnan(row["auc"]) for row in found["auc"])
    assert "Perturbation test" in written.err  # the progress bar


def test_compare_leaves_what_it_reads_and_what_is_no_comparison(
    curves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("paper").mkdir()
    Path("paper/table1.csv").write_text(TABLE)
    Path("ref.parquet").write_bytes(curves.read_bytes())
    Path("other.parquet").write_bytes(curves.read_bytes())
    Path("soft.parquet").symlink_to("ref.parquet")
    Path("hard.parquet").hardlink_to("ref.parquet")
    command = ["compare", "ref.parquet", "--paper", "paper", "--as-model", "gpt2-xl", "-o"]
    read = ["ref.parquet", "./paper/../ref.parquet", "~/ref.parquet", "soft.parquet",
            "hard.parquet", "paper/table1.csv"]  # fmt: skip
    for out in read:
        said = refused_line(*command, out)
        assert "it is the input " in said
        assert ", which stays" in said
    result = call(*command, "other.parquet")
    assert result.exit_code == 2
    assert "it holds the results of an experiment (perturbation)" in result.stderr
    for name in ("ref", "other", "soft", "hard"):
        assert Path(f"{name}.parquet").read_bytes() == curves.read_bytes()
    assert Path("paper/table1.csv").read_text() == TABLE
    for _ in range(2):  # a comparison replaces a comparison
        result = call(*command, "~/cells.csv", "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["out"] == str(tmp_path / "cells.csv")
    assert not Path("~").exists()


def test_results_are_printed_where_their_figure_finds_the_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    page, out = tmp_path / "p.html", tmp_path / "p.csv"
    # Loading writes a file of its own.
    monkeypatch.setattr("ra_lens.cli.session.load", lambda *a, **k: model)
    for command in (PERTURB, PATCH):
        wanted = done(*command)
        with disk_of(10):
            result = call(*command, "--figure", str(page))
            assert (result.exit_code, result.stdout) == (2, wanted)
            (said,) = _beside_few_right(result.stderr)
            assert said.startswith(f"error: cannot write {page}: ")
            assert "Free some space" in said
            said = refused_line(*command, "--out", str(out))
            assert said.startswith(f"error: cannot write {tmp_path / '.p.csv.journal'}, ")
        assert list(tmp_path.iterdir()) == []


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-t", "antonymm"], "There is no task 'antonymm'. Close names: antonym"),
        (["-t", "antonym", "antonym"], "antonym"),
        (["-t", ","], "found --task ',', which is empty"),
        (["-t", "antonym", "--shots", "x"], "found --shots x; give whole numbers"),
        (["-t", "antonym", "--shots", "-1"], "shots=[-1]"),
        (["-t", "antonym", "--shots", "5000"], "shots=5000"),
        (["-t", "antonym", "--source", "/no/such"], "no folder '/no/such'"),
        (["-t", "antonym", "--device", "nodevice"], "cannot use --device nodevice"),
        (["-t", "antonym", "-m", "./missing"], "there is no folder './missing'"),
        (["-t", "antonym", "--out", "x.txt"], "must end in .parquet or .csv"),
        (["-t", "antonym", "--out", "/no/such/x.csv"], "there is no folder /no/such"),
        (["-t", "antonym", "--out", "x" * 260 + ".csv"], "File name too long. Give a shorter name"),
        (["-t", "antonym", "--out", "~no-one/x.csv"], "no home folder for its ~"),
        (["-t", "", "--shots", "0"], "found --task/-t '', which is empty"),
        (["-t", "antonym", "--shots", ""], "found --shots '', which is empty"),
        (["-t", "antonym", "--shots", "0", ""], "found --shots '', which is empty"),
        (["-t", "antonym", "--source", ""], "found --source '', which is empty"),
        (["-t", "antonym", "-m", ""], "found --model/-m '', which is empty"),
        (["-t", "antonym", "--device", " "], "found --device ' ', which is empty"),
        (["-t", "antonym", "--out", ""], "found --out/-o '', which is empty"),
        (["-t", "antonym", "-o", ""], "found --out/-o '', which is empty"),
        (["-t", "antonym", "-o", "-q"], "found -q where the value of --out/-o is needed"),
        (["-t", "antonym", "--shots", "0-99999"], "found --shots 0-99999; give whole numbers"),
        (["-t", "antonym", "--shots", *map(str, range(20000))], "found 20,000 values of --shots"),
    ],
)
@pytest.mark.parametrize(
    "command", ["rank", "perturb", "patch", "knockout", *every_model("ablate-patch")]
)
def test_mistakes_are_one_line_and_exit_2(command: str, arguments: list[str], message: str) -> None:
    assert message in refused_line(command, *arguments, "--json", "-q")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["perturb", *SMALL, "--methods", "cm9"], "no ranking method 'cm9'. Did you mean"),
        (["rank", "-t", "antonym", "--methods", "ra", "ra"], "each once"),
        (["perturb", *SMALL, "--step", "0.3"], "found step=0.3"),
        (["perturb", *SMALL, "--figure", "x.png"], "must end in .html"),
        (["perturb", *SMALL, "--figure", ""], "found --figure '', which is empty"),
        (["perturb", *SMALL, "--methods", ""], "found --methods '', which is empty"),
        (["knockout", *SMALL, "--windows", "9"], "found windows=[9]; give different numbers"),
        (["knockout", *SMALL, "--cuts", "half"], "found --cuts half; give some of"),
        (["knockout", *SMALL, "--n-edges", "0", "--n-sets", "0"], "which cut nothing"),
        (["knockout", *SMALL, "--steps", "0"], "steps"),
        (["patch", *SMALL, "--scales", ""], "found --scales '', which is empty"),
        (["patch", *SMALL, "--kinds", ""], "found --kinds '', which is empty"),
        (["patch", *SMALL, "--figure", "/no/such/x.html"], "there is no folder /no/such"),
        (["patch", *SMALL, "--kinds", "fa"], "found --kinds fa; give some of ra, pattern"),
        (["patch", *SMALL, "--scales", "1", "b"], "found --scales 1 b; give numbers"),
        (["patch", *SMALL, "--length", "99"], "of 99 tokens"),
        (["patch", *SMALL, "--at-least", "9999"], "no 9999 pairs"),
        (["compare", "--paper", "/no/such", "missing.csv"], "there is no file missing.csv"),
        (["compare", "--paper", "/no/such", ""], "found RESULTS '', which is empty"),
        (["compare", "--paper", "", "missing.csv"], "found --paper '', which is empty"),
        (["compare", "--paper", "--all", "missing.csv"], "found --all where the value of --paper"),
        (["compare", "--paper", "/no/such", "/dev"], "/dev is a folder; a file is needed"),
    ],
)
def test_mistakes_of_a_command_are_one_line_too(arguments: list[str], message: str) -> None:
    assert message in refused_line(*arguments)


def test_results_of_other_settings_are_not_touched(curves: Path) -> None:
    before = curves.read_bytes()
    for options, told in [
        (["--seed", "3"], "seed: there 0, here 3"),
        (["--n-rank", "4", "--shots", "2"], "n_rank: there 3, here 4; shots: there [0, 1], here"),
        (["--methods", "fa"], "methods: there ['ra', 'random', 'index'], here ['ra', 'random', "),
        (["-t", "synonym"], "tasks: there ['antonym'], here ['antonym', 'synonym']"),
        (["--separator", "|"], 'format of antonym: there ["", "Q: ", "\\nA:", "\\n\\n"], here'),
        (["--n-test", "5"], "n_test: there 6, here 5"),
        (
            ["--n-test", "7"],
            "in what the table does not show: what the methods do; n_test, here 7, ",
        ),
    ]:
        said = refused_line(*PERTURB, *options, "--out", str(curves))
        assert f"holds the results of a run with other settings ({told}" in said
    assert curves.read_bytes() == before
    ranking = ["rank", *SMALL[:2], "--n-rank", "3", "--shots", "1", "-q", "--out", str(curves)]
    assert "experiment: there perturbation, here ranking" in refused_line(*ranking)
    assert curves.read_bytes() == before


def test_where_to_write_is_checked_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ra_lens.cli.session.load", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "thesis.txt").write_text("mine")
    for command in ("rank", "perturb", "patch", "ablate-patch", "knockout"):
        said = refused_line(command, "-t", "antonym", "--out", str(tmp_path))
        assert f"cannot write cells to {tmp_path}: it holds other files (thesis.txt). Give" in said
    for wrong in (["nope"], ["antonym", "--shots", "x"], ["antonym", "--methods", "nope"]):
        refused_line("perturb", "-t", *wrong)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda frame: frame.drop(columns="share"), "damaged.csv is a table without 'share'"),
        (lambda frame: frame.drop(columns="top1"), "damaged.csv is a table without 'top1'"),
        (lambda frame: frame.assign(top1=None), "damaged.csv is a table in which 'top1' is empty"),
        (
            lambda frame: frame.assign(top1=["n/a", *frame.top1[1:]]),
            "damaged.csv is a table with the text 'n/a' for top1 in row 1",
        ),
    ],
)
def test_compare_names_the_file_and_the_column_that_is_damaged(
    curves: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    (tmp_path / "table1.csv").write_text(TABLE)
    damage(read_results(curves)).to_csv(tmp_path / "damaged.csv", index=False)
    whole, damaged = str(curves), str(tmp_path / "damaged.csv")
    command = ["compare", "--paper", str(tmp_path), whole, damaged, "--as-model", "gpt2-xl"]
    assert message in refused_line(*command)


def test_compare_says_which_model_it_does_not_know(curves: Path, tmp_path: Path) -> None:
    (tmp_path / "table1.csv").write_text(TABLE)
    said = refused_line("compare", "--paper", str(tmp_path), str(curves))
    assert "results are of ra-lens-demo" in said
    assert "--as-model" in said


@pytest.mark.parametrize(
    "arguments",
    [["rank"], ["perturb"], ["patch", "--shots"], ["compare"], ["rank", "--split", "x"]],
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


def test_help_names_the_options_and_is_fast() -> None:
    commands = ("rank", "perturb", "patch", "ablate-patch", "knockout", "compare")
    texts = printed_without(HEAVY, *([command, "--help"] for command in commands))
    for command, text in zip(commands, texts, strict=True):
        assert ("--paper" if command == "compare" else "--shots") in text, command


def test_demonstrations_are_shared_where_that_is_asked(model: Any, tmp_path: Path) -> None:
    out, small = tmp_path / "a.csv", {"shots": [2], "n_test": 6, "progress": False}
    command = ["--shots", "2", "--demonstrations", "shared", "-o", str(out)]
    done("perturb", *SMALL, *command, "--methods", "index", "--n-rank", "3", "--step", "0.5")
    wanted = perturbation_test(
        model, "antonym", methods="index", n_rank=3, step=0.5, demonstrations="shared", **small
    )
    found = read_results(out)
    assert list(found["demonstrations"]) == list(wanted["demonstrations"]) == ["shared"] * 6
    assert found["logit_diff"].tolist() == pytest.approx(wanted["logit_diff"].tolist(), abs=1e-4)
    assert call("perturb", *SMALL, "--demonstrations", "mine").exit_code == 2
