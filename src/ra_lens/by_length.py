"""One batch run in groups of one length; what comes back is laid out as the batch is.

Where padding would change what a model computes (`ra_lens.padding`), examples of one length run
without it. The loss of a target is each example's own, so the groups have nothing to do with each
other. A metric of the user's gets the logits of all examples in one tensor, as ever: the groups run
once for these alone, the metric is differentiated with respect to them, and each group is then
differentiated along its part of that gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.targets import Bound

Group = Sequence[int]


@dataclass
class BatchResult:
    """What a batch gives beside its maps.

    Attributes:
        logits: Those asked for, `[batch, read, d_vocab]`.
        loss: Of each example; a scalar if the metric gave one.
        starts: Column of each example's first token; of an encoder-decoder that of its encoder.
        targets: Ids expected of each example; None for a metric of the user's.
    """

    logits: Tensor
    loss: Tensor
    starts: tuple[int, ...]
    targets: list[list[int]] | None


def run_by_length(
    groups: Sequence[Group],
    bound: Bound,
    *,
    run: Callable[[Group, Bound], BatchResult],
    logits_of: Callable[[Group], Float[Tensor, "group pos d_vocab"]],
    loss_of: Callable[[Float[Tensor, "batch pos d_vocab"]], Tensor],
) -> BatchResult:
    """Run the groups of a batch.

    Args:
        groups: Indices of the examples of each.
        bound: The objective of the batch.
        run: Runs a group forward and backward, for an objective of its own.
        logits_of: Runs a group forward; gives its logits at every position of the batch.
        loss_of: The loss of the batch by a metric of the user's, from logits at every position.
    """
    loss, bounds = None, [bound.part(group) for group in groups]
    if bound.positions is None:
        logits = in_order(groups, [logits_of(group) for group in groups])
        loss, gradient = _differentiated(loss_of, logits)
        bounds = [replace(bound, metric=_along(gradient, group)) for group in groups]
    results = [run(group, of_group) for group, of_group in zip(groups, bounds, strict=True)]
    if loss is None:
        loss = in_order(groups, [result.loss for result in results])
    order = places(groups)
    starts = [start for result in results for start in result.starts]
    targets = [row for result in results for row in result.targets or []]
    return BatchResult(
        in_order(groups, [result.logits for result in results]),
        loss,
        tuple(starts[i] for i in order),
        [targets[i] for i in order] if targets else None,
    )


def places(groups: Sequence[Group]) -> list[int]:
    """Where each example of a batch stands among the joined ones of its groups."""
    joined = [i for group in groups for i in group]
    return sorted(range(len(joined)), key=joined.__getitem__)


def in_order(groups: Sequence[Group], values: Sequence[Tensor]) -> Tensor:
    """Join values of the groups, in the order of the batch."""
    return torch.cat(list(values))[places(groups)]


def _differentiated(
    metric: Callable[[Tensor], Tensor], logits: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A metric of logits and its gradient there; None if it does not depend on them."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        loss = metric(leaf)
        if not loss.requires_grad:
            return loss, None
        (gradient,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
    return loss.detach(), gradient


def _along(gradient: Tensor | None, group: Group) -> Callable[[Tensor], Tensor]:
    """A metric whose gradient at the logits of a group is its part of `gradient`."""
    if gradient is None:
        return lambda _logits: torch.zeros(len(group))
    own = gradient[list(group)]
    own = own.to(torch.promote_types(own.dtype, torch.float32))

    def metric(logits: Tensor) -> Tensor:
        # Where there is no gradient logits may be infinite.
        product = (own * logits.to(own.dtype)).where(own != 0, 0.0)
        return product.flatten(start_dim=1).sum(dim=1)

    return metric
