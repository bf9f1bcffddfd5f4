"""What a model predicts for a prompt, before and after a patch with the prompt's own maps.

The patch is one step of attention patching: `scale` times the prompt's own RA map is added to the
pattern of every head (paper section 5.3, with a mean over one prompt). A negative scale follows
descent, so that the loss falls where the step is not too long. Cost: a forward and a backward pass
per prompt.

What `ra-lens demo` shows on the embedded model: a few-shot prompt, and a patched prediction.

The patch follows the paper's section 5.3: the Reversed Attention of a task's questions is averaged
entry by entry over 25 of them, and −30 times the mean is added to the attention of other questions,
which the model then answers with the same weights. Nothing is chosen by outcome: the question shown
is the first of those tested.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.html import Table
from ra_lens.inputs import TokenIds, answers_given, read_given
from ra_lens.model import Lens, as_lens
from ra_lens.numbers import Real, Whole, real, whole
from ra_lens.prompts import PromptInput, Prompts, read_prompts
from ra_lens.report.sections import Section
from ra_lens.run import run_with_ra
from ra_lens.targets import Answers, ids_of, one_each
from ra_lens.tasks import Prompt, load_task
from ra_lens.text import label


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
    factor, top = real("scale", scale), whole("top", top)
    if top < 1:
        raise BadInput(f"found top={top}; give the number of predictions to tell, at least 1.")
    lens = as_lens(model)
    prompts = _read(lens, input, ra)
    n = len(prompts)
    if n != ra.batch_size:
        raise BadInput(
            f"found {n} prompts for a cache of {ra.batch_size}. Give the prompts that "
            "run_with_ra was given."
        )
    targets = one_each(answers_given("target", target), n)
    if len(targets) != n:
        raise BadInput(
            f"found {len(targets)} targets for {n} prompts. Give one for all, or one for each."
        )
    found: list[PatchedPrompt] = []
    for i, wanted in enumerate(targets):
        prompt = replace(prompts.chosen([i]), width=0)
        options: dict[str, Any] = {"store": "norms", "progress": False}
        logits, plain = run_with_ra(model, prompt, target=_of_one(wanted), **options)
        if wanted is None:
            wanted = int(logits[0, 0].argmax())
        one = ra if not ra.has_batch_dim else ra.apply_slice_to_batch_dim([i])
        hooks = one.mean().patch_hooks(scale=factor)
        after, patched = run_with_ra(
            model, prompt, target=_of_one(wanted), fwd_hooks=hooks, **options
        )
        first = ids_of(lens, prompt, 0, wanted, f"target {i}")[0]
        found.append(
            PatchedPrompt(
                factor,
                # The first position read predicts the target's first token.
                _predictions(lens, logits[0, 0], plain, first, top),
                _predictions(lens, after[0, 0], patched, first, top),
            )
        )
    return tuple(found)


def _read(lens: Lens, input: PromptInput, ra: RACache) -> Prompts:
    if isinstance(input, Prompts):
        return input
    given = read_given("prompt", input)
    as_text = None if isinstance(given, TokenIds) else ra.info.bos_prepended
    return read_prompts(lens, given, prepend_bos=as_text)


def _of_one(target: object) -> Any:
    """The target of one prompt as that of a run: a row of ids is one answer, not several."""
    return [target] if isinstance(target, list) else target


def _predictions(
    lens: Lens, logits: Float[Tensor, "d_vocab"], ra: RACache, first: int, top: int
) -> Predictions:
    chances = logits.float().softmax(dim=-1)
    values, ids = chances.topk(min(top, chances.numel()))
    likely = tuple(
        (lens.decode(int(i)), float(v)) for v, i in zip(values.cpu(), ids.cpu(), strict=True)
    )
    target = None
    if ra.info.objective in ("answer_nll", "top_prediction", "sequence_nll"):
        length = 1 if ra.info.answer_lengths is None else max(ra.info.answer_lengths[0], 1)
        target = math.exp(-float(ra.loss.flatten()[0]) * length)
    if target is None:
        return Predictions(likely, target)
    rank = 1 + int(torch.sum(logits > logits[first]))
    return Predictions(likely, target, rank)


TASK = "country-capital"


@dataclass(frozen=True)
class Prediction:
    """What a model predicts for one question.

    Attributes:
        probability: Of the right answer.
        rank: Of the right answer; 1 is the top prediction.
        top: The top prediction.
        top_probability: Its probability.
    """

    probability: float
    rank: int
    top: str
    top_probability: float


@dataclass(frozen=True)
class PatchedPrediction:
    """One question before and after the patch, and the accuracy over all questions tested.

    Attributes:
        task: Name of the task.
        prompt: The question shown.
        answer: Its right answer.
        scale: What the mean maps were multiplied by.
        averaged: Number of questions the maps were averaged over; none of them is tested.
        tested: Number of questions tested.
        before: Prediction of the question shown, unpatched.
        after: The same, patched.
        accuracy_before: Share of the questions tested whose top prediction is right, unpatched.
        accuracy_after: The same, patched.
    """

    task: str
    prompt: str
    answer: str
    scale: float
    averaged: int
    tested: int
    before: Prediction
    after: Prediction
    accuracy_before: float
    accuracy_after: float


def few_shot_prompt() -> Prompt:
    """A question after two solved ones, whose relation the model has to find in them."""
    return load_task(TASK).sample(1, shots=2, seed=0)[0]


def patched_prediction(
    model: nn.Module,
    *,
    task: str = TASK,
    averaged: Whole = 25,
    tested: Whole = 48,
    scale: Real = -30.0,
    seed: Whole = 0,
) -> PatchedPrediction:
    """Patch the mean RA maps of some questions of a task into the attention of others.

    Args:
        model: A model whose tokenizer makes one token of every answer.
        task: A built-in task; its questions are asked without demonstrations.
        averaged: Number of questions whose maps are averaged.
        tested: Number of other questions to answer, at most.
        scale: What the mean maps are multiplied by.
        seed: Another seed gives other questions.

    Raises:
        BadInput: too few questions of one length.
        UnsupportedModel: a model whose attention cannot be edited.
    """
    averaged, tested = whole("averaged", averaged, least=1), whole("tested", tested, least=1)
    factor = real("scale", scale)
    lens = as_lens(model)
    found = load_task(task)
    prompts = found.sample(len(found.pairs), seed=seed)
    rows = [lens.encode(prompt.text, prepend_bos=None) for prompt in prompts]
    length = max({len(row) for row in rows}, key=[len(row) for row in rows].count)
    same = [i for i, row in enumerate(rows) if len(row) == length]
    if len(same) <= averaged:
        raise BadInput(
            f"found {len(same)} questions of {length} tokens in task {task!r}; averaging over "
            f"{averaged} leaves none to test. Give a smaller number, or another task."
        )
    learned, asked = same[:averaged], same[averaged : averaged + tested]
    _, ra = run_with_ra(
        model,
        torch.tensor([rows[i] for i in learned]),
        target=[prompts[i].answer for i in learned],
        store="mean",
        progress=False,
    )
    tokens = torch.tensor([rows[i] for i in asked])
    answers = [lens.encode_fragment(prompts[i].answer)[0] for i in asked]
    before = _last_logits(lens, tokens)
    hooks = ra.mean().patch_hooks(scale=factor)
    with lens.hooks(hooks):
        after = _last_logits(lens, tokens)
    wanted = torch.tensor(answers)
    return PatchedPrediction(
        task=found.name,
        prompt=prompts[asked[0]].text,
        answer=prompts[asked[0]].answer,
        scale=factor,
        averaged=len(learned),
        tested=len(asked),
        before=_prediction(lens, before[0], answers[0]),
        after=_prediction(lens, after[0], answers[0]),
        accuracy_before=float((before.argmax(-1) == wanted).float().mean()),
        accuracy_after=float((after.argmax(-1) == wanted).float().mean()),
    )


def as_section(patched: PatchedPrediction) -> Section:
    """Tell the result in a report."""

    def row(name: str, one: Prediction, accuracy: float) -> tuple[str, ...]:
        return (
            name,
            f"{one.probability:.3f}",
            str(one.rank),
            f"“{label(one.top)}” ({one.top_probability:.3f})",
            f"{accuracy:.1%}",
        )

    scale = f"{patched.scale:g}".replace("-", "−")
    columns = (
        "",
        f"p(“{label(patched.answer)}”)",
        "Its rank",
        "Top prediction",
        f"Right in {patched.tested} questions",
    )
    return Section(
        "A patched prediction",
        (
            f"Without demonstrations “{label(patched.prompt)}” does not say which relation is "
            f"asked for. The Reversed Attention of {patched.averaged} other questions of the task "
            f"{patched.task} is averaged, multiplied by {scale}, and added to the "
            "attention of every head; the weights stay as they are.",
        ),
        Table(
            columns,
            (
                row("Before", patched.before, patched.accuracy_before),
                row("Patched", patched.after, patched.accuracy_after),
            ),
        ),
        notes=("The question shown is the first of those tested; none was averaged over.",),
    )


def as_json(patched: PatchedPrediction) -> dict[str, object]:
    """The result as plain data."""
    return asdict(patched)


@torch.no_grad()
def _last_logits(lens: Lens, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch d_vocab"]:
    tokens = tokens.to(lens.device)
    return lens.forward(tokens, torch.ones_like(tokens, dtype=torch.bool))[:, -1].float().cpu()


def _prediction(lens: Lens, logits: Float[Tensor, "d_vocab"], answer: int) -> Prediction:
    chances = logits.softmax(dim=-1)
    best = int(chances.argmax())
    return Prediction(
        probability=float(chances[answer]),
        rank=int((logits > logits[answer]).sum()) + 1,
        top=lens.decode(best),
        top_probability=float(chances[best]),
    )
