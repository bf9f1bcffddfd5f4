"""What a notebook file must be, whether or not it is run: outputs there, clean, small."""

from __future__ import annotations

import ast
import importlib
import json
import re

import pytest

from .files import METADATA, NOTEBOOKS, ROOT, code_cells, joined, n_figures, read, texts

OTHERS = {"warnings", "importlib", "random", "pandas", "plotly", "torch", "transformer_lens"}

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def source_of(cell):
    """Python source of a cell; magics are no Python."""
    return re.sub(r"^(\s*)%.*$", r"\1pass", joined(cell["source"]), flags=re.M)


def test_metadata_says_nothing_of_a_machine(path):
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == METADATA
    assert [cell["id"] for cell in notebook["cells"]] == [
        f"cell-{i}" for i in range(len(notebook["cells"]))
    ]
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert path.stat().st_size < 1.5e6
    text = path.read_text(encoding="utf-8")
    for trace in ("/tmp/", "/home/", "/root/", "site-packages", "widget-view", "\\u001b"):
        assert trace not in text, trace


def test_every_cell_was_run_in_order_without_an_error_or_a_warning(path):
    cells = code_cells(read(path))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name", "stdout") == "stdout"
    assert sum(bool(texts(cell)) for cell in cells) >= 3


def test_it_shows_what_the_real_model_says(path):
    said = "".join(text for cell in code_cells(read(path)) for text in texts(cell))
    assert said.count("SmolLM2-135M-Instruct.Q4_1: 30 layers of 9 heads") == 1


def test_every_figure_is_an_image_too(path):
    shown = [o["data"] for c in code_cells(read(path)) for o in c["outputs"] if "data" in o]
    figures = [data for data in shown if "application/vnd.plotly.v1+json" in data]
    assert len(figures) == sum(n_figures(cell) for cell in code_cells(read(path))) >= 2
    assert all(len(data["image/png"]) > 2000 for data in figures)


def test_the_first_cell_installs_only_what_is_missing_and_names_no_repository(path):
    notebook = read(path)
    first = joined(code_cells(notebook)[0]["source"])
    assert 'if find_spec("ra_lens") is None:' in first
    assert "%pip install -q ra-lens\n" in first + "\n"
    links = re.findall(r"https?://[^\s)\"']+", json.dumps([c["source"] for c in notebook["cells"]]))
    assert set(links) <= {"https://arxiv.org/abs/2412.17019"}
    for cell in notebook["cells"]:
        for target in re.findall(r"\]\((?!http)([^)]+)\)", joined(cell["source"])):
            assert (path.parent / target).is_file(), target
        for named in re.findall(r"`(docs/[\w.-]+)`", joined(cell["source"])):
            assert (ROOT / named).is_file(), named


def test_only_what_ra_lens_offers_is_imported(path):
    for cell in code_cells(read(path)):
        for node in ast.walk(ast.parse(source_of(cell))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= OTHERS
            elif isinstance(node, ast.ImportFrom):
                package = node.module.split(".")[0]
                assert package in OTHERS | {"ra_lens"}
                if package == "ra_lens":
                    module = importlib.import_module(node.module)
                    offered = module.__all__ if hasattr(module, "__all__") else dir(module)
                    assert {alias.name for alias in node.names} <= set(offered)
