"""`ra-lens trace`: what it prints and writes, and which options go together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from command_line import call, refused_line
from ra_lens import run_with_ra, trace_paths
from ra_lens.errors import BadInput
from ra_lens.model import as_lens
from ra_lens.paths import trace_layers
from ra_lens.paths.page import MOST_PATHS
from ra_lens.prompts import read_prompts
from ra_lens.report.write import traces_of_run
from tiny_models import KINDS

PROMPT = "w5 w7 w9 w4 w6"


@pytest.fixture(scope="module")
def tiny(folder: Callable[..., Path]) -> str:
    return str(folder("gpt2"))


def test_it_prints_the_paths_in_words(tiny: str, shared: Any) -> None:
    result = call("trace", "-m", tiny, "-p", PROMPT, "--top", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    wanted = trace_layers(shared("gpt2", KINDS[0]), PROMPT, top_beam=3)
    flat = " ".join(result.stdout.split())
    for text in wanted.paths_text:
        assert text.rpartition(" (score")[0] in flat
    labels = ", ".join(f"L{layer}H{head}" for layer, head in wanted.heads(3))
    assert f"Heads on these paths: {labels}" in flat


def test_options_reach_the_trace(tiny: str, shared: Any) -> None:
    result = call(
        "trace", "-m", tiny, "-p", PROMPT, "--layer", "1", "--target-pos", "4", "--follow", "more",
        "-t", " w8", "--search", "beam", "--top-k", "3", "--min-attn", "0.01", "--agg-heads", "max",
        "--length-norm", "sqrt", "--json",
    )  # fmt: skip
    wanted = trace_paths(
        shared("gpt2", KINDS[0]), PROMPT, layer=1, target_pos=4, follow="more", target=" w8",
        search="beam", top_k=3, min_attn=0.01, agg_heads="max", length_norm="sqrt",
    )  # fmt: skip
    found = json.loads(result.stdout)
    assert found["metadata"] == json.loads(wanted.to_json())["metadata"]
    assert [b["positions"] for b in found["beams"]] == [list(b.positions) for b in wanted.beams]


def test_a_head_is_taken_as_it_is_printed(tiny: str, shared: Any) -> None:
    result = call(
        "trace", "-m", tiny, "-p", PROMPT, "--layer", "1", "--agg-heads", "L1H3", "--json"
    )
    wanted = trace_paths(shared("gpt2", KINDS[0]), PROMPT, layer=1, agg_heads=3)
    found = json.loads(result.stdout)
    assert [b["positions"] for b in found["beams"]] == [list(b.positions) for b in wanted.beams]
    assert found["metadata"]["agg_heads"] == 3


def test_a_page_is_written_where_it_says(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "paths.html"
    result = call("trace", "-m", tiny, "-p", PROMPT, "--layer=-1", "-o", str(path))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == f"Paths: {path}"
    assert '<div class="ra-paths">' in path.read_text(encoding="utf-8")


def test_more_paths_than_a_page_can_show_are_not_looked_for(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "paths.html"
    arguments = ["-m", tiny, "-p", PROMPT, "--json"]
    result = call("trace", *arguments, "--top", "100000", "-o", str(path))
    assert result.exit_code == 0
    assert result.stderr == (
        f"note: found --top 100000; these are the {MOST_PATHS} best paths, as many as a page can "
        "show. In Python, top_beam of trace_paths and trace_layers gives more.\n"
    )
    found = json.loads(result.stdout)
    assert len(found["beams"]) == found["metadata"]["top_beam"] == MOST_PATHS == 500
    assert path.stat().st_size < 2e6
    few = call("trace", *arguments, "--top", str(MOST_PATHS))
    assert few.stderr == ""
    assert json.loads(few.stdout)["beams"] == found["beams"]


def test_a_runs_report_shows_paths(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert call("run", "-m", tiny, "-p", PROMPT, "-t", "w8 w9", "-o", str(path)).exit_code == 0
    text = path.read_text(encoding="utf-8")
    assert "Paths to the last token" in text
    assert text.count('"title":"All layers: ') == 2


def test_a_report_without_paths_is_written_and_says_why(
    tiny: str, shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shared("gpt2", KINDS[0])
    prompt = read_prompts(as_lens(model), "w5", prepend_bos=False)
    _, ra = run_with_ra(model, prompt, target=" w8", progress=False)
    with pytest.raises(BadInput, match="found nothing to follow") as refused:  # one token
        traces_of_run(ra, model, prompt)
    monkeypatch.setattr("ra_lens.report.write.traces_of_run", Mock(side_effect=refused.value))
    path = tmp_path / "report.html"
    result = call("run", "-m", tiny, "-p", PROMPT, "-o", str(path))
    assert result.exit_code == 0
    assert result.stderr == f"note: the report shows no paths: {refused.value}\n"
    assert "Paths to the last token" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "3"], "--top-k, which is for one layer"),
        (["--length-norm", "sqrt"], "--length-norm, which is for one layer"),
        (["--layer", "last"], "--layer last; give a number or all"),
        (["--layer", "1", "--residual", "0.5"], "--residual with one layer"),
        (["--layer", "1", "--agg-heads", "sum"], "--agg-heads sum; give mean, max"),
        (["--layer", "1", "--agg-heads", "L2H3"], "agg_heads='L2H3', but the layer traced is 1"),
        (["--layer", "1", "--follow", "value_norm"], "--follow value_norm with one layer"),
        (["-o", "/nowhere/paths.html"], "no folder"),
        (["-o", "paths.json"], "a page is a file whose name must end in .html"),
        (["-o", ""], "found --output/-o '', which is empty"),
        (["--layer", ""], "found --layer '', which is empty"),
        (["--agg-heads", ""], "found --agg-heads '', which is empty"),
        (["--target-pos", "77"], "target_pos=77"),
    ],
)
def test_mistakes_are_one_line(tiny: str, arguments: list[str], message: str) -> None:
    assert message in refused_line("trace", "-m", tiny, "-p", PROMPT, *arguments)
