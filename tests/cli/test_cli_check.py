"""`ra-lens check`: the report of a model, as text and as JSON, and its exit code."""

from __future__ import annotations

import json
from typing import Any

import pytest

from command_line import call, refused_line
from ra_lens import check_model
from tiny_models import KINDS, N_LAYERS, OBSERVE_ONLY


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_is_that_of_check_model(kind: Any, folder: Any, fresh: Any) -> None:
    result = call("check", "--model", str(folder("opt")), "--kind", kind)
    assert (result.exit_code, result.stderr) == (0, "")
    model = fresh("opt", kind)
    model.cfg.model_name = folder("opt").name
    assert result.stdout == f"{check_model(model)}\n"
    found = json.loads(
        call("check", "--model", str(folder("opt")), "--kind", kind, "--json").stdout
    )
    route = "z" if ("opt", kind) in OBSERVE_ONLY else "pattern"
    assert [site["patches"] for site in found["sites"]] == [route] * N_LAYERS
    assert found["ok"] is True
    assert found["sites"][0]["scale"] == pytest.approx(6**-0.5)


def test_a_model_that_computes_something_else_is_told_by_the_exit_code(folder: Any) -> None:
    if "TransformerBridge" not in KINDS:
        pytest.skip("a model whose logits differ from Hugging Face's is one of the bridge's")
    where = str(folder("gpt2", scale_attn_weights=False))
    result = call("check", "--model", where, "--kind", "TransformerBridge")
    assert result.exit_code == 3
    assert "PROBLEM:" in result.stdout


def test_what_is_no_model_is_one_line() -> None:
    said = refused_line("check", "--model", "/nowhere/model")
    assert said.startswith("error: there is no folder")
