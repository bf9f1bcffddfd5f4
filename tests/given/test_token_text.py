"""Tokens that are less than a character: bytes until the character is complete, and then itself."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import arch_models
from ra_lens import run_with_ra, trace_paths
from ra_lens.cli.show import as_json
from ra_lens.errors import BadInput
from ra_lens.figures import head_map, path_diagram, query_key_pull, token_row
from ra_lens.model import Lens, available_kinds, load_folder
from ra_lens.paths import trace_layers
from ra_lens.report import patched_predictions, write_report
from ra_lens.targets import logit_diff
from ra_lens.text import label, pieces_as_read, visible
from tiny_models import ANY_KIND, D_VOCAB, KINDS

# The tokenizer puts BOS in front of every text, and TransformerLens one more.
pytestmark = pytest.mark.filterwarnings("ignore:.*was put in front of it once more")

Merges = Sequence[tuple[str, str]]
# Byte 0x20 is Ġ in GPT-2's alphabet, E2 9C 93 (✓) is â ľ ĵ, C3 A9 (é) is Ã ©, D7 A9 (ש) is × ©.
SPELLED = {" ": "Ġ", "✓": "âľĵ", "é": "Ã©", "ש": "×©", "\ufffd": "ï¿½", "\n": "Ċ"}
BYTES = re.compile("⟨[0-9A-F]{2}( [0-9A-F]{2})*⟩")


def byte_level(merges: Merges = (), *, alphabet: str | None = None) -> Any:
    """A tokenizer of GPT-2's kind; token 0 is the end of a text, a pad token and BOS."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if alphabet is None else alphabet
    names = ["<|end|>", *dict.fromkeys(letters), *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    end = "<|end|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=end, eos_token=end, pad_token=end, unk_token=end
    )


