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

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar, cast, overload

from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.errors import BadInput, one_of
from ra_lens.heads.corrupted import read_twins
from ra_lens.heads.one_run import Needs, OfRun, RunFunction, scores_of_one_run
from ra_lens.heads.scores import HeadScores
from ra_lens.model import Lens, PrependBos, as_lens
from ra_lens.model.backward import BACKWARDS, Backward
from ra_lens.model.sites import MapKind, VectorKind, read_kind, read_vectors
from ra_lens.numbers import Whole, flag, whole
from ra_lens.prompts import Prompts
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

    @cached_property
    def twins(self) -> Prompts:
        """The corrupted twins of the prompts, as token ids; drawn by `seed` where there are none.

        Raises:
            BadInput: a twin of another length, or a prompt for which none can be drawn.
        """
        return read_twins(
            self.lens,
            self.prompts,
            self.questions.prompts,
            prepend_bos=self.prepend_bos,
            seed=self.seed,
        )

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
class Passes:
    """What a method costs for one prompt, in passes of one row.

    Attributes:
        forward: Forward passes.
        backward: Backward passes, with respect to activations.
        forward_per_head: Forward passes for each head, of which those of late layers are short.
    """

    forward: int
    backward: int = 0
    forward_per_head: int = 0

    def forwards(self, n_heads: int) -> int:
        """Forward passes in a model with so many heads."""
        return self.forward + self.forward_per_head * n_heads


@dataclass(frozen=True)
class RankingMethod:
    """A way to rank heads.

    Attributes:
        name: What `rank_heads(method=...)` calls it.
        title: What it is, in a few words, for tables and figures.
        function: From a `RankingContext` to `Float[Tensor, "layer head"]`, or to
            `Float[Tensor, "prompt layer head"]`, of which the mean counts; or from the `RACache` of
            a batch to `Float[Tensor, "batch layer head"]` where `needs` says what it reads there;
            larger = more important.
        split: Part of a task whose questions it is computed on.
        random: Whether another `draw` gives another order.
        label: What legends and tables call it; empty: its name.
        needs: What it reads of one forward and one backward pass; None: it runs the model itself.
        passes: What it costs for one prompt; None: nobody said.
        twins: Whether it reads corrupted twins; experiments then take prompts that have some.
    """

    name: str
    title: str
    function: RankingFunction | RunFunction
    split: Part = "train"
    random: bool = False
    label: str = ""
    needs: Needs | None = None
    passes: Passes | None = None
    twins: bool = False


# Built-in ones are listed in this order, before all others, in whatever order they register.
_BUILT_IN = (
    *("ra", "w_norm", "michel", "atp", "knockout", "grad_sam", "ag", "grad_norm"),
    *("relp", "gim", "nap", "nap_ig"),
    *("zero", "mean", "resample"),
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
    passes: Passes | None = None,
    twins: bool = False,
    replace: bool = False,
) -> Callable[[RankingFunction], RankingFunction]:
    """Register the decorated function as a ranking method.

    It gives one score for each head, or one for each prompt and head, whose mean counts and which
    `rank_heads(each_prompt=True)` keeps.

    Args:
        name: What `rank_heads(method=...)` is to call it.
        title: What it is, in a few words. Default: the name.
        label: What legends and tables call it. Default: the name.
        split: Part of a task whose questions experiments compute it on: `"train"` or `"valid"`.
        random: Whether it gives another order for another `draw`; experiments then average draws.
        passes: What it costs for one prompt, for tables that compare methods.
        twins: Whether it reads corrupted twins (`RankingContext.twins`); experiments then take
            prompts that have some.
        replace: True to put it in the place of a method of the same name.

    Raises:
        BadInput: the name is taken, or empty; an unknown part.
    """
    _check_name(name, split)

    def register(function: RankingFunction) -> RankingFunction:
        method = RankingMethod(
            name, title or name, function, split, random, label, None, passes, twins
        )
        return _register(method, function, replace=replace)

    return register


