"""Weights folded as TransformerLens's classes do it."""

from __future__ import annotations

import torch


def fold(model, kind, **options):
    """Fold as the two classes do; by default nothing but value biases."""
    only = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, **options}
    only = {"fold_value_biases": True, **only}
    if kind == "TransformerBridge":
        model.enable_compatibility_mode(disable_warnings=True, **only)
    else:
        model.load_and_process_state_dict(model.state_dict(), **only)
        if only["fold_ln"]:  # TransformerLens 2 leaves what it has folded in the norms
            for norm in (m for b in model.blocks for m in (b.ln1, b.ln2)):
                reset_norm(norm)
            reset_norm(model.ln_final)
    return model


def reset_norm(norm):
    with torch.no_grad():
        for name, value in (("w", 1.0), ("b", 0.0)):
            if hasattr(norm, name):
                getattr(norm, name).fill_(value)
