"""Downloading the published pairs, against a real web server on this machine."""

from __future__ import annotations

import hashlib
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from other_process import printed_by
from ra_lens.errors import BadFile, BadInput, DownloadFailed, RALensError
from ra_lens.tasks import Pair, download, load_task, task_names
from ra_lens.tasks.download import COMMIT, fetch
from web_site import CONTENT, HALF, SHA256, Site, serving

PUBLISHED = Path(__file__).parents[3] / "shared" / "tasks" / "icl"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site({"/x.json": CONTENT})) as site:
        yield site


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "x.json"


def get(site: Site, kept: Path) -> bytes:
    assert fetch(f"{site.url}/x.json", SHA256, kept, timeout=5.0) == kept
    assert [path.name for path in kept.parent.iterdir()] == ["x.json"]
    return kept.read_bytes()


def test_a_file_is_downloaded_once(site: Site, kept: Path) -> None:
    assert get(site, kept) == CONTENT
    assert get(site, kept) == CONTENT
    assert site.asked == ["/x.json"]


@pytest.mark.parametrize("how", ["announced", "chunked"])
def test_a_download_that_broke_off_begins_again(site: Site, kept: Path, how: str) -> None:
    site.chunked = how == "chunked"
    site.cut = [HALF, 70_000]
    assert get(site, kept) == CONTENT
    assert site.asked == ["/x.json"] * 3


def test_the_error_of_a_download_that_broke_off(site: Site, kept: Path) -> None:
    site.cut = [1000, 500, 1500]
    with pytest.raises(DownloadFailed) as info:
        fetch(f"{site.url}/x.json", SHA256, kept, timeout=5.0)
    assert str(info.value).startswith(
        f"Could not download {site.url}/x.json: the connection broke off after 1,500 bytes "
        f"({len(CONTENT):,} bytes were announced). Without the download, "
        "load_task(name, source=FOLDER) reads the same files from a folder"
    )
    assert "load_task(name) has a list of its own." in str(info.value)
    assert isinstance(info.value, RALensError)
    assert isinstance(info.value, OSError)
    assert site.asked == ["/x.json"] * 3
    assert not kept.parent.exists()


def test_a_damaged_file_is_downloaded_again(site: Site, kept: Path) -> None:
    get(site, kept)
    kept.write_bytes(CONTENT[:-1] + b"!")
    assert get(site, kept) == CONTENT
    assert len(site.asked) == 2


@pytest.mark.parametrize("announce", [True, False])
def test_another_file_is_refused_and_not_kept(site: Site, kept: Path, announce: bool) -> None:
    site.files["/x.json"] = other = b"<html>Please log in.</html>"
    site.announce = announce
    with pytest.raises(BadFile) as info:
        fetch(f"{site.url}/x.json", SHA256, kept, timeout=5.0)
    assert str(info.value).startswith(
        f"{site.url}/x.json: found {len(other)} bytes with SHA-256 "
        f"{hashlib.sha256(other).hexdigest()}, but needed is the published file, with SHA-256 "
        f"{SHA256}. Nothing was kept."
    )
    assert not kept.parent.exists()
    assert len(site.asked) == 1


def test_a_damaged_file_is_not_used_where_it_cannot_be_replaced(site: Site, kept: Path) -> None:
    get(site, kept)
    kept.write_bytes(b"damaged")
    site.files.clear()
    with pytest.raises(DownloadFailed, match="HTTP 404"):
        fetch(f"{site.url}/x.json", SHA256, kept, timeout=5.0)


def test_a_missing_file_is_an_error_that_says_where(site: Site, kept: Path) -> None:
    with pytest.raises(DownloadFailed) as info:
        fetch(f"{site.url}/y.json", SHA256, kept, timeout=5.0)
    assert str(info.value).startswith(
        f"Could not download {site.url}/y.json: the server answered HTTP 404 Not Found. Without "
    )
    assert len(site.asked) == 1
    assert not kept.parent.exists()


