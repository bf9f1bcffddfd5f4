"""Reading the prompts, answers and decoder inputs that people hand over: texts, or token ids.

* Text: a string, or several in whatever iterates over strings (list, array, Series, generator).
* Token ids: one row of integers, or rows. Rows of one length are the tensor that they would make,
  padding and all; of rows of different lengths each is read as it is.
* What a tokenizer gives (`BatchEncoding`), or any mapping with `input_ids`: these, with its
  `attention_mask` where no other is given beside it. In transformers 5
  `apply_chat_template(..., return_tensors="pt")` gives such a thing.

All else is refused. A mapping or a set iterates too, but over something that nobody meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.numbers import as_whole
from ra_lens.text import whole_text

Given = str | Tensor | Mapping[str, Any] | Iterable[Any]
Mask = Tensor | Iterable[Any]

# What a Hugging Face model may read beside ids and mask; ra_lens hands on none of it.
_ALSO_READ = (
    "token_type_ids", "position_ids", "inputs_embeds", "pixel_values", "decoder_input_ids",
)  # fmt: skip


@dataclass(frozen=True)
class TokenIds:
    """Token ids as they were given."""

    ids: Int[Tensor, "batch pos"]  # shorter rows are filled up with 0
    lengths: tuple[int, ...]  # of each row as it was given
    mask: Bool[Tensor, "batch pos"] | None = None  # True at real tokens; None: nothing was said

    def __len__(self) -> int:
        """Give the number of rows."""
        return len(self.lengths)

    @property
    def ragged(self) -> bool:
        """Whether the rows have different lengths."""
        return min(self.lengths) < max(self.lengths)

    @property
    def keep(self) -> Bool[Tensor, "batch pos"]:
        """Where tokens are: what was given, less what the mask calls padding."""
        if self.mask is not None:
            return self.mask
        return torch.arange(self.ids.shape[1]) < torch.tensor(self.lengths).unsqueeze(1)

    @property
    def rows(self) -> list[list[int]]:
        """The tokens of each row."""
        return [row[real].tolist() for row, real in zip(self.ids.cpu(), self.keep, strict=True)]

    def masked(self, mask: Mask) -> TokenIds:
        """The same ids with a mask, which must have their shape and hold 0 and 1."""
        values = _plain(mask)
        values = [_plain(row) for row in values] if isinstance(values, list) else []
        rows: list[Any] = values if any(isinstance(row, list) for row in values) else [values]
        lengths = tuple(len(row) if isinstance(row, list) else 0 for row in rows)
        if lengths != self.lengths or getattr(mask, "ndim", 2) > 2:
            found, wanted = getattr(mask, "shape", lengths), self.ids.shape
            raise BadInput(
                f"found an attention_mask of shape {tuple(found)} for token ids of shape "
                f"{self.lengths if self.ragged else tuple(wanted)}. Give both the same shape."
            )
        odd = [value for row in rows for value in row if value not in (0, 1)]
        if odd:
            raise BadInput(
                f"found {odd[0]!r} in attention_mask; it is 1 at real tokens and 0 at padding. "
                "Give the mask that the tokenizer gives."
            )
        filled = torch.zeros(self.ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            filled[i, : len(row)] = torch.tensor(row).bool()
        return replace(self, mask=filled)


def read_given(name: str, given: Any, *, mask: Mask | None = None) -> tuple[str, ...] | TokenIds:
    """Tell texts from token ids; refuse all else, and none at all. Messages call one `name`.

    A `mask` of ids wins over one that comes with them. `given` may be a result of this.
    """
    if isinstance(given, Mapping) and given.get("input_ids") is not None:
        _refuse_what_else_is_read(name, given)
        mask = given.get("attention_mask") if mask is None else mask
        given = read_given(name, given["input_ids"])
        if not isinstance(given, TokenIds):
            raise BadInput(f"found text under input_ids of a {name}. Give text as it is.")
    found = given if isinstance(given, TokenIds) else _read(name, given)
    return found.masked(mask) if isinstance(found, TokenIds) and mask is not None else found


def answers_given(name: str, given: Any) -> Any:
    """Put answers into plain lists: texts, ids, or rows of ids of one answer; one stays alone."""
    if isinstance(given, Mapping) and given.get("input_ids") is not None:
        return cast("TokenIds", read_given(name, given)).rows
    _refuse_no_list(name, given)
    given = _plain(given)
    if isinstance(given, str) or not isinstance(given, Iterable):
        return given
    return [_plain(answer) for answer in given]


def _refuse_no_list(name: str, given: object) -> None:
    """Refuse bytes, sets and mappings, which iterate over something that is not meant."""
    found = f"found a {type(given).__name__} as {name}"
    if isinstance(given, bytes | bytearray | memoryview):
        raise BadInput(f"{found}; text is needed. Decode it: bytes.decode().")
    if isinstance(given, Set):
        raise BadInput(f"{found}, which has no order. Give a list.")
    if isinstance(given, Mapping):
        held = cast("Mapping[Any, Any]", given)
        keys = ", ".join(repr(key) for key in list(held)[:4]) or "nothing"
        raise BadInput(
            f"{found} with {keys} in it; text is needed, or token ids under input_ids. Give "
            "list(mapping.values()) if these are texts, or what model.tokenizer(text) gives."
        )


def _refuse_what_else_is_read(name: str, given: Mapping[Any, Any]) -> None:
    for key in _ALSO_READ:
        if _any(given.get(key)):
            how = "Give it as decoder_input=." if key == "decoder_input_ids" else "Leave it out."
            raise BadInput(
                f"found {key} beside the input_ids of a {name}; ra_lens runs a model on ids and "
                f"mask alone. {how}"
            )


def _any(value: Any) -> bool:
    """Whether something in nested lists, or in an array, is not 0."""
    value = _plain(value)
    return any(map(_any, value)) if isinstance(value, list) else bool(value)


def _plain(value: Any) -> Any:
    """Lists in place of a tuple, a tensor, an array or a table; else what it was."""
    if isinstance(value, tuple):
        return list(cast("tuple[Any, ...]", value))
    if hasattr(value, "__array__") and not hasattr(value, "tolist"):
        value = np.asarray(value)
    return value.tolist() if hasattr(value, "tolist") else value


def _read(name: str, given: Any) -> tuple[str, ...] | TokenIds:
    if isinstance(given, str):
        return (whole_text(f"{name} 0", given),)
    if isinstance(given, Tensor):
        return _from_tensor(name, given)
    _refuse_no_list(name, given)
    if hasattr(given, "__array__"):  # of NumPy, pandas and whatever else goes by their rules
        array: np.ndarray[Any, Any] = np.asarray(given)
        if array.dtype.kind in "biufc":
            # torch has fewer types of integers
            numbers = array.astype(np.int64) if array.dtype.kind in "iu" else array.copy()
            return _from_tensor(name, torch.from_numpy(numbers))
        if array.ndim != 1:
            raise BadInput(
                f"found a {type(given).__name__} of shape {array.shape} as {name}s; texts have one "
                "dimension. Give a list, or one column."
            )
        given = array.tolist()
    if not isinstance(given, Iterable):
        raise BadInput(
            f"found {_shown(given)} as {name}; text, a list of texts, or token ids are needed. "
            "Give 'some text', model.to_tokens(text), or what model.tokenizer(text) gives."
        )
    return _from_list(name, list(given))


def _from_tensor(name: str, tokens: Tensor) -> TokenIds:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise BadInput(
            f"found a {tokens.dtype} tensor as {name}; token ids are integers. "
            "Use model.to_tokens(text)."
        )
    ids = tokens.unsqueeze(0) if tokens.ndim == 1 else tokens
    if ids.ndim != 2 or ids.numel() == 0:
        raise BadInput(
            f"found token ids of shape {tuple(tokens.shape)}; [batch, pos] with at least one "
            "token is needed. Use model.to_tokens(text)."
        )
    return TokenIds(ids.long(), (ids.shape[1],) * ids.shape[0])


def _from_list(name: str, items: list[Any]) -> tuple[str, ...] | TokenIds:
    if not items:
        raise BadInput(f"found an empty list of {name}s. Pass at least one {name}.")
    if all(isinstance(item, str) for item in items):
        return tuple(whole_text(f"{name} {i}", text) for i, text in enumerate(items))
    alone = _row(items)
    rows = [_row(item) for item in items] if alone is None else [alone]
    wrong = next((i for i, row in enumerate(rows) if not row), None)
    if wrong is None:
        lengths = tuple(len(row or ()) for row in rows)
        filled = [[*(row or ()), *[0] * (max(lengths) - len(row or ()))] for row in rows]
        return TokenIds(torch.tensor(filled), lengths)
    if wrong > 0:
        raise BadInput(
            f"{name} {wrong} is {_shown(items[wrong])}, and {name} 0 a row of token ids. Give rows "
            "of at least one integer, or texts only."
        )
    wrong = next(i for i, item in enumerate(items) if not isinstance(item, str))
    raise BadInput(
        f"{name} {wrong} is a {type(items[wrong]).__name__}; a list of {name}s holds strings. "
        f"{_instead_of(items[wrong])}"
    )


def _row(item: Any) -> list[int] | None:
    """The token ids of one row; None for what is no row."""
    values = _plain(item)
    if isinstance(values, list) and getattr(item, "ndim", 1) == 2 and len(values) == 1:
        values = values[0]  # model.to_tokens(text)
    if not isinstance(values, list):
        return None
    ids = [None if getattr(i, "ndim", 0) else as_whole(i) for i in cast("list[Any]", values)]
    return None if None in ids else cast("list[int]", ids)


def _instead_of(item: Any) -> str:
    if isinstance(item, Mapping) and "role" in item:
        return "For a chat call tokenizer.apply_chat_template(messages, return_tensors='pt')."
    if isinstance(item, bytes):
        return "Decode it: bytes.decode()."
    if isinstance(getattr(item, "text", None), str):
        return "Give the text of each: [one.text for one in prompts]."
    return "For token ids pass one tensor."


def _shown(item: object) -> str:
    text = repr(item)
    return text if len(text) <= 40 else f"a {type(item).__name__}"
