"""`gradient_step`: forward hooks that run a model as it would be after a step of descent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, UnsupportedModel, one_of
from ra_lens.head_names import Heads
from ra_lens.model import Lens, Site, as_lens
from ra_lens.model.matrices import Matrix, WeightInUse, rounding, weight_in_use
from ra_lens.model.sites import VectorKind
from ra_lens.numbers import Real, real
from ra_lens.vjp import FACTORS, WEIGHTS, Weight

HookPairs = list[tuple[str, Callable[..., Any]]]

_MATRICES: dict[Weight, Matrix] = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o"}
_OF_QUERIES: tuple[Weight, ...] = ("W_Q", "W_O")


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
    ra.info.need_exact("a step of gradient descent")
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


def vectors_of(ra: RACache, site: Site, kind: VectorKind) -> Tensor:
    """Vectors of a layer, with a batch dimension."""
    value = ra[kind, site.layer]
    return value if ra.has_batch_dim else value.unsqueeze(0)


def _gradient(ra: RACache, site: Site, weight: Weight, chosen: list[int]) -> _Gradient:
    """Gradient of the mean loss at the matrices of some heads of a layer, beside each other."""
    read, given = (vectors_of(ra, site, kind) for kind in FACTORS[weight])
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
        return float((given - wanted).norm()) <= rounding(given.dtype) * float(wanted.norm())


def _output_weights(attention: Any) -> tuple[Tensor, Tensor]:
    return attention.W_O, attention.b_O
