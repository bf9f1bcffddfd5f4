"""`rank_heads`: score every head of a model by some methods; and the registry of methods.

A method is one function, and its scores all point the same way: larger = more important. A new one
is registered with a decorator and is then a name like the others. Most read a `RankingContext`:

    @ranking_method("early", title="early layers first")
    def early(context):
        n_layers, n_heads = context.shape
        return -torch.arange(n_layers)[:, None].expand(n_layers, n_heads).double()

    rank_heads(model, prompts, method="early").top(3)

Those that read one forward and one backward pass are handed the `RACache` of a batch and score each
of its examples. All of them that are asked for together share that pass (`ra_lens.heads.one_run`):

    @one_run_method("last_row", title="R of the last row", maps=["ra"])
    def last_row(ra):
        return torch.stack([ra["ra", i][:, :, -1].norm(dim=-1) for i in ra.layers], dim=1)

    rank_heads(model, prompts, methods=["ra", "michel", "last_row"])["last_row"].top(3)

Cost, for n prompts and a model of L layers with H heads:

* `ra`, `w_norm`, `michel`, `atp`, `knockout`, `grad_sam`, `ag`, `grad_norm`: n forwards, and n
  backwards with respect to activations only; as many for all of them together;
* `fa`, `fa_of_mean`: n forwards;
* `cm1`, `cm1_last`: n + L forwards, and n·L·H that begin at the layer of their head, half a forward
  on average where the layers are alike; `cm2`: n forwards more;
* `random`, `index`: none.

A forward of several rows counts once per row; rows run in batches of `batch_size`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar, cast, overload

from torch import Tensor, nn

from ra_lens.errors import BadInput, one_of
from ra_lens.heads.one_run import Needs, OfRun, RunFunction, scores_of_one_run
from ra_lens.heads.scores import HeadScores
from ra_lens.model import Lens, PrependBos, as_lens
from ra_lens.model.sites import MapKind, VectorKind, read_kind, read_vectors
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
_Function = TypeVar("_Function", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class RankingMethod:
    """A way to rank heads.

    Attributes:
        name: What `rank_heads(method=...)` calls it.
        title: What it is, in a few words, for tables and figures.
        function: From a `RankingContext` to `Float[Tensor, "layer head"]`, or from the `RACache` of
            a batch to `Float[Tensor, "batch layer head"]` where `needs` says what it reads there;
            larger = more important.
        split: Part of a task whose questions it is computed on.
        random: Whether another `draw` gives another order.
        label: What legends and tables call it; empty: its name.
        needs: What it reads of one forward and one backward pass; None: it runs the model itself.
    """

    name: str
    title: str
    function: RankingFunction | RunFunction
    split: Part = "train"
    random: bool = False
    label: str = ""
    needs: Needs | None = None


# Built-in ones are listed in this order, before all others, in whatever order they register.
_BUILT_IN = (
    *("ra", "w_norm", "michel", "atp", "knockout", "grad_sam", "ag", "grad_norm"),
    *("fa", "fa_of_mean", "cm1", "cm1_last", "cm2", "random", "index"),
)
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
    _check_name(name, split)

    def register(function: RankingFunction) -> RankingFunction:
        method = RankingMethod(name, title or name, function, split, random, label)
        return _register(method, function, replace=replace)

    return register


def one_run_method(
    name: str,
    *,
    title: str | None = None,
    label: str = "",
    maps: Sequence[MapKind] = (),
    vectors: Sequence[VectorKind] = (),
    split: Part = "train",
    replace: bool = False,
) -> Callable[[RunFunction], RunFunction]:
    """Register a ranking method that reads one forward and one backward pass.

    The decorated function gets the `RACache` of a batch, whose loss is that of the answers, and
    gives `Float[Tensor, "batch layer head"]`, larger = more important; a head's score is the mean
    over all examples. Where layers have fewer heads than others, NaN stands in for those they lack
    (`ra_lens.model.sites.table` lays rows out so). Norms of all kinds of map are always there.
    Methods of this kind that are ranked by together share the pass.

    Args:
        name: What `rank_heads(method=...)` is to call it.
        title: What it is, in a few words. Default: the name.
        label: What legends and tables call it. Default: the name.
        maps: Kinds of map that it reads, `ra["pattern", layer]`: they are then kept for a batch.
        vectors: Kinds of vectors that it reads, `ra["z", layer]`.
        split: Part of a task whose questions experiments compute it on: `"train"` or `"valid"`.
        replace: True to put it in the place of a method of the same name.

    Raises:
        BadInput: the name is taken, or empty; an unknown part or kind of vectors.
        NotStored: an unknown kind of map.
    """
    _check_name(name, split)
    needs = Needs(
        tuple(read_kind(kind) for kind in ([maps] if isinstance(maps, str) else maps)),
        tuple(sorted(read_vectors(vectors))),
    )

    def register(function: RunFunction) -> RunFunction:
        method = RankingMethod(name, title or name, function, split, label=label, needs=needs)
        return _register(method, function, replace=replace)

    return register


def _check_name(name: str, split: Part) -> None:
    if not name:
        raise BadInput("found an empty name for a ranking method; give it one, such as 'mine'.")
    one_of("split", split, ("train", "valid"), where=f" for method {name!r}")


def _register(method: RankingMethod, function: _Function, *, replace: bool) -> _Function:
    name, known = method.name, _methods.get(method.name)
    if known is not None and not replace and not _same_place(known.function, method.function):
        raise BadInput(
            f"there already is a ranking method {name!r} ({known.title}). Choose another name, "
            "or put yours in its place with replace=True."
        )
    _methods[name] = method
    return function


def use_method(method: RankingMethod) -> None:
    """Register a method that another process has registered."""
    _methods[method.name] = method


def _same_place(one: object, other: object) -> bool:
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


def find_methods(methods: str | Iterable[str]) -> list[RankingMethod]:
    """Give methods by their names, one or several.

    Raises:
        BadInput: there is none of a name, a name twice, or none at all.
    """
    given = [methods] if isinstance(methods, str) else list(methods)
    if not given or len(set(given)) < len(given):
        raise BadInput(f"found methods={methods!r}; give at least one, each once.")
    return [find_method(name) for name in given]


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
    batch_size: Whole = 32,
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
    batch_size: Whole = 32,
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
    batch_size: Whole = 32,
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
        progress: False hides the progress bars.

    Returns:
        The scores; with `methods` those of each by its name, in the order given.

    Raises:
        BadInput: `method` and `methods` together, an unknown method, prompts or options that cannot
            be used, scores of a wrong shape or with NaN.
        UnsupportedModel: a model whose attention cannot be read, or whose heads cannot be edited.
    """
    if method is not None and methods is not None:
        raise BadInput(
            f"found method={method!r} and methods={methods!r}; give method= for the scores of one, "
            "or methods= for those of several by name."
        )
    chosen = find_methods(("ra" if method is None else method,) if methods is None else methods)
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
    together = _scores_of_one_run(context, chosen)
    ranked = {
        one.name: HeadScores(
            method=one.name,
            title=one.title,
            scores=together[one.name] if one.name in together else _scores_of(one, context),
            layers=tuple(lens.sites),
            heads=context.n_heads,
            n_examples=len(context.prompts),
            model_name=lens.name,
            seed=seed,
            draw=draw,
        )
        for one in chosen
    }
    return ranked[chosen[0].name] if methods is None else ranked


def _scores_of_one_run(
    context: RankingContext, chosen: Iterable[RankingMethod]
) -> dict[str, Tensor]:
    """Give the scores of all methods that read one forward and one backward pass."""
    sharing = {
        one.name: OfRun(cast("RunFunction", one.function), one.needs)
        for one in chosen
        if one.needs is not None
    }
    if not sharing:
        return {}
    return scores_of_one_run(
        context.lens,
        context.model,
        context.questions,
        sharing,
        answer_in_input=context.answer_in_input,
        batch_size=context.batch_size,
        progress=context.progress,
    )


def _scores_of(method: RankingMethod, context: RankingContext) -> Tensor:
    """Give the scores of a method that runs the model itself."""
    scores: object = cast("RankingFunction", method.function)(context)
    if isinstance(scores, Tensor) and tuple(scores.shape) == context.shape:
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
