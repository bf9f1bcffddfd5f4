"""What the model reads: token ids per example, without padding, and batches made from them.

Every example is kept as its own list of ids. Positions are counted within that list, so they mean
the same alone, in any batch, and on either padding side; padding appears only when a `Batch` is
laid out, and its mask says where.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from ra_lens.errors import BadInput, RALensWarning
from ra_lens.inputs import Given, Mask, TokenIds, read_given
from ra_lens.model import Lens, PrependBos, default_front
from ra_lens.tensors import sent

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class Batch:
    """Token ids laid out with padding, and where each example lies in them."""

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]  # True at real tokens; on the host
    starts: tuple[int, ...]  # column of each example's first token
    lengths: tuple[int, ...]  # number of real tokens of each example

    @property
    def is_padded(self) -> bool:
        """Whether any example has padding."""
        return min(self.lengths) < self.tokens.shape[1]

    @property
    def first_span(self) -> slice:
        """Columns of the first example's tokens; of all examples where they are equally long."""
        return self.span(0)

    @property
    def model_input(self) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Tokens and mask."""
        return self.tokens, self.attention_mask

    @property
    def last(self) -> Int[Tensor, "batch 1"]:
        """Column of each example's last token."""
        return self.columns([[n - 1] for n in self.lengths])

    def span(self, i: int) -> slice:
        """Columns of an example's tokens."""
        return slice(self.starts[i], self.starts[i] + self.lengths[i])

    def spread(self, value: Tensor, dim: int) -> Tensor:
        """Lay values of equally long examples that ran unpadded out as this batch; elsewhere 0."""
        width, before = self.tokens.shape[1], self.starts[0]
        if value.shape[dim] == width:
            return value
        later = value.ndim - 1 - dim % value.ndim
        sides = [0, 0] * later + [before, width - before - value.shape[dim]]
        return torch.nn.functional.pad(value, sides)

    def columns(self, positions: Sequence[Sequence[int]]) -> Int[Tensor, "batch read"]:
        """Turn positions within each example into columns of `tokens`."""
        return torch.tensor(
            [[start + p for p in row] for start, row in zip(self.starts, positions, strict=True)]
        )


