"""What TransformerLens puts in front of text by default, and whether the model knows it there.

TransformerLens prepends the tokenizer's BOS to every text, also where the tokenizer itself would
not: a convention that GPT-2 takes well, whose BOS ended each document in training. Where BOS begins
a turn of a chat, plain text behind it is something that the model has never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ra_lens.model.tokens import Tokens

_END_OF_TEXT = "<|endoftext|>"  # between documents, in the training of many models
_PROBE = ":"


@dataclass(frozen=True)
class Front:
    """What stands in front of text by default.

    Attributes:
        token: The token, as text; empty if there is none.
        own: What the tokenizer itself, as it was published, puts there; None if it cannot be told,
            since TransformerLens has changed it and its files are not here.
        is_chat_token: Whether the token belongs to chats: whether it stands literally in the chat
            template of the tokenizer. `<|endoftext|>`, which ends any text, does not count.
        separator: Another token that stands between documents, `<|endoftext|>`; empty where the
            tokenizer has none.
    """

    token: str
    own: str | None
    is_chat_token: bool
    separator: str

    @property
    def is_strange(self) -> bool:
        """Whether it is a chat token, and not known to be the tokenizer's own doing."""
        return self.is_chat_token and self.own != self.token


def default_front(lens: Tokens) -> Front | None:
    """Tell what stands in front of text by default; None for a model without a tokenizer."""
    tokenizer = lens.tokenizer
    if tokenizer is None:
        return None
    token = _first(tokenizer, lens.encode(_PROBE, prepend_bos=None))
    own = _first(tokenizer, tokenizer(_PROBE)["input_ids"])
    # TransformerLens loads a tokenizer anew, with this on, to have it put BOS there.
    if own and getattr(tokenizer, "init_kwargs", {}).get("add_bos_token"):
        published = _published(tokenizer)
        own = None if published is None else _first(published, published(_PROBE)["input_ids"])
    templates = _chat_templates(tokenizer)
    chat = token not in ("", _END_OF_TEXT) and any(token in text for text in templates)
    known = _END_OF_TEXT in tokenizer.get_added_vocab() and token != _END_OF_TEXT
    return Front(token, own, chat, _END_OF_TEXT if known else "")


def _first(tokenizer: Any, ids: Sequence[int]) -> str:
    """Give the token that was put in front of the probe, as text; empty if there is none."""
    bare = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    ids = list(ids)
    before = ids[1 : 1 + len(bare)] == bare and len(ids) > len(bare)
    # Behind a special token the text itself may be cut in another way.
    special = ids[:1] != bare[:1] and ids[:1] and ids[0] in tokenizer.all_special_ids
    return str(tokenizer.convert_ids_to_tokens(ids[0])) if before or special else ""


def _published(tokenizer: Any) -> Any:
    """Load the tokenizer as its files say, without any request; None if they are not here."""
    from transformers import AutoTokenizer

    name = str(getattr(tokenizer, "name_or_path", "") or "")
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # tokenizers has no other class for a file that it cannot read
        return None


def _chat_templates(tokenizer: Any) -> list[str]:
    found: Any = getattr(tokenizer, "chat_template", None)
    several = list(found.values()) if isinstance(found, dict) else [found]
    return [text for text in several if isinstance(text, str)]
