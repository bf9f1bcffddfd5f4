"""Everything that a run could leave on a model or in a session, and hooks that stop one."""

from __future__ import annotations

import numpy as np
import torch

HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Oops(Exception):
    pass


def every_module(model):
    """Those of the Hugging Face model inside a bridge too."""
    roots = [model, getattr(model, "original_model", None)]
    found = (m for root in roots if root is not None for m in torch.nn.Module.modules(root))
    return list({id(m): m for m in found}.values())


def snapshot(model):
    """Everything a run could leave behind, by where it is."""
    state = {}
    for name, module in model.named_modules():
        state[name, "training"] = module.training
        state[name, "forward"] = vars(module).get("forward")
        for where in HOOK_DICTS:
            state[name, where] = tuple(map(id, getattr(module, where).values()))
        for where in ("fwd_hooks", "bwd_hooks"):
            state[name, where] = len(getattr(module, where, None) or ())
        state[name, "ctx"] = dict(getattr(module, "ctx", None) or {})
    for i, module in enumerate(every_module(model)):
        kept = {n: id(v) for n, v in vars(module).items() if isinstance(v, torch.Tensor)}
        state[type(module).__name__, i, "tensors"] = kept
    for name, p in torch.nn.Module.named_parameters(model):
        state[name, "parameter"] = (p.requires_grad, p.data_ptr(), p._version, p.dtype)
        g = p.grad
        state[name, "grad"] = None if g is None else (g.data_ptr(), g._version, float(g.sum()))
    every = torch.nn.modules.module
    state["flags"] = (getattr(model, "is_caching", None), getattr(model, "context_level", None))
    state["grad enabled"] = torch.is_grad_enabled()
    # Not Python's own generator: beartype, which --check-shapes has check types, draws from it.
    state["rng"] = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    state["global hooks"] = (len(every._global_forward_hooks), len(every._global_forward_pre_hooks))
    return state


def changes(before, after):
    keys = before.keys() | after.keys()
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def raises(error):
    def hook(value, hook=None):
        raise error

    return hook


def graphs(model):
    """Attributes in which modules keep a tensor with a graph."""
    return [
        (type(module).__name__, name)
        for module in every_module(model)
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    ]
