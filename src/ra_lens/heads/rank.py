"""`rank_heads`: score every head of a model by one method, larger = more important.

Cost, for n prompts and a model of L layers with H heads:

* `ra`: n forwards, and n backwards with respect to activations only;
* `fa`, `fa_of_mean`: n forwards;
* `cm1`, `cm1_last`: n + L forwards, and n·L·H that begin at the layer of their head, half a forward
  on average where the layers are alike; `cm2`: n forwards more;
* `random`, `index`: none.

A forward of several rows counts once per row; rows run in batches of `batch_size`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import cast

from torch import Tensor, nn

from ra_lens.errors import BadInput
from ra_lens.heads.registry import RankingContext, find_method
from ra_lens.heads.scores import HeadScores
from ra_lens.numbers import Whole, whole
from ra_lens.sites import as_lens
from ra_lens.tasks import Prompt


def rank_heads(
    model: nn.Module,
    prompts: Iterable[Prompt],
    *,
    method: str = "ra",
    seed: Whole = 0,
    draw: Whole = 0,
    answer_in_input: bool = True,
    prepend_bos: bool | None = None,
    batch_size: Whole = 32,
    progress: bool = True,
) -> HeadScores:
    """Score every head of a model on some questions, by one of `ranking_methods()`.

    * `"ra"`: mean Frobenius norm of Reversed Attention, for the answer's cross-entropy.
    * `"fa"`: mean Frobenius norm of the pattern; `"fa_of_mean"`: norm of the mean pattern.
    * `"cm1"`: probability that the answer loses where the head is set to zero at every position;
      `"cm1_last"`: at the last token only.
    * `"cm2"`: probability that the answer gains where, in a prompt with shuffled labels, the head's
      last token gets its mean over the right prompts.
    * `"random"`: one random order per `seed` and `draw`; `"index"`: the first layer first.

    The published experiments use 25 questions; `"cm2"` those of the valid part of a task, the
    others those of its train part.

    Args:
        model: A HookedTransformer or TransformerBridge.
        prompts: Questions with their answers, as `ra_lens.tasks` makes them.
        method: Name of the method.
        seed: Of the random orders and of the shuffled labels.
        draw: Which random order, for `"random"`.
        answer_in_input: For `"ra"` and `"fa"`: True reads prompt and answer, the loss being the
            mean over the answer's tokens; False reads the prompt alone, the loss being −log p of
            the answer's first token.
        prepend_bos: Overrides the model's default.
        batch_size: Rows per forward pass; a row is a prompt, or a prompt with one head changed.
        progress: False hides the progress bars.

    Returns:
        The scores.

    Raises:
        BadInput: an unknown method, prompts or options that cannot be used, scores of a wrong shape
            or with NaN.
        UnsupportedModel: a model whose attention cannot be read, or whose heads cannot be edited.
    """
    chosen = find_method(method)
    lens = as_lens(model)
    seed, draw = whole("seed", seed), whole("draw", draw)
    batch_size = whole("batch_size", batch_size)
    if batch_size < 1:
        raise BadInput(f"found batch_size={batch_size}; give a positive number.")
    context = RankingContext(
        lens=lens,
        model=model,
        prompts=_checked(prompts),
        seed=seed,
        draw=draw,
        answer_in_input=answer_in_input,
        prepend_bos=prepend_bos,
        batch_size=batch_size,
        progress=progress,
    )
    scores: object = chosen.function(context)
    if not isinstance(scores, Tensor) or tuple(scores.shape) != context.shape:
        shaped = isinstance(scores, Tensor)
        found = f"scores of shape {tuple(scores.shape)}" if shaped else f"a {_type(scores)}"
        raise BadInput(
            f"method {method!r} gave {found}; a tensor [layer, head] = {list(context.shape)} is "
            f"needed for {lens.name}."
        )
    return HeadScores(
        method=method,
        title=chosen.title,
        scores=scores.detach().cpu().double(),
        layers=tuple(lens.sites),
        heads=context.n_heads,
        n_examples=len(context.prompts),
        model_name=lens.name,
        seed=seed,
        draw=draw,
    )


def _checked(prompts: object) -> tuple[Prompt, ...]:
    needed = "Make some with ra_lens.load_task(name).sample(25, shots=5), or Prompt(text, answer)."
    unordered = isinstance(prompts, str | Mapping | Set)
    if unordered or not isinstance(prompts, Iterable):
        raise BadInput(
            f"found prompts of type {_type(prompts)}; a list of Prompt is needed. {needed}"
        )
    given = tuple(cast("Iterable[object]", prompts))
    for i, prompt in enumerate(given):
        if not isinstance(prompt, Prompt):
            raise BadInput(f"prompts[{i}] is a {_type(prompt)}; a Prompt is needed. {needed}")
    return cast("tuple[Prompt, ...]", given)


def _type(thing: object) -> str:
    return type(thing).__name__
