"""What the model reads: token ids per example, without padding, and batches made from them.

Every example is kept as its own list of ids. Positions are counted within that list, so they mean
the same alone, in any batch, and on either padding side; padding appears only when a `Batch` is
laid out, and its mask says where.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ra_lens.errors import BadInput, RALensWarning
from ra_lens.sites import Lens

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class Batch:
    """Token ids laid out with padding, and where each example lies in them.

    Attributes:
        tokens: Ids, padded.
        attention_mask: True at real tokens.
        starts: Column of each example's first token.
        lengths: Number of real tokens of each example.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def first_span(self) -> slice:
        """Columns of the first example's tokens; of all examples where they are equally long."""
        return slice(self.starts[0], self.starts[0] + self.lengths[0])

    def columns(self, positions: Sequence[Sequence[int]]) -> Int[Tensor, "batch read"]:
        """Turn positions within each example into columns of `tokens`."""
        return torch.tensor(
            [[start + p for p in row] for start, row in zip(self.starts, positions, strict=True)]
        )


@dataclass(frozen=True)
class Prompts:
    """The examples of one run.

    Attributes:
        ids: Token ids of each example.
        bos_prepended: Whether TransformerLens put a BOS token in front of the text; None when
            token ids were given.
        padding_side: Where a batch is padded.
        width: Width that every batch is padded to at least (that of a token tensor given).
        texts: The prompts as text, where they were given as text.
    """

    ids: tuple[tuple[int, ...], ...]
    bos_prepended: bool | None
    padding_side: PaddingSide
    width: int = 0
    texts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Give the number of examples."""
        return len(self.ids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each example."""
        return tuple(len(row) for row in self.ids)

    def extended(self, answers: Sequence[Sequence[int]]) -> Prompts:
        """Append to each example the tokens of its answer (teacher forcing)."""
        rows = tuple((*row, *answer) for row, answer in zip(self.ids, answers, strict=True))
        return replace(self, ids=rows)

    def batches(self, batch_size: int | None) -> Iterator[tuple[slice, Prompts]]:
        """Split into runs of `batch_size` consecutive examples (None: one run of all)."""
        step = len(self) if batch_size is None else batch_size
        for start in range(0, len(self), step):
            part = slice(start, min(start + step, len(self)))
            yield part, replace(self, ids=self.ids[part], texts=None)

    def chosen(self, which: Iterable[int]) -> Prompts:
        """Some of the examples, in the order of their indices given; one may be there twice."""
        return replace(self, ids=tuple(self.ids[i] for i in which), texts=None)

    def widened(self) -> Prompts:
        """The same, with every batch padded to the longest of all examples."""
        return replace(self, width=max(self.width, *self.lengths))

    def lay_out(self, lens: Lens) -> Batch:
        """Pad the examples to one width and move them to the model's device.

        Raises:
            BadInput: an example longer than the model's context.
        """
        width = max(self.width, *self.lengths)
        if width > lens.n_ctx:
            raise BadInput(
                f"found a prompt of {width} tokens (answer included), but {lens.name} reads at "
                f"most {lens.n_ctx}. Shorten the prompt, or load the model with a longer context."
            )
        tokens = torch.full((len(self), width), lens.pad_token_id)
        mask = torch.zeros((len(self), width), dtype=torch.bool)
        starts: list[int] = []
        for i, row in enumerate(self.ids):
            start = width - len(row) if self.padding_side == "left" else 0
            tokens[i, start : start + len(row)] = torch.tensor(row)
            mask[i, start : start + len(row)] = True
            starts.append(start)
        device = lens.device
        return Batch(tokens.to(device), mask.to(device), tuple(starts), self.lengths)


def read_prompts(
    lens: Lens,
    input: str | Sequence[str] | Tensor,
    *,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
) -> Prompts:
    """Turn what the user gave into token ids per example.

    Args:
        lens: The model.
        input: One prompt, several prompts, or token ids (`Int[Tensor, "batch pos"]` or one row).
        attention_mask: For token ids: 1 at real tokens. Without it, in a batch of several rows, a
            run of the tokenizer's pad token at the end (or start) of a row counts as padding, as
            in TransformerLens; where pad and BOS are the same token, the last one of a run at the
            start is kept as BOS.
        prepend_bos: For text: overrides the model's `cfg.default_prepend_bos`.
        padding_side: Overrides the tokenizer's side.

    Raises:
        BadInput: an empty prompt, ids that are not integers or not in the vocabulary, a mask of
            another shape or with gaps, options that do not apply to this kind of input.
    """
    default_side = getattr(lens.tokenizer, "padding_side", "right")
    side: PaddingSide = padding_side or ("left" if default_side == "left" else "right")
    if isinstance(input, Tensor):
        if prepend_bos is not None:
            raise BadInput(
                f"found prepend_bos={prepend_bos} with token ids, which are read as they are. "
                "Pass text, or put the BOS id into the tensor."
            )
        return _from_tokens(lens, input, attention_mask, padding_side)
    if attention_mask is not None:
        raise BadInput(
            "found attention_mask with text input; the mask of text is made from its padding. "
            "Pass token ids with the mask, or leave it out."
        )
    texts = (input,) if isinstance(input, str) else tuple(input)
    if not texts:
        raise BadInput("found an empty list of prompts. Pass at least one prompt.")
    rows: list[tuple[int, ...]] = []
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise BadInput(
                f"prompt {i} is a {type(text).__name__}; a list of prompts holds strings. "
                "For token ids pass one tensor."
            )
        if text == "":
            raise BadInput(f"prompt {i} is empty. Pass a text of at least one token.")
        row = tuple(lens.encode(text, prepend_bos=prepend_bos))
        if not row:
            raise BadInput(
                f"prompt {i} ({text!r}) has no token for {lens.name}. Pass a text of at least one "
                "token, or prepend_bos=True."
            )
        rows.append(row)
    prepended = all(_starts_with_bos(lens, t, r) for t, r in zip(texts, rows, strict=True))
    return Prompts(tuple(rows), prepended, side, texts=texts)


