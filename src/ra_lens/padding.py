"""Which prompts run in one batch, so that each of them computes what it computes alone.

In a batch of several lengths the shorter prompts are padded, and a mask is to hide that from them.
Not every model obeys: some attend to padding all the same, some to later tokens as soon as there is
a mask, some count positions from the first column. It is found by looking, not by name:

* before a model's first padded batch the shortest and the longest prompt run padded together, and
  each alone. The residual stream of every token, what it attends to, and the logits must be the
  same (`padding_is_hidden`);
* in every padded batch no token may attend to padding nor, in a causal layer, to what comes after
  it (`watched`).

Where this does not hold, prompts run in groups of one length, without padding and so without a
mask, which is exact; what comes back is laid out as the batch is. The loss of a target is each
example's own, so the groups have nothing to do with each other. A metric of the user's gets the
logits of all examples in one tensor, as ever: the groups run once for these alone, the metric is
differentiated with respect to them, and each group is then differentiated along its part of that
gradient.

Cost: three forward passes of one or two prompts for each side that is padded, once per model and
again for wider batches than seen before; in a padded batch the largest weight of each query and
key.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ra_lens.errors import UnsupportedModel
from ra_lens.fitting import rows_of_forward
from ra_lens.half import LossScale
from ra_lens.model import Lens, Side, Site
from ra_lens.prompts import Batch, PaddingSide, Prompts
from ra_lens.targets import Loss
from ra_lens.tensors import read_numbers

_N_READ = 8  # positions of each prompt at which logits are compared
_NOTHING = torch.finfo(torch.float32).eps  # a smaller weight is none
# The widest batches in which padding was seen to be hidden from a model's prompts, of an encoder
# and of the rest, by what may change that; None where it was seen not to be.
_seen: weakref.WeakKeyDictionary[nn.Module, dict[object, tuple[int, int] | None]] = (
    weakref.WeakKeyDictionary()
)


class PaddingShows(UnsupportedModel):
    """Tokens of a padded batch attended to what they must not see."""


# ---- which prompts run together ------------------------------------------------------------------


def together(lens: Lens, prompts: Prompts) -> list[list[int]]:
    """Give the indices of the prompts that may run in one batch: all, or those of each length."""
    if padding_is_hidden(lens, prompts):
        return [list(range(len(prompts)))]
    return of_one_length(prompts)


def of_one_length(prompts: Prompts, encoded: Prompts | None = None) -> list[list[int]]:
    """Give the indices of the prompts of each length, or pair of lengths; shorter ones first."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, lengths in enumerate(zip((encoded or prompts).lengths, prompts.lengths, strict=True)):
        groups.setdefault(lengths, []).append(i)
    return [groups[lengths] for lengths in sorted(groups)]


def batches(
    lens: Lens, prompts: Prompts, batch_size: int | Literal["auto"] | None
) -> Iterator[tuple[list[int], Prompts]]:
    """Split prompts into batches of those that may run together, told by their indices.

    `"auto"`: of as many as fit in a forward pass that keeps nothing of all layers.
    """
    if batch_size == "auto":
        batch_size = rows_of_forward(lens, prompts)
    hidden = padding_is_hidden(lens, prompts)
    read = prompts if hidden else prompts.unpadded()
    for group in together(lens, prompts):
        step = batch_size or len(group)
        for start in range(0, len(group), step):
            part = group[start : start + step]
            yield part, read.chosen(part)


# ---- in every padded batch -----------------------------------------------------------------------


@contextmanager
def watched(lens: Lens, batch: Batch, encoded: Batch | None = None) -> Generator[None, None, None]:
    """Watch a forward pass of a padded batch, `encoded` being what an encoder reads.

    Raises PaddingShows when it closes, if a token attended to padding, or to a later token in a
    causal layer.
    """
    sides: dict[Side, Batch] = {"input": encoded or batch, "decoder": batch}
    if not any(side.is_padded for side in sides.values()):
        yield
        return
    masks: dict[tuple[Side, Side, bool], Tensor] = {}
    largest: dict[str, Tensor] = {}

    def look(site: Site, pattern: Tensor) -> None:
        kind = (site.query_side, site.key_side, site.causal and not site.cross)
        if kind not in masks:
            masks[kind] = _out_of_sight(sides[kind[0]], sides[kind[1]], causal=kind[2])
        weights = pattern.amax(dim=1)
        found = weights.where(masks[kind].to(weights.device), 0.0).amax()
        before = largest.get(site.label, found)  # where a layer runs several times
        largest[site.label] = torch.maximum(before, found)

    looks = {site.pattern_name: partial(look, site) for site in lens.sites.values()}
    with lens.looking(looks):
        yield
    weights = read_numbers(list(largest.values()))
    shown = [label for label, weight in zip(largest, weights, strict=True) if weight > _NOTHING]
    if shown:
        raise PaddingShows(
            f"found tokens that attend to padding, or to later tokens, at {shown[0]} of "
            f"{lens.name} in a batch of prompts of different lengths, although its mask forbids "
            "it. Give prompts of one length at a time."
        )


