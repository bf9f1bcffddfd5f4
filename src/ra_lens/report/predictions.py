"""What a model predicts for a prompt, before and after a patch of its attention.

`patched_predictions` patches each prompt with its own maps, one step of attention patching: `scale`
times the prompt's own RA map is added to the pattern of every head (paper section 5.3, with a mean
over one prompt). A negative scale follows descent, so that the loss falls where the step is not too
long. Cost: a forward and a backward pass per prompt.

`patched_prediction` is what `ra-lens demo` shows on the embedded model. It patches as section 5.3
does: it averages the Reversed Attention of 25 questions of a task entry by entry and adds −30 times
the mean to the attention of other questions, which the model then answers with the same weights.
Nothing is chosen by outcome: the question shown is the first of those tested.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mode
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.html import Table
from ra_lens.inputs import TokenIds, answers_given, read_given
from ra_lens.model import Lens, as_lens
from ra_lens.numbers import Real, Whole, real, whole
from ra_lens.prompts import PromptInput, Prompts, read_prompts
from ra_lens.questions import last_logits, mark, read_questions
from ra_lens.report.sections import Section
from ra_lens.run import run_with_ra
from ra_lens.targets import Answers, ids_of, one_each
from ra_lens.tasks import Prompt, load_task
from ra_lens.text import label, scale_name

TASK = "country-capital"


@dataclass(frozen=True)
class Predictions:
    """What comes next after a prompt.

    Attributes:
        top: The likeliest tokens with their probabilities, the likeliest first.
        target: Probability of the target, of all its tokens together; None where the loss is not
            the target's −log p.
        rank: Rank of the target's first token; 1 is the top prediction. None likewise.
    """

    top: tuple[tuple[str, float], ...]
    target: float | None = None
    rank: int | None = None


@dataclass(frozen=True)
class PatchedPrompt:
    """A prompt's predictions before and after the patch.

    Attributes:
        scale: What the prompt's own RA maps were multiplied by.
        before: Unpatched.
        after: Patched.
    """

    scale: float
    before: Predictions
    after: Predictions


def patched_predictions(
    model: nn.Module,
    input: PromptInput,
    ra: RACache,
    *,
    target: Answers | None = None,
    scale: Real = -30.0,
    top: Whole = 5,
) -> tuple[PatchedPrompt, ...]:
    """Patch each prompt's RA maps into its own attention and compare what comes next.

    Args:
        model: The model that `ra` is of.
        input: The prompts as `run_with_ra` was given them; text is read with BOS or without, as
            it was then.
        ra: What it gave, with its maps.
        target: The target it was given: text, a token id, or one per prompt; None: the model's own
            top prediction, which stays the target once patched.
        scale: What the maps are multiplied by.
        top: How many of the likeliest tokens are told.

    Returns:
        One per prompt.

    Raises:
        BadInput: another number of prompts than the cache holds, or `top` below 1.
        NotStored: the maps were not kept.
        UnsupportedModel: a model whose attention cannot be edited.
    """
    scale, top = real("scale", scale), whole("top", top)
    if top < 1:
        raise BadInput(f"found top={top}; give the number of predictions to tell, at least 1.")
    lens = as_lens(model)
    prompts = _read(lens, input, ra)
    n = len(prompts)
    targets = one_each(answers_given("target", target), n)
    if len(targets) != n:
        raise BadInput(
            f"found {len(targets)} targets for {n} prompts. Give one for all, or one for each."
        )
    found: list[PatchedPrompt] = []
    for i, wanted in enumerate(targets):
        prompt = prompts.chosen([i]).unpadded()
        one = ra if not ra.has_batch_dim else ra.apply_slice_to_batch_dim([i])
        sides: list[Predictions] = []
        for hooks in ((), one.mean().patch_hooks(scale=scale)):
            # A row of ids is the answer of one prompt, not answers of several.
            answer: Any = [wanted] if isinstance(wanted, list) else wanted
            logits, run = run_with_ra(
                model, prompt, target=answer, fwd_hooks=hooks, store="norms", progress=False
            )
            if wanted is None:
                wanted = int(logits[0, 0].argmax())
            first = ids_of(lens, prompt, 0, wanted, f"target {i}")[0]
            length = 1 if run.info.answer_lengths is None else max(run.info.answer_lengths[0], 1)
            chance = math.exp(-float(run.loss.flatten()[0]) * length)
            # The first position read predicts the target's first token.
            sides.append(_predictions(lens, logits[0, 0], first, chance, top))
        found.append(PatchedPrompt(scale, *sides))
    return tuple(found)


def _read(lens: Lens, input: PromptInput, ra: RACache) -> Prompts:
    given = input if isinstance(input, Prompts) else read_given("prompt", input)
    if len(given) != ra.batch_size:
        raise BadInput(
            f"found {len(given)} prompts for a cache of {ra.batch_size}. Give the prompts that "
            "run_with_ra was given."
        )
    if isinstance(given, Prompts):
        return given
    front = None if isinstance(given, TokenIds) else ra.info.prepended
    return read_prompts(lens, given, prepend_bos=False if front == "" else front)


def _predictions(
    lens: Lens, logits: Float[Tensor, "d_vocab"], first: int, chance: float, top: int
) -> Predictions:
    values, ids = logits.float().softmax(dim=-1).topk(min(top, logits.numel()))
    likely = zip(ids.tolist(), values.tolist(), strict=True)
    return Predictions(
        top=tuple((lens.decode(i), value) for i, value in likely),
        target=chance,
        rank=1 + int((logits > logits[first]).sum()),
    )


def few_shot_prompt() -> Prompt:
    """Give a question after two solved ones, whose relation the model has to find in them."""
    return load_task(TASK).sample(1, shots=2, seed=0)[0]


def patched_prediction(
    model: nn.Module, *, averaged: int = 25, tested: int = 48, scale: float = -30.0
) -> dict[str, Any]:
    """Patch the mean RA maps of some questions into others of the same length; as plain data."""
    lens, task = as_lens(model), load_task(TASK)
    prompts = task.sample(len(task.pairs), seed=0)
    questions = read_questions(lens, prompts)
    lengths = questions.prompts.lengths
    same = [i for i, n in enumerate(lengths) if n == mode(lengths)]
    if len(same) <= averaged:
        raise BadInput(
            f"found {len(same)} questions of {mode(lengths)} tokens in task {TASK!r}; averaging "
            f"over {averaged} leaves none to test. Give a smaller number, or another task."
        )
    learned, asked = same[:averaged], same[averaged : averaged + tested]
    _, ra = run_with_ra(
        model,
        questions.prompts.chosen(learned),
        target=[prompts[i].answer for i in learned],
        store="mean",
        progress=False,
    )
    facts: dict[str, Any] = {
        "task": TASK,
        "prompt": prompts[asked[0]].text,
        "answer": prompts[asked[0]].answer,
        "scale": scale,
        "averaged": len(learned),
        "tested": len(asked),
    }
    answers = questions.first_tokens[asked]
    for when, hooks in (("before", ()), ("after", ra.mean().patch_hooks(scale=scale))):
        logits = last_logits(lens, questions.prompts.chosen(asked), hooks)
        marks = mark(logits, answers)
        chance = float(marks.probability[0])
        one = _predictions(lens, logits[0], int(answers[0]), chance, top=1)
        ((text, best),) = one.top
        facts[when] = {
            "probability": chance,
            "rank": one.rank,
            "top": text,
            "top_probability": best,
        }
        facts[f"accuracy_{when}"] = marks.accuracy()
    return facts


def as_section(facts: dict[str, Any]) -> Section:
    """Tell a patched prediction in a report."""

    def row(name: str, when: str) -> tuple[str, ...]:
        one = facts[when]
        return (
            name,
            f"{one['probability']:.3f}",
            str(one["rank"]),
            f"“{label(one['top'])}” ({one['top_probability']:.3f})",
            f"{facts[f'accuracy_{when}']:.1%}",
        )

    answer, tested = label(facts["answer"]), facts["tested"]
    columns = ("", f"p(“{answer}”)", "Its rank", "Top prediction", f"Right in {tested} questions")
    return Section(
        "A patched prediction",
        (
            f"Without demonstrations “{label(facts['prompt'])}” does not say which relation is "
            f"asked for. The Reversed Attention of {facts['averaged']} other questions of the task "
            f"{facts['task']} is averaged, multiplied by {scale_name(facts['scale'])}, and added "
            "to the attention of every head; the weights stay as they are.",
        ),
        Table(columns, (row("Before", "before"), row("Patched", "after"))),
        notes=("The question shown is the first of those tested; none was averaged over.",),
    )