def sentence_piece() -> Any:
    """A tokenizer of Llama's kind, with a token for each byte of what it has no token for."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "é", "\ufffd", "▁"]
    inner = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def lens_of(tokenizer: Any) -> Lens:
    model = torch.nn.Module()
    model.tokenizer = tokenizer
    return Lens(model, KINDS[0])


def read(tokenizer: Any, text: str) -> list[str]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(lens_of(tokenizer).decode_each(ids))


@pytest.mark.parametrize(
    ("merges", "text", "pieces"),
    [
        ([("â", "ľ")], "✓", ["⟨E2 9C⟩", "✓"]),
        ([], "✓", ["⟨E2⟩", "⟨9C⟩", "✓"]),
        ([("â", "ľ"), ("âľ", "ĵ")], "✓", ["✓"]),
        ([("Ġ", "â"), ("Ġâ", "ľ")], " ✓✓", [" ⟨E2 9C⟩", "✓", "⟨E2⟩", "⟨9C⟩", "✓"]),
        ([("©", "â")], "é✓", ["⟨C3⟩", "é⟨E2⟩", "⟨9C⟩", "✓"]),
        ([("×", "©")], "שé a", ["ש", "⟨C3⟩", "é", " ", "a"]),
        ([], "\ufffd", ["⟨EF⟩", "⟨BF⟩", "\ufffd"]),  # the text's own
        ([("ï", "¿"), ("ï¿", "½")], "a\ufffd", ["a", "\ufffd"]),
        ([], "👍", ["⟨F0⟩", "⟨9F⟩", "⟨91⟩", "👍"]),
        ([("ð", "Ł")], "👍\n", ["⟨F0 9F⟩", "⟨91⟩", "👍", "\n"]),
    ],
)  # fmt: skip
def test_a_character_stands_with_the_piece_that_completes_it(
    merges: Merges, text: str, pieces: list[str]
) -> None:
    assert read(byte_level(merges), text) == pieces


def test_bytes_that_no_character_follows_stay_bytes() -> None:
    tokenizer = byte_level([("â", "ľ"), ("ĵ", "a")])
    lens = lens_of(tokenizer)
    begun, end, a, mixed = (
        tokenizer.convert_tokens_to_ids(name) for name in ("âľ", "ĵ", "a", "ĵa")
    )
    assert lens.decode(begun) == lens.decode_text([begun]) == "⟨E2 9C⟩"
    assert lens.decode(end) == "⟨93⟩"
    assert lens.decode_each([begun, a, end]) == ("⟨E2 9C⟩", "a", "⟨93⟩")
    assert lens.decode_each([end, begun, begun, mixed]) == ("⟨93⟩", "⟨E2 9C⟩", "⟨E2 9C⟩", "✓a")
    assert lens.decode_each([end, mixed, 10**6]) == ("⟨93⟩", "⟨93⟩a", "")
    assert lens.decode_text([begun, end]) == "✓"  # several tokens are one text
    assert lens.decode_each([]) == ()


def test_what_was_added_to_a_byte_level_vocabulary_is_its_own_text() -> None:
    tokenizer = byte_level()
    words = ["año", "שלום", "<｜user｜>", "<|im_end|>"]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    assert read(tokenizer, "".join(words) + "ñ") == [*words, "⟨C3⟩", "ñ"]


def test_byte_fallback_and_bytes_as_a_vocabulary_are_read_alike() -> None:
    assert read(sentence_piece(), "✓aé\ufffdb<") == [
        "⟨E2⟩",
        "⟨9C⟩",
        "✓",
        "a",
        "é",
        "\ufffd",
        "b",
        "<",
    ]
    assert read(ByT5Tokenizer(), "✓aÀ\n") == ["⟨E2⟩", "⟨9C⟩", "✓", "a", "⟨C3⟩", "À", "\n"]
    words = Tokenizer(models.WordLevel({"âľ": 0, "\ufffd": 1, "<0xE2>": 2}, unk_token="\ufffd"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    one_each = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="\ufffd")
    assert read(one_each, "âľ <0xE2> \ufffd") == ["âľ", "<0xE2>", "\ufffd"]


@pytest.mark.parametrize("kind", [byte_level, ByT5Tokenizer, sentence_piece])
def test_pieces_that_are_not_bytes_are_the_text(kind: Callable[[], Any]) -> None:
    """One token per byte: what each shows follows from UTF-8 alone."""
    draw = random.Random(0)
    letters = "xyz \n\tÀßğŁשلا́中文🙂\u200d\u00a0\ufffd\u0080\u009f"
    for _ in range(20):
        text = "".join(draw.choices(letters, k=30))
        wanted: list[str] = []
        for letter in text:
            *before, _ = letter.encode()
            whole = kind is sentence_piece and letter in "\ufffd "
            wanted += [] if whole else [f"⟨{byte:02X}⟩" for byte in before]
            wanted.append(letter)
        found = read(kind(), text)
        assert found == wanted
        assert "".join(piece for piece in found if not BYTES.fullmatch(piece)) == text


def test_every_cut_of_a_text_has_its_characters_where_they_end() -> None:
    draw = random.Random(1)
    text = "aé✓👍שb" * 3
    encoded = text.encode()
    for _ in range(50):
        cuts = sorted({0, len(encoded), *draw.choices(range(len(encoded)), k=9)})
        pieces = [encoded[i:j] for i, j in pairwise(cuts)]
        shown = pieces_as_read(pieces)
        assert "".join(BYTES.sub("", one) for one in shown) == text
        for end, one in zip(cuts[1:], shown, strict=True):
            # As many characters are complete up to there as can be decoded.
            so_far = encoded[:end].decode(errors="ignore")
            assert so_far.endswith(BYTES.sub("", one))
            assert one.endswith("⟩") == (so_far.encode() != encoded[:end])


# ---- everywhere ---------------------------------------------------------------------------------

TEXT = "✓ש é\ufffd"
PIECES = ["⟨E2 9C⟩", "✓", "⟨D7⟩", "ש", " ", "⟨C3⟩", "é", "⟨EF⟩", "⟨BF⟩", "\ufffd"]


def small() -> Any:
    """A byte-level tokenizer that fits the tiny models."""
    return byte_level([("â", "ľ")], alphabet="".join(SPELLED.values()))


@pytest.fixture(scope="module", params=ANY_KIND)
def model(request: Any, folder: Callable[..., Path], tmp_path_factory: Any) -> Any:
    where = tmp_path_factory.mktemp("bytes")
    for file in folder("gpt2").iterdir():
        (where / file.name).write_bytes(file.read_bytes())
    small().save_pretrained(str(where))
    return load_folder(where, kind=request.param, device="cpu", dtype=torch.float32)


def without_bos(tokens: Sequence[str]) -> list[str]:
    return [token for token in tokens if token != "<|end|>"]


def test_a_run_and_every_trace_tell_the_same_tokens(model: Any) -> None:
    _, ra = run_with_ra(model, [TEXT, "✓"], target=" é")
    answer = [" ", "⟨C3⟩", "é"]
    assert ra.str_tokens is not None
    assert [*map(without_bos, ra.str_tokens)] == [[*PIECES, *answer], ["⟨E2 9C⟩", "✓", *answer]]
    assert ra.info.targets == (" é", " é")  # several tokens are one text
    _, cache = model.run_with_cache(TEXT)
    for trace in (
        trace_layers(model, TEXT),
        trace_paths(model, TEXT, layer=0),
        trace_layers(model, TEXT, follow="abs", target=5),
        trace_paths(cache, TEXT, layer=0),
    ):
        assert without_bos(trace.tokens) == PIECES
        assert all(trace.tokens[node["position"]] == node["name"] for node in trace.sankey["nodes"])
        told = trace.to_dataframe()
        assert set(told.query_token) | set(told.key_token) <= set(trace.tokens)


def test_a_decoder_that_reads_bytes_tells_them(tmp_path: Path) -> None:
    kind = "TransformerBridge"
    if kind not in available_kinds() or not arch_models.has("bart"):
        pytest.skip("needs an encoder-decoder on TransformerBridge")
    where = arch_models.write("bart", tmp_path)
    small().save_pretrained(str(where))
    two = load_folder(where, kind=kind, device="cpu")
    _, ra = run_with_ra(two, TEXT, target=3, decoder_input="é✓")
    assert ra.str_tokens is not None
    assert without_bos(ra.str_tokens[0]) == PIECES
    assert ra.info.decoder_tokens is not None
    assert without_bos(ra.info.decoder_tokens[0][1:]) == ["⟨C3⟩", "é", "⟨E2 9C⟩", "✓"]


def test_predictions_of_less_than_a_character_are_bytes(model: Any) -> None:
    _, ra = run_with_ra(model, "é")
    (patched,) = patched_predictions(model, "é", ra, top=D_VOCAB)
    named = {text for text, _ in patched.before.top}
    assert "\ufffd" not in named
    assert {"⟨E2⟩", "⟨9C⟩", "⟨E2 9C⟩", "⟨C3⟩", " ", "<|end|>"} <= named
    begun = small().convert_tokens_to_ids("âľ")
    _, ra = run_with_ra(model, "é", target=begun)
    assert ra.info.targets == ("⟨E2 9C⟩",)
    with pytest.raises(BadInput, match=r"found 3: '⟨C3⟩' \+ 'é' \+ ' '"):
        run_with_ra(model, "é", target=logit_diff("é ", " "))


def test_nothing_that_shows_tokens_shows_a_replacement(model: Any, tmp_path: Path) -> None:
    _, ra = run_with_ra(model, "✓ש é", target=" é")
    trace = trace_layers(ra, follow="abs", target_pos=-2)
    report = write_report(ra, tmp_path / "r.html", traces=[trace]).read_text(encoding="utf-8")
    facts = as_json(ra, model, ["✓ש é"], top=200)
    shown = [
        report,
        trace.to_html(),
        trace.to_json(),
        str(trace),
        trace.to_dataframe().to_csv(),
        json.dumps(facts, ensure_ascii=False),
        *(str(f(ra, (0, 0)).to_plotly_json()) for f in (head_map, query_key_pull, token_row)),
        str(path_diagram(trace).to_plotly_json()),
    ]
    for text in shown:
        assert BYTES.search(text.replace("\\u27e8", "⟨").replace("\\u27e9", "⟩"))
        assert "E2·9C" not in text  # the space between bytes is none of the text's
        assert "\ufffd" not in text
        assert "\\ufffd" not in text
    assert visible(" ⟨E2 9C⟩ ") == "·⟨E2 9C⟩·"


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("\u0301", "◌\u0301"),  # its letter is in the token before
        ("e\u0301", "e\u0301"),
        ("\u05b8\u05dc", "\u2068◌\u05b8\u05dc\u2069"),
        ("\ufe0f", "U+FE0F"),
        ("❤\ufe0f", "❤\ufe0f"),
        ("\u200d", "U+200D"),
        ("\u200d🚀", "U+200D🚀"),
    ],
)
def test_what_completes_a_character_that_cannot_be_seen_alone_is_seen(
    token: str, shown: str
) -> None:
    assert label(token) == shown
