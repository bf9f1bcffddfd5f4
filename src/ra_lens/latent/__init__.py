"""One head's queries and keys in two dimensions, and where a step of descent moves them.

`space` computes the plane and what lies in it, `layout` the pixels of a drawing, labels included;
figures and pages draw from these. Nothing here draws.
"""

from ra_lens.latent.layout import Drawing, lay_out
from ra_lens.latent.space import LatentSpace, Points, latent_space_of

__all__ = ["Drawing", "LatentSpace", "Points", "latent_space_of", "lay_out"]
