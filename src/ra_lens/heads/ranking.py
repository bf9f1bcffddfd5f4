"""`rank_heads`: score every head of a model by one method; and the registry of methods.

A method is one function from a `RankingContext` to scores, which all point the same way: larger =
more important. A new one is registered with a decorator and is then a name like the others:

    @ranking_method("early", title="early layers first")
    def early(context):
        n_layers, n_heads = context.shape
        return -torch.arange(n_layers)[:, None].expand(n_layers, n_heads).double()

    rank_heads(model, prompts, method="early").top(3)

Cost, for n prompts and a model of L layers with H heads:

* `ra`, `w_norm`: n forwards, and n backwards with respect to activations only;
* `fa`, `fa_of_mean`: n forwards;
* `cm1`, `cm1_last`: n + L forwards, and n·L·H that begin at the layer of their head, half a forward
  on average where the layers are alike; `cm2`: n forwards more;
* `random`, `index`: none.

A forward of several rows counts once per row; rows run in batches of `batch_size`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

from torch import Tensor, nn

from ra_lens.errors import BadInput, one_of
from ra_lens.heads.scores import HeadScores
from ra_lens.model import Lens, PrependBos, as_lens
from ra_lens.numbers import Whole, whole
from ra_lens.questions import Questions, read_questions
from ra_lens.tasks import Prompt

Part = Literal["train", "valid"]


@dataclass(frozen=True, eq=False)
class RankingContext:
    """What a ranking method gets.

    Attributes:
        lens: The model, as `ra_lens.model.Lens`.
        model: The model itself.
        prompts: The questions to rank heads on, each with its right answer.
        seed: For methods that draw something.
        draw: Which of several random orders.
        answer_in_input: Whether methods that read maps append the answer to the prompt.
        prepend_bos: What stands in front of each prompt, as in `run_with_ra`.
        batch_size: Rows per forward pass.
        progress: Whether progress bars may be shown.
    """

    lens: Lens
    model: nn.Module
    prompts: tuple[Prompt, ...]
    seed: int = 0
    draw: int = 0
    answer_in_input: bool = True
    prepend_bos: PrependBos = None
    batch_size: int = 32
    progress: bool = True

    @cached_property
    def questions(self) -> Questions:
        """The prompts as token ids, each with the ids of its answer."""
        return self.read(self.prompts)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers with attention, and heads per layer (the most, if they differ): of the scores."""
        return self.lens.sites.shape

    @property
    def n_heads(self) -> tuple[int, ...]:
        """Heads of each layer. What a method gives beyond them counts for nothing."""
        return self.lens.sites.n_heads

    def read(self, prompts: tuple[Prompt, ...]) -> Questions:
        """Tokenise other prompts than the given ones."""
        return read_questions(self.lens, prompts, prepend_bos=self.prepend_bos)


RankingFunction = Callable[[RankingContext], Tensor]


@dataclass(frozen=True)
class RankingMethod:
    """A way to rank heads.

    Attributes:
        name: What `rank_heads(method=...)` calls it.
        title: What it is, in a few words, for tables and figures.
        function: Gives `Float[Tensor, "layer head"]`, larger = more important.
        split: Part of a task whose questions it is computed on.
        random: Whether another `draw` gives another order.
        label: What legends and tables call it; empty: its name.
    """

    name: str
    title: str
    function: RankingFunction
    split: Part = "train"
    random: bool = False
    label: str = ""


# Built-in ones are listed in this order, before all others, in whatever order they register.
_BUILT_IN = ("ra", "w_norm", "fa", "fa_of_mean", "cm1", "cm1_last", "cm2", "random", "index")
_methods: dict[str, RankingMethod] = {}


def ranking_method(
    name: str,
    *,
    title: str | None = None,
    label: str = "",
    split: Part = "train",
    random: bool = False,
    replace: bool = False,
) -> Callable[[RankingFunction], RankingFunction]:
    """Register the decorated function as a ranking method.

    Args:
        name: What `rank_heads(method=...)` is to call it.
        title: What it is, in a few words. Default: the name.
        label: What legends and tables call it. Default: the name.
        split: Part of a task whose questions experiments compute it on: `"train"` or `"valid"`.
        random: Whether it gives another order for another `draw`; experiments then average draws.
        replace: True to put it in the place of a method of the same name.

    Raises:
        BadInput: the name is taken, or empty; an unknown part.
    """
    if not name:
        raise BadInput("found an empty name for a ranking method; give it one, such as 'mine'.")
    one_of("split", split, ("train", "valid"), where=f" for method {name!r}")

    def register(function: RankingFunction) -> RankingFunction:
        known = _methods.get(name)
        if known is not None and not replace and not _same_place(known.function, function):
            raise BadInput(
                f"there already is a ranking method {name!r} ({known.title}). Choose another name, "
                "or put yours in its place with replace=True."
            )
        _methods[name] = RankingMethod(name, title or name, function, split, random, label)
        return function

    return register


def _same_place(one: RankingFunction, other: RankingFunction) -> bool:
    # A notebook cell that is run again defines the same function anew.
    return all(getattr(one, name, None) == getattr(other, name, 1) for name in _PLACE)


_PLACE = ("__module__", "__qualname__")


def ranking_methods() -> dict[str, RankingMethod]:
    """Give the ranking methods by name, built-in ones first."""
    listed = dict.fromkeys(name for name in (*_BUILT_IN, *_methods) if name in _methods)
    return {name: _methods[name] for name in listed}


def find_method(name: str) -> RankingMethod:
    """Give a method by its name.

    Raises:
        BadInput: there is none of that name.
    """
    known = ranking_methods()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise BadInput(
        f"there is no ranking method {name!r}.{hint} There are {', '.join(map(repr, known))}; "
        "add your own in Python with ra_lens.heads.ranking_method."
    )


def rank_heads(
    model: nn.Module,
    prompts: Iterable[Prompt],
    *,
    method: str = "ra",
    seed: Whole = 0,
    draw: Whole = 0,
    answer_in_input: bool = True,
    prepend_bos: PrependBos = None,
    batch_size: Whole = 32,
    progress: bool = True,
) -> HeadScores:
    """Score every head of a model on some questions, by one of `ranking_methods()`.

    * `"ra"`: mean Frobenius norm of Reversed Attention, for the answer's cross-entropy.
    * `"w_norm"`: mean norm of the gradient of the head's W_Q, W_K, W_V and W_O.
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
        answer_in_input: For `"ra"`, `"w_norm"` and `"fa"`: True reads prompt and answer, the loss
            being the mean over the answer's tokens; False reads the prompt alone, the loss being
            −log p of the answer's first token.
        prepend_bos: What stands in front of each prompt, as in `run_with_ra`.
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
