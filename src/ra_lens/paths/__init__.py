"""Paths of attention traced backwards: from one token to where it came from.

`trace_paths` runs through one layer's map, `trace_layers` through all layers, head by head;
`read_maps` reads several prompts for them. `docs/paths.md` has the formulas.
"""

from ra_lens.paths.read import PromptMaps, read_maps
from ra_lens.paths.result import Step, TracedPath, TraceResult
from ra_lens.paths.trace import trace_layers, trace_paths

__all__ = [
    "PromptMaps",
    "Step",
    "TraceResult",
    "TracedPath",
    "read_maps",
    "trace_layers",
    "trace_paths",
]
