"""The command line: what it prints where, its exit codes, and what it leaves behind."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from rich.console import Console

from command_line import HEAVY, call, printed_without, refused_line
from made_caches import make
from ra_lens import run_with_ra
from ra_lens.cli import main, options, show
from ra_lens.cli.command import reported
from ra_lens.cli.session import hints, prepare, read_layers, read_text
from ra_lens.errors import BadInput
from ra_lens.experiments.perturbation import Rule
from ra_lens.head_maps import head_of_example
from ra_lens.model import ModelKind, as_lens
from ra_lens.patching import Where
from ra_lens.paths.result import Follow
from ra_lens.questions import Metric
from ra_lens.report import patched_predictions
from ra_lens.scales import SCALES
from ra_lens.tasks import SplitRule
from ra_lens.text import scale_name
from tiny_models import KINDS, N_HEADS, N_LAYERS, every_model

PROMPT = "w5 w7 w9 w4 w6"


@pytest.fixture(scope="module")
def tiny(folder: Callable[..., Path]) -> str:
    return str(folder("gpt2"))


# ---- results ------------------------------------------------------------------------------------


def test_run_prints_loss_heads_and_the_strongest_map(tiny: str, shared: Any) -> None:
    result = call("run", "-m", tiny, "-p", PROMPT, "-t", " w8", "--top", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    _, ra = run_with_ra(shared("gpt2", KINDS[0]), PROMPT, target=" w8")
    text = result.stdout
    assert f"{float(ra.loss):.4f}, −log p of the target" in text
    assert "“w8”" in text
    assert "top prediction" not in text
    assert "<|endoftext|>w5w7w9w4w6" in text
    lines = [line.split() for line in text.splitlines()]
    for rank, score in enumerate(ra.top_heads(3), start=1):
        assert [str(rank), score.label, f"{score.score:.4g}"] in [line[:3] for line in lines]
    top = head_of_example(ra, ra.top_heads(1)[0])
    assert f"Strongest map, {top.label}" in text
    cell = top.strongest(1)[0]
    arrows = [line for line in lines if "→" in line]
    for row, edge in zip(arrows, ra.top_edges(5), strict=False):
        assert row == [
            edge.label, edge.query_token.strip(), f"({edge.query})", "→", edge.key_token.strip(),
            f"({edge.key})", f"{edge.pattern:.3f}", f"{edge.effect:+.3g}",
            *(["is", "needed"] if edge.effect > 0 else ["is", "in", "the", "way"]),
        ]  # fmt: skip
    assert "loss (nats)" in text
    assert "looks at “<|endoftext|>”, where heads rest, are left out" in " ".join(text.split())
    assert arrows[5] == [
        top.tokens[cell.query], f"({cell.query})", "→", top.tokens[cell.key], f"({cell.key})",
        f"{-cell.ra:+.3g}", f"{cell.pattern:.3f}", cell.moves,
    ]  # fmt: skip
    assert "[" not in text


def test_without_a_target_it_says_whose_the_target_is(tiny: str) -> None:
    result = call("run", "-m", tiny, "-p", PROMPT)
    assert result.exit_code == 0
    flat = " ".join(result.stdout.split())
    assert "(the model's own top prediction; no target was given)" in flat


def in_another_process(*words: str) -> tuple[int, str, str]:
    [text] = printed_without(("plotly",), words)
    return 0, text, ""


def in_this_process(*words: str) -> tuple[int, str, str]:
    done = call(*words)
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("run", [in_this_process, *every_model(in_another_process)])
def test_json_is_all_that_is_on_standard_output(run: Any, tiny: str, shared: Any) -> None:
    code, out, told = run("run", "-m", tiny, "-p", PROMPT, "-t", " w8", "--json", "--top", "4")
    assert (code, told) == (0, "")
    found = json.loads(out)
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, PROMPT, target=" w8")
    assert found["ra_lens"] == version("ra-lens")
    assert found["model"] == {
        "name": Path(tiny).name, "kind": KINDS[0], "layers": list(range(N_LAYERS)),
        "n_heads": N_HEADS,
    }  # fmt: skip
    assert found["tokens"] == ["<|endoftext|>", *PROMPT.split()]
    assert (found["prompt"], found["target"]) == (PROMPT, "w8")
    assert (found["target_is_top_prediction"], found["report"]) == (False, None)
    assert found["loss"] == pytest.approx(float(ra.loss), rel=1e-5)
    heads = [(head["layer"], head["head"]) for head in found["top_heads"]]
    assert heads == [(score.layer, score.head) for score in ra.top_heads(4)]
    values = ra["ra", heads[0][0]][0, heads[0][1]]
    first = found["strongest_cells"][0]
    assert abs(first["ra"]) == pytest.approx(values.abs().max().item(), rel=1e-4)
    assert first["ra"] == pytest.approx(values[first["query"], first["key"]].item(), rel=1e-4)
    assert first["descent_wants"] == ("more" if first["ra"] < 0 else "less")
    assert first["key_token"] == found["tokens"][first["key"]]
    assert found["loss_unit"] == "nats"
    edges = [(e["layer"], e["head"], e["query"], e["key"]) for e in found["top_edges"]]
    wanted = ra.top_edges(5)
    assert edges == [(e.layer, e.head, e.query, e.key) for e in wanted]
    for one, edge in zip(found["top_edges"], wanted, strict=True):
        assert one["label"] == edge.label
        assert one["loss_if_blocked"] == pytest.approx(edge.effect, rel=1e-4)
        kinds = ("pattern", "pattern_grad")
        a, grad = (ra[kind, edge.layer][0, edge.head, edge.query] for kind in kinds)
        without = a.clone()
        without[edge.key] = 0
        change = ((without / without.sum() - a) * grad).sum().item()  # done, where L is linear
        assert one["loss_if_blocked"] == pytest.approx(change, rel=1e-3)
        assert one["pattern"] == pytest.approx(a[edge.key].item(), rel=1e-4)
        assert one["query_token"] == found["tokens"][edge.query]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_kind_reach_the_run(tiny: str, kind: str) -> None:
    result = call("run", "-m", tiny, "-p", PROMPT, "--layers", "0,-1", "--kind", kind, "--json")
    found = json.loads(result.stdout)
    assert found["model"]["layers"] == [0, N_LAYERS - 1]
    assert found["model"]["kind"] == kind


def test_a_report_is_written_where_it_says(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    result = call("run", "-m", tiny, "-p", PROMPT, "-t", "w8 w9", "-o", str(path))
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, f"Report: {path}")
    assert os.listdir(tmp_path) == ["out.html"]
    text = path.read_text()
    assert text.count("data-edge=") == 10
    assert f"ra-lens run --model {tiny} --prompt &#x27;{PROMPT}&#x27; --target &#x27;w8 w9" in text
    assert "mean of −log p" in text


def test_several_prompts_go_into_one_report(tiny: str, shared: Any, tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    texts, targets = ["w5 w7 w9", "w4 w6"], [" w8", " w9"]
    words = ["-p", texts[0], "-p", texts[1], "-t", targets[0], "-t", targets[1]]
    result = call("run", "-m", tiny, *words, "-o", str(path), "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    _, ra = run_with_ra(shared("gpt2", KINDS[0]), texts, target=targets)
    assert [one["prompt"] for one in found["prompts"]] == texts
    losses = [one["loss"] for one in found["prompts"]]
    assert losses == pytest.approx(ra.loss.tolist(), rel=1e-5)
    assert [h["label"] for h in found["top_heads"]] == [s.label for s in ra.top_heads(10)]
    cell, norms = found["prompts"][1]["strongest_cells"][0], ra.norms()[1]
    assert (cell["layer"], cell["head"]) == divmod(int(norms.argmax()), N_HEADS)
    for one, edges in zip(found["prompts"], ra.top_edges(5).by_example(), strict=True):
        told = [(e["label"], e["query"], e["key"]) for e in one["top_edges"]]
        assert told == [(e.label, e.query, e.key) for e in edges]
    values = ra["ra", cell["layer"]][1, cell["head"]]
    assert cell["ra"] == pytest.approx(values[cell["query"], cell["key"]].item(), rel=1e-4)
    text = path.read_text()
    assert "prompt 2 of 2" in text
    assert text.count("What comes next") == 2
    printed = call("run", "-m", tiny, *words).stdout
    for wanted in ("Prompt 1", "Prompt 2", "mean of 2 prompts"):
        assert wanted in printed


def test_a_prompt_can_come_from_standard_input(tiny: str) -> None:
    result = call("run", "-m", tiny, "-p", "-", "--json", text=PROMPT + "\n")
    assert json.loads(result.stdout)["prompt"] == PROMPT


@pytest.mark.parametrize("before", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r"])
def test_text_is_read_without_byte_order_mark_and_with_newlines(
    before: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(f"{before}wé{end}w7{end}".encode()), encoding="latin-1")
    monkeypatch.setattr("sys.stdin", stream)
    assert read_text("-", escapes=False) == ("wé\nw7" if end else "wéw7")
    assert read_text(f"{before}w5", escapes=False) == "w5"


def test_a_byte_order_mark_changes_no_loss(tiny: str) -> None:
    result = call("run", "-m", tiny, "-p", "-", "--json", text=b"\xef\xbb\xbf" + PROMPT.encode())
    assert result.stdout == call("run", "-m", tiny, "-p", PROMPT, "--json").stdout


NO_UTF8 = [
    ("w5 é".encode("latin-1"), "text that is not UTF-8 (byte 0xe9 at place 3). Convert"),
    ("w5 é".encode("utf-16"), "text that is not UTF-8 but UTF-16, by its byte order mark. Convert"),
    ("w5 é".encode("utf-32"), "text that is not UTF-8 but UTF-32"),
    ("w5 é".encode("utf-16-le"), "a zero byte at place 1, which is in no text: it may be UTF-16"),
    (b"w5 \xed\xa0\x80", "text that is not UTF-8 (byte 0xed at place 3)"),
]


@pytest.mark.parametrize(("raw", "told"), NO_UTF8)
def test_standard_input_that_is_no_utf8_is_told(raw: bytes, told: str) -> None:
    for command in (["run", "-t", "w5"], ["trace"]):
        said = refused_line(*command, "-p", "-", text=raw)
        assert said.startswith(f"error: standard input: found {told}")


def test_a_closed_standard_input_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(BadInput, match=r"standard input is closed\. Give the text"):
        read_text("-", escapes=False)


@pytest.mark.parametrize(
    ("arguments", "option", "place"),
    [
        (["run", "-p", "caf\udce9"], "-p", 3),
        (["run", "-pcaf\udce9"], "-p", 5),
        (["run", "-p", PROMPT, "--target=\udce9"], "--target", 9),
        (["run", "-p", PROMPT, "-o", "caf\udce9.html"], "-o", 3),
        (["trace", "-p", PROMPT, "--model", "\udce9"], "--model", 0),
        (["rank", "-t", "antonym", "synonym\udce9"], "-t", 7),
        (["patch", "-t", "antonym", "--separator", "\udce9"], "--separator", 0),
        (["compare", "caf\udce9.csv"], "an argument", 3),
    ],
)
def test_words_whose_bytes_are_no_utf8_are_told(
    arguments: list[str], option: str, place: int
) -> None:
    said = refused_line(*arguments)
    told = f"error: found text that is not UTF-8 as {option} (byte 0xe9 at place {place} of "
    assert said.startswith(told)
    assert said.endswith("Give it in UTF-8.\n")


def test_half_a_character_of_an_option_is_told() -> None:
    command = [sys.executable, "-m", "ra_lens.cli", "run", "-p", b"caf\xe9"]
    told = subprocess.run(command, capture_output=True, check=False)
    assert (told.returncode, told.stdout) == (2, b"")
    assert told.stderr.startswith(
        b"error: found text that is not UTF-8 as -p (byte 0xe9 at place 3"
    )
    told = "as -p (half a character at place 3 of 'w5 \\ud83d')"
    assert told in refused_line("run", "-p", "w5 \ud83d")


def test_a_second_bos_is_told_once_in_all_that_a_command_does(tiny: str, tmp_path: Path) -> None:
    path = str(tmp_path / "out.html")
    result = call("run", "-m", tiny, "-p", "<|endoftext|> w5", "-t", "w8", "-o", path, "--json")
    assert result.exit_code == 0
    assert result.stderr.count("warning: prompt 0 begins with '<|endoftext|>'") == 1
    assert json.loads(result.stdout)["tokens"] == ["<|endoftext|>"] * 2 + ["w5"]


@pytest.mark.parametrize("command", ["run", "trace"])
def test_words_the_tokenizer_does_not_know_are_named(tiny: str, command: str) -> None:
    result = call(command, "-m", tiny, "-p", "w5 nope w6 [red] nope", "--json")
    assert result.exit_code == 0
    json.loads(result.stdout)
    assert result.stderr == (
        "warning: the model does not know 'nope', '[red]'; its tokenizer reads them as <pad>.\n"
    )


def test_a_tokenizer_whose_unknown_token_is_its_end_knows_every_word(shared: Any) -> None:
    model = shared("gpt2", KINDS[0])
    lens = as_lens(model)
    assert lens.unknown_words("nope w5") == ["nope"]
    known = model.tokenizer.unk_token
    model.tokenizer.unk_token = model.tokenizer.eos_token
    try:
        assert lens.unknown_words("nope w5") == []
    finally:
        model.tokenizer.unk_token = known


# ---- the terminal -------------------------------------------------------------------------------


def printed(ra: Any, model: Any, width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    consoles: list[Console] = []

    def console(**options: Any) -> Console:
        consoles.append(Console(width=width, record=True, file=open(os.devnull, "w"), **options))  # noqa: SIM115
        return consoles[-1]

    monkeypatch.setattr(show, "Console", console)
    show.print_run(ra, model, top=3)
    with consoles[0].file:
        return consoles[0].export_text()


def test_the_map_is_drawn_where_it_fits(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ra = shared("gpt2", KINDS[0]), make()
    text = printed(ra, model, 80, monkeypatch)
    rows = text[text.index("Rows: from (query)") :].splitlines()
    maps = head_of_example(ra, ra.top_heads(1)[0])
    assert rows[1].split() == ["<|end|>", "·Paris", "⏎", "·Paris", "<b>&$x$"]
    largest = abs(maps.strongest(1)[0].ra)
    for i, row in enumerate(rows[2:7]):
        cells = row.split()
        assert cells[:2] == [str(i), rows[1].split()[i]]
        for j, mark in enumerate(cells[2:]):
            share = -maps.ra[i, j] / largest
            tenths = round(10 * abs(share))
            digit = "X" if tenths == 10 else str(tenths)
            assert mark == ("·" if tenths == 0 else f"{'+' if share > 0 else '-'}{digit}")
        assert len(cells) == 2 + i + 1
    assert max(map(len, rows)) <= 80


def test_a_long_prompt_shows_its_strongest_entries_only(
    shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ra = make((tuple(f" w{i}" for i in range(60)),))
    text = printed(ra, shared("gpt2", KINDS[0]), 80, monkeypatch)
    assert "Rows: from" not in text
    assert sum("→" in line for line in text.splitlines()) == 5 + 10  # edges, entries of a head


def test_tokens_are_not_read_as_markup(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ra = make((("[red]", "[/]", "[link=x]y", ":smile:"),))
    text = printed(ra, shared("gpt2", KINDS[0]), 120, monkeypatch)
    assert "[red][/][link=x]y:smile:·t" in text
    assert "3 :smile:" in text


def test_a_gradient_of_zero_is_said(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(make(scale=0.0), shared("gpt2", KINDS[0]), 80, monkeypatch)
    assert "The gradient is 0 in every cell." in text


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", ""], "prompt 0 is empty"),
        (["-p", PROMPT, "-t", " nope"], "not a word that"),
        (["-p", PROMPT, "-t", ""], "empty text"),
        (["-p", " ".join(["w5"] * 40)], "reads at most 16"),
        (["-p", PROMPT, "--layers", "7"], r"found layers=[7]"),
        (["-p", PROMPT, "--layers", "x"], "found --layers 'x'"),
        (["-p", PROMPT, "--device", "nodevice"], "cannot use --device nodevice"),
        (["-p", PROMPT, "-o", "/nowhere/at/all.html"], "there is no folder /nowhere/at"),
        (["-p", PROMPT, "-o", "-"], "a report is a file whose name must end in .html"),
        (
            ["-p", PROMPT, "-o", "results.parquet"],
            "a report is a file whose name must end in .html",
        ),
        (["-p", PROMPT, "-o", "x" * 260 + ".html"], "File name too long. Give a shorter name."),
        (["-p", PROMPT, "-o", "~no-one/report.html"], "no home folder for its ~"),
        (["-p", PROMPT, "-o", ""], "found --output/-o '', which is empty"),
        (["-p", PROMPT, "-o", "--escapes"], "found --escapes where the value of --output/-o is"),
        (["-p", "--top"], "found --top where the value of --prompt/-p is needed"),
        (["-p", PROMPT, "-m", ""], "found --model/-m '', which is empty"),
        (["-p", PROMPT, "-m", "x" * 300], "could not load 'xxx"),
        (["-p", PROMPT, "-m", "~no-one/model"], "no home folder for its ~"),
        (["-p", PROMPT, "--layers", ""], "found --layers '', which is empty"),
        (["-p", PROMPT, "--device", ""], "found --device '', which is empty"),
        (
            ["-p", PROMPT, "--layers", "0-99999"],
            "found --layers '0-99999'; give numbers and rising",
        ),
        (["-p", PROMPT, "--layers", "0-9" + "9" * 5000], "'0-9999"),
        (["-p", PROMPT, "--layers", "0-9999"], "found layers=[3, 4, 5, 6, 7, 8, ...]; "),
        (["-p", PROMPT, "--layers", ",".join(map(str, range(9000)))], "found layers=[3, 4, 5, 6"),
        (["-p", "a", "-p", "b", "-p", "c", "-t", "x", "-t", "y"], "2 targets for 3 prompts"),
        (["-p", "-", "-t", "-"], "standard input can be read only once"),
        (["-p", PROMPT, "-m", "./missing"], "there is no folder './missing'"),
        (["-p", PROMPT, "-m", "/dev"], "has no config.json"),
        (["-p", PROMPT, "-m", "no-such-model"], "could not load 'no-such-model'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tiny: str, arguments: list[str], message: str) -> None:
    model = [] if "-m" in arguments else ["-m", tiny]
    said = refused_line("run", *model, *arguments, "--json")
    assert message in said
    assert len(said) < 1000


def test_a_long_error_keeps_its_beginning_and_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), reported(debug=False):
        raise BadInput(f"found {list(range(100_000))}; give one.")
    told = capsys.readouterr().err
    assert told.startswith("error: found [0, 1, 2")
    assert told.endswith("99999]; give one.\n")
    assert len(told) < 2100


FULL = "error: cannot write what is printed: No space left on device.\n"


@pytest.mark.parametrize(
    "arguments", [["run", "-p", PROMPT], ["run", "-p", PROMPT, "--json"], ["--version"], ["-h"]]
)
def test_what_finds_no_space_to_be_printed_on_is_one_error(
    tiny: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    model = ["-m", tiny] if arguments[0] == "run" else []
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "argv", ["ra-lens", *arguments, *model])
        with pytest.raises(SystemExit) as done:
            main()
        monkeypatch.undo()
    assert (done.value.code, capfd.readouterr().err) == (2, FULL)


def test_a_page_of_something_else_is_not_overwritten(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "results.html"
    path.write_bytes(b"PAR1 and more")
    for command in (["run", "-p", PROMPT], ["demo"], ["trace", "-p", PROMPT]):
        model = [] if command[0] == "demo" else ["-m", tiny]
        said = refused_line(*command, *model, "-o", str(path))
        assert re.search(r"the file there is not a (report|page)\. Give another", said)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"PAR1 and more", ["results.html"])


def test_a_value_that_looks_like_an_option_can_be_meant(tiny: str) -> None:
    result = call("run", "-m", tiny, "--prompt=--top", "--json")
    assert json.loads(result.stdout)["prompt"] == "--top"


@pytest.mark.parametrize("damage", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_model_folder_is_one_error(tiny: str, tmp_path: Path, damage: str) -> None:
    for file in Path(tiny).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for content in (b"", b"{}", b"\xff\xfe\x00", (tmp_path / damage).read_bytes()[:500]):
        (tmp_path / damage).write_bytes(content)
        for kind in KINDS:
            said = refused_line("run", "-m", str(tmp_path), "-p", PROMPT, "--kind", kind)
            assert str(tmp_path) in said


def test_a_path_that_cannot_be_written_is_found_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ra_lens.cli.session.load", lambda *a, **k: pytest.fail("loaded"))
    for command in (["run", "-p", PROMPT], ["demo"]):
        assert "is a folder" in refused_line(*command, "-o", str(tmp_path))


def test_a_run_that_fails_leaves_the_report_of_before(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    path.write_text("<p>old")
    refused_line("run", "-m", tiny, "-p", PROMPT, "-t", " nope", "-o", str(path))
    assert (path.read_text(), os.listdir(tmp_path)) == ("<p>old", ["out.html"])


def test_the_unexpected_exits_1_and_shows_where_on_demand(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("ra_lens.cli.session.load", broken)
    result = call("run", "-m", tiny, "-p", PROMPT)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "error: ZeroDivisionError: two lines (unexpected; --debug shows where)\n"
    )
    result = call("run", "-m", tiny, "-p", PROMPT, "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_debug_shows_the_traceback_of_a_mistake_too(tiny: str) -> None:
    result = call("run", "-m", tiny, "-p", "", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: prompt 0 is empty")


@pytest.mark.parametrize("arguments", [["run"], ["run", "-p", "x", "--top", "0"], ["nope"], []])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


def test_nothing_is_left_switched_off(tiny: str) -> None:
    import logging

    from transformers.utils import logging as bars

    before = (logging.root.manager.disable, bars.is_progress_bar_enabled())
    call("run", "-m", tiny, "-p", PROMPT)
    call("run", "-m", "/dev", "-p", PROMPT)
    assert (logging.root.manager.disable, bars.is_progress_bar_enabled()) == before


# ---- reading ------------------------------------------------------------------------------------


def test_layers_are_numbers_and_ranges() -> None:
    assert read_layers(None) is None
    assert read_layers("3") == [3]
    assert read_layers("0, 5-7,-1") == [0, 5, 6, 7, -1]
    for wrong in ("", "a", "1-", "1..2", "1,,2"):
        with pytest.raises(BadInput, match="found --layers"):
            read_layers(wrong)


def test_escapes_are_read_when_asked() -> None:
    assert read_text(r"Q: a\nA:\t\\n", escapes=True) == "Q: a\nA:\t\\n"
    assert read_text(r"Q: a\nA:", escapes=False) == r"Q: a\nA:"


def test_slips_of_the_shell_are_pointed_out() -> None:
    assert hints("Q: a\nA:", " b", escapes=False) == []
    assert "add -e" in hints(r"Q: a\nA:", " b", escapes=False)[0]
    assert hints(r"Q: a\nA:", " b", escapes=True) == []
    assert "no leading space" in hints("the city of", "Paris", escapes=False)[0]
    assert hints("the city of ", "Paris", escapes=False) == []


# ---- help ---------------------------------------------------------------------------------------


def test_help_is_fast() -> None:
    calls = [["--help"], ["run", "--help"], ["demo", "-h"], ["--version"]]
    for words, text in zip(calls, printed_without(HEAVY, *calls), strict=True):
        assert "ra-lens" in text, words


def test_choices_are_those_of_the_library() -> None:
    assert get_args(options.Kind) == get_args(ModelKind)
    assert get_args(options.Metric) == get_args(Metric)
    assert get_args(options.AucRule) == get_args(Rule)
    assert get_args(options.Split) == get_args(SplitRule)
    assert get_args(options.Where) == get_args(Where)
    assert set(get_args(options.Follow)) == set(get_args(Follow))


def test_version_is_that_of_the_package() -> None:
    assert call("--version").stdout == f"ra-lens {version('ra-lens')}\n"


def test_every_option_is_in_the_help() -> None:
    [text] = printed_without(HEAVY, ["run", "--help"], env={**os.environ, "COLUMNS": "140"})
    for option in ("--model", "--prompt", "--target", "--top", "--layers", "--scale", "--at",
                   "--kind", "--device", "--json", "--output", "--debug", "--escapes"):  # fmt: skip
        assert option in text


# ---- demo ---------------------------------------------------------------------------------------


@pytest.mark.every_model  # to import all that TransformerLens does takes seconds
def test_demo_writes_its_report_offline(tmp_path: Path) -> None:
    block = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    # Its report needs no plotly either.
    [text] = printed_without(
        ("plotly",), ["demo"], before=block, cwd=tmp_path, env=env, timeout=120
    )
    assert os.listdir(tmp_path) == ["ra_report.html"]
    assert f"Report: {tmp_path / 'ra_report.html'}" in text
    assert "A patched prediction" in text
    assert "A patched prediction" in (tmp_path / "ra_report.html").read_text()


def test_local_models_keep_hugging_face_off_the_network(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model, offline in (("demo", "1"), (tiny, "1"), ("gpt2", None)):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        prepare(model, None)
        assert os.environ.get("HF_HUB_OFFLINE") == offline, model


def test_the_patched_prediction_is_what_the_hooks_give() -> None:
    from ra_lens import load_demo_model, load_task
    from ra_lens.report.predictions import patched_prediction

    model: Any = load_demo_model(device="cpu")
    found = patched_prediction(model, averaged=6, tested=5, scale=-3.0)
    prompts = load_task(found["task"]).sample(11)
    texts, answers = [p.text for p in prompts], [p.answer for p in prompts]
    _, ra = run_with_ra(model, texts[:6], target=answers[:6])
    with torch.no_grad():
        before = model(model.to_tokens(texts[6:]))[:, -1]
        with model.hooks(fwd_hooks=ra.mean().patch_hooks(scale=-3.0)):
            after = model(model.to_tokens(texts[6:]))[:, -1]
    ids = torch.tensor([model.to_single_token(answer) for answer in answers[6:]])
    losses = -before.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert bool((losses > 0.3).all())
    shown = int(losses.argsort()[2])  # the median of five, all of which are open
    assert (found["prompt"], found["answer"]) == (texts[6 + shown], answers[6 + shown])
    assert (found["scale"], found["scale_found"]) == (-3.0, False)
    for logits, one, accuracy in (
        (before, found["before"], found["accuracy_before"]),
        (after, found["after"], found["accuracy_after"]),
    ):
        assert one["probability"] == pytest.approx(
            logits[shown].softmax(-1)[ids[shown]].item(), rel=1e-3, abs=1e-7
        )
        assert one["rank"] == 1 + int((logits[shown] > logits[shown, ids[shown]]).sum())
        assert accuracy == pytest.approx((logits.argmax(-1) == ids).float().mean().item())
    assert found["before"]["probability"] != found["after"]["probability"]


def test_the_scale_of_the_patched_prediction_is_found_on_the_questions_averaged() -> None:
    from ra_lens import load_demo_model, load_task
    from ra_lens.report.predictions import as_section, patched_prediction
    from ra_lens.scales import SCALES

    model: Any = load_demo_model(device="cpu")
    found = patched_prediction(model, averaged=4, tested=3)
    prompts = load_task(found["task"]).sample(4)
    texts, answers = [p.text for p in prompts], [p.answer for p in prompts]
    _, ra = run_with_ra(model, texts, target=answers)
    ids = torch.tensor([[model.to_single_token(answer)] for answer in answers])
    losses: dict[float, float] = {}
    for scale in SCALES:
        with torch.no_grad(), model.hooks(fwd_hooks=ra.mean().patch_hooks(scale=scale)):
            logits = model(model.to_tokens(texts))[:, -1]
        losses[scale] = -float(logits.log_softmax(-1).gather(1, ids).mean())
    assert found["scale"] == min(losses, key=lambda scale: losses[scale])
    assert found["prompt"] not in texts
    (note,) = as_section(found).notes
    assert "was found on the 4 questions averaged" in note


def test_the_question_of_the_demo_is_a_typical_open_one() -> None:
    from ra_lens import load_demo_model, load_task
    from ra_lens.report.predictions import demo_prompt, typical_open

    def of(*losses: float) -> int:
        return typical_open(torch.tensor(losses, dtype=torch.float64).neg().exp())

    assert of(0.1, 5.0, 0.2, 0.4, 2.0) == 4  # 0.4, 2 and 5 are open
    assert of(0.1, 5.0, 0.4) == 2
    assert of(0.1, 0.29, 0.2) == 1  # none is open: the nearest to it
    model: Any = load_demo_model(device="cpu")
    prompts = load_task("choose_middle_of_3").sample(48, shots=1, seed=0)
    losses: list[float] = []
    with torch.no_grad():
        for prompt in prompts:
            log_p = model(model.to_tokens(prompt.text))[0, -1].log_softmax(-1)
            losses.append(-float(log_p[model.to_single_token(prompt.answer)]))
    still_open = sorted(loss for loss in losses if loss > 0.3)
    wanted = prompts[losses.index(still_open[(len(still_open) - 1) // 2])]
    assert demo_prompt(model) == wanted


def test_demo_opens_with_an_answer_that_a_patch_changes(tmp_path: Path) -> None:
    result = call("demo", "-o", str(tmp_path / "demo.html"), "--json")
    facts = json.loads(result.stdout)
    assert facts["loss"] > 0.3
    before, after = facts["own_patch"]["before"], facts["own_patch"]["after"]
    assert before["rank"] > 1
    assert after["rank"] == 1
    assert facts["patched"]["accuracy_after"] > facts["patched"]["accuracy_before"]
    text = call("demo", "-o", str(tmp_path / "demo.html")).stdout
    flat = " ".join(text.split())
    assert "those whose loss is above 0.3 are open; this is the one of their median loss" in flat
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert "those whose loss is above 0.3 are open" in page
    assert '<svg class="scales"' in page


def test_run_patches_each_prompt_at_its_best_scale_and_says_so(tiny: str, shared: Any) -> None:
    prompts = [PROMPT, "w9 w8 w7"]
    words = ["run", "-m", tiny, "-p", prompts[0], "-p", prompts[1], "-t", " w8"]
    model = shared("gpt2", KINDS[0])
    _, ra = run_with_ra(model, prompts, target=" w8")
    wanted = patched_predictions(model, prompts, ra, target=" w8")
    found = json.loads(call(*words, "--json").stdout)["prompts"]
    for one, patched in zip(found, wanted, strict=True):
        own = one["own_patch"]
        assert (own["scale"], own["at"]) == (patched.scale, "pattern")
        assert own["after"]["probability"] == pytest.approx(patched.after.target, rel=1e-4)
        assert own["before"]["top"][0]["token"] == patched.before.top[0][0]
        assert [row["scale"] for row in own["scales"]] == list(SCALES)
        assert patched.found is not None
        losses = [row["loss"] for row in own["scales"]]
        assert losses == pytest.approx(patched.found.losses.tolist(), rel=1e-4)
    text = call(*words).stdout
    for patched in wanted:
        scale = scale_name(patched.scale)
        assert f"Patched: R times {scale} added to the pattern of every head" in text
    assert "the smallest loss of 32 scales" in text


def test_a_scale_is_taken_or_no_patch_made_where_that_is_asked_for(
    tiny: str, tmp_path: Path
) -> None:
    words = ["run", "-m", tiny, "-p", PROMPT, "-t", " w8"]
    own = json.loads(call(*words, "--scale", "-3", "--at", "scores", "--json").stdout)["own_patch"]
    assert (own["scale"], own["at"]) == (-3.0, "scores")
    assert "scales" not in own
    path = tmp_path / "none.html"
    result = call(*words, "--scale", "none", "-o", str(path))
    assert "Patched" not in result.stdout
    page = path.read_text(encoding="utf-8")
    assert "What comes next" not in page
    assert "--scale none" in page
    assert "own_patch" not in json.loads(call(*words, "--scale", "none", "--json").stdout)
    for wrong in ("most", "nan", "inf"):
        line = refused_line(*words, "--scale", wrong)
        assert f"found --scale {wrong}; give best, a number such as -30, or none." in line


def test_a_task_without_enough_questions_is_refused() -> None:
    from ra_lens import load_demo_model
    from ra_lens.report.predictions import patched_prediction

    with pytest.raises(BadInput, match="leaves none to test"):
        patched_prediction(load_demo_model(device="cpu"), averaged=500)


def test_auto_lays_a_model_over_all_gpus(monkeypatch):
    from ra_lens.cli import session

    given: dict[str, Any] = {}
    monkeypatch.setattr(session, "load_model", lambda _name, **options: given.update(options))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        BadInput, match=r"found --device auto, and torch sees no GPU\. Try --device"
    ):
        session.prepare("gpt2", "auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    session.prepare("gpt2", "auto")
    session.load("gpt2", None, "auto", debug=False)
    assert (given["n_devices"], given["device"]) == (3, None)
    session.load("gpt2", None, "cuda:1", debug=False)
    assert given.pop("device") == "cuda:1"
