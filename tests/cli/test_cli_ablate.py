"""`ra-lens ablate-patch`: what it prints is what the function gives."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from command_line import call, refused_line
from ra_lens import load_demo_model
from ra_lens.experiments import ablation_effects, patching_ablations, read_results
from ra_lens.text import scale_name, short

COMMAND = ["ablate-patch", "-t", "capitalize", "--ablations", "heads", "sign", "--n-mean", "3",
           "--n-test", "4", "--scales", "paper", "best", "--tried", "-3", "-30", "--each-question",
           "--head-shares", "0.25", "--methods", "index", "-q"]  # fmt: skip


@pytest.mark.every_model
def test_ablate_patch_prints_the_effects_and_goes_on_from_its_results(tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    result = call(*COMMAND, "--out", str(out))
    assert (result.exit_code, result.stderr) == (0, "")
    wanted = patching_ablations(
        load_demo_model(), "capitalize", ablations=["heads", "sign"], n_mean=3, n_test=4,
        scales=["paper", "best"], tried=(-3, -30), each_question=True, head_shares=0.25,
        methods="index", progress=False,
    )  # fmt: skip
    found = read_results(out)
    pd.testing.assert_frame_equal(found, wanted, check_exact=False, rtol=1e-4, atol=1e-5)
    effects = ablation_effects(found)
    lines = {line[:22].strip(): line[22:] for line in result.stdout.splitlines()}
    for variant, rows in effects[effects.ablation != "none"].groupby("variant"):
        said = lines[variant[:22].strip()]
        for _, row in rows.iterrows():
            scale = f" at {scale_name(row.scale_low)}" if row.scale_from == "best" else ""
            cell = f"{short(row.value)} {short(row.low)}–{short(row.high)}{scale}"
            assert cell in said, (variant, said)
            assert f"{row.kl:.2g}" in said
    assert short(effects.value.iloc[0]) in lines["unpatched"]
    facts = json.loads(call(*COMMAND, "--out", str(out), "--json").stdout)
    assert (facts["experiment"], facts["metric"], facts["level"]) == ("ablations", "top1", 0.9)
    assert (facts["n_mean"], facts["shots"]) == (3, [0])
    assert [row["variant"] for row in facts["variants"]] == effects.variant.tolist()
    assert [row["kl"] for row in facts["variants"]] == pytest.approx(effects.kl.tolist())
    assert facts["variants"][0]["minus_whole"] is None


@pytest.mark.every_model
def test_the_page_has_a_figure_for_each_number_of_examples(tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    result = call(*COMMAND[:-1], "--shots", "0", "1", "--quiet", "--figure", str(page))
    assert result.exit_code == 0, result.output
    html = page.read_text()
    for text in ("Ablations of attention patching: ra-lens-demo", "With 1 shot", "One sign of it"):
        assert text in html


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ablations", "layer"], "found --ablations layer; give some of layers, heads"),
        (["--scales", "-30"], "found --scales -30; give some of paper, best"),
        (["--tried", "x"], "found --tried x; give numbers"),
        (["--methods", "cm9"], "no ranking method 'cm9'"),
        (["--n-prompts", "25"], "found n_prompts=[25]"),
        (["--from-shots", "0"], "from_shots=0"),
    ],
)
def test_mistakes_in_its_own_options(options: list[str], message: str) -> None:
    assert message in refused_line("ablate-patch", "-t", "capitalize", *options, "-q")
