"""The script for a GPU runs from end to end, on a CPU and tiny shapes; its time is bounded."""

from __future__ import annotations

import json
from itertools import count

import pytest
import torch
from test_benchmarks import DOCS

from benchmarks import gpu, models
from benchmarks.devices import Host
from benchmarks.engine import FORWARD, NORMS, OURS, PLAIN
from benchmarks.figures import records
from benchmarks.floor import Shape, floor
from benchmarks.peers import AUTHORS
from benchmarks.recompute import RECOMPUTE
from tiny_models import KINDS

TINY = {
    "GPT-2 XL": Shape(2, 2, 2, 8, 16, 32, 7000, gated=False),
    "SmolLM2-135M": Shape(2, 2, 1, 8, 16, 32, 7000, gated=True),
}


def session(**changes):
    options = {"rounds": 3, "seconds": 100.0, "quick": True, **changes}
    return gpu.Session(Host(), **options)


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(gpu, "PACKAGE", "a_package_that_is_not_there")


@pytest.mark.every_model
def test_everything_is_measured(no_package, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "SHAPES", TINY)
    gpu.main(tmp_path, rounds=1, seconds=600.0, quick=True)
    kept = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    rows = records(kept["gpu"])
    found = {(r["shape"], r["dtype"], r["model"], r["batch × tokens"], r["route"]) for r in rows}
    for name in TINY:
        for kind in KINDS:
            for dtype in ("float32", "bfloat16"):
                own = {which[3:] for which in found if which[:3] == (name, dtype, kind)}
                of_both = {FORWARD, OURS, NORMS, PLAIN, RECOMPUTE}
                wanted = {(size, route) for size in ("2 × 8", "1 × 12") for route in of_both}
                wanted |= {("4 × 8", gpu.AUTO_ROUTE)}
                if (
                    dtype == "float32"
                ):  # in bfloat16 rounding hides whether blocks of rows are right
                    wanted |= {("1 × 12", gpu.ROWS)}
                if name == "SmolLM2-135M":
                    wanted |= {("2 questions", route) for route in (gpu.CM1, gpu.RA, gpu.CELL)}
                assert own - {("1 × 12", gpu.ROWS)} == wanted - {("1 × 12", gpu.ROWS)}
                assert own >= wanted
    if "TransformerBridge" in KINDS:
        assert ("GPT-2 XL", "bfloat16", "Hugging Face", "1 × 12", AUTHORS) in found
    for row in rows:
        assert row["s"] > 0
        assert (row["route"] == OURS) == (row["waits of the host"] is not None)
        if row["route"] in (OURS, NORMS) and row["model"] in KINDS:
            batch, n = map(int, row["batch × tokens"].split(" × "))
            ratio = row["over the forward pass"] / floor(
                TINY[row["shape"]], batch=batch, n_tokens=n
            )
            assert row["over the counted floor"] == pytest.approx(ratio)
            assert row["estimated, MB"] > 0
            assert row["share of the matrix products' peak"] > 0
    assert kept["skipped"][-1].startswith("SmolLM2-135M-Instruct, Q4_1: the package")
    assert len(kept["waits"]) == sum(row["route"] == OURS for row in rows)
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert text.startswith("## On a GPU\n\nno GPU, torch")
    assert text.count("\n| ") == len(rows) + 1
    assert "the host's clock" in text


def test_no_time_is_no_row_and_what_is_left_out_is_said(no_package, tmp_path, capsys):
    gpu.main(tmp_path, rounds=1, seconds=0.0, quick=True)
    kept = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert kept["gpu"]["rows"] == []
    n = 3 * 2 * len(KINDS)
    assert len(kept["skipped"]) == n + 1
    assert kept["skipped"][0] == f"GPT-2 XL, float32, {KINDS[0]}: 0 s were left of 0"
    assert "Left out: GPT-2 XL, float32" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert f"0 rows in {tmp_path}; {n + 1} left out" in capsys.readouterr().out


def test_rounds_are_as_many_as_there_is_time_for():
    ran = []
    for seconds, rounds in ((100.0, 3), (6.0, 2), (2.5, 0)):
        ticks = count()
        one = session(seconds=seconds, clock=lambda ticks=ticks: float(next(ticks)))
        ran.clear()
        found = one.timed("a", lambda: ran.append(1))
        # The call before, one that is not counted, and the rounds.
        assert len(ran) == (rounds + 2 if rounds else 1)
        assert (found is None) == (rounds == 0)
        assert one.skipped == ([] if rounds else ["a: one call took 1.0 s of the 0 left"])


def test_what_cannot_run_is_left_out(monkeypatch):
    from ra_lens.errors import NotEnoughMemory

    def refused():
        raise NotEnoughMemory("too much. Use less.")

    one = session()
    case = gpu.Case("a", TINY["GPT-2 XL"], torch.float32, KINDS[0])
    assert gpu.of_route(one, case, (1, 8), "b", refused, None) is None
    assert one.skipped == [f"a, float32, {KINDS[0]}, 1 × 8, b: too much"]
    assert one.rows == []


def test_without_a_gpu_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = gpu.measure(rounds=1)
    assert found["rows"] == []
    assert found["how"].startswith("Not measured")
    kept = json.loads((DOCS / "performance.json").read_text(encoding="utf-8"))["gpu"]
    assert kept["columns"] == found["columns"]
    with pytest.raises(gpu.typer.BadParameter, match="found no GPU; --quick runs"):
        gpu.main(tmp_path)


@pytest.mark.every_model
@pytest.mark.parametrize("shape", TINY.values(), ids=list(TINY))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_are_made_in_their_shape(kind, shape, dtype):
    model = models.made(shape, kind, device="cpu", dtype=dtype)
    assert models.shape_of(model) == shape
    assert {p.dtype for p in torch.nn.Module.parameters(model)} == {dtype}
    assert not model.training


def test_large_shapes_are_those_of_the_models():
    # Published: 1.558 and 6.738 thousand million weights, GPT-2's embedding being its unembedding.
    xl, llama = gpu.SHAPES["GPT-2 XL"], gpu.SHAPES["Llama 7B"]
    assert (gpu.parameters(xl) - xl.unembedding) / 1e9 == pytest.approx(1.558, rel=0.003)
    assert gpu.parameters(llama) / 1e9 == pytest.approx(6.738, rel=0.001)
