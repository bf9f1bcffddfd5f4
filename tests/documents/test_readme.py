"""What the README promises a stranger: two commands, ten lines, pins for everything it installs."""

from __future__ import annotations

import re

import pytest

from documents import ROOT, blocks

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_are_there_and_name_what_exists():
    assert "python -m pip install -c constraints.txt -e . && ra-lens demo" in README
    assert 'python -m pip install -c constraints.txt -e ".[test]" && python -m pytest' in README
    for name in re.findall(r"`?((?:constraints|examples)[\w/]*\.(?:txt|py))`?", README):
        assert (ROOT / name).is_file(), name


def test_the_example_is_short_and_shows_its_output():
    (example,) = blocks(ROOT / "README.md", "python")
    assert example.code.count("\n") <= 13
    assert example.shown


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