def _out_of_sight(queries: Batch, keys: Batch, *, causal: bool) -> Bool[Tensor, "batch query key"]:
    """Where a real token must not attend to."""
    seen = keys.attention_mask[:, None, :].expand(-1, queries.tokens.shape[1], -1)
    seen = seen.tril() if causal else seen
    return queries.attention_mask[:, :, None] & ~seen


# ---- once for each model -------------------------------------------------------------------------


def padding_is_hidden(lens: Lens, prompts: Prompts, encoded: Prompts | None = None) -> bool:
    """Whether prompts compute in one padded batch what they compute alone, as far as was seen.

    Hooks on the model have no part in this. `encoded` is what an encoder-decoder's encoder reads.
    """
    sides = (_side(encoded), _side(prompts))
    if sides == (None, None):
        return True
    key = (lens.state, lens.pad_token_id, sides)
    seen = _seen.setdefault(lens.module, {})
    known = seen.get(key, (0, 0))
    if known is None:
        return False
    width = prompts.padded_width
    widest = max(known[0], 0 if encoded is None else encoded.padded_width), max(known[1], width)
    if widest != known:
        seen[key] = widest if _same_as_alone(lens, prompts, encoded) else None
    return seen[key] is not None


def _side(prompts: Prompts | None) -> PaddingSide | None:
    """Where prompts are padded if they run in one batch."""
    return prompts.padding_side if prompts is not None and prompts.is_padded else None


@torch.no_grad()
def _same_as_alone(lens: Lens, prompts: Prompts, encoded: Prompts | None) -> bool:
    """Run the shortest and the longest prompts padded together, and each alone."""
    every = range(len(prompts))
    lengths = [read.lengths for read in (prompts, encoded) if read is not None]
    chosen = sorted({pick(every, key=n.__getitem__) for n in lengths for pick in (min, max)})
    prompts, encoded = prompts.widened(), None if encoded is None else encoded.widened()

    def run(part: Callable[[Prompts], Prompts]) -> list[list[Tensor]]:
        return _run(lens, part(prompts), None if encoded is None else part(encoded))

    rounding = _rounding(lens)
    with lens.without_hooks(), lens.no_attention_returned():
        try:
            padded = run(lambda read: read.chosen(chosen))
        except PaddingShows:
            return False
        for i, found in zip(chosen, padded, strict=True):
            [wanted] = run(lambda read, i=i: read.chosen([i]).unpadded())
            pairs = zip(found, wanted, strict=True)
            if not all(_agree(*pair, rounding=rounding) for pair in pairs):
                return False
    return True


