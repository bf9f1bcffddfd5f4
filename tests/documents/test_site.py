"""The pages of the site: links that lead where a code host's do, and no page left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from make_site import ROOT, configuration, site_files, translated, unlisted, write_pages


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in (
        *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "src/code.py"),
        *("docs/glossary.md", "docs/guides/index.md", "docs/guides/patching.md"),
        *("docs/figures/map.png", "docs/numbers.json", "docs/make_site.py"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n", encoding="utf-8")
    return tmp_path


def test_the_site_holds_the_docs_and_three_pages_of_the_root(repository):
    assert set(site_files(repository)) == {
        *("index.md", "contributing.md", "changelog.md", "glossary.md"),
        *("guides/index.md", "guides/patching.md", "figures/map.png", "numbers.json"),
    }


@pytest.mark.parametrize(
    ("page", "written", "of_the_site"),
    [
        ("index.md", "[a](docs/glossary.md)", "[a](glossary.md)"),
        ("index.md", "[a](docs/guides/patching.md#b)", "[a](guides/patching.md#b)"),
        ("index.md", "[a](CHANGELOG.md) [b](src/code.py)", "[a](changelog.md) b"),
        ("index.md", "![a](docs/figures/map.png)", "![a](figures/map.png)"),
        ("guides/patching.md", "[a](../../README.md#b)", "[a](../index.md#b)"),
        ("guides/patching.md", "[a](../../CONTRIBUTING.md)", "[a](../contributing.md)"),
        ("guides/patching.md", "[a](index.md), [b](../numbers.json)", None),
        ("guides/patching.md", "[a](../../src/code.py) [b](../../src)", "a b"),
        ("glossary.md", "[a](#b) [c](https://d.org/e.md) [f][ra_lens.g]", None),
        ("glossary.md", "```python\n[a](nowhere.md)\n```", None),
    ],
)
def test_links_become_links_of_the_site(repository, page, written, of_the_site):
    assert translated(written, page, site_files(repository)) == (of_the_site or written, [])


def test_a_link_that_leads_nowhere_is_named(repository):
    _, dead = translated("[a](nowhere.md) ![b](c.png)", "guides/index.md", site_files(repository))
    assert dead == [
        "guides/index.md links to nowhere.md, which does not exist",
        "guides/index.md links to c.png, which does not exist",
    ]


def test_pages_are_written_once_and_go_with_their_file(repository):
    pages = repository / "build/pages"
    repository.joinpath("docs/glossary.md").write_text("[a](../README.md)\n", encoding="utf-8")
    assert write_pages(site_files(repository), pages) == []
    assert (pages / "glossary.md").read_text(encoding="utf-8") == "[a](index.md)\n"
    for name in ("index.md", "glossary.md"):
        os.utime(pages / name, (0, 0))

    repository.joinpath("docs/glossary.md").write_text("words\n", encoding="utf-8")
    repository.joinpath("docs/numbers.json").unlink()
    write_pages(site_files(repository), pages)
    assert (pages / "glossary.md").read_text(encoding="utf-8") == "words\n"
    assert (pages / "index.md").stat().st_mtime == 0  # so that only what changed is built anew
    assert not (pages / "numbers.json").exists()


def test_pages_and_navigation_hold_the_same(repository):
    nav = [{"Home": "index.md"}, {"Guides": ["guides/index.md", {"Old": "guides/old.md"}]}]
    assert unlisted(site_files(repository), nav) == [
        "changelog.md stands nowhere in the navigation",
        "contributing.md stands nowhere in the navigation",
        "glossary.md stands nowhere in the navigation",
        "guides/patching.md stands nowhere in the navigation",
        "the navigation names guides/old.md, which does not exist",
    ]


def test_the_navigation_holds_every_page():
    assert unlisted(site_files(ROOT), configuration()["nav"]) == []
