"""Scores per head, one registry: how important each head is, larger = more important.

`rank_heads` scores every head of a model on some questions by one or several of
`ranking_methods()`; `ranking_method` adds another, and `one_run_method` one that reads a forward
and a backward pass. `HeadScores` holds the result and the order that follows from it.
`head_effects` really takes each head away, and gives what every prompt loses.

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
from ra_lens.heads import ablation as ablation
from ra_lens.heads import gradients as gradients
from ra_lens.heads import mediation as mediation
from ra_lens.heads import methods as methods
from ra_lens.heads import relevance as relevance
from ra_lens.heads.ablation import HeadEffects, head_effects
from ra_lens.heads.corrupted import CorruptedRun
from ra_lens.heads.known import KnownHeads, Localisation, known_heads, localisation_scores
from ra_lens.heads.one_run import Needs
from ra_lens.heads.ranking import rank_heads
from ra_lens.heads.registry import (
    Passes,
    RankingContext,
    RankingMethod,
    one_run_method,
    ranking_method,
    ranking_methods,
)
from ra_lens.heads.scores import HeadScores

# As they are before somebody adds one, or puts one in the place of another.
BUILT_IN_METHODS = ranking_methods()

__all__ = [
    "CorruptedRun",
    "HeadEffects",
    "HeadScore",
    "HeadScores",
    "KnownHeads",
    "Localisation",
    "Needs",
    "Passes",
    "RankingContext",
    "RankingMethod",
    "head_effects",
    "known_heads",
    "localisation_scores",
    "one_run_method",
    "rank_heads",
    "ranking_method",
    "ranking_methods",
]
