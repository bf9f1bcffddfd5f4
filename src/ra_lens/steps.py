"""What one step of gradient descent on attention weights does: to pairs, outputs, loss, answers.

A step of size η moves each weight against its gradient, W' = W − η ∂L/∂W, with L the mean of the
losses of a cache's examples. The gradient of a matrix is a sum over tokens s of what it read times
the gradient δ at what it gave, so that what it gives moves along the gradients of all tokens, each
as far as the token now read resembles the one that was learnt from (the paper's shift of the
output, its equations 10 and 11):

    ∂L/∂W = Σ_s x_s ⊗ δ_s        x_t W' − x_t W = −η Σ_s (x_t·x_s) δ_s

That sum is linear in x_t, so the step can be taken by adding it to what the matrix gives, in a
forward hook (`gradient_step`), for any prompt and exactly; no weight is changed. What comes after,
products q·k, a softmax and later layers, is not linear. To first order,

    Δ(q·k) = Δq·k + q·Δk         of a pair, whose sign R foretells: R < 0, drawn together
    ΔS = c Δ(q·k)    ΔA = A ⊙ (ΔS − rowsum(A ⊙ ΔS))    Δz = ΔA v + A Δv
    ΔL = −η Σ ‖∂L/∂W‖²

`pulls`, `output_shift` and `step_effect` really take the step and set what happens beside this;
`largest_linear_step` finds how far it holds.

A key/value head that several query heads share has one W_K and one W_V; it is stepped if any of
them is chosen, by the gradient that all of them together give it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict, cast, overload

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import Unpack

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, NothingToDifferentiate, UnsupportedModel, one_of
from ra_lens.head_maps import kept_tokens, read_example, read_head
from ra_lens.head_names import Head, Heads, list_heads
from ra_lens.inputs import Given, Mask
from ra_lens.model import FwdHooks, Lens, PrependBos, Site, as_lens
from ra_lens.model.matrices import Matrix, WeightInUse, weight_in_use
from ra_lens.model.sites import VectorKind
from ra_lens.numbers import Real, Whole, real, whole
from ra_lens.prompts import PaddingSide, PromptInput
from ra_lens.run import run_with_ra
from ra_lens.targets import Answers, Metric, Objective, Position
from ra_lens.text import label
from ra_lens.vjp import FACTORS, WEIGHTS, Weight

if TYPE_CHECKING:
    import pandas as pd

HookPairs = list[tuple[str, Callable[..., Any]]]

_MATRICES: dict[Weight, Matrix] = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o"}
_OF_QUERIES: tuple[Weight, ...] = ("W_Q", "W_O")
# Largest error of what should be equal, relative to its size: a few roundings in that type.
_ROUNDING = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
_ROUNDING_OTHERWISE = 1e-3
_HALVINGS = 12  # of a step that is foretold to change the loss by a thousandth
_CLOSE = 1.02  # ratio of two steps that are told apart no further


class RunOptions(TypedDict, total=False):
    """The options of `run_with_ra` that say what was read, and what was asked for."""

    target: Answers | Objective | None
    metric: Metric | Objective | None
    position: Position | None
    attention_mask: Mask | None
    prepend_bos: PrependBos
    padding_side: PaddingSide | None
    decoder_input: Given | None
    batch_size: Whole | None


# ---- the step -----------------------------------------------------------------------------------


def gradient_step(
    model: nn.Module,
    ra: RACache,
    heads: Heads,
    eta: Real,
    *,
    weights: Weight | Iterable[Weight] = WEIGHTS,
) -> HookPairs:
    """Forward hooks that run a model as it would be after one step of gradient descent.

        _, ra = run_with_ra(model, prompts, target=answers, vectors=True)
        with model.hooks(fwd_hooks=gradient_step(model, ra, ["L5H3"], eta=0.1)):
            model("Another prompt")

    Several steps are these hooks after each other, each made of a run under those before it
    (`run_with_ra(..., fwd_hooks=hooks)`).

    The step is along the gradient of the mean loss of the cache's examples (of a metric that gave
    one number for all, of that). Weights other than these, and biases, stay. Prompts of any length,
    with padding or a key/value cache, are read as by the model whose weights were changed. Costs
    a product more for each matrix, and memory for the vectors of the tokens learnt from (where
    these are many, for the gradient).

    Where another hook of yours changes what q, k, v or the output of the attention is, it sees it
    as the stepped model makes it if it comes after these. On a HookedTransformer a hook that
    changes z must come before a step of W_O, else it is refused.

    Args:
        model: The model that the cache is of.
        ra: A run with `vectors=True`, or with those that the weights need: `query_in` and `q_grad`
            for W_Q, `key_in` and `k_grad` for W_K, `value_in` and `v_grad` for W_V, `z` and
            `attn_out_grad` for W_O.
        heads: Labels like `"L3H5"`, `(layer, head)` pairs or `HeadScore`s; one or several. None:
            all that are in the cache.
        eta: Size η of the step, in weights per gradient; negative climbs.
        weights: Which matrices of these heads. Of W_K and W_V, those of the key/value heads that
            these heads read.

    Returns:
        `(hook name, hook)` pairs for `model.hooks(fwd_hooks=...)`, `run_with_hooks` or
        `run_with_ra`; they compose with other hooks. A hook raises UnsupportedModel where the step
        would not be exact.

    Raises:
        BadInput: heads that are not there, another model, or an option that cannot be used.
        NotStored: vectors that were not kept.
        UnsupportedModel: a model whose matrices cannot be stepped by hooks: latent attention (MLA),
            layers that run several times, weights that round what they read; or, for W_O, a
            HookedTransformer that normalises what attention gives.
    """
    lens, size = as_lens(model), real("eta", eta)
    pairs: HookPairs = []
    for site, weight, chosen in _stepped(lens, ra, heads, read_weights(weights)):
        at = weight_in_use(lens, site, _MATRICES[weight])
        gradient = _gradient(ra, site, weight, chosen)
        if weight != "W_O":
            pairs.append((at.name, _Shift(at, site, weight, chosen, gradient, -size).at_output))
        elif at.argument is not None:
            pairs.append((at.name, _OutputShift(at, site, chosen, gradient, -size).at_output))
        else:
            shift = _CheckedShift(at, site, chosen, gradient, -size)
            pairs += [(site.z_name, shift.at_z), (at.name, shift.at_output)]
    return pairs


def read_weights(weights: object) -> tuple[Weight, ...]:
    """Read which matrices are meant, in the order of `WEIGHTS`; BadInput for others, or none."""
    several = isinstance(weights, Iterable) and not isinstance(weights, str)
    given: list[object] = list(cast("Iterable[object]", weights)) if several else [weights]
    for one in given:
        one_of("weights", one, WEIGHTS)
    if not given:
        raise BadInput(f"found weights={weights!r}, which is none of {', '.join(WEIGHTS)}.")
    return tuple(one for one in WEIGHTS if one in given)


def gradient_norm(
    model: nn.Module,
    ra: RACache,
    heads: Heads = None,
    *,
    weights: Weight | Iterable[Weight] = WEIGHTS,
) -> float:
    """‖∂L/∂W‖ over the matrices that `gradient_step` steps.

    A step of η is foretold to change the loss by −η times its square. The natural unit of η is
    therefore L / ‖∂L/∂W‖²: the step that, to first order, takes the whole loss away.
    """
    parts = _stepped(as_lens(model), ra, heads, read_weights(weights))
    return math.sqrt(sum(_gradient(ra, site, one, chosen).square for site, one, chosen in parts))


def _stepped(
    lens: Lens, ra: RACache, heads: Heads, weights: tuple[Weight, ...]
) -> Iterator[tuple[Site, Weight, list[int]]]:
    """Give each kind of matrix of each layer, with the heads of it that are stepped."""
    for layer, marks in ra.sites.choose_heads(heads).items():
        site = ra.sites[layer]
        _need_the_model(lens, site)
        queries = [int(head) for head in marks.nonzero()[:, 0]]
        groups = sorted({site.kv_group(head) for head in queries})
        for weight in weights:
            yield site, weight, queries if weight in _OF_QUERIES else groups


def _need_the_model(lens: Lens, site: Site) -> None:
    own = lens.sites.get(site.layer)
    if own is None or (own.prefix, own.n_heads) != (site.prefix, site.n_heads):
        raise BadInput(
            f"found a cache with {site.n_heads} heads at {site.prefix}, which {lens.name} does not "
            "have. Give the model that the cache was made with."
        )
    if site.repeated:
        raise UnsupportedModel(
            f"{site.label} of {lens.name} runs several times in one forward pass, and the vectors "
            "kept are those of the last time, so the gradient of its weights is not known."
        )


def _vectors(ra: RACache, site: Site, kind: VectorKind) -> Tensor:
    """Vectors of a layer, with a batch dimension."""
    value = ra[kind, site.layer]
    return value if ra.has_batch_dim else value.unsqueeze(0)


def _gradient(ra: RACache, site: Site, weight: Weight, chosen: list[int]) -> _Gradient:
    """Gradient of the mean loss at the matrices of some heads of a layer, beside each other."""
    read, given = (_vectors(ra, site, kind) for kind in FACTORS[weight])
    if weight == "W_O":
        read = read[:, :, chosen].flatten(start_dim=2)
    else:
        given = given[:, :, chosen].flatten(start_dim=2)
    n = ra.batch_size if ra.loss.ndim or not ra.has_batch_dim else 1
    read, given = read.flatten(0, 1), given.flatten(0, 1).to(read.device) / n
    there = given.abs().amax(dim=1) > 0  # not padding, nor what the loss does not depend on
    return _Gradient(read[there], given[there])


@dataclass(frozen=True, eq=False, repr=False)
class _Gradient:
    """∂L/∂W = Σ over tokens of read ⊗ given, which is only formed where that is the shorter way."""

    read: Float[Tensor, "token _into"]
    given: Float[Tensor, "token _out"]

    @cached_property
    def matrix(self) -> Float[Tensor, "_into _out"]:
        return self.read.T @ self.given

    @property
    def square(self) -> float:
        """‖∂L/∂W‖²."""
        if not self._few:
            return float(self.matrix.double().square().sum())
        read, given = self.read.double(), self.given.double()
        return float(((read @ read.T) * (given @ given.T)).sum())

    def times(self, factor: float, x: Float[Tensor, "*pos _into"]) -> Float[Tensor, "*pos _out"]:
        """x ∂L/∂W, times a factor, where x is."""
        if not self._few:
            return x @ (factor * self.matrix).to(x)
        return (x @ self.read.to(x).T) @ (factor * self.given).to(x)

    @property
    def _few(self) -> bool:
        (tokens, into), out = self.read.shape, self.given.shape[1]
        return tokens * (into + out) < into * out


class _Shift:
    """Adds x times a gradient to what W_Q, W_K or W_V gives to some heads."""

    def __init__(
        self,
        at: WeightInUse,
        site: Site,
        weight: Weight,
        chosen: list[int],
        gradient: _Gradient,
        factor: float,
    ) -> None:
        self._at, self._chosen = at, chosen
        self._gradient, self._factor = gradient, factor
        self._n = site.n_heads if weight == "W_Q" else site.n_key_value_heads

    def at_output(self, given: Tensor, hook: Any) -> Tensor:  # noqa: ARG002  TransformerLens passes it by name
        read = self._at.read()
        read = read.to(torch.promote_types(given.dtype, torch.float32))
        # A HookedTransformer may give every query head keys of its own, all of one matrix.
        share = given.shape[2] // self._n if given.ndim == 4 else 1
        every = [head * share + i for head in self._chosen for i in range(share)]
        index = torch.tensor(every, device=given.device)
        if read.ndim == 4:  # inputs that were split by head: each meets the gradient of its own
            own = read[:, :, every]
            shift = self._by_head(own, share)
        else:
            shift = self._gradient.times(self._factor, read).unflatten(-1, (len(self._chosen), -1))
            shift = shift.repeat_interleave(share, dim=2)
        by_head = given.reshape(*given.shape[:2], self._n * share, -1)
        moved = by_head.index_add(2, index, shift.to(given.device, given.dtype))
        return moved.reshape(given.shape)

    def _by_head(
        self, read: Float[Tensor, "batch pos some d_model"], share: int
    ) -> Float[Tensor, "batch pos some d_head"]:
        matrices = self._gradient.matrix.unflatten(1, (len(self._chosen), -1))
        matrices = (self._factor * matrices).repeat_interleave(share, dim=1).to(read)
        form = "batch pos some d_model, d_model some d_head -> batch pos some d_head"
        return einsum(read, matrices, form)


class _OutputShift:
    """Adds z times a gradient to what W_O gives, for some heads."""

    def __init__(
        self,
        at: WeightInUse,
        site: Site,
        chosen: list[int],
        gradient: _Gradient,
        factor: float,
    ) -> None:
        self._at, self._site, self._chosen = at, site, chosen
        self._gradient, self._factor = gradient, factor

    def at_output(self, given: Tensor, hook: Any) -> Tensor:  # noqa: ARG002  TransformerLens passes it by name
        return self.moved(given, self._at.read())

    def moved(self, given: Tensor, z: Tensor) -> Tensor:
        by_head = z.reshape(*given.shape[:-1], self._site.n_heads, -1)
        own = by_head[..., self._chosen, :].flatten(start_dim=-2)
        wide = own.to(torch.promote_types(given.dtype, torch.float32))
        shift = self._gradient.times(self._factor, wide)
        return given + shift.to(given.device, given.dtype)


# What steps of W_O have made of the output of a HookedTransformer's attention, with its z.
_moved_with: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()


class _CheckedShift(_OutputShift):
    """The same where z is seen at a hook of its own, before; what is given must follow from it."""

    _z: Tensor | None = None

    def at_z(self, z: Tensor, hook: Any) -> None:  # noqa: ARG002  TransformerLens passes it by name
        self._z = z

    def at_output(self, given: Tensor, hook: Any) -> Tensor:  # noqa: ARG002  TransformerLens passes it by name
        z, self._z = self._z, None
        moved_before = given in _moved_with and _moved_with[given] is z  # by a step before this one
        if z is None or not (moved_before or self._follows(given.detach(), z.detach())):
            raise UnsupportedModel(
                f"{self._at.name} does not show z W_O + b_O, so a step of {self._at.label} would "
                "not be exact. Either the model normalises what attention gives (load it as a "
                "TransformerBridge, or leave W_O out of weights=), or another hook changes z after "
                "the step, or the output before it: put the step between them."
            )
        moved = self.moved(given, z)
        _moved_with[moved] = z
        return moved

    def _follows(self, given: Tensor, z: Tensor) -> bool:
        weight, bias = (one.detach() for one in _output_weights(self._at.owner))
        into = "batch pos head d_head, head d_head d_model -> batch pos d_model"
        wanted = einsum(z.to(weight), weight, into).to(given) + bias.to(given)
        rounding = _ROUNDING.get(given.dtype, _ROUNDING_OTHERWISE)
        return float((given - wanted).norm()) <= rounding * float(wanted.norm())


def _output_weights(attention: Any) -> tuple[Tensor, Tensor]:
    return attention.W_O, attention.b_O


# ---- pairs that are drawn together or apart -----------------------------------------------------


@dataclass(frozen=True)
class Pull:
    """What the loss wants of one query and one key of a head, and what a step did to them.

    Attributes:
        layer: Index of the layer.
        head: Index of the head.
        query: Position of the token that looks, within its prompt.
        key: Position of the token looked at.
        ra: R, ∂L/∂(q·k). Negative: descent draws the two together.
        pattern: A, the attention there; NaN where it was not kept.
        product: q·k, as they enter the scores.
        cosine: Of the angle between them.
        predicted: Change of q·k after the step, to first order: Δq·k + q·Δk. NaN without a step,
            and so are the next two.
        product_after: q·k after it.
        cosine_after: Of the angle then.
        query_token: The token that looks; `#3` where the cache was not told.
        key_token: The token looked at.
        example: Which prompt of several.
    """

    layer: int
    head: int
    query: int
    key: int
    ra: float
    pattern: float
    product: float
    cosine: float
    predicted: float = float("nan")
    product_after: float = float("nan")
    cosine_after: float = float("nan")
    query_token: str = ""
    key_token: str = ""
    example: int = 0

    @property
    def together(self) -> bool:
        """Whether descent is asked to draw query and key together (R < 0)."""
        return self.ra < 0

    @property
    def change(self) -> float:
        """Change of q·k by the step, as measured."""
        return self.product_after - self.product

    def __str__(self) -> str:
        """Spell the pair, what is asked for, and what happened."""
        query, key = (
            f"{label(token)} ({at})" if token else str(at)
            for token, at in ((self.query_token, self.query), (self.key_token, self.key))
        )
        wish = "together" if self.together else "apart"
        text = f"{query} → {key}: R {self.ra:+.3g} ({wish}), q·k {self.product:.4g}"
        if self.product_after == self.product_after:
            text += f" → {self.product_after:.4g}"
        text += f", cosine {self.cosine:.3f}"
        return text + (f" → {self.cosine_after:.3f}" * (self.cosine_after == self.cosine_after))


class Pulls(Sequence[Pull]):
    """Pairs of one head in the order of |R|, as `pulls` gives them.

    Attributes:
        label: The head, `L5H3`.
        eta: Size of the step; None where none was taken.
    """

    def __init__(self, pairs: Iterable[Pull], label: str, eta: float | None) -> None:
        """Hold the pairs of the head called `label`, after a step of size `eta`."""
        self._pairs, self.label, self.eta = tuple(pairs), label, eta

    @overload
    def __getitem__(self, index: int) -> Pull: ...
    @overload
    def __getitem__(self, index: slice) -> Pulls: ...
    def __getitem__(self, index: int | slice) -> Pull | Pulls:
        """Give one pair, or some of them."""
        found = self._pairs[index]
        return Pulls(found, self.label, self.eta) if isinstance(found, tuple) else found

    def __len__(self) -> int:
        """Give the number of pairs."""
        return len(self._pairs)

    def __iter__(self) -> Iterator[Pull]:
        """Iterate over the pairs in their order."""
        return iter(self._pairs)

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate one row per pair."""
        import pandas as pd  # late, as it takes long to import

        return pd.DataFrame([asdict(pair) for pair in self])

    def __repr__(self) -> str:
        """List the pairs, a line each."""
        step = "" if self.eta is None else f", before and after a step of {self.eta:.4g}"
        return "\n".join([f"Pulls of {self.label}: {len(self)} pairs{step}", *map(str, self)])


