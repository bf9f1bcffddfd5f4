"""The report: one file, complete or absent, that loads nothing and runs nothing of the prompt's."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from ra_lens import files as file_module
from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NotStored
from ra_lens.figures import head_grid, head_map
from ra_lens.report import Section, Table, check_output, write_report
from test_figures import make

EVIL = "</script><script>alert(1)</script>"
HOSTILE = (EVIL, "\"'`", "🙂", "שלום", "<!--", "%{y}", "&lt;", "\u202eabc", "\n", "]]>")


class Page(HTMLParser):
    """Collects what a browser would see of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._in: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style", "title"):
            self._in.append(tag)
            if tag == "script":
                self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._in and self._in[-1] == tag:
            self._in.pop()

    def handle_data(self, data: str) -> None:
        if self._in and self._in[-1] == "script":
            self.scripts[-1] += data
        elif not self._in:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def figures(self) -> list[Any]:
        kinds = [attrs for tag, attrs in self.tags if tag == "script"]
        return [
            go.Figure(json.loads(text))
            for text, attrs in zip(self.scripts, kinds, strict=True)
            if attrs.get("type") == "application/json"
        ]


@pytest.fixture
def ra() -> RACache:
    return make()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def numbers(value: Any) -> np.ndarray:
    if isinstance(value, dict):  # plotly's own form of an array
        kinds = {"f4": np.float32, "f8": np.float64}
        import base64

        flat = np.frombuffer(base64.b64decode(value["bdata"]), kinds[value["dtype"]])
        return flat.reshape([int(n) for n in str(value["shape"]).split(",")]).astype(float)
    return np.asarray(value, dtype=float)


def test_it_tells_the_run(ra: RACache, path: Path) -> None:
    section = Section("More", ("A paragraph.",), Table(("x",), (("y",),)), notes=("Small.",))
    assert write_report(ra, path, top=2, command="ra-lens run -p 'x'", sections=[section]) == path
    page = read(path)
    for wanted in (
        "Reversed Attention of toy", "Model toy", "0, 2; 3 heads each", "5, BOS prepended",
        "Target “·t”", "1.0000, −log p of the target; p(target) = 0.368",
        "2; this page shows number 0", "averaged over 2 examples", "A paragraph.", "Small.",
        "ra-lens run -p 'x'", "transformer-lens", "Red cells would get more attention",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    chips = [attrs["class"] for tag, attrs in page.tags if tag == "bdi" and "class" in attrs]
    assert chips == ["token special", *["token"] * 4, "token target"]


def test_its_figures_hold_the_values_of_the_cache(ra: RACache, path: Path) -> None:
    write_report(ra, path, top=2, example=1, sign="gradient")
    grid, *maps = read(path).figures()
    np.testing.assert_array_equal(numbers(grid.data[0].z), numbers(head_grid(ra).data[0].z))
    assert len(maps) == 4
    for i, score in enumerate(ra.top_heads(2)):
        for j, kind in enumerate(("pattern", "ra")):
            wanted: Any = head_map(ra, score, kind=kind, example=1, sign="gradient")
            found = maps[2 * i + j].data[0]
            np.testing.assert_array_equal(numbers(found.z), numbers(wanted.data[0].z))
            assert found.name == f"{score.label} {kind}"
    assert maps[1].data[0].zmax == maps[3].data[0].zmax


def test_the_table_says_what_the_strongest_entries_are(ra: RACache, path: Path) -> None:
    write_report(ra, path, top=1)
    score = ra.top_heads(1)[0]
    values = ra["ra", score.layer][0, score.head]
    query, key = divmod(int(values.abs().argmax()), values.shape[-1])
    moves = "more" if values[query, key] < 0 else "less"
    text = read(path).text
    assert f"{score.label} {score.score:.4g}" in text
    assert re.search(rf"\({query}\) → \S+ \({key}\): {moves}", text)


@pytest.fixture
def hostile() -> RACache:
    ra = make((HOSTILE,))
    ra.info = replace(ra.info, targets=(EVIL,), model_name=EVIL)
    return ra


def test_hostile_text_stays_text(hostile: RACache, path: Path) -> None:
    figure = go.Figure(go.Heatmap(z=[[1.0]], x=[EVIL], y=["<!--<script>"]))
    section = Section(EVIL, (EVIL,), Table((EVIL,), ((EVIL,),)), ((EVIL, (figure,)),), (EVIL,))
    write_report(hostile, path, command=EVIL, sections=[section])
    text, page = path.read_text(encoding="utf-8"), read(path)
    write_report(make((tuple("abcdefghij"),)), path, command="c", sections=[
        Section("s", ("p",), Table(("c",), (("v",),)), (("h", (figure,)),), ("n",))
    ])  # fmt: skip
    plain = read(path)
    breaks = ("br", "wbr")  # a line ends where a token ends one
    names = [tag for tag, _ in page.tags if tag not in breaks]
    assert names == [tag for tag, _ in plain.tags if tag not in breaks]  # none is the text's
    assert text.replace(get_plotlyjs(), "").count("alert(1)<") == 0
    assert page.text.count(EVIL) == 12
    for token in ("\"'`", "🙂", "שלום", "<!--", "%{y}", "&lt;", "U+202Eabc", "⏎", "]]>"):
        assert token in page.text
    labels = list(page.figures()[1].data[0].x)
    assert labels[0] == "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt; (0)"


def test_it_loads_nothing(ra: RACache, path: Path) -> None:
    write_report(ra, path)
    page = read(path)
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "base")]
    assert not [a for _, a in page.tags if {"src", "href", "srcset", "action"} & set(a)]
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    own = path.read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert "://" not in own
    assert "@import" not in own
    assert "url(" not in own
    assert page.scripts.count(get_plotlyjs()) == 1
    assert sum(len(script) > 100_000 for script in page.scripts) == 1


