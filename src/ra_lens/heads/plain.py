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

from ra_lens.heads.ranking import RankingContext, ranking_method
from ra_lens.model.sites import table


@ranking_method("random", title="random order", random=True)
def random_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """One uniform number in [0, 1) per head."""
    # A text seeds Python's generator by its digest; `random()` itself never changes.
    generator = random.Random(f"ra_lens random order {context.seed} {context.draw}")
    numbers = [[generator.random() for _ in range(n)] for n in context.n_heads]
    return table([torch.tensor(row, dtype=torch.float64) for row in numbers])


@ranking_method("index", title="first layer first")
def index_scores(context: RankingContext) -> Float[Tensor, "layer head"]:
    """How many heads come after this one in the model."""
    after = torch.arange(sum(context.n_heads), dtype=torch.float64).flip(0)
    return table(after.split(context.n_heads))
