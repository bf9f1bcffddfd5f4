"""Build the documentation as a site: `python docs/make_site.py` into `site`, `--serve` to read it.

Zensical makes the site, as `zensical.toml` says, of the folder `build/pages`, which this writes:
what lies in `docs`, and README, CONTRIBUTING and CHANGELOG, which are pages of the site as they
are, so nothing is written twice. Links are those that a code host follows. One that leaves `docs`
for another page of the site is turned to that page; one to any other file of the repository becomes
plain text, because the site does not hold it. A build fails on a link that leads nowhere, on a page
that the navigation leaves out, on an entry of the navigation without a page, and on every warning:
of Zensical about links and anchors, of the reader of docstrings about arguments that do not exist.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
CONFIGURATION = ROOT / "zensical.toml"
FROM_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\[]*)\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
_PICTURE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<path>[^)#:\s]+)\)")
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def main() -> None:
    """Write the pages, check them, and have Zensical build or serve the site."""
    parser = argparse.ArgumentParser(description="Build the documentation as a site.")
    parser.add_argument("--serve", action="store_true", help="serve it, and follow what is edited")
    serve = parser.parse_args().serve
    if importlib.util.find_spec("zensical") is None:
        sys.exit('Zensical is not installed: python -m pip install -c constraints.txt -e ".[docs]"')
    project = configuration()
    pages = ROOT / project["docs_dir"]
    if serve:
        follow(pages)
    else:
        files = site_files(ROOT)
        problems = write_pages(files, pages) + unlisted(files, project["nav"])
        if not problems:
            shutil.rmtree(ROOT / project["site_dir"], ignore_errors=True)
            problems = build()
        if problems:
            sys.exit("\n".join(problems))


def configuration() -> dict[str, Any]:
    """Read `zensical.toml`."""
    return tomllib.loads(CONFIGURATION.read_text(encoding="utf-8"))["project"]


def build() -> list[str]:
    """Have Zensical build the site; give what it, or the Python it calls, warned of."""
    import zensical

    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        zensical.build(str(CONFIGURATION), {"clean": True, "strict": True})
    except RuntimeError as error:
        warnings.append(str(error))
    return warnings


def follow(pages: Path) -> None:
    """Serve the site until it is interrupted, writing pages anew as they are edited."""
    write_pages(site_files(ROOT), pages)
    server = subprocess.Popen([sys.executable, "-m", "zensical", "serve"], cwd=ROOT)
    with contextlib.suppress(KeyboardInterrupt):
        while server.poll() is None:
            time.sleep(0.5)
            write_pages(site_files(ROOT), pages)
    server.wait()


def site_files(root: Path) -> dict[str, Path]:
    """Give the file of the repository that each page, picture and data file of the site is."""
    docs = root / "docs"
    files = {
        path.relative_to(docs).as_posix(): path
        for path in sorted(docs.rglob("*"))
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    return files | {page: root / source for source, page in FROM_ROOT.items()}


def write_pages(files: dict[str, Path], folder: Path) -> list[str]:
    """Write what the site is made of, leaving alone what has not changed; give its dead links."""
    problems: list[str] = []
    for name, source in files.items():
        content = source.read_bytes()
        if source.suffix == ".md":
            text, dead = translated(content.decode(), name, files)
            content = text.encode()
            problems += dead
        written = folder / name
        if not written.is_file() or written.read_bytes() != content:
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_bytes(content)
    for old in folder.rglob("*"):
        if old.is_file() and old.relative_to(folder).as_posix() not in files:
            old.unlink()
    return problems


def translated(text: str, page: str, files: dict[str, Path]) -> tuple[str, list[str]]:
    """Turn links that a code host follows into links of the site; name those that lead nowhere."""
    folder = files[page].parent
    page_of = {os.path.normpath(file): name for name, file in files.items()}
    dead: list[str] = []

    def inside(path: str) -> str | None:
        file = Path(os.path.normpath(folder / path))
        if not file.exists():
            dead.append(f"{page} links to {path}, which does not exist")
        target = page_of.get(os.fspath(file))
        return target and os.path.relpath(target, os.path.dirname(page) or ".").replace(os.sep, "/")

    def link(found: re.Match[str]) -> str:
        target = inside(found["path"])
        return f"[{found['text']}]({target}{found['anchor'] or ''})" if target else found["text"]

    def picture(found: re.Match[str]) -> str:
        target = inside(found["path"])
        return f"![{found['text']}]({target})" if target else found["text"]

    parts = _FENCED.split(text)
    parts[::2] = [_PICTURE.sub(picture, _LINK.sub(link, part)) for part in parts[::2]]
    return "".join(parts), dead


def unlisted(files: dict[str, Path], nav: list[Any]) -> list[str]:
    """Name the pages that the navigation leaves out, and its entries that are no page."""
    pages = {name for name in files if name.endswith(".md")}
    listed = list(_entries(nav))
    left_out, missing = sorted(pages - {*listed}), [name for name in listed if name not in pages]
    return [
        *(f"{name} stands nowhere in the navigation" for name in left_out),
        *(f"the navigation names {name}, which does not exist" for name in missing),
    ]


def _entries(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _entries(entry)


if __name__ == "__main__":
    main()