def pulls(
    ra: RACache,
    head: Head,
    *,
    example: Whole = 0,
    k: Whole = 20,
    eta: Real | None = None,
    model: nn.Module | None = None,
    input: PromptInput | None = None,
    **options: Unpack[RunOptions],
) -> Pulls:
    """Queries and keys of a head that the loss draws together, and those it drives apart.

    R is the gradient at q·k: descent raises the product of a pair with R < 0. With `eta` the step
    is really taken, on W_Q and W_K of this head for this example's loss: the model runs with
    `gradient_step` on the same prompts, and q and k are read off again as they enter their product,
    rotated, normalised and scaled as the model does it. What a pair does then is not decided by
    its R alone, because one step moves all tokens' queries and keys at once.

    Args:
        ra: A run with `vectors=True`, or at least `query` and `key`; with `eta` also `query_in`,
            `q_grad`, `key_in` and `k_grad`.
        head: `"L2H3"`, `(layer, head)` or a `HeadScore`.
        example: Which prompt.
        k: How many pairs at most; those with R = 0 are none.
        eta: Size of a step to take. Default: none is taken. Costs a forward pass of all prompts and
            a backward pass down to this layer.
        model: The model, for the step.
        input: The prompts that `ra` was made from, for the step.
        **options: As they were given to `run_with_ra`: `attention_mask`, `prepend_bos`,
            `padding_side`, `decoder_input`; and `target`, where it was appended to the prompts.

    Returns:
        Pairs, the largest |R| first.

    Raises:
        BadInput: a head or example that is not there, a step without a model, or other prompts.
        NotStored: maps or vectors that were not kept.
        UnsupportedModel: a step that cannot be taken; see `gradient_step`.
    """
    layer, index = read_head(ra, head)
    site, one = ra.sites[layer], read_example(ra, example)
    k = whole("k", k, least=1)
    size = None if eta is None else real("eta", eta)
    r = _of_one(ra, ra["ra", layer], one)[index]
    no_pattern = torch.full_like(r, float("nan"))
    pattern = (
        _of_one(ra, ra["pattern", layer], one)[index] if ("pattern", layer) in ra else no_pattern
    )
    query, key = _query_and_key(ra, site, one, index)
    product, cosine = _product_and_cosine(query, key)
    predicted = product_after = cosine_after = no_pattern
    if size is not None:
        again = _stepped_run(ra, site, index, one, size, model, input, options)
        query_after, key_after = _query_and_key(again, site, one, index)
        product_after, cosine_after = _product_and_cosine(query_after, key_after)
        predicted = (query_after - query) @ key.T + query @ (key_after - key).T
    query_tokens, _, rows = kept_tokens(ra, site.query_side, one, r.shape[0], None)
    key_tokens, _, columns = kept_tokens(ra, site.key_side, one, r.shape[1], None)
    pairs: list[Pull] = []
    tables = {
        "ra": r,
        "pattern": pattern,
        "product": product,
        "cosine": cosine,
        "predicted": predicted,
        "product_after": product_after,
        "cosine_after": cosine_after,
    }
    own = {name: table[rows, columns] for name, table in tables.items()}
    order = own["ra"].abs().flatten().sort(descending=True, stable=True).indices.tolist()
    for row, column in (divmod(place, len(key_tokens)) for place in order[:k]):
        values = {name: float(table[row, column]) for name, table in own.items()}
        if values["ra"] == 0:
            break
        pairs.append(
            Pull(
                layer=layer,
                head=index,
                query=row,
                key=column,
                query_token=query_tokens[row],
                key_token=key_tokens[column],
                example=one,
                **values,
            )
        )
    return Pulls(pairs, f"L{layer}H{index}", size)


