"""Where attention lives in a TransformerLens model, and how to run that model.

The only package that knows TransformerLens's classes, versions and architectures. Everything else
sees a `Lens`: sites (one per attention layer), tokens in, logits out, and the few module-level
attachment points that collecting gradients needs.
"""

from ra_lens.sites.described import Layers
from ra_lens.sites.facts import with_scales
from ra_lens.sites.find import find_sites
from ra_lens.sites.lens import Lens, as_lens
from ra_lens.sites.loading import ModelKind, available_kinds, load_folder, load_model
from ra_lens.sites.site import Gate, Side, Site, spell_layers

__all__ = [
    "Gate",
    "Layers",
    "Lens",
    "ModelKind",
    "Side",
    "Site",
    "as_lens",
    "available_kinds",
    "find_sites",
    "load_folder",
    "load_model",
    "spell_layers",
    "with_scales",
]
