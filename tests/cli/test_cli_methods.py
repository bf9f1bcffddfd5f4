"""`ra-lens compare-methods`, on the embedded model."""

from __future__ import annotations

import json

from command_line import call, refused_line
from ra_lens import load_demo_model, load_task
from ra_lens.experiments import faithfulness, faithfulness_test, read_results

COMMAND = [
    "compare-methods", "--model", "demo", "-t", "antonym", "--shots", "0", "--methods", "michel",
    "atp", "ra", "--ablations", "zero", "--n-rank", "3", "--k", "4", "-q",
]  # fmt: skip


def test_it_prints_what_the_function_gives_and_keeps_every_prompt(tmp_path):
    out, page = tmp_path / "effects.parquet", tmp_path / "page.html"
    printed = call(*COMMAND, "-o", str(out), "--figure", str(page))
    assert printed.exit_code == 0, printed.output
    wanted = faithfulness_test(
        load_demo_model(), load_task("antonym"), methods=["michel", "atp", "ra"], shots=0,
        ablations="zero", n_rank=3, ks=4, progress=False,
    )  # fmt: skip
    again = faithfulness(read_results(out), ks=4)
    measures = ["method", "ablation", "spearman_signed", "spearman_abs", "precision_abs_4"]
    assert again[measures].equals(wanted[measures])
    best = wanted.sort_values("spearman_signed").iloc[-1]
    lines = printed.stdout.splitlines()
    [row] = [line for line in lines if line.startswith("AtP")]
    assert best["method"] == "atp" and f"{best['spearman_signed']:.2f}" in row and "3 + 3" in row
    assert lines[0].startswith("antonym, 0 shots: head zeroed")
    assert "Ranking methods: ra-lens-demo" in page.read_text(encoding="utf-8")
    told = json.loads(call(*COMMAND, "-o", str(out), "--json").stdout)  # found again
    ranked = {row["method"]: row["spearman_signed"] for row in told["agreement"]}
    assert ranked == dict(zip(wanted["method"], wanted["spearman_signed"], strict=True))


def test_what_it_cannot_do_is_one_line(tmp_path):
    assert "there is no ranking method 'nope'" in refused_line(
        "compare-methods", "-t", "antonym", "--methods", "nope"
    )
    assert "--ablations" in refused_line("compare-methods", "-t", "antonym", "--ablations", "half")


def test_numbers_of_heads_are_read_before_the_work(monkeypatch):
    monkeypatch.setattr("ra_lens.experiments.head_effect_table", None)
    assert "found ks=[4, 40] for a model of 32 heads" in refused_line(*COMMAND, "--k", "40")
    monkeypatch.setattr("ra_lens.cli.session.load", None)
    assert "found ks=0; give at least 1" in refused_line(*COMMAND, "--k", "0")
    assert "found seed=-1; give at least 0" in refused_line(*COMMAND, "--seed", "-1")
