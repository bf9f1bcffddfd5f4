"""`--run-notebooks`: a cache in a notebook that ran, converted to HTML and opened in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from browser import Seen
from explorer_cells import same_cells, shown_cells, wanted_cells
from made_caches import make

CELLS = (
    "from ra_lens import RACache\nra = RACache.load('ra.safetensors')\nra",
    "for examples in ([0], [1]):\n    ra.show(examples=examples)\nprint('after')",
    "print(ra)",
)


@pytest.fixture(autouse=True)
def _only_when_asked(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--run-notebooks", default=False):
        pytest.skip("executes a notebook; asked for with --run-notebooks")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client|zmq|nbclient|traitlets")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:nbconvert|bleach|jinja2")
def test_a_notebook_shows_its_caches_also_as_html(browser: Any, tmp_path: Path) -> None:
    nbconvert = pytest.importorskip("nbconvert")
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    ra = make()
    ra.save(tmp_path / "ra.safetensors")
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, CELLS)))
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources=resources
    ).execute()

    # A copy: to convert it takes the notebook apart.
    outputs = [[output.copy() for output in cell.outputs] for cell in notebook.cells]
    assert [[output.output_type for output in each] for each in outputs] == [
        ["execute_result"],
        ["display_data", "display_data", "stream"],
        ["stream"],
    ]
    shown = [outputs[0][0], *outputs[1][:2]]
    assert [set(output.data) for output in shown] == 3 * [{"text/plain", "text/html"}]
    assert {output.data["text/plain"] for output in shown} == {repr(ra)}
    assert outputs[2][0].text == f"{ra!r}\n"

    html, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    path = tmp_path / "notebook.html"
    path.write_text(html, encoding="utf-8")
    seen = Seen(browser, path)
    asked_by: list[Any] = []
    seen.page.on("request", lambda request: asked_by.append(request.frame))
    seen.page.reload()
    frames = [frame for frame in seen.page.frames if frame.parent_frame is not None]
    assert len(frames) == 3
    for frame, (layer, head, example, n) in zip(
        frames, [(0, 2, 0, 5), (2, 1, 0, 5), (0, 0, 1, 3)], strict=True
    ):
        frame.click(f"[data-head='{layer}.{head}']")
        assert str(frame.text_content("#ra-title")).startswith(f"L{layer}H{head}:")
        same_cells(shown_cells(frame), wanted_cells(ra, layer, head, example, n))
    assert seen.page.locator("pre:visible", has_text="RACache of toy").count() == 1  # printed
    # The template of nbconvert asks for libraries of its own; no frame does.
    assert set(asked_by) == {seen.page.main_frame}
    seen.close()
