"""`output_shift`: what a step does to what a head gives to W_O, foretold and measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.head_maps import read_head
from ra_lens.head_names import Head
from ra_lens.model import Site
from ra_lens.model.sites import VectorKind
from ra_lens.numbers import Real, real
from ra_lens.prompts import PromptInput
from ra_lens.steps.again import RunOptions, run_again
from ra_lens.steps.gradient import gradient_step, read_weights, vectors_of
from ra_lens.vjp import Weight


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
    again = run_again(ra, model, input, options, hooks, site, vectors=kinds)
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
        found[kind] = vectors_of(ra, site, kind)[:, :, index]
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
