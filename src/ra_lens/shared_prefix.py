"""Prompts that begin with the same tokens, such as the same demonstrations: these run once.

    shared = SharedPrefix.of(lens, questions.prompts)
    if shared is not None:
        prefix = shared.read(hooks, n_rows)
        logits = shared.last_logits(prefix, rows, prompts, hooks)

The tokens are compared one by one, so that a tokenizer which joins the last one of them to what
comes after is no problem: the prefix is then a token shorter. Prompts that begin otherwise are no
members, and run in full.

Cost: for n prompts of p + r tokens, p of them shared, and m sets of hooks: m·(p + n·r) tokens in
the place of m·n·(p + r). How the kept keys and values come in front: `ra_lens.model.prefix`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ra_lens.model import FwdHooks, Lens
from ra_lens.model.prefix import Prefix, logits_after, read_prefix
from ra_lens.prompts import Prompts

# How many tokens after which prefix were seen to come out as in full, by what else may change that.
_seen: weakref.WeakKeyDictionary[nn.Module, dict[object, int]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class SharedPrefix:
    """The tokens that some prompts begin with.

    Attributes:
        lens: The model that reads them.
        ids: The tokens.
        members: Indices of the prompts that begin with them and go on; the others do not.
    """

    lens: Lens
    ids: tuple[int, ...]
    members: tuple[int, ...]

    @staticmethod
    def of(lens: Lens, prompts: Prompts) -> SharedPrefix | None:
        """Find the tokens that are most worth running once; None where there are none.

        None as well where hooks are on the model, which may look at whole prompts; where tokens see
        what comes after them; and where a prompt is longer than the model reads.
        """
        if lens.reads != "left to right" or lens.is_hooked or prompts.padded_width > lens.n_ctx:
            return None
        ids = _shared_ids(prompts.ids)
        members = [i for i, row in enumerate(prompts.ids) if _goes_on(row, ids)]
        return SharedPrefix(lens, ids, tuple(members)) if ids else None

    def read(
        self, n_rows: int = 1, fwd_hooks: FwdHooks = (), *, base: Prefix | None = None
    ) -> Prefix:
        """Run the tokens in so many rows, with hooks, and keep their keys and values."""
        tokens = torch.tensor([self.ids], device=self.lens.device).expand(n_rows, -1)
        return read_prefix(self.lens, tokens, fwd_hooks, base=base)

    def tokens(self, prompts: Prompts, n_rows: int) -> Prompts:
        """The shared tokens, in so many rows, as prompts."""
        ids = (self.ids,) * n_rows
        return replace(prompts, ids=ids, texts=None, width=0, padding_side="right")

    def rest(self, prompts: Prompts) -> Prompts:
        """What comes after the shared tokens in prompts that are members."""
        ids = tuple(row[len(self.ids) :] for row in prompts.ids)
        return replace(prompts, ids=ids, texts=None, width=0, padding_side="right")

    def logits_at(
        self,
        prefix: Prefix,
        rows: Sequence[int],
        rest: Prompts,
        positions: Sequence[Sequence[int]],
        fwd_hooks: FwdHooks = (),
    ) -> Float[Tensor, "prompt read d_vocab"]:
        """Run the rests of prompts, each after a row of the prefix; NaN is refused.

        Positions, as hooks, count from the first token of a rest.
        """
        batch = rest.lay_out(self.lens)
        which: Int[Tensor, "prompt"] = torch.tensor(list(rows))
        columns = batch.columns(positions)
        logits = logits_after(self.lens, prefix, which, batch.tokens, columns, fwd_hooks)
        self.lens.refuse_nan(logits)
        return logits

    def proven(self, rest: Prompts, fwd_hooks: FwdHooks, compare: Callable[[], bool]) -> bool:
        """Whether rests come out as in full, which `compare` finds out.

        What was seen is not compared again: as many tokens with such hooks after this prefix.
        """
        at = frozenset((name, _code(hook)) for name, hook in fwd_hooks)
        key, width = (self.lens.state, self.ids, at), max(rest.lengths)
        seen = _seen.setdefault(self.lens.module, {})
        if seen.get(key, 0) < width:
            if not compare():
                return False
            seen[key] = width
        return True


def _code(hook: object) -> object:
    """What a hook runs, whatever it was made with."""
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__code__", None) or type(hook)


def _goes_on(row: Sequence[int], ids: tuple[int, ...]) -> bool:
    return len(row) > len(ids) and tuple(row[: len(ids)]) == ids


def _shared_ids(rows: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The beginning that saves the most tokens, if all rows that go on from it have it once."""
    best, saved = (), 0
    different = set(rows)
    for n in range(1, max(map(len, rows), default=0)):
        found = Counter(row[:n] for row in different if len(row) > n)
        ids, times = found.most_common(1)[0]
        if (times - 1) * n > saved:
            best, saved = ids, (times - 1) * n
    return best


def same_logits(
    found: Float[Tensor, "*some d_vocab"], wanted: Float[Tensor, "*some d_vocab"]
) -> bool:
    """Whether logits are the same but for rounding, which is another in a batch of another shape.

    Half of their digits are.
    """
    allowed = torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max()
    return bool((found - wanted).abs().max() <= allowed)
