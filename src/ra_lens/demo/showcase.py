"""What `ra-lens demo` shows on the embedded model: a few-shot prompt, and a patched prediction.

The patch follows the paper's section 5.3: the Reversed Attention of a task's questions is averaged
entry by entry over 25 of them, and −30 times the mean is added to the attention of other questions,
which the model then answers with the same weights. Nothing is chosen by outcome: the question shown
is the first of those tested.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ra_lens.display.tokens import label
from ra_lens.errors import BadInput
from ra_lens.numbers import Real, Whole, real, whole
from ra_lens.report.page import Section, Table
from ra_lens.run import run_with_ra
from ra_lens.sites import Lens, as_lens
from ra_lens.tasks import Prompt, load_task

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