def test_without_a_connection_the_error_says_what_else_there_is(kept: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: nobody else answers there
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x.json"
        with pytest.raises(DownloadFailed) as info:
            fetch(url, SHA256, kept, timeout=5.0)
    told = str(info.value)
    assert told.startswith(f"Could not download {url}: it cannot be reached (")
    assert "refused" in told
    assert "load_task(name, source=FOLDER)" in told
    assert "load_task(name) has a list of its own." in told


def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(kept: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.json"
        with pytest.raises(DownloadFailed, match=r"broke off after 0 bytes \(.*timed out\)\. With"):
            fetch(url, SHA256, kept, timeout=0.05)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://host/x", "x.json"])
def test_only_web_servers_are_asked(kept: Path, url: str) -> None:
    with pytest.raises(BadInput, match=r"RA_LENS_TASKS_URL has to begin with https:// or http://"):
        fetch(url, SHA256, kept)


def test_a_cache_that_cannot_be_written_is_told(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match=r"cannot make the folder .*Set RA_LENS_CACHE to a folder"):
        fetch(f"{site.url}/x.json", SHA256, tmp_path / "file" / "x.json", timeout=5.0)
    (tmp_path / "x.json").mkdir()
    with pytest.raises(BadInput, match=r"it is a folder.*Set RA_LENS_CACHE to a folder"):
        fetch(f"{site.url}/x.json", SHA256, tmp_path / "x.json", timeout=5.0)


def test_a_task_is_loaded_from_the_repository_then_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(download.FILES, "capitalize", ("abstractive", SHA256))
    monkeypatch.setenv("RA_LENS_CACHE", str(tmp_path))
    with serving(Site({"/files/abstractive/capitalize.json": CONTENT})) as site:
        monkeypatch.setenv("RA_LENS_TASKS_URL", f"{site.url}/files/")
        for name in ("capitalize", "icl/capitalize"):
            task = load_task(name, "download")
            assert (task.name, task.kind, task.source) == (
                "capitalize",
                "icl",
                f"download:{COMMIT}",
            )
            assert task.pairs[:1] == (Pair("word0", "Word0"),)
            assert len(task.pairs) == 4000
            assert task.prompt("dog", task.pairs[:1]) == "Q: word0\nA: Word0\n\nQ: dog\nA:"
        assert site.asked == ["/files/abstractive/capitalize.json"]
    # The server is gone, the file is still there.
    assert load_task("capitalize", source="download") == task
    assert [path.name for path in tmp_path.rglob("*.json")] == ["capitalize.json"]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published files in ../shared/tasks")
def test_the_published_files_have_the_digests_that_are_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert set(download.FILES) == {path.stem for path in PUBLISHED.glob("*.json")}
    files = {
        f"/{folder}/{name}.json": (PUBLISHED / f"{name}.json").read_bytes()
        for name, (folder, _) in download.FILES.items()
    }
    monkeypatch.setenv("RA_LENS_CACHE", str(tmp_path))
    with serving(Site(files)) as site:
        monkeypatch.setenv("RA_LENS_TASKS_URL", site.url)
        for name in task_names(source="download"):
            task = load_task(name, "download")
            assert task.pairs == load_task(name, PUBLISHED).pairs
        assert len(site.asked) == 17


def test_the_list_of_what_can_be_downloaded() -> None:
    names = task_names(source="download")
    assert names == task_names("icl", "download")
    assert len(names) == 17
    assert set(task_names("icl")) < set(names)
    assert task_names("natural", "download") == ()
    assert download.URL.endswith(f"/function_vectors/{COMMIT}/dataset_files")
    assert len(COMMIT) == 40
    for folder, sha256 in download.FILES.values():
        assert folder in ("abstractive", "extractive")
        assert len(bytes.fromhex(sha256)) == 32


def test_unknown_names_are_refused_before_anything_is_asked() -> None:
    with pytest.raises(BadInput) as info:
        load_task("antonyms", "download")
    assert str(info.value).startswith(
        "There is no published file for a task 'antonyms'. Close names: antonym, synonym. To "
        "be downloaded are: adjective_v_verb_3, alphabetically_first_3,"
    )
    with pytest.raises(BadInput, match="Natural questions are built in, or read from a folder"):
        load_task("natural/country-capital", "download")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RA_LENS_CACHE", str(tmp_path / "own"))
    assert download.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("RA_LENS_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert download.cache_folder() == tmp_path / "xdg" / "ra_lens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert download.cache_folder() == tmp_path / ".cache" / "ra_lens"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert download.cache_folder() == tmp_path / "local" / "ra_lens"


def test_built_in_tasks_load_without_what_talks_to_the_network() -> None:
    code = (
        "import sys; from ra_lens import tasks; tasks.load_task('antonym'); tasks.task_names();"
        "print(sorted({'urllib.request', 'http.client', 'ssl'} & set(sys.modules)))"
    )
    assert printed_by(code) == "[]"