def test_it_fits_phones_and_both_themes(ra: RACache, path: Path) -> None:
    write_report(ra, path)
    text = path.read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert "responsive: true" in text
    assert all(figure.layout.width is None for figure in read(path).figures())


def test_answers_of_several_tokens_are_marked_once(ra: RACache, path: Path) -> None:
    ra.info = replace(
        ra.info,
        objective="sequence_nll",
        targets=(" Paris<b>", ""),
        answer_lengths=(2, 0),
        str_tokens=(("<|end|>", " x", "\n", " Paris", "<b>"), ra.info.str_tokens[1]),
    )
    write_report(ra, path, top=1)
    page = read(path)
    chips = [attrs["class"] for tag, attrs in page.tags if tag == "bdi" and "class" in attrs]
    assert chips == ["token special", "token", "token", "token target"]
    assert "mean of −log p over the target's tokens" in page.text
    assert "p(target)" not in page.text


def test_a_long_prompt_shows_its_end_and_says_so(path: Path) -> None:
    write_report(make((tuple(f" w{i}" for i in range(140)),)), path, top=1)
    page = read(path)
    assert "The maps show the last 128 of 140 tokens." in page.text
    assert numbers(page.figures()[1].data[0].z).shape == (128, 128)


def test_the_same_cache_gives_the_same_file(ra: RACache, tmp_path: Path) -> None:
    first, second = (write_report(ra, tmp_path / name) for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes()


# ---- files --------------------------------------------------------------------------------------


def test_a_failure_leaves_the_old_file_and_nothing_else(
    ra: RACache, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text("old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(BadInput, match=r"No space left on device.*Free some space"):
        write_report(ra, path)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["report.html"]


def test_an_interrupt_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(file_module, "_mode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        file_module.write_whole(path, "text")
    assert os.listdir(path.parent) == []


def test_the_file_has_the_mode_that_open_would_give(path: Path) -> None:
    other = path.with_name("other")
    other.write_text("")
    file_module.write_whole(path, "text")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    path.chmod(0o640)
    file_module.write_whole(path, "more")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_keeps_pointing(path: Path) -> None:
    link = path.with_name("link.html")
    link.symlink_to(path)
    assert file_module.write_whole(link, "text") == path
    assert link.is_symlink()
    assert path.read_text() == "text"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("missing/report.html", "no folder"),
        (".", "is a folder"),
        ("file/report.html", "no folder"),
        ("/dev/null", "not a regular file"),
    ],
)
def test_paths_that_cannot_be_written_are_refused(tmp_path: Path, where: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=message):
        check_output(tmp_path / where)
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_takes_no_file_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(BadInput, match="Permission denied"):
        check_output(path)


@pytest.mark.parametrize(
    ("options", "message"), [({"top": 0}, "top=0"), ({"example": 2}, "example=2")]
)
def test_mistakes_are_named_and_nothing_is_written(
    ra: RACache, path: Path, options: Any, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        write_report(ra, path, **options)
    assert not path.exists()


def test_maps_are_needed(ra: RACache, path: Path) -> None:
    norms = RACache(sites=ra.sites, store="norms", info=ra.info, loss=ra.loss)
    for layer in ra.layers:
        norms.put_norms(layer, "ra", ra["ra", layer])
    with pytest.raises(NotStored, match="store='maps'"):
        write_report(norms, path)
    assert not path.exists()
