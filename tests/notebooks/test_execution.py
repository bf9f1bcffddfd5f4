"""`--run-notebooks`: each notebook runs in a fresh kernel and says again what its file says.

Takes a few minutes and the `notebook` extra. Figures are not compared: whether there is an image
depends on a browser.
"""

from __future__ import annotations

import pytest

from .files import NOTEBOOKS, code_cells, joined, n_figures, read, same_text, texts

SENTENCE = "I like Italy and France. I visited the city of Florence"


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
    from .execute import execute

    gpt2_like(tmp_path / "model")
    text = NOTEBOOKS[0].read_text(encoding="utf-8")
    chosen = r"MODEL = \"demo\""
    assert text.count(chosen) == 1
    path = tmp_path / NOTEBOOKS[0].name
    folder = (tmp_path / "model").as_posix()
    path.write_text(text.replace(chosen, rf"MODEL = \"{folder}\""), encoding="utf-8")
    said = "".join(joined(text) for cell in code_cells(execute(path)) for text in texts(cell))
    assert "p(' Florence') from 0." in said
