"""`rank_heads`: score every head of a model by one or several methods of the registry.

Cost, for n prompts and a model of L layers with H heads:

* `ra`, `w_norm`, `michel`, `atp`, `knockout`, `grad_sam`, `ag`, `grad_norm`: n forwards, and n
  backwards with respect to activations only; as many for all of them together;
* `nap`: n forwards more, for the corrupted twins; `nap_ig`, in 5 steps: 4 n forwards and backwards
  more than `nap`;
* `relp`, `gim`: n forwards and backwards more, for each of them;
* `zero`, `mean`, `resample`: as `cm1`, with n forwards more for the mean and the twins;
* `fa`, `fa_of_mean`: n forwards;
* `cm1`, `cm1_last`: n + L forwards, and n·L·H that begin at the layer of their head, half a forward
  on average where the layers are alike; `cm2`: n forwards more;
* `random`, `index`: none.

A forward of several rows counts once per row; rows run in batches of `batch_size`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import cast, overload

from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.errors import BadInput
from ra_lens.fitting import rows_of_forward
from ra_lens.heads.one_run import OfRun, RunFunction, scores_of_one_run
from ra_lens.heads.registry import RankingContext, RankingFunction, RankingMethod, find_methods
from ra_lens.heads.scores import HeadScores
from ra_lens.memory import offering
from ra_lens.model import PrependBos, as_lens
from ra_lens.model.backward import BACKWARDS
from ra_lens.numbers import BatchSize, Whole, flag, read_batch_size, whole
from ra_lens.tasks import Prompt


@overload
def rank_heads(
    model: nn.Module,
    prompts: Iterable[Prompt],
    *,
    method: str | None = None,
    methods: None = None,
    seed: Whole = 0,
    draw: Whole = 0,
    answer_in_input: bool = True,
    prepend_bos: PrependBos = None,
    batch_size: BatchSize = 32,
    each_prompt: bool = False,
    progress: bool = True,
) -> HeadScores: ...


@overload
def rank_heads(
    model: nn.Module,
    prompts: Iterable[Prompt],
    *,
    methods: str | Iterable[str],
    seed: Whole = 0,
    draw: Whole = 0,
    answer_in_input: bool = True,
    prepend_bos: PrependBos = None,
    batch_size: BatchSize = 32,
    each_prompt: bool = False,
    progress: bool = True,
) -> dict[str, HeadScores]: ...


def rank_heads(
    model: nn.Module,
    prompts: Iterable[Prompt],
    *,
    method: str | None = None,
    methods: str | Iterable[str] | None = None,
    seed: Whole = 0,
    draw: Whole = 0,
    answer_in_input: bool = True,
    prepend_bos: PrependBos = None,
    batch_size: BatchSize = 32,
    each_prompt: bool = False,
    progress: bool = True,
) -> HeadScores | dict[str, HeadScores]:
    """Score every head of a model on some questions, by one or several of `ranking_methods()`.

    From one forward and one backward pass, for the answer's cross-entropy L, with A the pattern and
    G = ∂L/∂A, each the mean over the prompts:

    * `"ra"`: Frobenius norm of Reversed Attention.
    * `"w_norm"`: norm of the gradient of the head's W_Q, W_K, W_V and W_O.
    * `"michel"`: |Σ z·∂L/∂z|; `"atp"`: −Σ z·∂L/∂z, what zeroing the head does to L, foretold.
    * `"knockout"`: Σ |−R~/(1 − A)|, what cutting each edge does to L, foretold.
    * `"grad_sam"`: Σ relu(−A ⊙ G); `"ag"`: Σ |A ⊙ G|; `"grad_norm"`: ‖G‖ where A > 0.
    * `"nap"`: Σ (z′ − z)·∂L/∂z, z′ being that of the prompt's corrupted twin (`Prompt.corrupted`,
      or drawn by `seed`); `"nap_ig"`: with the mean of the gradient on the way from the twin.
    * `"relp"`, `"gim"`: |Σ z·∂L/∂z|, each from a backward pass of its own rules.

    What a change of one head really does to L, in nats:

    * `"zero"`: z is 0 at every token; `"mean"`: its mean over all tokens; `"resample"`: z′.

    The others:

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
        method: Name of one method. Default: `"ra"`.
        methods: Instead of it the names of several; those that read one forward and one backward
            pass share it.
        seed: Of the random orders and of the shuffled labels.
        draw: Which random order, for `"random"`.
        answer_in_input: For the methods of one run, and `"fa"`: True reads prompt and answer, the
            loss being the mean over the answer's tokens; False reads the prompt alone, the loss
            being −log p of the answer's first token.
        prepend_bos: What stands in front of each prompt, as in `run_with_ra`.
        batch_size: Rows per forward pass; a row is a prompt, or a prompt with one head changed.
            `"auto"`: as many as fit what the model's device has free (`ra_lens.fitting`).
        each_prompt: Keep the score of each prompt too, as `HeadScores.each`, which takes no more
            time.
        progress: False hides the progress bars.

    Returns:
        The scores; with `methods` those of each by its name, in the order given.

    Raises:
        BadInput: `method` and `methods` together, an unknown method, prompts or options that cannot
            be used, scores of a wrong shape or with NaN; `each_prompt` with a method that has no
            score for single prompts; a prompt without a corrupted twin of which none can be drawn.
        UnsupportedModel: a model whose attention cannot be read, or whose heads cannot be edited.
    """
    if method is not None and methods is not None:
        raise BadInput(
            f"found method={method!r} and methods={methods!r}; give method= for the scores of one, "
            "or methods= for those of several by name."
        )
    chosen = find_methods(("ra" if method is None else method,) if methods is None else methods)
    context = ranking_context(
        model,
        prompts,
        seed=seed,
        draw=draw,
        answer_in_input=answer_in_input,
        prepend_bos=prepend_bos,
        batch_size=batch_size,
        progress=progress,
    )
    scores = scores_by(context, chosen)
    ranked: dict[str, HeadScores] = {}
    for one in chosen:
        found = scores[one.name]
        each = found if found.ndim == 3 else None
        if each_prompt and each is None:
            raise BadInput(
                f"found each_prompt=True with method {one.name!r} ({one.title}), which has no "
                "score for a single prompt. Leave the one or the other out."
            )
        ranked[one.name] = HeadScores(
            method=one.name,
            title=one.title,
            scores=found if each is None else each.mean(dim=0),
            layers=tuple(context.lens.sites),
            heads=context.n_heads,
            n_examples=len(context.prompts),
            model_name=context.lens.name,
            seed=context.seed,
            draw=context.draw,
            each=each if each_prompt else None,
        )
    return ranked[chosen[0].name] if methods is None else ranked


def scores_by(
    context: RankingContext, methods: Iterable[RankingMethod]
) -> dict[str, Float[Tensor, "*prompt layer head"]]:
    """Give the scores by each method: those of each prompt, or of all where there are no others."""
    chosen = list(methods)
    together = _scores_of_one_run(context, chosen)
    return {
        one.name: together[one.name] if one.name in together else _scores_of(one, context)
        for one in chosen
    }


def ranking_context(
    model: nn.Module,
    prompts: object,
    *,
    seed: Whole = 0,
    draw: Whole = 0,
    answer_in_input: object = True,
    prepend_bos: PrependBos = None,
    batch_size: BatchSize = 32,
    progress: bool = True,
) -> RankingContext:
    """Read what `rank_heads` is given, or raise where it cannot be used."""
    lens = as_lens(model)
    seed, draw = whole("seed", seed, least=0), whole("draw", draw, least=0)
    at_a_time = read_batch_size(batch_size)
    context = RankingContext(
        lens=lens,
        model=model,
        prompts=_checked(prompts),
        seed=seed,
        draw=draw,
        answer_in_input=flag("answer_in_input", answer_in_input),
        prepend_bos=prepend_bos,
        batch_size=1 if at_a_time == "auto" else at_a_time,
        progress=progress,
        fits=at_a_time == "auto",
    )
    if not context.fits or not context.prompts:
        return context
    questions = context.questions
    found = replace(
        context,
        batch_size=rows_of_forward(
            lens,
            questions.with_answers,
            n_read=max(map(len, questions.answers)) if answer_in_input else 1,
            kept=1,  # what blocks return, where a later pass begins behind them
        ),
    )
    vars(found)["questions"] = questions  # they are not read, and warned of, again
    return found


def _scores_of_one_run(
    context: RankingContext, chosen: Iterable[RankingMethod]
) -> dict[str, Tensor]:
    """Give the scores of each prompt by all methods that read a run; one run a backward pass."""
    sharing = {
        one.name: OfRun(cast("RunFunction", one.function), one.needs)
        for one in chosen
        if one.needs is not None
    }
    found = dict[str, Tensor]()
    for backward in BACKWARDS:
        of_one = {name: one for name, one in sharing.items() if one.needs.backward == backward}
        if of_one:
            with offering("batch_size", one_batch=True):
                found |= scores_of_one_run(
                    context.lens,
                    context.model,
                    context.questions,
                    of_one,
                    twins=lambda: context.twins,
                    answer_in_input=context.answer_in_input,
                    batch_size="auto" if context.fits else context.batch_size,
                    progress=context.progress,
                )
    return found


def _scores_of(method: RankingMethod, context: RankingContext) -> Tensor:
    """Give the scores of a method that runs the model itself."""
    scores: object = cast("RankingFunction", method.function)(context)
    each = (len(context.prompts), *context.shape)
    if isinstance(scores, Tensor) and tuple(scores.shape) in (context.shape, each):
        return scores.detach().cpu().double()
    shaped = isinstance(scores, Tensor)
    found = f"scores of shape {tuple(scores.shape)}" if shaped else f"a {_type(scores)}"
    raise BadInput(
        f"method {method.name!r} gave {found}; a tensor [layer, head] = {list(context.shape)} is "
        f"needed for {context.lens.name}."
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
