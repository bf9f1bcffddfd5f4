"""What stands in front of text by default, and the warning where that is a token of chats."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from ra_lens import check_model, rank_heads, run_with_ra, trace_paths
from ra_lens.errors import BadInput, RALensWarning
from ra_lens.model import Front, as_lens, default_front, load_folder
from ra_lens.tasks import Prompt
from tiny_models import ANY_KIND, BOS, tokenizer, write_folder

TURN = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"
OF_BOS = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
ENDS = "{% for message in messages %}{{ message['content'] }}<|endoftext|>{% endfor %}"

Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Load a model with this chat template; its tokenizer may put BOS in front by itself."""

    def made(kind: Any, arch: str, template: Any, *, adds: bool = False, stays: bool = True) -> Any:
        folder = write_folder(arch, tmp_path / "model")
        own = tokenizer(arch)
        own.chat_template = template
        if adds:
            bos = own.bos_token
            own.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, BOS[arch])]
            )
        own.save_pretrained(str(folder))
        model = load_folder(folder, kind=kind)
        if not stays:
            shutil.rmtree(folder)
        return model

    return made


# What is told of a model: its tokenizer's template, whether it puts BOS there itself, and whether
# its files stay.
CASES: dict[str, tuple[dict[str, Any], Front]] = {
    "a chat token": (
        {"arch": "llama", "template": TURN},
        Front("<s>", "", is_chat_token=True, separator=""),
    ),
    "of a model whose files are gone": (
        {"arch": "llama", "template": TURN, "stays": False},
        Front("<s>", None, is_chat_token=True, separator=""),
    ),
    "put there by the tokenizer": (
        {"arch": "llama", "template": TURN, "adds": True},
        Front("<s>", "<s>", is_chat_token=True, separator=""),
    ),
    "BOS of a template": (
        {"arch": "llama", "template": OF_BOS},
        Front("<s>", "", is_chat_token=False, separator=""),
    ),
    "no template": (
        {"arch": "llama", "template": None},
        Front("<s>", "", is_chat_token=False, separator=""),
    ),
    "the end of a text": (
        {"arch": "gpt2", "template": ENDS},
        Front("<|endoftext|>", "", is_chat_token=False, separator=""),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ANY_KIND)
def test_it_is_told_from_what_the_tokenizer_itself_does(make: Make, kind: Any, case: str) -> None:
    options, wanted = CASES[case]
    model = make(kind, **options)
    found = default_front(as_lens(model))
    assert found is not None
    if wanted.own is None and found.own == "":
        # TransformerLens did not have to load this tokenizer anew, so that it tells by itself.
        wanted = Front(wanted.token, "", wanted.is_chat_token, wanted.separator)
    assert found == wanted
    assert as_lens(model).encode("w5", prepend_bos=None) == [BOS[options["arch"]], 5]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ANY_KIND)
def test_a_model_warns_once_of_a_chat_token_and_only_by_default(
    make: Make, kind: Any, case: str
) -> None:
    options, wanted = CASES[case]
    model = make(kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_with_ra(model, [5, 6], target=9)
        for front in (True, False, "w7", "<s>" if options["arch"] == "llama" else "w8"):
            run_with_ra(model, "w5", target=9, prepend_bos=front)
            trace_paths(model, "w5 w6", prepend_bos=front)
            rank_heads(model, [Prompt("w5", " w6")], prepend_bos=front, progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_with_ra(model, ["w5", "w6"], target=9)
        run_with_ra(model, "w5", target=9)
        trace_paths(model, "w5 w6")
        rank_heads(model, [Prompt("w5", " w6")], progress=False)
    if not wanted.is_strange:
        assert caught == []
        return
    assert [warning.category for warning in caught] == [RALensWarning]
    text = str(caught[0].message)
    for part in (
        "TransformerLens puts '<s>' in front of text for model: a token of its chats",
        "prepend_bos=False (--no-bos). prepend_bos=True keeps",
    ):
        assert part in text
    if wanted.own is not None:
        assert "which its tokenizer itself does not put there" in text


def test_another_token_between_documents_is_named(make: Make) -> None:
    model = make(None, "llama", TURN)
    model.tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)  # a word of it until now
    found = default_front(as_lens(model))
    assert found == Front("<s>", "", is_chat_token=True, separator="<|endoftext|>")
    told = r"\(--no-bos\), or prepend_bos='<\|endoftext\|>' \(--bos '<\|endoftext\|>'\), which"
    with pytest.warns(RALensWarning, match=told):
        run_with_ra(model, "w5", target=9)
    report = check_model(model)
    assert any("prepend_bos=False or prepend_bos='<|endoftext|>'" in note for note in report.notes)


def test_a_chat_that_brings_its_token_is_told_of_that_alone(make: Make) -> None:
    model = make(None, "llama", TURN)
    with pytest.warns(RALensWarning, match="once more") as caught:
        run_with_ra(model, "<s> w5", target=9)
    assert len(caught) == 1


@pytest.mark.parametrize("kind", ANY_KIND)
def test_the_report_of_a_model_tells_it(make: Make, kind: Any) -> None:
    report = check_model(make(kind, "llama", TURN))
    assert (report.prepended, report.tokenizer_prepends, report.prepends_chat_token) == (
        "<s>", "", True,
    )  # fmt: skip
    assert "\nIn front of text: '<s>', a token of chats\n" in str(report)
    (note,) = report.notes
    assert note == (
        "TransformerLens puts '<s>' in front of text, the tokenizer itself puts nothing there; "
        "plain text may be answered better with prepend_bos=False"
    )
    assert report.ok


@pytest.mark.parametrize("kind", ANY_KIND)
def test_the_report_of_a_model_that_nothing_is_put_in_front_of(make: Make, kind: Any) -> None:
    model = make(kind, "llama", None, adds=True)
    model.cfg.default_prepend_bos = False
    report = check_model(model)
    assert (report.prepended, report.tokenizer_prepends) == ("", "<s>")
    assert "\nIn front of text: nothing\n" in str(report)
    assert report.notes == (
        "the tokenizer itself puts '<s>' in front of text, TransformerLens nothing: "
        "prepend_bos=True puts it there",
    )


def test_check_model_reads_its_prompt_with_what_stands_in_front(make: Make) -> None:
    model = make(None, "llama", None)
    assert check_model(model, prompt="w5 w6 w7", prepend_bos="<|endoftext|>").ok
    with pytest.raises(BadInput, match=r"prepend_bos=False without a prompt .*prompt= as text"):
        check_model(model, prepend_bos=False)
    with pytest.raises(BadInput, match="2 tokens"):
        check_model(model, prompt="w5", prepend_bos="w5 w6")