def _of_one(ra: RACache, value: Tensor, example: int) -> Tensor:
    return value[example] if ra.has_batch_dim else value


def _query_and_key(
    ra: RACache, site: Site, example: int, head: int
) -> tuple[Float[Tensor, "query d_head"], Float[Tensor, "key d_head"]]:
    query, key = (_of_one(ra, ra[kind, site.layer], example) for kind in ("query", "key"))
    dtype = torch.promote_types(query.dtype, key.dtype)
    return query[:, head].to(dtype), key[:, site.kv_group(head)].to(dtype)


def _product_and_cosine(
    q: Float[Tensor, "query d_head"], key: Float[Tensor, "key d_head"]
) -> tuple[Float[Tensor, "query key"], Float[Tensor, "query key"]]:
    product = q @ key.T
    size = q.norm(dim=-1, keepdim=True) * key.norm(dim=-1)
    return product, product / size.clamp(min=torch.finfo(size.dtype).tiny)


def _stepped_run(
    ra: RACache,
    site: Site,
    head: int,
    example: int,
    eta: float,
    model: nn.Module | None,
    input: PromptInput | None,
    options: RunOptions,
) -> RACache:
    """Queries and keys of a layer after a step on W_Q and W_K of a head."""
    if model is None or input is None:
        missing = "model" if model is None else "input"
        raise BadInput(
            f"found eta={eta:g} without {missing}=; the step is really taken, so give the model "
            "and the prompts that the cache was made from: pulls(ra, head, eta=..., model=model, "
            "input=prompts)."
        )
    of_example = ra.apply_slice_to_batch_dim([example]) if ra.has_batch_dim else ra
    hooks = gradient_step(model, of_example, [(site.layer, head)], eta, weights=("W_Q", "W_K"))
    return _run_again(ra, model, input, options, hooks, site, vectors=("query", "key"))


