"""Where attention lives in a TransformerLens model, and how to run that model.

The only package that knows TransformerLens's classes, versions and architectures. Everything else
sees a `Lens`: sites (one per attention layer), tokens in, logits out, and the few module-level
attachment points that collecting gradients needs.
"""

from ra_lens.model.attention import find_sites
from ra_lens.model.front import Front, default_front
from ra_lens.model.lens import FwdHooks, Lens, ModelKind, as_lens
from ra_lens.model.loading import available_kinds, load_demo_model, load_folder, load_model
from ra_lens.model.sites import Gate, Layers, Side, Site, Sites, spell_layers
from ra_lens.model.tokens import PrependBos

__all__ = [
    "Front",
    "FwdHooks",
    "Gate",
    "Layers",
    "Lens",
    "ModelKind",
    "PrependBos",
    "Side",
    "Site",
    "Sites",
    "as_lens",
    "available_kinds",
    "default_front",
    "find_sites",
    "load_demo_model",
    "load_folder",
    "load_model",
    "spell_layers",
]
