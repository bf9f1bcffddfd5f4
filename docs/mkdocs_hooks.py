"""What the site needs beyond mkdocs: pages that are files of the repository's root, and links.

README, CONTRIBUTING and CHANGELOG are pages of the site as they are, so nothing is written twice.
Links are those that a code host follows. One that leaves `docs` for another page of the site is
turned to that page; one to any other file of the repository becomes plain text, because the site
does not hold it. A link to a file that does not exist is a warning, an error under `--strict`.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FROM_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\[]*)\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
_PICTURE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<path>[^)#:\s]+)\)")
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)

log = logging.getLogger("mkdocs.hooks.ra_lens")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie in the repository's root."""
    for source, page in FROM_ROOT.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that a code host follows into links of the site."""
    uri = page.file.src_uri
    source = next((ROOT / root for root, name in FROM_ROOT.items() if name == uri), None)
    source = source or ROOT / "docs" / uri

    def link(found: re.Match[str]) -> str:
        target = _target(source, found["path"])
        if target is None:
            return found["text"]
        return f"[{found['text']}]({_relative(target, uri)}{found['anchor'] or ''})"

    def picture(found: re.Match[str]) -> str:
        target = _target(source, found["path"])
        return f"![{found['text']}]({_relative(target, uri)})" if target else found["text"]

    parts = _FENCED.split(markdown)
    parts[::2] = [_PICTURE.sub(picture, _LINK.sub(link, part)) for part in parts[::2]]
    return "".join(parts)


def _target(source: Path, path: str) -> str | None:
    """Give the page or file of the site that a link of `source` leads to, None for none."""
    file = Path(os.path.normpath(source.parent / path))
    if not file.exists():
        log.warning("%s links to %s, which does not exist", source.name, path)
        return None
    inside = file.relative_to(ROOT).as_posix()
    if inside in FROM_ROOT:
        return FROM_ROOT[inside]
    return inside.removeprefix("docs/") if inside.startswith("docs/") and file.is_file() else None


def _relative(target: str, uri: str) -> str:
    return os.path.relpath(target, os.path.dirname(uri) or ".").replace(os.sep, "/")
