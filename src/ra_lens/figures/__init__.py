"""Pictures: one function each, data in, a plotly figure out, nothing displayed or changed.

Maps show −R by default, where gradient descent moves attention: red cells get more, blue less.
`sign="gradient"` shows R itself. What blocking attention would do to the loss is green where the
loss would rise, so that the answer needs it, and brown where it would fall. The colour bar says
which. Curves and tables take the frames of
`ra_lens.experiments`.

A figure shows itself in Jupyter, VS Code and Colab where it is the last line of a cell, or by
`figure.show()`; after `images_in_notebooks()` an image is kept beside it, for where no JavaScript
runs. `save_figure(figure, "figure.pdf")` writes PNG, SVG, PDF or HTML. Images need kaleido
(`pip install "ra-lens[images]"`) and a Chrome or Chromium.
"""

from ra_lens.figures.ablations import patching_ablations
from ra_lens.figures.auc_table import auc_table
from ra_lens.figures.curves import perturbation_curves
from ra_lens.figures.flow import flow_map
from ra_lens.figures.grid import head_grid
from ra_lens.figures.images import images_in_notebooks, save_figure
from ra_lens.figures.knockouts import knockout_curves, knockout_scatter
from ra_lens.figures.latent import latent_space
from ra_lens.figures.maps import Sign, head_map, head_maps
from ra_lens.figures.methods import method_agreement
from ra_lens.figures.paths import path_diagram
from ra_lens.figures.pull import query_key_pull
from ra_lens.figures.scale_curve import scale_curve
from ra_lens.figures.style import Layout
from ra_lens.figures.sweep import patching_sweep_curve
from ra_lens.figures.token_row import token_row

__all__ = [
    "Layout",
    "Sign",
    "auc_table",
    "flow_map",
    "head_grid",
    "head_map",
    "head_maps",
    "images_in_notebooks",
    "knockout_curves",
    "knockout_scatter",
    "latent_space",
    "method_agreement",
    "patching_ablations",
    "patching_sweep_curve",
    "path_diagram",
    "perturbation_curves",
    "query_key_pull",
    "save_figure",
    "scale_curve",
    "token_row",
]