def _run_again(
    ra: RACache,
    model: nn.Module,
    input: PromptInput,
    options: RunOptions,
    hooks: FwdHooks,
    site: Site,
    *,
    vectors: Sequence[str] = (),
    fixed: bool = False,
) -> RACache:
    """Run the prompts of a cache again, under hooks; refuses other prompts.

    With `fixed` the target is that of the cache where it was the model's own top prediction, which
    the hooks may change.
    """
    given: dict[str, Any] = {**options}
    asked = given.get("target") is not None or given.get("metric") is not None
    if (
        not asked
        and ra.info.targets is not None
        and (fixed or not ra.info.target_is_top_prediction)
    ):
        given["target"] = list(ra.info.targets)
    scale = {site.layer: site.scale} if site.scale is not None else None
    _, again = run_with_ra(
        model,
        input,
        **given,
        layers=[site.layer],
        store="norms",
        vectors=list(vectors),
        fwd_hooks=hooks,
        softmax_scale=scale,
        progress=False,
    )
    mine, theirs = ra.info, again.info
    same = (mine.str_tokens, mine.decoder_tokens) == (theirs.str_tokens, theirs.decoder_tokens)
    if mine.str_tokens is not None and (not same or mine.starts != theirs.starts):
        raise BadInput(
            "found other prompts than those that the cache was made from. Give input= and the "
            "options as they were given to run_with_ra (prepend_bos, padding_side, and a target "
            "of several tokens, which is appended)."
        )
    return again


