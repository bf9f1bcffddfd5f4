"""`--run-notebooks`: each notebook runs in a fresh kernel and says again what its file says.

Takes a few minutes and the `notebook` extra. Figures are not compared: whether there is an image
depends on a browser.
"""

from __future__ import annotations

import pytest

from .files import NOTEBOOKS, code_cells, n_figures, read, same_text, texts


@pytest.fixture(autouse=True)
def _only_when_asked(request):
    if not request.config.getoption("--run-notebooks", default=False):
        pytest.skip("executes notebooks for minutes; asked for with --run-notebooks")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client|zmq|nbclient|traitlets")
def test_running_it_again_prints_what_the_file_says(path):
    from .execute import execute

    committed, now = code_cells(read(path)), code_cells(execute(path))
    assert len(now) == len(committed)
    for old, new in zip(committed, now, strict=True):
        assert n_figures(old) == n_figures(new)
        assert len(texts(old)) == len(texts(new))
        for said, says in zip(texts(old), texts(new), strict=True):
            assert same_text(said, says), f"{path.name} said\n{said}\nand now says\n{says}"
