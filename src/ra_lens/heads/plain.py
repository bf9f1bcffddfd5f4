"""Orders that know nothing of the prompts: random, and by position in the model.

A random score is one uniform number per head, from a generator of its own that is seeded by `seed`
and `draw`: the same on every machine and version, and no other generator notices.

`index` puts the first layer first, and within a layer the first head: the paper's text. In its code
the plain run is the other one, last layer first: `rank_heads(..., method="index").reversed()`.

Cost: none.
"""

from __future__ import annotations

import random

import torch
from jaxtyping import Float
from torch import Tensor

from ra_lens.heads.registry import RankingContext, ranking_method


@ranking_method("random", title="random order", random=True)
def random_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """One uniform number in [0, 1) per head."""
    # A text seeds Python's generator by its digest; `random()` itself never changes.
    generator = random.Random(f"ra_lens random order {context.seed} {context.draw}")
    n_layers, n_heads = context.shape
    numbers = [[generator.random() for _ in range(n_heads)] for _ in range(n_layers)]
    return torch.tensor(numbers, dtype=torch.float64)


@ranking_method("index", title="first layer first")
def index_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """How many heads come after this one in the model."""
    n_layers, n_heads = context.shape
    return torch.arange(n_layers * n_heads, dtype=torch.float64).flip(0).reshape(n_layers, n_heads)