# ---- the output of a head ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class OutputShift:
    """What a step did to what one head gives to W_O, and what was foretold.

    Attributes:
        layer: Index of the layer.
        head: Index of the head.
        eta: Size of the step.
        z: What the head gave before, A v.
        predicted: Its change to first order.
        measured: Its change by the step that was really taken.
    """

    layer: int
    head: int
    eta: float
    z: Float[Tensor, "batch pos d_head"]
    predicted: Float[Tensor, "batch pos d_head"]
    measured: Float[Tensor, "batch pos d_head"]

    @property
    def error(self) -> float:
        """‖predicted − measured‖ / ‖measured‖ over all tokens."""
        size = float(self.measured.norm())
        return float((self.predicted - self.measured).norm()) / size if size else 0.0

    def __repr__(self) -> str:
        """Say how far z moved, and how far that was foretold."""
        share = float(self.measured.norm() / self.z.norm())
        return (
            f"OutputShift of L{self.layer}H{self.head} by a step of {self.eta:.4g}: z moved by "
            f"{share:.3g} of its size, foretold to {self.error:.1%}"
        )


def output_shift(
    model: nn.Module,
    input: PromptInput,
    ra: RACache,
    head: Head,
    eta: Real,
    *,
    weights: Weight | Iterable[Weight] = ("W_Q", "W_K", "W_V"),
    **options: Unpack[RunOptions],
) -> OutputShift:
    """Shift of what a head gives to W_O by a step on its weights, foretold and measured.

    q, k and v move along the gradients of all tokens (module's text); z follows through the
    softmax, to first order by Δz = ΔA v + A Δv. Costs a forward pass, and a backward pass down to
    this layer.

    Args:
        model: The model that the cache is of.
        input: The prompts that it was made from.
        ra: Their run, with `vectors=True`.
        head: `"L2H3"`, `(layer, head)` or a `HeadScore`.
        eta: Size of the step, along the gradient of the mean loss of all prompts.
        weights: Which of W_Q, W_K and W_V.
        **options: As they were given to `run_with_ra`.

    Raises:
        BadInput: a head or option that cannot be used, or other prompts.
        NotStored: maps or vectors that were not kept.
        UnsupportedModel: a step that cannot be taken, see `gradient_step`; or a layer that does
            something else than the softmax of c·q·k (scores with a cap) or gates what heads give.
    """
    layer, index = read_head(ra, head)
    site, chosen, size = ra.sites[layer], read_weights(weights), real("eta", eta)
    if "W_O" in chosen:
        raise BadInput("found W_O in weights=, which z does not depend on: it is what W_O reads.")
    kinds: tuple[VectorKind, ...] = ("query", "key", "value", "z")
    before = _of_head(ra, site, index, (*kinds, "query_grad"))
    maps = [ra["ra", layer], ra["pattern", layer]]
    r, pattern = ((m if ra.has_batch_dim else m[None])[:, index].to(before["z"]) for m in maps)
    _need_plain_attention(site, r, pattern, before)
    hooks = gradient_step(model, ra, [(site.layer, index)], size, weights=chosen)
    again = _run_again(ra, model, input, options, hooks, site, vectors=kinds)
    after = _of_head(again, site, index, kinds)
    query, key, value = (after[kind] - before[kind] for kind in kinds[:3])
    scores = site.need_scale() * (
        query @ before["key"].transpose(1, 2) + before["query"] @ key.transpose(1, 2)
    )
    moved = pattern * (scores - (pattern * scores).sum(dim=-1, keepdim=True))
    return OutputShift(
        layer=site.layer,
        head=index,
        eta=size,
        z=before["z"],
        predicted=moved @ before["value"] + pattern @ value,
        measured=after["z"] - before["z"],
    )


