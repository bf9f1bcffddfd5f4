"""`--bos` and `--no-bos`: what stands in front of text, and where the commands record it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import call, refused_line
from ra_lens.experiments import read_results
from tiny_models import tokenizer, write_folder

# What the options reach is tested in test_front.py and test_default_front.py.
pytestmark = pytest.mark.every_model

FRONTS = [((), "<|endoftext|>"), (("--no-bos",), ""), (("--bos", "A:"), "A:")]
RANK = ("rank", "-t", "antonym", "--methods", "fa", "--shots", "0", "--n-rank", "2", "-q")
PERTURB = ("perturb", "-t", "antonym", "--methods", "index", "--shots", "0", "--n-rank", "2",
           "--n-test", "2", "--step", "0.5", "-q")  # fmt: skip
PATCH = ("patch", "-t", "antonym", "--shots", "0", "--n-mean", "2", "--n-test", "2",
         "--scales", "1", "--kinds", "pattern", "-q")  # fmt: skip


@pytest.mark.parametrize(("front", "token"), FRONTS)
def test_run_and_trace_read_it_and_say_so(front: tuple[str, ...], token: str) -> None:
    prompt = ("-p", "Q: Italy", *front)
    found = json.loads(call("run", *prompt, "--json").stdout)
    first = [token] if token else []
    assert (found["prepended"], found["tokens"][:-1]) == (token, [*first, "Q:"])
    assert f"{token or 'nothing'} prepended" in call("run", *prompt).stdout
    traced = json.loads(call("trace", *prompt, "--json").stdout)
    assert (traced["metadata"]["prepended"], traced["tokens"]) == (token, found["tokens"])


@pytest.mark.parametrize(
    ("front", "written"), [(("--no-bos",), "--no-bos"), (("--bos", "Q"), "--bos Q")]
)
def test_a_report_tells_the_command(front: tuple[str, ...], written: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    call("run", "-p", "Italy", *front, "-o", str(page))
    assert f"--prompt Italy {written}" in page.read_text("utf-8")


@pytest.mark.parametrize("command", [RANK, PERTURB, PATCH], ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("front", "value"), [((), None), (("--no-bos",), False), (("--bos", "Tokyo"), "Tokyo")]
)
def test_experiments_record_it(
    command: tuple[str, ...], front: tuple[str, ...], value: Any, tmp_path: Path
) -> None:
    out = tmp_path / "results.csv"
    result = call(*command, *front, "-o", str(out), "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["prepend_bos"] == value
    written = read_results(out)["prepend_bos"]
    assert written.isna().all() if value is None else set(written) == {value}


def test_check_tells_it_and_reads_its_prompt_with_it() -> None:
    told = call("check").stdout
    assert "\nIn front of text: '<|endoftext|>'\n" in told
    assert json.loads(call("check", "--json").stdout)["prepended"] == "<|endoftext|>"
    result = call("check", "-p", r"Q: Italy\nA: Rome", "-e", "--bos", r"\n")
    assert (result.exit_code, result.stderr) == (0, "")
    said = refused_line("check", "-p", "Q", "--bos", "Italy Rome")
    assert "found prepend_bos='Italy Rome', which is 2 tokens of ra-lens-demo" in said


@pytest.mark.parametrize(
    "command",
    [("run", "-p", "Q"), ("trace", "-p", "Q"), ("check",), RANK, PERTURB, PATCH],
    ids=lambda command: command[0],
)
def test_both_are_refused_and_so_is_no_token(command: tuple[str, ...]) -> None:
    said = refused_line(*command, "--bos", "Q", "--no-bos")
    assert "found --bos Q and --no-bos; give --bos with the token" in said
    assert "--bos" in refused_line(*command, "--bos", "")
    assert "--bos" in refused_line(*command, "--bos", "--no-bos")


def test_check_needs_a_text_for_it() -> None:
    assert "found --no-bos without a text for it. Add --prompt" in refused_line("check", "--no-bos")
    assert "found --bos without a text for it" in refused_line("check", "--bos", "Q")


@pytest.mark.parametrize("command", [("run",), ("trace",)], ids=lambda command: command[0])
def test_a_chat_token_by_default_is_told_once(command: tuple[str, ...], tmp_path: Path) -> None:
    folder = write_folder("llama", tmp_path / "chatty")
    own = tokenizer("llama")
    own.chat_template = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"
    own.save_pretrained(str(folder))
    given = (*command, "-m", str(folder), "-p", "w5 w6", "-o", str(tmp_path / "page.html"))
    said = call(*given).stderr
    assert said.count("warning: TransformerLens puts '<s>' in front of text for chatty") == 1
    assert said.count("\n") == 1
    assert call(*given, "--no-bos").stderr == call(*given, "--bos", "<s>").stderr == ""