def _run(lens: Lens, prompts: Prompts, encoded: Prompts | None) -> list[list[Tensor]]:
    """What each prompt computes, `[token, feature]`.

    It is what goes into every block with attention, a sketch of every pattern, and some logits.
    """
    batch = prompts.lay_out(lens)
    other = None if encoded is None else encoded.lay_out(lens)
    sides: dict[Side, Batch] = {"input": other or batch, "decoder": batch}
    found: list[list[Tensor]] = [[] for _ in batch.lengths]

    def at_pattern(site: Site, pattern: Tensor) -> None:
        queries, keys = sides[site.query_side], sides[site.key_side]
        for i, of_prompt in enumerate(found):
            of_prompt.append(_sketch(pattern[i, :, queries.span(i), keys.span(i)]))

    def at_block(tokens: Batch, residual: Tensor) -> None:
        if residual.shape[:2] == tokens.tokens.shape:
            for i, of_prompt in enumerate(found):
                of_prompt.append(residual[i, tokens.span(i)])

    looks: dict[str, Callable[[Tensor], None]] = {}
    for site in lens.sites.values():
        with suppress(UnsupportedModel):  # a block without a hook point on its input
            looks[lens.block_input_name(site)] = partial(at_block, sides[site.query_side])
        looks[site.pattern_name] = partial(at_pattern, site)
    spread = [[(n - 1) * k // (_N_READ - 1) for k in range(_N_READ)] for n in batch.lengths]
    columns = batch.columns(spread)
    with watched(lens, batch, other), lens.looking(looks):
        logits = lens.logits_at(*batch.model_input, columns, (), other and other.model_input)
    for of_prompt, read in zip(found, logits, strict=True):
        of_prompt.append(read)
    return found


def _sketch(pattern: Float[Tensor, "head query key"]) -> Float[Tensor, "query head"]:
    """A number for each row, of about its size, that no other row is likely to have."""
    wide = pattern if pattern.dtype == torch.float64 else pattern.float()
    waves = torch.arange(wide.shape[-1], device=wide.device).mul(2.4).cos()
    return (wide @ waves.to(wide.dtype)).T


def _rounding(lens: Lens) -> float:
    """How far products are off here and now: float32 may be TensorFloat32, or autocast."""
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).to(lens.dtype)
    found = (x.to(lens.device) @ x.to(lens.device)).cpu().double()
    wanted = x.double() @ x.double()
    error = float((found - wanted).norm() / wanted.norm())
    return max(error, torch.finfo(lens.dtype).eps, _NOTHING)


def _agree(
    found: Float[Tensor, "token feature"],
    wanted: Float[Tensor, "token feature"],
    *,
    rounding: float,
) -> bool:
    """Whether two values are the same up to rounding: half of their digits are.

    In half precision that is asked of the middle token, not of the worst: rounding sends some to
    another expert, and padding in the wrong place moves all.
    """
    difference = (found - wanted).where(found != wanted, 0.0).float()  # infinities may be equal
    errors = difference.norm(dim=-1)
    size = wanted.float().nan_to_num(0.0, 0.0, 0.0).square().sum(dim=-1).mean().sqrt()
    error = errors.max() if rounding < 1e-5 else errors.median()
    return bool(error <= rounding**0.5 * size)


# ---- a batch in groups of one length -------------------------------------------------------------

Group = Sequence[int]


@dataclass
class BatchResult:
    """What a batch gives beside its maps."""

    logits: Float[Tensor, "batch read d_vocab"]  # those asked for
    loss: Float[Tensor, "batch"] | Float[Tensor, ""]  # a scalar if the metric gave one
    starts: tuple[int, ...]  # column of each example's first token; in an encoder, if there is one
    targets: list[list[int]] | None  # ids expected; None for a metric of the user's


def run_by_length(
    groups: Sequence[Group],
    bound: Loss,
    *,
    run: Callable[[Group, Loss], BatchResult],
    logits_of: Callable[[Group], Float[Tensor, "group pos d_vocab"]],
    loss_of: Callable[[Float[Tensor, "batch pos d_vocab"]], Tensor],
) -> BatchResult:
    """Run the groups of a batch, each forward and backward with `run` for a loss of its own.

    For a metric of the user's, `logits_of` gives a group's logits at every position of the batch,
    and `loss_of` the loss of the batch from all of these.
    """
    order, loss = places(groups), None
    losses = [bound.part(group) for group in groups]
    if bound.positions is None:
        logits = torch.cat([logits_of(group) for group in groups])[order]
        loss, gradient = _differentiated(loss_of, logits)
        losses = [replace(bound, metric=_along(gradient, group)) for group in groups]
    results = [run(group, of_group) for group, of_group in zip(groups, losses, strict=True)]
    starts = [start for result in results for start in result.starts]
    targets = [row for result in results for row in result.targets or []]
    return BatchResult(
        torch.cat([result.logits for result in results])[order],
        torch.cat([result.loss for result in results])[order] if loss is None else loss,
        tuple(starts[i] for i in order),
        [targets[i] for i in order] if targets else None,
    )


def places(groups: Sequence[Group]) -> list[int]:
    """Where each example of a batch stands among the joined ones of its groups."""
    joined = torch.tensor([i for group in groups for i in group])
    return joined.argsort().tolist()


def _differentiated(
    metric: Callable[[Tensor], Tensor], logits: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A metric of logits and its gradient there; None if it does not depend on them."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        loss = metric(leaf)
        if not loss.requires_grad:
            return loss, None
        total = loss.sum()
        # In float16 the gradient of a small loss would be 0, or have a bit or two.
        factor = LossScale(in_float16=leaf.dtype == torch.float16).of(total, leaf)
        weight = torch.full_like(total, factor)
        (gradient,) = torch.autograd.grad(total, leaf, weight, allow_unused=True)
    if gradient is not None:
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / factor
    return loss.detach(), gradient


def _along(gradient: Tensor | None, group: Group) -> Callable[[Tensor], Tensor]:
    """A metric whose gradient at the logits of a group is its part of `gradient`."""
    if gradient is None:
        return lambda _logits: torch.zeros(len(group))
    own = gradient[list(group)]

    def metric(logits: Tensor) -> Tensor:
        # Where there is no gradient logits may be infinite.
        product = (own * logits.to(own.dtype)).where(own != 0, 0.0)
        return product.flatten(start_dim=1).sum(dim=1)

    return metric
