"""`ra-lens head`: what it prints and writes of one head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import call, printed_without, refused_line
from ra_lens import run_with_ra
from ra_lens.steps import pulls
from ra_lens.vjp import WEIGHTS, weight_gradient
from tiny_models import KINDS

PROMPT = "w5 w7 w9 w4 w6"


@pytest.fixture(scope="module")
def tiny(folder: Callable[..., Path]) -> str:
    return str(folder("gpt2"))


@pytest.fixture(scope="module")
def ra(shared: Any) -> Any:
    model = shared("gpt2", KINDS[0])
    return run_with_ra(model, PROMPT, target=" w8", vectors=True, progress=False)[1]


def test_it_prints_edges_pairs_words_and_gradients(tiny: str, ra: Any) -> None:
    result = call("head", "L1H2", "-m", tiny, "-p", PROMPT, "-t", " w8", "--top", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    rank = 1 + int((ra.norms() > ra.norms()[0, 1, 2]).sum())
    flat = " ".join(result.stdout.split())
    assert f"‖R‖ {ra.norms()[0, 1, 2]:.4g}, rank {rank} of 12" in flat
    assert "layer 1, head 2 of 4" in flat
    found = pulls(ra, "L1H2", k=3)
    rows = [line for line in lines if line and line[-1] in ("together", "apart")]
    for row, one in zip(rows, found, strict=True):
        wanted = [
            one.query_token.strip(), f"({one.query})", "→", one.key_token.strip(), f"({one.key})",
            f"{one.ra:+.3g}", f"{one.product:.4g}", f"{one.cosine:.3f}",
            "together" if one.together else "apart",
        ]  # fmt: skip
        assert row == [word.replace("-", "−") for word in wanted]
    for weight in WEIGHTS:
        norm = weight_gradient(ra, weight, "L1H2").norm
        assert [f"∂L/∂{weight}", f"{norm:.4g}"] in [line[:2] for line in lines]
    for words in ("should write (−e)", "tells who looks (v)", "Edges it matters for"):
        assert words in flat
    assert "Not here" not in flat


def test_json_is_all_that_is_on_standard_output(tiny: str, ra: Any) -> None:
    result = call("head", "top", "-m", tiny, "-p", PROMPT, "-t", " w8", "--json", "--top", "4")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    head = ra.top_heads(1)[0]
    assert found["head"]["label"] == head.label
    assert found["head"]["ra_norm"] == pytest.approx(head.score, rel=1e-5)
    assert (found["head"]["rank"], found["head"]["among"]) == (1, 12)
    assert (found["prompt"], found["target"], found["page"]) == (PROMPT, "w8", None)
    assert found["missing"] == {}
    effects = ra["knockout", head.layer][0, head.head]
    for edge in found["edges"]:
        value = effects[edge["query"], edge["key"]].item()
        assert edge["loss_if_blocked"] == pytest.approx(value, rel=1e-4)
        assert edge["key_token"] == found["tokens"][edge["key"]]
        assert edge["query_token"] == found["tokens"][edge["query"]]
    for pair, one in zip(found["pulls"], pulls(ra, head, k=4), strict=True):
        assert (pair["query"], pair["key"]) == (one.query, one.key)
        assert pair["cosine"] == pytest.approx(one.cosine, abs=1e-5)
        assert pair["descent_moves"] == ("together" if one.ra < 0 else "apart")
    assert [one["weight"] for one in found["weights"]] == list(WEIGHTS)
    assert all(sum(one["shares"]) == pytest.approx(1, rel=1e-4) for one in found["weights"])
    assert 0 < sum(found["latent_variance"]) <= 1
    kinds = {one["kind"] for one in found["vocabulary"]}
    assert {"z", "z_step", "value", "value_step", "query", "key"} <= kinds


def test_a_page_is_written_where_it_says(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "head.html"
    result = call("head", "L0H1", "-m", tiny, "-p", PROMPT, "--no-bos", "-o", str(path))
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == f"Page: {path}"
    text = path.read_text(encoding="utf-8")
    assert "<h1>Head L0H1 of" in text
    assert f"ra-lens head L0H1 --model {tiny} --prompt &#x27;{PROMPT}&#x27; --no-bos" in text


@pytest.mark.every_model  # a process of its own, which loads torch
def test_without_a_page_no_figures_are_imported(tiny: str) -> None:
    [text] = printed_without(("plotly",), ["head", "top", "-m", tiny, "-p", PROMPT])
    assert "Edges it matters for" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["H1"], "found 'H1' among heads. Give (layer, head) pairs, labels like 'L3H5'"),
        (["L7H0"], "found head (layer=7, head=0); this cache has layers [0, 1, 2]"),
        (["L0H1", "-o", "x.txt"], ".html"),
        (["L0H1", "--bos", "<s>", "--no-bos"], "--bos <s> and --no-bos"),
        ([""], "HEAD '', which is empty"),
    ],
)
def test_mistakes_are_one_line(tiny: str, arguments: list[str], message: str) -> None:
    assert message in refused_line("head", *arguments, "-m", tiny, "-p", PROMPT)
