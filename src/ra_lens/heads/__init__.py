"""Scores per head, one registry: how important each head is, larger = more important.

`rank_heads` scores every head of a model on some questions by one of `ranking_methods()`;
`ranking_method` adds another. `HeadScores` holds the result and the order that follows from it.

Example:
    ```python
    from ra_lens import load_demo_model, load_task
    from ra_lens.heads import rank_heads

    model, task = load_demo_model(), load_task("antonym")
    scores = rank_heads(model, task.sample(25, shots=5), method="ra")
    print(scores.top(3))
    ```
"""

from ra_lens.head_names import HeadScore

# Importing these registers the built-in methods.
from ra_lens.heads import mediation as mediation
from ra_lens.heads import methods as methods
from ra_lens.heads.ranking import (
    RankingContext,
    RankingMethod,
    rank_heads,
    ranking_method,
    ranking_methods,
)
from ra_lens.heads.scores import HeadScores

__all__ = [
    "HeadScore",
    "HeadScores",
    "RankingContext",
    "RankingMethod",
    "rank_heads",
    "ranking_method",
    "ranking_methods",
]
