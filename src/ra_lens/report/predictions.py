"""What a model predicts for a prompt, before and after a patch of its attention.

`patched_predictions` patches each prompt with its own maps, one step of attention patching: a scale
times the prompt's own RA map is added to the attention of every head (paper section 5.3, with a
mean over one prompt). The paper's −30 is for means, which are 10 to 100 times smaller, and wrecks
the prediction of many a prompt; so each prompt's scale is found (`best_scale`). It is found with
the target at hand: it tells how far a step along R carries the answer, not what the model knows.

`demo_prompt` and `patched_prediction` are what `ra-lens demo` shows on the embedded model: a
question with its maps, and section 5.3 as it stands, with the mean Reversed Attention of 25
questions added to the attention of others. Which questions are shown is decided by their loss
before any patch, and the scale of the mean on the 25 questions that it is of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mode
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.html import Table
from ra_lens.inputs import TokenIds, answers_given, read_given
from ra_lens.memory import offering
from ra_lens.model import FwdHooks, Lens, as_lens
from ra_lens.numbers import Real, Whole, real, whole
from ra_lens.patching import Where
from ra_lens.patching.hooks import check_variant
from ra_lens.prompts import PromptInput, Prompts, read_prompts
from ra_lens.questions import ask, last_logits, mark, read_questions
from ra_lens.report.sections import Section
from ra_lens.run import run_with_ra
from ra_lens.scales import BestScale, best_scale
from ra_lens.targets import Answers, Objective, answer_nll, one_each, sequence_nll
from ra_lens.tasks import Prompt, load_task
from ra_lens.text import label, scale_name

OPEN_LOSS = 0.3
"""A question is open where the loss is larger: its answer has a probability below 74 %."""

DEMO_TASK, DEMO_SHOTS, DEMO_AMONG = "choose_middle_of_3", 1, 48
MEAN_TASK = "country-capital"


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
        at: What they were added to: the `"pattern"` or the `"scores"`.
        found: What other scales do; None where the scale was given.
    """

    scale: float
    before: Predictions
    after: Predictions
    at: Where = "pattern"
    found: BestScale | None = None


def patched_predictions(
    model: nn.Module,
    input: PromptInput,
    ra: RACache,
    *,
    target: Answers | None = None,
    scale: Real | Literal["best"] = "best",
    at: Where = "pattern",
    top: Whole = 5,
) -> tuple[PatchedPrompt, ...]:
    """Patch each prompt's RA maps into its own attention and compare what comes next.

    Costs two forward and backward passes per prompt, and a forward pass for each of the 32 scales
    that `best_scale` tries, which a given scale saves.

    Args:
        model: The model that `ra` is of.
        input: The prompts as `run_with_ra` was given them; text is read with BOS or without, as
            it was then.
        ra: What it gave, with its maps.
        target: The target it was given: text, a token id, or one per prompt; None: the model's own
            top prediction, which stays the target once patched.
        scale: What the maps are multiplied by. `"best"`: for each prompt the scale at which its
            own loss is smallest, of those that `best_scale` tries.
        at: What they are added to: `"pattern"` or `"scores"`, as in `patch_hooks`.
        top: How many of the likeliest tokens are told.

    Returns:
        One per prompt.

    Raises:
        BadInput: another number of prompts than the cache holds, no such `scale` or `at`, or `top`
            below 1.
        NotStored: the maps were not kept.
        UnsupportedModel: a model whose attention cannot be edited.
    """
    fixed, top = _read_scale(scale), whole("top", top)
    check_variant(at, renormalise=False)
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
    # Where one target has several tokens all are appended, and the maps are of prompt and answer.
    as_loss = answer_nll if ra.info.answer_lengths is None else sequence_nll
    found: list[PatchedPrompt] = []
    for i, wanted in enumerate(targets):
        prompt = prompts.chosen([i]).unpadded()
        one = ra if not ra.has_batch_dim else ra.apply_slice_to_batch_dim([i])
        if wanted is None:
            logits, _ = run_with_ra(model, prompt, store="norms", progress=False)
            wanted = int(logits[0, 0].argmax())
        answer = as_loss([wanted])  # a list, as a row of ids is the answer of one prompt
        curve, chosen = None, fixed
        if chosen is None:
            curve = best_scale(model, one, prompt, answer, at=at, progress=False)
            chosen = curve.scale
        before = _predicted(model, prompt, answer, (), top)
        hooks = one.mean().patch_hooks(scale=chosen, at=at)
        after = _predicted(model, prompt, answer, hooks, top)
        found.append(PatchedPrompt(chosen, before, after, at, curve))
    return tuple(found)


def _read_scale(scale: object) -> float | None:
    """Give the scale; None for the best."""
    if not isinstance(scale, str):
        return real("scale", scale)
    if scale != "best":
        raise BadInput(f"found scale={scale!r}; give a number, or 'best'.")
    return None


