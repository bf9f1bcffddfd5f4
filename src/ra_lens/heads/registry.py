"""The registry of ranking methods: what one is, what it is handed, and how another is added.

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
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar, cast

from torch import Tensor, nn

from ra_lens.errors import BadInput, one_of
from ra_lens.heads.corrupted import read_twins
from ra_lens.heads.one_run import Needs, RunFunction
from ra_lens.model import Lens, PrependBos
from ra_lens.model.backward import BACKWARDS, Backward
from ra_lens.model.sites import MapKind, VectorKind, read_kind, read_vectors
from ra_lens.numbers import Whole, whole
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
        fits: Whether `batch_size` is what fits, found for forward passes; those with a backward
            pass then find theirs.
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
    fits: bool = False

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