def _of_head(
    ra: RACache, site: Site, head: int, kinds: Iterable[VectorKind]
) -> dict[VectorKind, Float[Tensor, "batch pos d_head"]]:
    """Vectors of one head; keys and values are those of its group."""
    found: dict[VectorKind, Tensor] = {}
    for kind in kinds:
        index = site.kv_group(head) if kind in ("key", "value") else head
        found[kind] = _vectors(ra, site, kind)[:, :, index]
    # Some layers multiply in one type what they made in another.
    dtype = torch.promote_types(found["query"].dtype, found["z"].dtype)
    return {kind: value.to(dtype) for kind, value in found.items()}


def _need_plain_attention(
    site: Site, r: Tensor, pattern: Tensor, vectors: dict[VectorKind, Tensor]
) -> None:
    """Refuse a layer whose scores are not c·q·k and a bias, or whose z is not A v."""
    equations = {
        "its scores are not c·q·k (they may be capped)": (
            r @ vectors["key"],
            vectors["query_grad"],
        ),
        "what its heads give is not A v (it may be gated)": (
            pattern @ vectors["value"],
            vectors["z"],
        ),
    }
    for what, (found, wanted) in equations.items():
        if float((found - wanted).norm()) > 1e-2 * float(wanted.norm()):
            raise UnsupportedModel(
                f"{site.label}: {what}, so the shift of z is not foretold by the softmax. "
                "step_effect foretells the loss all the same."
            )