@dataclass(frozen=True)
class Prompts:
    """The examples of one run."""

    ids: tuple[tuple[int, ...], ...]
    prepended: str | None  # the token put in front of text, "" for none; None where ids were given
    padding_side: PaddingSide
    width: int = 0  # that every batch is padded to at least (that of a token tensor given)
    texts: tuple[str, ...] | None = None  # where the prompts were given as text

    def __len__(self) -> int:
        """Give the number of examples."""
        return len(self.ids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each example."""
        return tuple(len(row) for row in self.ids)

    @property
    def padded_width(self) -> int:
        """Width of a batch of all examples."""
        return max(self.width, *self.lengths)

    @property
    def starts(self) -> tuple[int, ...]:
        """Column of each example's first token in a batch of all examples."""
        left, width = self.padding_side == "left", self.padded_width
        return tuple(width - n if left else 0 for n in self.lengths)

    @property
    def is_padded(self) -> bool:
        """Whether any example is padded in a batch of all."""
        return min(self.lengths) < self.padded_width

    def extended(self, answers: Sequence[Sequence[int]]) -> Prompts:
        """Append to each example the tokens of its answer (teacher forcing)."""
        rows = tuple((*row, *answer) for row, answer in zip(self.ids, answers, strict=True))
        return replace(self, ids=rows)

    def batches(self, batch_size: int | None) -> Iterator[tuple[range, Prompts]]:
        """Split into runs of `batch_size` consecutive examples (None: one run of all)."""
        step, every = batch_size or len(self), range(len(self))
        for start in every[::step]:
            examples = every[start : start + step]
            yield examples, self.chosen(examples)

    def chosen(self, which: Iterable[int]) -> Prompts:
        """Some of the examples, in the order of their indices given; one may be there twice."""
        order = list(which)
        texts = None if self.texts is None else tuple(self.texts[i] for i in order)
        return replace(self, ids=tuple(self.ids[i] for i in order), texts=texts)

    def widest(self) -> Prompts:
        """The longest example alone."""
        lengths = self.lengths
        return self.chosen([max(range(len(lengths)), key=lengths.__getitem__)])

    def widened(self) -> Prompts:
        """The same, with every batch padded to the longest of all examples."""
        return replace(self, width=self.padded_width)

    def unpadded(self) -> Prompts:
        """The same, padded no more than their lengths need."""
        return replace(self, width=0)

    def lay_out(self, lens: Lens) -> Batch:
        """Pad the examples to one width, tokens on the model's device; refuse more than fit."""
        width = self.padded_width
        if width > lens.n_ctx:
            raise BadInput(
                f"found a prompt of {width} tokens (answer included), but {lens.name} reads at "
                f"most {lens.n_ctx}. Shorten the prompt, or load the model with a longer context."
            )
        tokens = torch.full((len(self), width), lens.pad_token_id)
        mask = torch.zeros((len(self), width), dtype=torch.bool)
        for i, (row, start) in enumerate(zip(self.ids, self.starts, strict=True)):
            tokens[i, start : start + len(row)] = torch.tensor(row)
            mask[i, start : start + len(row)] = True
        return Batch(sent(tokens, lens.device), mask, self.starts, self.lengths)


PromptInput = Given | TokenIds | Prompts
"""What is read as prompts: see `ra_lens.inputs`; the last two have been read already."""


def read_prompts(
    lens: Lens,
    input: PromptInput,
    *,
    attention_mask: Mask | None = None,
    prepend_bos: PrependBos = None,
    padding_side: PaddingSide | None = None,
) -> Prompts:
    """Turn what the user gave into token ids per example; the options are those of `run_with_ra`.

    Without a mask, in a batch of several rows of one length, a run of the tokenizer's pad token at
    the end (or start) of a row counts as padding, as in TransformerLens; where pad and BOS are the
    same token, the last one of a run at the start is kept as BOS.
    """
    if isinstance(input, Prompts):
        if (attention_mask, prepend_bos, padding_side) != (None, None, None):
            raise BadInput(
                "found attention_mask, prepend_bos or padding_side with prompts that have been "
                "read already. Leave it out, or give texts or token ids."
            )
        return input
    default_side = getattr(lens.tokenizer, "padding_side", "right")
    side: PaddingSide = padding_side or ("left" if default_side == "left" else "right")
    given = read_given("prompt", input, mask=attention_mask)
    if isinstance(given, TokenIds):
        if prepend_bos is not None:
            raise BadInput(
                f"found prepend_bos={prepend_bos!r} with token ids, which are read as they are. "
                "Pass text, or put the BOS id into the tensor."
            )
        return _from_tokens(lens, given, side if given.ragged else padding_side)
    if attention_mask is not None:
        raise BadInput(
            "found attention_mask with text input; the mask of text is made from its padding. "
            "Pass token ids with the mask, or leave it out."
        )
    rows: list[tuple[int, ...]] = []
    for i, text in enumerate(given):
        if text == "":
            raise BadInput(f"prompt {i} is empty. Pass a text of at least one token.")
        row = tuple(lens.encode(text, prepend_bos=prepend_bos))
        if not row:
            raise BadInput(
                f"prompt {i} ({text!r}) has no token for {lens.name}. Pass a text of at least one "
                "token, or prepend_bos=True."
            )
        rows.append(row)
    if isinstance(prepend_bos, str):
        return Prompts(tuple(rows), prepend_bos, side, texts=given)
    prepended = [_starts_with_bos(lens, t, r) for t, r in zip(given, rows, strict=True)]
    bos = special_id(lens, "bos")
    twice = [i for i, row in enumerate(rows) if prepended[i] and row[1:2] == (bos,)]
    if twice and prepend_bos is None:
        warnings.warn(
            f"prompt {twice[0]} begins with {lens.decode(rows[twice[0]][0])!r}, which was put in "
            "front of it once more, as TransformerLens does. Pass prepend_bos=False for text that "
            "brings its own BOS, such as that of a chat template.",
            RALensWarning,
            stacklevel=3,
        )
    elif prepend_bos is None:
        _warn_of_a_chat_token(lens)
    front = str(lens.tokenizer.bos_token) if all(prepended) else ""
    return Prompts(tuple(rows), front, side, texts=given)


def read_decoder_prompts(lens: Lens, decoder_input: Given | None, n: int) -> Prompts:
    """What the decoder of an encoder-decoder has read before the answer, for each of `n` prompts.

    Token ids are read as they are, less what a mask given with them calls padding; text comes after
    the model's start token, which stands alone where nothing is given. One may be for all.
    """
    given = read_given("decoder_input", "" if decoder_input is None else decoder_input)
    if isinstance(given, TokenIds):
        # Many begin with their pad token: nothing here is padding that no mask calls so.
        rows = list(_from_tokens(lens, given, "right", guess=False).ids)
    elif lens.decoder_start is None:
        raise BadInput(
            f"{lens.name} does not say which token its decoder begins with. Give decoder_input="
            "as token ids, that token included."
        )
    else:
        rows = [(lens.decoder_start, *lens.encode_fragment(text)) for text in given]
        if any(row[1:2] == (lens.decoder_start,) for row in rows):
            warnings.warn(
                f"a decoder_input begins with {lens.decode(lens.decoder_start)!r}, which is put in "
                "front of text once more. Leave it out, or give token ids.",
                RALensWarning,
                stacklevel=3,
            )
    rows = rows * n if len(rows) == 1 else rows
    if len(rows) != n:
        raise BadInput(
            f"found a decoder_input of {len(rows)} rows for {n} prompts. Give one for all, or one "
            "per prompt."
        )
    return Prompts(tuple(rows), None, "right")


def special_id(lens: Lens, name: Literal["bos", "eos", "pad", "mask"]) -> int | None:
    """Id of a special token; None if the tokenizer has none."""
    return getattr(lens.tokenizer, f"{name}_token_id", None)


def _starts_with_bos(lens: Lens, text: str, row: tuple[int, ...]) -> bool:
    """Whether the row begins with a BOS token that is not the text's own."""
    if row[0] != special_id(lens, "bos"):
        return False
    written = text.startswith(getattr(lens.tokenizer, "bos_token", None) or "\0")
    return not written or len(row) > len(lens.encode(text, prepend_bos=False))


_looked_at: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_of_a_chat_token(lens: Lens) -> None:
    """Warn, once for each model, of a chat token in front that its tokenizer does not put there."""
    if lens.module in _looked_at:
        return
    _looked_at.add(lens.module)
    front = default_front(lens)
    if front is None or not front.is_strange:
        return
    itself = "" if front.own is None else ", which its tokenizer itself does not put there"
    token = repr(front.separator)
    other = f", or prepend_bos={token} (--bos {token}), which stands between documents"
    other *= bool(front.separator)
    warnings.warn(
        f"TransformerLens puts {front.token!r} in front of text for {lens.name}: a token of its "
        f"chats{itself}. It may do better on plain text with prepend_bos=False (--no-bos){other}. "
        "prepend_bos=True keeps the token, without this warning.",
        RALensWarning,
        stacklevel=4,
    )


def _from_tokens(
    lens: Lens, given: TokenIds, padding_side: PaddingSide | None, *, guess: bool = True
) -> Prompts:
    ids, keep = given.ids.cpu(), given.keep.cpu()  # at once: what follows reads numbers
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= lens.d_vocab:
        raise BadInput(
            f"found token id {low if low < 0 else high}; {lens.name} has ids 0 to "
            f"{lens.d_vocab - 1}. Use the model's own tokenizer: model.to_tokens(text)."
        )
    if given.mask is None and not given.ragged and guess:
        keep = _guess_mask(lens, ids)
        special = (special_id(lens, "bos"), special_id(lens, "eos"))
        if not bool(keep.all()) and lens.pad_token_id in special:
            warnings.warn(
                f"rows of the input begin or end with {lens.decode(lens.pad_token_id)!r}, which is "
                "the pad token as well as a real one, and were taken as padded. Pass "
                "attention_mask to say what is padding.",
                RALensWarning,
                stacklevel=4,
            )
    return _strip(ids, keep, given.lengths, padding_side)


def _guess_mask(lens: Lens, ids: Tensor) -> Tensor:
    pad = special_id(lens, "pad")
    keep = torch.ones_like(ids, dtype=torch.bool)
    if pad is None or ids.shape[0] == 1:
        return keep
    real = ids != pad
    from_left = real.cummax(dim=1).values
    from_right = real.flip(1).cummax(dim=1).values.flip(1)
    leading = (~from_left).sum(dim=1)
    if bool((ids[:, 0] == pad).any()) and not bool((~from_right).any()):  # padded on the left
        if special_id(lens, "bos") == pad:
            leading = (leading - 1).clamp(min=0)
        return torch.arange(ids.shape[1], device=ids.device) >= leading.unsqueeze(1)
    return from_right | ~real.any(dim=1, keepdim=True)


def _strip(
    ids: Tensor, keep: Tensor, lengths: Sequence[int], padding_side: PaddingSide | None
) -> Prompts:
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
        right |= last < lengths[i] - 1
        rows.append(tuple(ids[i, first : last + 1].tolist()))
    if left and right:
        raise BadInput("the rows are padded on different sides. Pad all of them on one side.")
    side: PaddingSide = "left" if left else "right"
    if not left and not right and padding_side is not None:
        side = padding_side
    width = lengths[0] if len(set(lengths)) == 1 else 0
    return Prompts(tuple(rows), None, side, width)
