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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.fitting import rows_of_run
from ra_lens.heads.corrupted import CorruptedRun, corrupted_runs
from ra_lens.knockouts.predict import FORETOLD_FROM
from ra_lens.model import Lens
from ra_lens.model.backward import Backward
from ra_lens.model.sites import MapKind, VectorKind, read_vectors
from ra_lens.patching.masking import need_heads
from ra_lens.prompts import Prompts
from ra_lens.questions import Questions
from ra_lens.run import run_with_ra
from ra_lens.targets import Objective, answer_nll, sequence_nll

RunFunction = Callable[..., Tensor]
"""Gives `Float[Tensor, "batch layer head"]`, one score for each example and head.

It gets the `RACache` of a batch; where the method needs corrupted twins, the `CorruptedRun` too.
"""


@dataclass(frozen=True)
class Needs:
    """What a method reads in the cache of a run, beside the norms of its maps.

    Attributes:
        maps: Kinds of map, those that are made from others included.
        vectors: Kinds of vectors.
        corrupted: Whether the function also gets what heads give on the corrupted twins.
        steps: In how many steps the gradient is taken on the way from the twins; 1: at the prompts
            alone.
        backward: Which backward pass; methods of one share it.
    """

    maps: tuple[MapKind, ...] = ()
    vectors: tuple[VectorKind, ...] = ()
    corrupted: bool = False
    steps: int = 1
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
    twins: Callable[[], Prompts],
    answer_in_input: bool,
    batch_size: int | Literal["auto"],
    progress: bool,
) -> dict[str, Float[Tensor, "prompt layer head"]]:
    """Run each batch forwards and backwards once, and give what every method makes of it.

    `twins` gives the corrupted twins of the questions, where a method needs them; with `"auto"` a
    batch is as large as fits with what the methods keep of it.

    All methods are of one backward pass.

    Returns:
        By the name of the method, float64 on the CPU.

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

    steps = sorted({one.needs.steps for one in methods.values() if one.needs.corrupted})
    others = twins() if steps else None
    found: dict[str, list[Tensor]] = {name: [] for name in methods}
    if batch_size == "auto":
        answers = questions.answers if answer_in_input else [()] * len(questions)
        batch_size = rows_of_run(
            lens,
            questions.prompts.extended(answers),
            n_read=max(1, *map(len, answers)),
            wanted=kept.__contains__,
            vectors=read_vectors([*vectors, *["z"] * bool(steps)]),  # z of the twins
        )
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
        runs: dict[int, CorruptedRun] = {}
        if others is not None:
            runs = corrupted_runs(
                lens,
                cache,
                prompts,
                others.chosen(examples),
                answers if answer_in_input else ((),) * len(answers),
                partial(_objective_of, part, answer_in_input=answer_in_input),
                steps,
            )
        for name, one in methods.items():
            given = (cache, runs[one.needs.steps]) if one.needs.corrupted else (cache,)
            found[name].append(_checked(name, one.function(*given), cache))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _objective_of(questions: Questions, some: Sequence[int], *, answer_in_input: bool) -> Objective:
    answers = tuple(questions.answers[i] for i in some)
    return _objective(replace(questions, answers=answers), answer_in_input=answer_in_input)


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
