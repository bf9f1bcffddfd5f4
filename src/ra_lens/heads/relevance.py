"""Scores from other backward passes through the same forward pass: RelP and GIM.

With ∂L/∂z not the gradient of the loss but what `ra_lens.model.backward` hands back by the rules of
RelP or GIM, from the same L and z as the scores of `ra_lens.heads.gradients`:

    relp        |Σ z·∂L/∂z|      sizes of norms, and activations over their input, held constant
    gim         |Σ z·∂L/∂z|      sizes of norms held constant, softmaxes softened, products shared

Both are sizes. Without the absolute value they put back heads that others outweigh, which bringing
heads back from nothing needs as well. Cost: a forward and a backward pass for each prompt and each
of the two; other methods of the same backward pass share it. A model that computes something these
rules do not cover is refused with its name (mixtures of experts, gates by a sigmoid).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ra_lens.cache import RACache
from ra_lens.heads.gradients import michel_scores
from ra_lens.heads.registry import one_run_method


@one_run_method(
    "relp",
    label="|RelP|",
    title="relevance of what a head gives, by RelP",
    vectors=["z", "z_grad"],
    backward="relp",
)
def relp_scores(ra: RACache) -> Float[Tensor, "batch layer head"]:
    """|Σ z·∂L/∂z| over all tokens, by the backward pass of RelP: Michel's score under its rules.

    At least 0, without a direction. What it holds constant, the sizes of norms and the slopes of
    activations, really changes when a head goes, so its size is no number of nats. The source takes
    the difference to a corrupted prompt's z; here that is z = 0, as for `atp`. It fails with heads
    that do the same, each of which could go alone, as every slope at one point does.

    Source: Rezaei Jafari, Eberle, Khakzar and Nanda 2025, arXiv 2508.21258.
    """
    return michel_scores(ra)


@one_run_method(
    "gim",
    label="|GIM|",
    title="relevance of what a head gives, by GIM",
    vectors=["z", "z_grad"],
    backward="gim",
)
def gim_scores(ra: RACache) -> Float[Tensor, "batch layer head"]:
    """|Σ z·∂L/∂z| over all tokens, by the backward pass of GIM.

    At least 0, without a direction. Of a head below, it counts what passes through the queries,
    keys and values of heads above for less, a quarter and a half, and what passes through saturated
    attention for more than the slope does. Heads of low layers therefore come out smaller than
    those of high ones, the more the deeper the model is.

    Source: Edin et al. 2025, arXiv 2505.17630.
    """
    return michel_scores(ra)