def read_decoder_prompts(
    lens: Lens, decoder_input: str | Sequence[str] | Tensor | None, n: int
) -> Prompts:
    """What the decoder of an encoder-decoder has read before the answer.

    Args:
        lens: The model.
        decoder_input: Token ids, read as they are; or text, after the model's start token; one for
            all prompts, or one each. None: the start token alone.
        n: Number of prompts.

    Raises:
        BadInput: ids that are not, another number of rows, or a model without a start token.
    """
    if isinstance(decoder_input, Tensor):
        # Many begin with their pad token: nothing here is padding.
        everything = torch.ones_like(decoder_input)
        rows = list(_from_tokens(lens, decoder_input, everything, "right").ids)
    elif lens.decoder_start is None:
        raise BadInput(
            f"{lens.name} does not say which token its decoder begins with. Give decoder_input="
            "as token ids, that token included."
        )
    else:
        given = decoder_input or ""
        texts = [given] if isinstance(given, str) else given
        rows = [(lens.decoder_start, *lens.encode_fragment(text)) for text in texts]
    rows = rows * n if len(rows) == 1 else rows
    if len(rows) != n:
        raise BadInput(
            f"found a decoder_input of {len(rows)} rows for {n} prompts. Give one for all, or one "
            "per prompt."
        )
    return Prompts(tuple(rows), None, "right")


def _starts_with_bos(lens: Lens, text: str, row: tuple[int, ...]) -> bool:
    """Whether the row begins with a BOS token that is not the text's own."""
    if row[0] != getattr(lens.tokenizer, "bos_token_id", None):
        return False
    written = text.startswith(getattr(lens.tokenizer, "bos_token", None) or "\0")
    return not written or len(row) > len(lens.encode(text, prepend_bos=False))


def _from_tokens(
    lens: Lens, tokens: Tensor, attention_mask: Tensor | None, padding_side: PaddingSide | None
) -> Prompts:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise BadInput(
            f"found a {tokens.dtype} tensor as input; token ids are integers. "
            "Use model.to_tokens(text)."
        )
    ids = tokens.unsqueeze(0) if tokens.ndim == 1 else tokens
    if ids.ndim != 2 or ids.numel() == 0:
        raise BadInput(
            f"found token ids of shape {tuple(tokens.shape)}; [batch, pos] with at least one "
            "token is needed. Use model.to_tokens(text)."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= lens.d_vocab:
        raise BadInput(
            f"found token id {low if low < 0 else high}; {lens.name} has ids 0 to "
            f"{lens.d_vocab - 1}. Use the model's own tokenizer: model.to_tokens(text)."
        )
    if attention_mask is not None:
        mask = attention_mask.unsqueeze(0) if attention_mask.ndim == 1 else attention_mask
        if mask.shape != ids.shape:
            raise BadInput(
                f"found an attention_mask of shape {tuple(attention_mask.shape)} for token ids of "
                f"shape {tuple(tokens.shape)}. Give both the same shape."
            )
        keep = mask != 0
    else:
        keep = _guess_mask(lens, ids)
        special = {getattr(lens.tokenizer, n, None) for n in ("bos_token_id", "eos_token_id")}
        if not bool(keep.all()) and lens.pad_token_id in special:
            warnings.warn(
                f"rows of the input begin or end with {lens.decode(lens.pad_token_id)!r}, which is "
                "the pad token as well as a real one, and were taken as padded. Pass "
                "attention_mask to say what is padding.",
                RALensWarning,
                stacklevel=4,
            )
    return _strip(ids.cpu(), keep.cpu(), padding_side)


def _guess_mask(lens: Lens, ids: Tensor) -> Tensor:
    pad = getattr(lens.tokenizer, "pad_token_id", None)
    keep = torch.ones_like(ids, dtype=torch.bool)
    if pad is None or ids.shape[0] == 1:
        return keep
    real = ids != pad
    from_left = real.cummax(dim=1).values
    from_right = real.flip(1).cummax(dim=1).values.flip(1)
    bos = getattr(lens.tokenizer, "bos_token_id", None)
    leading = (~from_left).sum(dim=1)
    if bool((ids[:, 0] == pad).any()) and not bool((~from_right).any()):  # padded on the left
        if bos == pad:
            leading = (leading - 1).clamp(min=0)
        return torch.arange(ids.shape[1], device=ids.device) >= leading.unsqueeze(1)
    return from_right | ~real.any(dim=1, keepdim=True)


def _strip(ids: Tensor, keep: Tensor, padding_side: PaddingSide | None) -> Prompts:
    rows: list[tuple[int, ...]] = []
    left = right = False
    for i in range(ids.shape[0]):
        where = keep[i].nonzero().flatten().tolist()
        if not where:
            raise BadInput(f"row {i} of the input has no real token (its mask is 0 throughout).")
        first, last = where[0], where[-1]
        if last - first + 1 != len(where):
            raise BadInput(
                f"row {i} of attention_mask has a gap between real tokens. "
                "Pad on one side only, left or right."
            )
        left |= first > 0
        right |= last < ids.shape[1] - 1
        rows.append(tuple(ids[i, first : last + 1].tolist()))
    if left and right:
        raise BadInput("the rows are padded on different sides. Pad all of them on one side.")
    side: PaddingSide = "left" if left else "right"
    if not left and not right and padding_side is not None:
        side = padding_side
    return Prompts(tuple(rows), None, side, width=ids.shape[1])
