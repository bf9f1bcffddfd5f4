"""Pictures: one function each, a cache in, a plotly figure out, nothing displayed or changed.

Maps show −R by default, where gradient descent moves attention: red cells get more, blue less.
`sign="gradient"` shows R itself. The colour bar says which.
"""

from ra_lens.figures.grid import head_grid
from ra_lens.figures.maps import Sign, head_map, head_maps

__all__ = ["Sign", "head_grid", "head_map", "head_maps"]
