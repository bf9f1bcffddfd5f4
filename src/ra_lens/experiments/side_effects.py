"""What a patch does to text that has nothing to do with it.

Eight plain sentences, which come with the package, are read by the model as it is and patched. Each
is cut to as many tokens as the questions have (or as the shortest sentence has, if that is less),
so that a map lies on all of it, its first row on the first token. At every token

    KL(unpatched ‖ patched) = Σ_v p(v) (log p(v) − log q(v))        in nats

p and q being what the two predict next; the mean over all tokens of all sentences, and the share of
them at which both put the same token first. Cost: a forward pass of these tokens for each patch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources

from jaxtyping import Float
from torch import Tensor

from ra_lens.model import FwdHooks, Lens, PrependBos
from ra_lens.prompts import Prompts, read_prompts
from ra_lens.questions import logits_at


@dataclass(frozen=True)
class SideEffect:
    """What a patch changes on unrelated text.

    Attributes:
        kl: KL(unpatched ‖ patched), nats per token.
        top1_same: Share of the tokens after which the same token is predicted first.
    """

    kl: float
    top1_same: float


def plain_sentences() -> list[str]:
    """Give the sentences that come with the package."""
    file = resources.files("ra_lens.experiments") / "plain_sentences.txt"
    return file.read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True, eq=False)
class PlainText:
    """The sentences as tokens, all of one length; the model as it is reads them once."""

    lens: Lens
    prompts: Prompts

    @staticmethod
    def read(lens: Lens, n_tokens: int, *, prepend_bos: PrependBos = None) -> PlainText:
        """Read the sentences, cut to `n_tokens` with what stands in front, or to the shortest."""
        read = read_prompts(lens, plain_sentences(), prepend_bos=prepend_bos)
        n = min(n_tokens, *read.lengths)
        return PlainText(lens, replace(read, ids=tuple(row[:n] for row in read.ids), texts=None))

    def under(self, fwd_hooks: FwdHooks) -> SideEffect:
        """Read the sentences under hooks, and compare with the model as it is."""
        kl, same = 0.0, 0
        # Sentence by sentence, as a vocabulary in float64 is large.
        for before, after in zip(self._unpatched, self._logits(fwd_hooks), strict=True):
            p, q = before.double().log_softmax(dim=-1), after.double().log_softmax(dim=-1)
            kl += float((p.exp() * (p - q)).sum())
            same += int((before.argmax(dim=-1) == after.argmax(dim=-1)).sum())
        n = sum(self.prompts.lengths)
        return SideEffect(kl / n, same / n)

    @cached_property
    def _unpatched(self) -> Float[Tensor, "sentence token d_vocab"]:
        return self._logits(())

    def _logits(self, fwd_hooks: FwdHooks) -> Float[Tensor, "sentence token d_vocab"]:
        every = [list(range(n)) for n in self.prompts.lengths]
        logits = logits_at(self.lens, self.prompts, every, fwd_hooks)
        return logits.cpu() if logits.device.type == "mps" else logits  # which has no float64