# ---- the loss ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class StepEffect:
    """What a step does to the loss: foretold to first order, and measured.

    Attributes:
        eta: Size of the step.
        norm: ‖∂L/∂W‖ over the matrices stepped.
        loss_before: Loss of each example (one number, if a metric gave one).
        loss_after: The same after the step.
    """

    eta: float
    norm: float
    loss_before: Float[Tensor, "*batch"]
    loss_after: Float[Tensor, "*batch"]

    @property
    def predicted(self) -> float:
        """Change of the mean loss to first order, −η ‖∂L/∂W‖²."""
        return -self.eta * self.norm**2

    @property
    def measured(self) -> float:
        """Change of the mean loss."""
        return float((self.loss_after.double() - self.loss_before.double()).mean())

    @property
    def error(self) -> float:
        """|measured − predicted| / |predicted|."""
        return abs(self.measured - self.predicted) / abs(self.predicted)

    def __repr__(self) -> str:
        """Say what was foretold and what happened."""
        return (
            f"StepEffect of a step of {self.eta:.4g}: loss {float(self.loss_before.mean()):.4f} → "
            f"{float(self.loss_after.mean()):.4f} ({self.measured:+.4g}, foretold "
            f"{self.predicted:+.4g})"
        )


def step_effect(
    model: nn.Module,
    input: PromptInput,
    ra: RACache,
    heads: Heads,
    eta: Real,
    *,
    weights: Weight | Iterable[Weight] = WEIGHTS,
    **options: Unpack[RunOptions],
) -> StepEffect:
    """Take a step and measure the loss of the same prompts, beside −η ‖∂L/∂W‖².

    Costs two forward passes, and backward passes through the last layer.

    Args:
        model: The model that the cache is of.
        input: The prompts that it was made from.
        ra: Their run, with the vectors that `gradient_step` needs.
        heads: Which heads; None: all.
        eta: Size of the step.
        weights: Which of their matrices.
        **options: As they were given to `run_with_ra`, `target` or `metric` included. Targets that
            were told apart by text alone may be left out.

    Raises:
        BadInput: heads or options that cannot be used, other prompts, or another loss than the
            cache's.
        NotStored: vectors that were not kept.
        UnsupportedModel: a step that cannot be taken; see `gradient_step`.
        NothingToDifferentiate: a loss that is NaN after the step.
    """
    taken = _Taken(model, input, ra, heads, read_weights(weights), options)
    return taken.step(real("eta", eta))


