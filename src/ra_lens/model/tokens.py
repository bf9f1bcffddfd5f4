"""`Tokens`: the tokenizer of a TransformerLens model, read as the model itself reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ra_lens.errors import BadInput
from ra_lens.text import bytes_of, isolated, pieces_as_read, whole_text

PrependBos = bool | str | None
"""In front of text: the model's default (None), BOS (True), nothing (False), or a token as text."""


class Tokens:
    """From text to token ids and back."""

    def __init__(self, model: nn.Module) -> None:
        """Read as `model` does."""
        self.module = model
        # Both classes build attributes dynamically; all untyped access goes through this name.
        self._model: Any = model

    @property
    def name(self) -> str:
        """The model's name, as TransformerLens has it."""
        return str(getattr(self._model.cfg, "model_name", "") or type(self.module).__name__)

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or None."""
        return getattr(self._model, "tokenizer", None)

    @property
    def pad_token_id(self) -> int:
        """Id written at padded positions; what it is never matters, they are masked."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if pad is None else int(pad)

    @property
    def unknown_token_id(self) -> int | None:
        """Id of words that the tokenizer does not know; None where it knows them all.

        Tokenizers whose unknown token is also BOS or EOS know every text.
        """
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        ends = {getattr(self.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
        return None if unknown in ends else unknown

    def unknown_words(self, text: str) -> list[str]:
        """Words of a text that the tokenizer reads as its unknown token, each once."""
        unknown = self.unknown_token_id
        if unknown is None:
            return []
        if not getattr(self.tokenizer, "is_fast", False):
            words = [word for word in text.split() if unknown in self.encode_fragment(word)]
            return list(dict.fromkeys(words))
        read = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        places = zip(read["input_ids"], read["offset_mapping"], strict=True)
        words = [text[start:end] for token, (start, end) in places if token == unknown]
        return list(dict.fromkeys(word.strip() or repr(word) for word in words))

    def describe_unknown(self, text: str) -> str:
        """Name the unknown words of a text and what they are read as; empty where all are known."""
        words = self.unknown_words(text)
        if not words:
            return ""
        named = ", ".join(isolated(repr(word)) for word in words[:8])
        named += f" and {len(words) - 8} more" * (len(words) > 8)
        it = "them" if len(words) > 1 else "it"
        return f"{named}; its tokenizer reads {it} as {self.tokenizer.unk_token}"

    def encode(self, text: str, *, prepend_bos: PrependBos) -> list[int]:
        """Token ids of a prompt, exactly as the model's own `to_tokens` gives them.

        A token given as text stands in front in place of BOS; BOS itself as text is the same as
        True, so that a text is read again alike from what stood in front of it.
        """
        self._need_tokenizer()
        if isinstance(prepend_bos, str):
            token = self.token_in_front(prepend_bos)
            if token == getattr(self.tokenizer, "bos_token_id", None):
                ids = self.encode(text, prepend_bos=True)
                if ids[:1] == [token]:
                    return ids
            return [token, *self.encode(text, prepend_bos=False)]
        if type(prepend_bos) in (int, float):  # an id, perhaps, which would pass for True
            raise BadInput(
                f"found prepend_bos={prepend_bos!r}; give True (BOS), False (nothing), None (the "
                "model's default), or a token as text, such as '<|endoftext|>'."
            )
        options: dict[str, Any] = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        return self._model.to_tokens(whole_text("text", text), truncate=False, **options)[
            0
        ].tolist()

    def token_in_front(self, text: str) -> int:
        """Id of a token that is to stand in front of prompts, given as text."""
        self._need_tokenizer()
        given = whole_text("prepend_bos", text)
        known = self.tokenizer.get_added_vocab().get(given)
        ids = self.encode_fragment(given) if known is None else [known]
        if len(ids) != 1:
            pieces = " + ".join(isolated(repr(piece)) for piece in self.decode_each(ids))
            pieces = f" ({pieces})" * bool(ids)
            raise BadInput(
                f"found prepend_bos={given!r}, which is {len(ids)} tokens of {self.name}{pieces}. "
                f"Give one token{self._special_tokens()}, True for BOS, or False for nothing."
            )
        if ids[0] == self.unknown_token_id and given != self.tokenizer.unk_token:
            raise BadInput(
                f"found prepend_bos={given!r}, which {self.name} does not know: its tokenizer "
                f"reads it as {self.tokenizer.unk_token}. Give a token of its vocabulary"
                f"{self._special_tokens()}, True for BOS, or False for nothing."
            )
        return ids[0]

    def _special_tokens(self) -> str:
        named = list(dict.fromkeys(map(str, self.tokenizer.all_special_tokens)))[:4]
        return f", such as {' or '.join(map(repr, named))}" if named else ""

    def encode_fragment(self, text: str) -> list[int]:
        """Token ids of a piece of text in the middle of a prompt: no special tokens."""
        self._need_tokenizer()

        def ids_of(piece: str) -> list[int]:
            return self.tokenizer(piece, add_special_tokens=False)["input_ids"]

        # SentencePiece tokenizers put a space of their own in front of a text, so that " Paris"
        # alone is two tokens. Tokenised after something it is one; what that drops must be blank.
        text = whole_text("text", text)
        before, joint, alone = ids_of(":"), ids_of(":" + text), ids_of(text)
        rest = joint[len(before) :]
        if not rest or joint != before + rest or alone[-len(rest) :] != rest:
            return alone
        dropped = "".join(map(self.decode, alone[: -len(rest)]))
        return alone if dropped.replace("▁", "").strip() else rest

    def decode(self, token: int) -> str:
        """Text of one token by itself, as `decode_each` writes it."""
        return self.decode_each([token])[0]

    def decode_each(self, tokens: Sequence[int]) -> tuple[str, ...]:
        """Text of each token of a sequence; `#id` for a model without a tokenizer.

        Where a character is cut over several tokens, it stands with the one that completes it, and
        the others show their bytes: `⟨E2 9C⟩`.
        """
        if self.tokenizer is None:
            return tuple(f"#{token}" for token in tokens)
        tokenizer = self.tokenizer
        names = tokenizer.convert_ids_to_tokens(list(tokens))
        added = tokenizer.get_added_vocab()
        pieces: list[bytes] = []
        for token, name in zip(tokens, names, strict=True):
            text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
            pieces.append(bytes_of(name, text, added=name in added))
        return pieces_as_read(pieces)

    def decode_text(self, tokens: Sequence[int]) -> str:
        """Text of several tokens together; bytes where one alone is less than a character."""
        if self.tokenizer is None or len(tokens) == 1:
            return "".join(self.decode_each(tokens))
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def _need_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise BadInput(
                f"{self.name} has no tokenizer, so text cannot be read. Pass token ids "
                "(Int[Tensor, 'batch pos']) as input and ids as target, or set model.tokenizer."
            )
