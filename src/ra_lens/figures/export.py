"""Figures as files: PNG, SVG and PDF for papers, HTML for the web."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ra_lens.errors import BadInput
from ra_lens.figures.style import read_size
from ra_lens.files import PAGE, FileKind, begins_with, check_output, whole_file
from ra_lens.numbers import Real, real

_IMAGES = {
    ".png": (b"\x89PNG",),
    ".svg": (b"<svg", b"<?xml"),
    ".pdf": (b"%PDF",),
    ".jpg": (b"\xff\xd8\xff",),
    ".webp": (b"RIFF",),
}
"""Suffixes of images, and what files of these kinds begin with."""


def save_figure(
    figure: Any,
    path: str | Path,
    *,
    width: Real | None = None,
    height: Real | None = None,
    scale: Real = 2.0,
) -> Path:
    """Write a figure to a file: `.png`, `.svg`, `.pdf`, `.jpg`, `.webp` or `.html`.

    Images are drawn by kaleido (`pip install "ra-lens[images]"`) with a Chrome or Chromium, which
    it finds itself or by the environment variable `BROWSER_PATH`. HTML needs neither; the file
    holds plotly.js (about 5 MB) and asks the network for nothing.

    Args:
        figure: Any plotly figure.
        path: The file; one of the same kind is replaced, only when the new one is complete.
        width: In pixels. Default: the figure's own, else 900.
        height: In pixels. Default: the figure's own, else 450.
        scale: Pixels of a PNG per pixel of the figure; 2 is sharp in print.

    Returns:
        The file written.

    Raises:
        BadInput: another suffix, a path that cannot be written or holds another kind of file, or no
            kaleido or no browser.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (*_IMAGES, ".html"):
        raise BadInput(
            f"found the suffix {suffix!r} in {path}; give one of {', '.join(_IMAGES)} or .html."
        )
    (width, height), factor = read_size(width, height), real("scale", scale)
    if suffix == ".html":
        kind = PAGE
    else:
        kind = FileKind(f"a {suffix} image", begins_with(*_IMAGES[suffix]))
    destination = check_output(path, kind)
    if suffix == ".html":
        page: str = figure.to_html(include_plotlyjs=True, config={"displaylogo": False})
        content = page.encode()
    else:
        content = _image(figure, suffix[1:], width, height, factor)
    with whole_file(path, kind) as temporary:
        temporary.write_bytes(content)
    return destination


def _image(
    figure: Any, kind: str, width: float | None, height: float | None, scale: float
) -> bytes:
    if find_spec("kaleido") is None:
        raise BadInput(
            f"cannot draw a .{kind}: plotly needs kaleido for images, which is not installed. "
            'Install it with pip install "ra-lens[images]", or give a path ending in .html.'
        )
    layout: Any = figure.layout
    try:
        return figure.to_image(
            format=kind,
            width=width or layout.width or 900,
            height=height or layout.height or 450,
            scale=scale,
        )
    except Exception as error:  # kaleido and its browser raise classes of their own
        if "chrome" not in f"{type(error).__name__} {error}".lower():
            raise
        raise BadInput(
            f"cannot draw a .{kind}: kaleido found no Chrome or Chromium "
            f"({str(error).strip().splitlines()[0]}). Install one, or set BROWSER_PATH to it, or "
            "give a path ending in .html."
        ) from error
