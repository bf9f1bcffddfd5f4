"""Attention knockouts: cut edges of attention, foretold from one backward pass or really done.

sinks.py     tokens that heads look at where they have nothing to say
predict.py   what a cut does to the loss, to first order
edges.py     which edges are meant
read.py      what a cache foretells of them
hooks.py     doing it: the `(name, hook)` pairs
agreement.py what was foretold beside what was measured
"""

from ra_lens.knockouts.edges import Edge, Edges, EdgeSet
from ra_lens.knockouts.hooks import knockout_hooks

__all__ = ["Edge", "EdgeSet", "Edges", "knockout_hooks"]