def one_run_method(
    name: str,
    *,
    title: str | None = None,
    label: str = "",
    maps: Sequence[MapKind] = (),
    vectors: Sequence[VectorKind] = (),
    corrupted: bool = False,
    steps: Whole = 1,
    backward: Backward = "exact",
    split: Part = "train",
    replace: bool = False,
) -> Callable[[RunFunction], RunFunction]:
    """Register a ranking method that reads one forward and one backward pass.

    The decorated function gets the `RACache` of a batch, whose loss is that of the answers, and
    gives `Float[Tensor, "batch layer head"]`, larger = more important; a head's score is the mean
    over all examples. Where layers have fewer heads than others, NaN stands in for those they lack
    (`ra_lens.model.sites.table` lays rows out so). Norms of all kinds of map are always there.
    Methods of this kind that are ranked by together share the pass, one for each `backward`.

    Args:
        name: What `rank_heads(method=...)` is to call it.
        title: What it is, in a few words. Default: the name.
        label: What legends and tables call it. Default: the name.
        maps: Kinds of map that it reads, `ra["pattern", layer]`: they are then kept for a batch.
        vectors: Kinds of vectors that it reads, `ra["z", layer]`.
        corrupted: Whether the function gets, after the cache, the `CorruptedRun` of the prompts'
            corrupted twins: their z, and ∂L/∂z. Twins are drawn where prompts have none.
        steps: In how many steps that gradient is taken from the twins to the prompts, and averaged;
            1: at the prompts alone.
        backward: Which backward pass it reads, as in `run_with_ra`.
        split: Part of a task whose questions experiments compute it on: `"train"` or `"valid"`.
        replace: True to put it in the place of a method of the same name.

    Raises:
        BadInput: the name is taken, or empty; an unknown part, kind of vectors or backward pass; no
            number of steps, several without `corrupted`, or with another backward pass.
        NotStored: an unknown kind of map.
    """
    _check_name(name, split)
    one_of("backward", backward, BACKWARDS, where=f" for method {name!r}")
    steps = whole("steps", steps, least=1)
    if steps > 1 and not corrupted:
        raise BadInput(
            f"found steps={steps} without corrupted=True for method {name!r}: steps lead from the "
            "corrupted twins to the prompts. Give both."
        )
    if steps > 1 and backward != "exact":
        raise BadInput(
            f"found steps={steps} with backward={backward!r} for method {name!r}: on the way from "
            "the corrupted twins gradients are exact. Leave one of both away."
        )
    kinds = read_vectors(vectors) | read_vectors(["z_grad"] if corrupted else [])
    needs = Needs(
        tuple(read_kind(kind) for kind in ([maps] if isinstance(maps, str) else maps)),
        tuple(sorted(kinds)),
        corrupted=corrupted,
        steps=steps,
        backward=backward,
    )
    passes = Passes(steps + int(corrupted), steps)

    def register(function: RunFunction) -> RunFunction:
        method = RankingMethod(
            name,
            title or name,
            function,
            split,
            label=label,
            needs=needs,
            passes=passes,
            twins=corrupted,
        )
        return _register(method, function, replace=replace)

    return register


def _check_name(name: str, split: object) -> None:
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


def find_methods(methods: object) -> list[RankingMethod]:
    """Give methods by their names, one or several.

    Raises:
        BadInput: there is none of a name, a name twice, or none at all.
    """
    alone = isinstance(methods, str) or not isinstance(methods, Iterable)
    given = cast("list[str]", [methods] if alone else list(cast("Iterable[object]", methods)))
    if not all(isinstance(name, str) for name in given):
        raise BadInput(
            f"found methods={methods!r}; give the name of a ranking method, such as 'ra', or "
            "several in a list."
        )
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
    batch_size: Whole = 32,
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
    batch_size: Whole = 32,
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
    batch_size: Whole = 32,
    progress: bool = True,
) -> RankingContext:
    """Read what `rank_heads` is given, or raise where it cannot be used."""
    lens = as_lens(model)
    seed, draw = whole("seed", seed, least=0), whole("draw", draw, least=0)
    batch_size = whole("batch_size", batch_size)
    if batch_size < 1:
        raise BadInput(f"found batch_size={batch_size}; give a positive number.")
    return RankingContext(
        lens=lens,
        model=model,
        prompts=_checked(prompts),
        seed=seed,
        draw=draw,
        answer_in_input=flag("answer_in_input", answer_in_input),
        prepend_bos=prepend_bos,
        batch_size=batch_size,
        progress=progress,
    )


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
            found |= scores_of_one_run(
                context.lens,
                context.model,
                context.questions,
                of_one,
                twins=lambda: context.twins,
                answer_in_input=context.answer_in_input,
                batch_size=context.batch_size,
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