def _predicted(
    model: nn.Module, prompt: Prompts, answer: Objective, hooks: FwdHooks, top: int
) -> Predictions:
    """What comes next after one prompt."""
    lens = as_lens(model)
    with offering():
        logits, run = run_with_ra(
            model, prompt, target=answer, fwd_hooks=hooks, store="norms", progress=False
        )
    bound, _ = answer.bind(lens, prompt)
    [ids] = bound.targets or [[]]
    chance = math.exp(-float(run.loss.flatten()[0]) * len(ids))
    # The first position read predicts the target's first token.
    return _predictions(lens, logits[0, 0], ids[0], chance, top)


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


def typical_open(chances: Float[Tensor, "question"]) -> int:
    """Give the open question of the median loss, by the probabilities of the answers.

    Of an even number the one with the smaller loss. If none is open, the one of the largest loss.
    """
    losses = -chances.double().log()
    order = losses.argsort(stable=True).tolist()
    still = [i for i in order if float(losses[i]) > OPEN_LOSS]
    return still[(len(still) - 1) // 2] if still else order[-1]


def demo_prompt(model: nn.Module, *, among: int = DEMO_AMONG) -> Prompt:
    """Give the demo's question, which has a solved one in front: a typical one of the open."""
    prompts = load_task(DEMO_TASK).sample(among, shots=DEMO_SHOTS, seed=0)
    lens = as_lens(model)
    return prompts[typical_open(ask(lens, read_questions(lens, prompts)).probability)]


def why_this_prompt(among: int = DEMO_AMONG) -> Section:
    """Tell how the demo's question was chosen."""
    return Section(
        "Which question this is",
        (
            f"Of {among} questions of the task {DEMO_TASK}, each with a solved one in front, those "
            f"whose loss is above {OPEN_LOSS} are open; this is the one of their median loss. What "
            "a patch does to it had no part in the choice.",
        ),
    )


def patched_prediction(
    model: nn.Module,
    *,
    averaged: int = 25,
    tested: int = 48,
    scale: Real | Literal["best"] = "best",
) -> dict[str, Any]:
    """Patch the mean RA maps of some questions into others of the same length; as plain data.

    The best scale is that at which the loss of the questions averaged is smallest. The question
    shown is the open one of median loss among those tested. Costs a forward and a backward pass per
    question averaged, 32 forward passes of each for the best scale, and two of each one tested.
    """
    lens, task, fixed = as_lens(model), load_task(MEAN_TASK), _read_scale(scale)
    prompts = task.sample(len(task.pairs), seed=0)
    questions = read_questions(lens, prompts)
    lengths = questions.prompts.lengths
    same = [i for i, n in enumerate(lengths) if n == mode(lengths)]
    if len(same) <= averaged:
        raise BadInput(
            f"found {len(same)} questions of {mode(lengths)} tokens in task {MEAN_TASK!r}; "
            f"averaging over {averaged} leaves none to test. Give a smaller number, or another "
            "task."
        )
    learned, asked = same[:averaged], same[averaged : averaged + tested]
    read, targets = questions.prompts.chosen(learned), [prompts[i].answer for i in learned]
    _, ra = run_with_ra(model, read, target=targets, store="mean", progress=False)
    mean = ra.mean()
    if fixed is None:
        chosen = best_scale(model, mean, read, targets, batch_size=256, progress=False).scale
    else:
        chosen = fixed
    facts: dict[str, Any] = {"task": MEAN_TASK, "scale": chosen, "scale_found": fixed is None}
    answers, shown = questions.first_tokens[asked], 0
    for when, hooks in (("before", ()), ("after", mean.patch_hooks(scale=chosen))):
        logits = last_logits(lens, questions.prompts.chosen(asked), hooks)
        marks = mark(logits, answers)
        if when == "before":
            shown = typical_open(marks.probability)
            prompt = prompts[asked[shown]]
            facts |= {"prompt": prompt.text, "answer": prompt.answer}
            facts |= {"averaged": len(learned), "tested": len(asked)}
        chance = float(marks.probability[shown])
        one = _predictions(lens, logits[shown], int(answers[shown]), chance, top=1)
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

    answer, tested, n = label(facts["answer"]), facts["tested"], facts["averaged"]
    scale = scale_name(facts["scale"])
    columns = ("", f"p(“{answer}”)", "Its rank", "Top prediction", f"Right in {tested} questions")
    found = f"{scale} was found on the {n} questions averaged, whose loss is smallest there. "
    return Section(
        "A patched prediction",
        (
            f"Without demonstrations “{label(facts['prompt'])}” does not say which relation is "
            f"asked for. The Reversed Attention of {n} other questions of the task "
            f"{facts['task']} is averaged, multiplied by {scale}, and added "
            "to the attention of every head; the weights stay as they are.",
        ),
        Table(columns, (row("Before", "before"), row("Patched", "after"))),
        notes=(
            f"{found * facts['scale_found']}The question shown is that of the median loss, before "
            f"any patch, among those tested with a loss above {OPEN_LOSS}; none was averaged over.",
        ),
    )
