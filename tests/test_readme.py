"""The README says what is true: its example runs and prints what stands below it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_prints_what_the_readme_shows(tmp_path):
    code, shown = re.search(
        r"## Ten lines.*?```python\n(.*?)```\n\n```text\n(.*?)```", README, re.S
    ).groups()
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    mine = ("RACache", "  ", "[", "0.")
    printed = [line for line in run.stdout.splitlines() if line.startswith(mine)]
    assert printed == shown.splitlines()
    assert list(tmp_path.iterdir()) == []


def test_the_experiments_of_the_readme_run(tmp_path):
    section = README.partition("## The paper's experiments")[2]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    areas = {
        tuple(line.split()[1:3]): float(line.split()[3])
        for line in run.stdout.splitlines()
        if re.match(r"\d", line)
    }
    assert set(areas) == {
        *((method, way) for method in ("ra", "cm1") for way in ("forward", "reversed")),
        ("random", "none"),
    }
    assert areas["cm1", "forward"] > areas["random", "none"] > areas["cm1", "reversed"]


def test_the_two_commands_are_there_and_name_what_exists():
    assert "python -m pip install -c constraints.txt -e . && ra-lens demo" in README
    assert 'python -m pip install -c constraints.txt -e ".[test]" && python -m pytest' in README
    for name in re.findall(r"`?((?:constraints|examples)[\w/]*\.(?:txt|py))`?", README):
        assert (ROOT / name).is_file(), name


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).is_file(), picture


def test_the_constraints_pin_every_dependency():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.match(r"[\w-]+", need)[0].lower() for need in needed}
    for file in ("constraints.txt", "constraints/tl2.txt", "constraints/tl4.txt"):
        lines = (ROOT / file).read_text().lower().splitlines()
        pinned = {line.split("==")[0].replace("_", "-") for line in lines if "==" in line}
        assert names <= pinned, (file, names - pinned)
