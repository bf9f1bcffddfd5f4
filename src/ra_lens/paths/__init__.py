"""Paths of attention traced backwards: from one token to where it came from.

`trace_paths` runs through one layer's map, `trace_layers` through all layers, head by head;
`trace_many` and `trace_layers_many` take several prompts. `docs/paths.md` has the formulas.
"""

from ra_lens.paths.result import Step, TracedPath, TraceResult
from ra_lens.paths.trace import trace_layers, trace_layers_many, trace_many, trace_paths

__all__ = [
    "Step",
    "TraceResult",
    "TracedPath",
    "trace_layers",
    "trace_layers_many",
    "trace_many",
    "trace_paths",
]
