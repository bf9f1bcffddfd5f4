"""Losses of questions with edges of attention really cut, each row of a batch with its own cut.

The loss is −log p of the answer's first token at the last position of the prompt. A cut of a layer
changes nothing before the layer's block, so the forward pass begins there, from what the blocks
before it returned in one pass without cuts (`ra_lens.model.blocks`). This is checked with the
questions at hand: a cut of each layer also runs in full, and where the logits come out otherwise,
every cut of that layer runs in full.

    CutQuestions.losses    ΔL, the edges really cut: one forward pass a row, without gradients
    CutQuestions.slopes    dL/dt at a share t of the cut, A + t (A′ − A): one forward and one
                           backward pass a row, from the layer of the cut on

∫ dL/dt from t = 0 to 1 is ΔL, so some slopes with their weights (`gauss_points`) come nearer to it
than the slope at 0 alone, which is the first-order prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.errors import UnsupportedModel
from ra_lens.fitting import rows_of_forward, rows_of_run
from ra_lens.knockouts import Edge, EdgeSet, knockout_hooks
from ra_lens.knockouts.edges import Box, Positions
from ra_lens.model import FwdHooks, Lens
from ra_lens.model.blocks import SkippedBlocks
from ra_lens.padding import together, watched
from ra_lens.prompts import Prompts
from ra_lens.questions import Questions, by_length
from ra_lens.run import run_with_ra
from ra_lens.shared_prefix import same_logits


@dataclass(frozen=True)
class Cut:
    """Edges of one question that are cut together.

    Attributes:
        question: Its index among the questions.
        layer: The first layer in which something is cut.
        edges: What is cut.
        renormalise: Whether the rest of each row gets what the cut edges had.
    """

    question: int
    layer: int
    edges: EdgeSet
    renormalise: bool = True


def edge_cut(question: int, edge: Edge, *, renormalise: bool = True) -> Cut:
    """A cut of one edge."""
    box = Box({edge.layer: (edge.head,)}, Positions((edge.query,)), Positions((edge.key,)))
    return Cut(question, edge.layer, EdgeSet(((box,),)), renormalise)


def gauss_points(n: int) -> list[tuple[float, float]]:
    """Give the points of the Gauss-Legendre rule on [0, 1] with their weights."""
    places, weights = np.polynomial.legendre.leggauss(n)
    return [
        (float(place), float(weight))
        for place, weight in zip((places + 1) / 2, weights / 2, strict=True)
    ]


class CutQuestions:
    """Questions to which cuts are made.

    Attributes:
        loss: Of each question as it is, in float64.
    """

    def __init__(
        self, lens: Lens, questions: Questions, *, batch_size: int | Literal["auto"]
    ) -> None:
        """Run the questions as they are, in groups that may run together.

        With `"auto"` as many rows run at a time as fit, with a backward pass fewer.

        Raises:
            UnsupportedModel: an encoder-decoder, or a model whose attention cannot be edited.
        """
        refuse_two_texts(lens)
        _learn_routes(lens, questions.prompts)
        self._lens = lens
        self._answers = questions.first_tokens
        self._sloped = rows_of_run(lens, questions.prompts) if batch_size == "auto" else batch_size
        if batch_size == "auto":
            batch_size = rows_of_forward(lens, questions.prompts, kept=1)
        self._batch_size = batch_size
        self._groups: list[_Group] = []
        self.loss = torch.zeros(len(questions), dtype=torch.float64)
        for part in together(lens, questions.prompts):
            order = by_length(questions.prompts, part)
            for start in range(0, len(order), batch_size):
                some = order[start : start + batch_size]
                group = _Group(lens, questions.prompts, some, batch_size)
                self._groups.append(group)
                self.loss[group.members] = self._losses(group.unchanged, group.members).detach()

    def losses(self, cuts: Sequence[Cut]) -> Float[Tensor, "cut"]:
        """Give the change of the loss that each cut makes, in float64: with it minus without."""
        found = torch.zeros(len(cuts), dtype=torch.float64)
        for group, which in self._batches(cuts, self._batch_size):
            rows = [cuts[i] for i in which]
            questions = [cut.question for cut in rows]
            with torch.no_grad():
                losses = self._losses(group.logits(rows, 1.0), questions)
            found[which] = losses - self.loss[questions]
        return found

    def slopes(self, cuts: Sequence[Cut], share: float) -> Float[Tensor, "cut"]:
        """Give dL/dt of each cut where a `share` t of it is made, in float64."""
        lens = self._lens
        found = torch.zeros(len(cuts), dtype=torch.float64)
        wide = torch.promote_types(lens.dtype, torch.float32)
        for group, which in self._batches(cuts, self._sloped):
            rows = [cuts[i] for i in which]
            with torch.enable_grad(), lens.parameters_frozen(), lens.tensors_put_back():
                amount = torch.full((len(rows),), share, dtype=wide, device=lens.device)
                amount.requires_grad_()
                loss = self._losses(group.logits(rows, amount), [cut.question for cut in rows])
                (slope,) = torch.autograd.grad(loss.sum(), amount)
            found[which] = slope.cpu().double()
        return found

    def _losses(
        self, logits: Float[Tensor, "row d_vocab"], questions: Sequence[int]
    ) -> Float[Tensor, "row"]:
        exact = (logits.cpu() if logits.device.type == "mps" else logits).double()
        ids = self._answers[list(questions)].to(exact.device).unsqueeze(1)
        return -exact.log_softmax(dim=-1).gather(1, ids).squeeze(1).cpu()

    def _batches(self, cuts: Sequence[Cut], size: int) -> Iterator[tuple[_Group, list[int]]]:
        """Cuts that run together: of one group and first layer, renormalised or not."""
        for group in self._groups:
            alike: dict[tuple[int, bool], list[int]] = {}
            for i, cut in enumerate(cuts):
                if cut.question in group.members:
                    alike.setdefault((cut.layer, cut.renormalise), []).append(i)
            for which in alike.values():
                for start in range(0, len(which), size):
                    yield group, which[start : start + size]


class _Group:
    """Questions that run in one batch, and what the blocks returned for them."""

    def __init__(
        self, lens: Lens, prompts: Prompts, members: Sequence[int], batch_size: int
    ) -> None:
        self.members = list(members)
        self._batch_size = batch_size
        self._lens = lens
        self._prompts = replace(prompts, width=max(prompts.lengths[i] for i in members))
        self._place = {question: i for i, question in enumerate(members)}
        self._skipped = SkippedBlocks(lens)
        self._late: dict[int, bool] = {}  # whether the cuts of a layer may begin at its block
        with torch.no_grad(), self._skipped.recorded(len(members)):
            self.unchanged = self._run(self._prompts.chosen(members))

    def logits(
        self, cuts: Sequence[Cut], amount: float | Float[Tensor, "row"]
    ) -> Float[Tensor, "row d_vocab"]:
        """Run cuts that all begin at one layer, as far as `amount` says, in the gradient mode."""
        layer = cuts[0].layer
        if layer not in self._late:
            self._late[layer] = self._proven(layer)
        return self._cut(cuts, amount, layer if self._late[layer] else None)

    @torch.no_grad()
    def _proven(self, layer: int) -> bool:
        """Whether a cut at a layer comes out the same from its block on as in full."""
        try:
            found = self._cut([self._probe(layer)], 1.0, layer)
        except Exception:  # if it was not the skipped blocks that were missed, it is raised in full
            return False
        return same_logits(found[0], self._in_full[layer])

    @cached_property
    @torch.no_grad()
    def _in_full(self) -> dict[int, Float[Tensor, "d_vocab"]]:
        """The logits of a cut of each layer, run in full."""
        layers = list(self._lens.sites)
        parts = [layers[i : i + self._batch_size] for i in range(0, len(layers), self._batch_size)]
        rows = [self._cut(list(map(self._probe, part)), 1.0, None) for part in parts]
        return dict(zip(layers, torch.cat(rows), strict=True))

    def _probe(self, layer: int) -> Cut:
        """A cut that the logits show: from the last token to the first one, in all heads."""
        question = self.members[0]
        heads = {layer: tuple(range(self._lens.sites[layer].n_heads))}
        box = Box(heads, Positions((self._prompts.lengths[question] - 1,)), Positions((0,)))
        return Cut(question, layer, EdgeSet(((box,),)))

    def _cut(
        self, cuts: Sequence[Cut], amount: float | Tensor, begin_at: int | None
    ) -> Float[Tensor, "row d_vocab"]:
        questions = [cut.question for cut in cuts]
        prompts = self._prompts.chosen(questions)
        hooks = knockout_hooks(
            self._lens.module,
            [cut.edges for cut in cuts],
            renormalise=cuts[0].renormalise,
            amount=amount,
            attention_mask=prompts.lay_out(self._lens).attention_mask,
        )
        if begin_at is None:
            return self._run(prompts, hooks)
        examples = torch.tensor([self._place[question] for question in questions])
        with self._skipped.reused(begin_at, examples):
            return self._run(prompts, hooks)

    def _run(self, prompts: Prompts, hooks: FwdHooks = ()) -> Float[Tensor, "row d_vocab"]:
        batch = prompts.lay_out(self._lens)
        with watched(self._lens, batch):
            logits = self._lens.logits_at(*batch.model_input, batch.last, hooks)
        self._lens.refuse_nan(logits)
        return logits[:, 0]


def refuse_slopes(lens: Lens) -> None:
    """Raise for a model in float16, whose gradients would be 0 or infinite here and there."""
    if lens.in_float16:
        raise UnsupportedModel(
            f"{lens.name} is in float16, in which the loss cannot be differentiated by the share "
            "of a cut. Load it in float32 or bfloat16, or leave steps= and ends= out."
        )


def refuse_two_texts(lens: Lens) -> None:
    """Raise for an encoder-decoder, whose edges lead between two texts."""
    if any(site.cross or site.query_side == "decoder" for site in lens.sites.values()):
        raise UnsupportedModel(
            f"{lens.name} is an encoder-decoder, whose questions its decoder would be asked. Cut "
            "its edges with ra_lens.knockout_hooks, or take a model that reads one text."
        )


def _learn_routes(lens: Lens, prompts: Prompts) -> None:
    """Find out of a bridge, once, whether edits of its patterns change anything."""
    if any(site.observe_only is None for site in lens.sites.values()):
        run_with_ra(lens.module, prompts.chosen([0]).unpadded(), store="norms", progress=False)
