"""Images beside figures in notebooks: drawn where they can be, and never an error."""

from __future__ import annotations

import base64
import struct

import plotly.graph_objects as go
import plotly.io as pio
import pytest

from ra_lens.errors import BadInput
from ra_lens.figures import images_in_notebooks

PLOTLY = "application/vnd.plotly.v1+json"


@pytest.fixture(autouse=True)
def _renderers_as_they_were():
    before = pio.renderers.default
    yield
    pio.renderers.default = before


def shown(figure, monkeypatch):
    """What a notebook's cell gets."""
    bundles = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, **_: bundles.append(bundle))
    pio.show(figure)
    (bundle,) = bundles
    return bundle


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("plotly_mimetype", "plotly_mimetype+ra_lens_png"),
        ("plotly_mimetype+notebook", "plotly_mimetype+ra_lens_png"),
        ("colab", "colab+ra_lens_png"),
        ("browser", "plotly_mimetype+ra_lens_png"),
    ],
)
def test_the_image_is_added_to_what_is_there_and_no_plotly_js_embedded(before, after):
    pio.renderers.default = before
    for _ in range(2):
        images_in_notebooks()
        assert pio.renderers.default == after


def test_nonsense_is_refused():
    with pytest.raises(BadInput, match=r"found width=0, scale=1\.0"):
        images_in_notebooks(width=0, scale=1.0)
    with pytest.raises(BadInput, match=r"found width=9, scale=-1\.0"):
        images_in_notebooks(width=9, scale=-1.0)


@pytest.mark.usefixtures("chromium")
def test_an_image_beside_the_figure(monkeypatch):
    pytest.importorskip("kaleido")
    pytest.importorskip("IPython")
    images_in_notebooks(width=200, scale=1.5)
    sizes = []
    for layout in ({"height": 100}, {"height": 100, "width": 60}):
        bundle = shown(go.Figure(layout=layout), monkeypatch)
        assert set(bundle) == {PLOTLY, "image/png"}
        sizes.append(struct.unpack(">II", base64.b64decode(bundle["image/png"])[16:24]))
    assert sizes == [(300, 150), (90, 150)]


def test_without_a_browser_the_figure_is_interactive_only(monkeypatch):
    pytest.importorskip("IPython")
    tries = []

    def cannot(*_, **__):
        tries.append(1)
        raise RuntimeError("no browser")

    monkeypatch.setattr(pio, "to_image", cannot)
    images_in_notebooks()
    for _ in range(2):
        assert set(shown(go.Figure(), monkeypatch)) == {PLOTLY}
    assert len(tries) == 1