@dataclass(frozen=True)
class LinearStep:
    """How far the loss follows its first order, as `largest_linear_step` found it.

    Attributes:
        eta: The largest step tried that stays within.
        within: The error that was allowed, relative to what is foretold.
        effect: What it does to the loss.
        tried: All steps tried, with the change of the loss foretold and measured.
    """

    eta: float
    within: float
    effect: StepEffect
    tried: tuple[tuple[float, float, float], ...]

    def __str__(self) -> str:
        """Say how far."""
        return f"{self.eta:.4g}: within {self.within:.0%} of first order; {self.effect}"


def largest_linear_step(
    model: nn.Module,
    input: PromptInput,
    ra: RACache,
    heads: Heads,
    *,
    weights: Weight | Iterable[Weight] = WEIGHTS,
    within: Real = 0.1,
    **options: Unpack[RunOptions],
) -> LinearStep:
    """Find the largest step after which the loss is what first order foretells, or nearly.

    Steps are really taken: from one that is foretold to change the mean loss by a thousandth,
    twice as large each time until one fails; then between the last two, until they are within 2 %
    of each other. (The loss may come back to its first order by chance at a larger step; the first
    failure counts.) Costs 15 to 25 forward passes.

    Args:
        model: The model that the cache is of.
        input: The prompts that it was made from.
        ra: Their run, with the vectors that `gradient_step` needs.
        heads: Which heads; None: all.
        weights: Which of their matrices.
        within: The error allowed, relative to what is foretold.
        **options: As in `step_effect`.

    Raises:
        BadInput: as in `step_effect`; or no such step, as the loss follows its first order nowhere
            that can be measured.
        NotStored: vectors that were not kept.
        UnsupportedModel: a step that cannot be taken; see `gradient_step`.
    """
    allowed = real("within", within)
    if not 0 < allowed < 1:
        raise BadInput(f"found within={allowed:g}; give a share between 0 and 1, such as 0.1.")
    taken = _Taken(model, input, ra, heads, read_weights(weights), options)
    if taken.norm == 0:
        raise BadInput("the gradient of these weights is 0: a step along it goes nowhere.")
    tried: dict[float, StepEffect | None] = {}

    def holds(eta: float) -> bool:
        try:
            tried[eta] = taken.step(eta)
        except NothingToDifferentiate:  # NaN: far too large
            tried[eta] = None
        effect = tried[eta]
        return effect is not None and effect.error <= allowed

    size = float(taken.before.double().abs().mean())
    low = 1e-3 * size / taken.norm**2
    for _ in range(_HALVINGS):
        if holds(low):
            break
        low /= 2
    else:
        raise BadInput(
            f"the loss follows its first order within {allowed:.0%} at no step that can be "
            f"measured, down to {2 * low:.2g}: it is {size:.3g}, and differences of it are lost in "
            "rounding. Give larger within=, prompts with a larger loss, or a float64 model."
        )
    high = 2 * low
    while holds(high):
        low, high = high, 2 * high
    while high / low > _CLOSE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    best = tried[low]
    assert best is not None
    nan = float("nan")
    every = (
        (eta, nan, nan) if one is None else (eta, one.predicted, one.measured)
        for eta, one in sorted(tried.items())
    )
    return LinearStep(low, allowed, best, tuple(every))


class _Taken:
    """Steps on the weights of some heads, and the loss after them."""

    def __init__(
        self,
        model: nn.Module,
        input: PromptInput,
        ra: RACache,
        heads: Heads,
        weights: tuple[Weight, ...],
        options: RunOptions,
    ) -> None:
        self._heads = cast("Heads", heads if heads is None else list_heads(heads))
        self._model, self._input, self._ra = model, input, ra
        self._weights, self._options = weights, options
        self.norm = gradient_norm(model, ra, self._heads, weights=weights)
        self.before = self._loss(())
        known = ra.loss.to(self.before)
        if known.shape != self.before.shape and known.numel() == self.before.numel():
            known = known.reshape(self.before.shape)  # of one example, without its dimension
        apart = known.shape != self.before.shape or (known - self.before).abs().max() > 1e-2 * (
            self.before.abs().max() + 1e-3
        )
        if apart and not bool(known.isnan().any()):
            raise BadInput(
                f"found a loss of {float(self.before.mean()):.4g} where the cache has "
                f"{float(known.mean()):.4g} ({ra.info.objective}): give target= or metric= as they "
                "were given to run_with_ra."
            )

    def step(self, eta: float) -> StepEffect:
        hooks = gradient_step(self._model, self._ra, self._heads, eta, weights=self._weights)
        return StepEffect(eta, self.norm, self.before, self._loss(hooks))

    def _loss(self, hooks: FwdHooks) -> Tensor:
        lens = as_lens(self._model)
        last = lens.sites[max(lens.sites)]
        return _run_again(
            self._ra, self._model, self._input, self._options, hooks, last, fixed=True
        ).loss
