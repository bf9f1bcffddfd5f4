"""Scores that read one forward and one backward pass, which all such methods share.

A method of this kind is a function of the `RACache` of a batch. What it reads there beside norms,
maps or vectors, it says when it is registered; each batch then runs once, with what the chosen
methods need together. The loss is the mean cross-entropy over the answer's tokens, or that of its
first token.

Memory: norms alone keep one layer's maps at a time. Maps that a method needs are kept of all layers
for a batch, 4 bytes times layers · heads · prompts · tokens² for each kind; a smaller `batch_size`
keeps less. Vectors are smaller than maps where prompts are longer than heads are wide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.knockouts.predict import FORETOLD_FROM
from ra_lens.model import Lens
from ra_lens.model.backward import Backward
from ra_lens.model.sites import MapKind, VectorKind
from ra_lens.patching.masking import need_heads
from ra_lens.questions import Questions
from ra_lens.run import run_with_ra
from ra_lens.targets import Objective, answer_nll, sequence_nll

RunFunction = Callable[[RACache], Tensor]
"""Gives `Float[Tensor, "batch layer head"]`, one score for each example and head."""


@dataclass(frozen=True)
class Needs:
    """What a method reads in the cache of a run, beside the norms of its maps.

    Attributes:
        maps: Kinds of map, those that are made from others included.
        vectors: Kinds of vectors.
        backward: Which backward pass; methods of one share it.
    """

    maps: tuple[MapKind, ...] = ()
    vectors: tuple[VectorKind, ...] = ()
    backward: Backward = "exact"


@dataclass(frozen=True)
class OfRun:
    """A method that reads one run: its function and what that reads."""

    function: RunFunction
    needs: Needs


def scores_of_one_run(
    lens: Lens,
    model: nn.Module,
    questions: Questions,
    methods: Mapping[str, OfRun],
    *,
    answer_in_input: bool,
    batch_size: int,
    progress: bool,
) -> dict[str, Float[Tensor, "layer head"]]:
    """Run each batch forwards and backwards once, and average what every method makes of it.

    All methods are of one backward pass.

    Returns:
        The mean over examples by the name of the method, float64 on the CPU.

    Raises:
        BadInput: a method gave something else than one number per example and head.
        UnsupportedModel: a method needs z, and the model does not show it.
    """
    vectors = {kind for one in methods.values() for kind in one.needs.vectors}
    if not vectors.isdisjoint(("z", "z_grad")):
        need_heads(lens)
    backward: Backward = next(one.needs.backward for one in methods.values())
    kinds = {kind for one in methods.values() for kind in one.needs.maps}
    kept = {
        site.map_name(part)
        for kind in kinds
        for part in FORETOLD_FROM.get(kind, (kind,))
        for site in lens.sites.values()
    }
    from tqdm.auto import tqdm

    totals = {name: torch.zeros(lens.sites.shape, dtype=torch.float64) for name in methods}
    batches = list(questions.prompts.batches(batch_size))
    hidden = not progress or len(batches) == 1
    for examples, prompts in tqdm(batches, desc="Reversed Attention", unit="batch", disable=hidden):
        answers = tuple(questions.answers[i] for i in examples)
        part = replace(questions, prompts=prompts, answers=answers)
        _, cache = run_with_ra(
            model,
            prompts,
            target=_objective(part, answer_in_input=answer_in_input),
            store="maps" if kept else "norms",
            names_filter=kept.__contains__,
            vectors=sorted(vectors),
            backward=backward,
        )
        for name, one in methods.items():
            totals[name] += _checked(name, one.function(cache), cache).sum(dim=0)
    return {name: total / len(questions) for name, total in totals.items()}


def _objective(questions: Questions, *, answer_in_input: bool) -> Objective:
    if answer_in_input:
        return sequence_nll([list(answer) for answer in questions.answers])
    return answer_nll(questions.first_tokens.tolist())


def _checked(name: str, scores: object, cache: RACache) -> Tensor:
    shape = (cache.batch_size, *cache.sites.shape)
    if isinstance(scores, Tensor) and tuple(scores.shape) == shape:
        return scores.detach().cpu().double()
    shaped = isinstance(scores, Tensor)
    found = f"scores of shape {tuple(scores.shape)}" if shaped else f"a {type(scores).__name__}"
    raise BadInput(
        f"method {name!r} gave {found} for a batch; a tensor [example, layer, head] = "
        f"{list(shape)} is needed for {cache.info.model_name}."
    )
