"""Figures in notebooks that are read where no JavaScript runs, as on a code host."""

from __future__ import annotations

import warnings
from base64 import b64encode
from importlib import import_module
from typing import Any

import plotly.io as pio
from plotly.io.base_renderers import MimetypeRenderer

from ra_lens.errors import BadInput
from ra_lens.numbers import Real, Whole, real, whole

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
