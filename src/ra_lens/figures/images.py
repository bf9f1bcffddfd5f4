"""Figures as files: PNG, SVG and PDF for papers, HTML for the web; and images in notebooks.

A code host runs no JavaScript, so a notebook that is read there needs an image of each figure.
"""

from __future__ import annotations

import warnings
from base64 import b64encode
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plotly.io as pio
from plotly.io.base_renderers import MimetypeRenderer

from ra_lens.errors import BadInput
from ra_lens.figures.style import read_size
from ra_lens.files import PAGE, FileKind, begins_with, check_output, whole_file
from ra_lens.numbers import Real, Whole, real, whole

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
    (width, height), factor = read_size({"width": width, "height": height}), real("scale", scale)
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


_NAME = "ra_lens_png"


def images_in_notebooks(*, width: Whole = 900, scale: Real = 1.5) -> None:
    """From here on, keep a PNG image beside every figure that a notebook shows.

    Plotly figures are drawn by JavaScript, which code hosts do not run: a notebook looks empty
    there. With the image beside it, a figure is interactive where it can be and an image elsewhere.
    Sets `plotly.io.renderers.default` of this process. Images need kaleido and a Chrome or Chromium
    (see `save_figure`); without them figures stay as they are, and nothing is raised. About half a
    second per figure.

    Args:
        width: In pixels, of figures that have no width of their own.
        scale: Pixels of the image per pixel of the figure.

    Raises:
        BadInput: a width or scale that is not positive.
    """
    pixels, factor = whole("width", width), real("scale", scale)
    if pixels < 1 or factor <= 0:
        raise BadInput(f"found width={pixels}, scale={factor}; give positive numbers.")
    renderers: Any = pio.renderers
    renderers[_NAME] = _Images(pixels, factor)
    # "notebook" would put plotly.js, megabytes of it, into the file.
    others = [n for n in renderers.default.split("+") if n not in ("", "notebook", "browser")]
    renderers.default = "+".join(dict.fromkeys([*(others or ["plotly_mimetype"]), _NAME]))


class _Images(MimetypeRenderer):
    """Adds an image to what a cell shows, until one cannot be drawn."""

    def __init__(self, width: int, scale: float) -> None:
        self._width, self._scale = width, scale
        self._failures: list[Exception] = []  # a list, as plotly works on shallow copies

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, str]:
        """Give `image/png`, or nothing where images cannot be drawn."""
        if self._failures:
            return {}
        layout = fig_dict["layout"]
        with warnings.catch_warnings():
            # kaleido's, of options that a browser kept open cannot take; none are given.
            warnings.filterwarnings("ignore", message="The kopts argument is ignored")
            try:
                image = pio.to_image(
                    fig_dict,
                    format="png",
                    width=layout.get("width") or self._width,
                    height=layout.get("height"),
                    scale=self._scale,
                    validate=False,
                )
            except Exception as error:  # no kaleido, no browser, or one that does not start
                self._failures.append(error)
                return {}
        _keep_browser()
        return {"image/png": b64encode(image).decode()}


def _keep_browser() -> None:
    # One browser for all figures takes a sixth of the time; kaleido closes it at exit. Only after
    # a first image: where there is no browser, a server would wait for it.
    start = getattr(import_module("kaleido"), "start_sync_server", None)
    if start is not None:
        start(silence_warnings=True)
