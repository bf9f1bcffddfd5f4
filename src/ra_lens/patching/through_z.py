"""The same change of a pattern where the model only shows it: through z.

What a head gives to W_O is z = A V, so changing the pattern by D is adding D V to z, exactly. V is
seen at hook_v, before z; the pattern is shown after z. So the change is made first and checked as
soon as the pattern is there, within the same layer and before anything is returned:

    A V = z    up to rounding, with z as it was before the change

Where z is multiplied with a gate before hook_z (`Site.gate`), so is D V, and A V in the check. It
fails, and is refused, where z is changed in another way before W_O, where V is something else than
is shown, and where another hook changed V or z in between. Earlier tokens in a key/value cache
are refused too, because their V is not seen, unless nothing was to be changed.

A change that depends on the pattern, as a cut does, takes it from the layer that is running
(`ra_lens.model.in_use`): of the candidates there, the one with A V = z. That must be the pattern
shown afterwards, to the bit. Changes of one layer follow each other: each sees the pattern as those
before it left it.

Cost: two products of a pattern with the values, and V and z kept until the pattern is shown, and a
pattern for what was changed so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.model import Gate, Site
from ra_lens.model.in_use import patterns_in_use
from ra_lens.model.values import attention_output

# Gives D for a pattern of this shape, on this device, or None where nothing changes. The function
# handed to it gives the pattern, as the changes before this one left it.
Difference = Callable[[Sequence[int], torch.device, Callable[[], Tensor]], Tensor | None]

# Largest error of A V per head, relative to z: a few roundings of A, V and z in that dtype.
# What the check is to find (a gate, another V) is of order 1.
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TOLERANCE_OTHERWISE = 1e-3

# In float32, as the models do it.
_ACTIVATIONS: dict[Gate, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda gate: gate.float().sigmoid(),
    "softplus": lambda gate: torch.nn.functional.softplus(gate.float()),
}


def need_values(site: Site, what: str, instead: str) -> None:
    """Refuse a layer whose pattern is only shown, and whose values are not.

    Args:
        site: The layer.
        what: What cannot be done there.
        instead: What to do.

    Raises:
        UnsupportedModel: it is one.
    """
    if site.values is None:
        raise UnsupportedModel(
            f"{what} of {site.label}: its hook_pattern only shows "
            "what the model has already used, and no hook point shows the values that the pattern "
            "is multiplied with (JetMoE's go through a mixture of experts; some layers of Gemma 4 "
            f"use those of an earlier layer). {instead}"
        )


@dataclass
class _Ledger:
    """What all changes together have done in this pass, to the pattern and to its z."""

    values: Tensor  # whose storage stays this ledger's own as long as it is held
    pattern: Tensor | None = None
    z: Tensor | None = None


# By the storage of the values, which is one for all hooks of a layer in a pass. Only those hooks
# hold the ledgers, so that none outlives them on the model.
_ledgers: WeakValueDictionary[tuple[str, int], _Ledger] = WeakValueDictionary()


def _storage(values: Tensor) -> tuple[str, int]:
    # One tensor is handed to every hook, each in a view of its own.
    return str(values.device), values.untyped_storage().data_ptr()


@dataclass
class _Pass:
    """One forward pass through the layer."""

    values: Tensor
    gate: Tensor | None = None
    name: str | None = None  # under which hook_z fired first
    z: Tensor | None = None  # as the model made it; None: nothing was added to it
    pattern: Tensor | None = None  # as the model uses it, where that was needed
    checked: bool = False
    ledger: _Ledger | None = None
    misfit: BadInput | None = None


class ThroughZ:
    """Changes one layer's pattern through z."""

    def __init__(self, site: Site, what: Literal["patch", "cut"], difference: Difference) -> None:
        """Change the pattern at `site` by a difference; errors say `what` it is."""
        self._site = site
        self._what = what
        self._difference = difference
        self._pass: _Pass | None = None

    def pairs(self) -> list[tuple[str, Callable[..., Any]]]:
        """`(hook name, hook)` pairs in the order in which they fire."""
        site = self._site
        gate = [(site.gate_name, self._at_gate)] if site.gate else []
        return [
            (site.value_name, self._at_values),
            *gate,
            (site.z_name, self._at_z),
            (site.pattern_name, self._at_pattern),
            (site.block_output_name, self._at_block_output),
        ]

    def _at_values(self, values: Tensor, hook: Any) -> None:  # noqa: ARG002  TransformerLens passes it by name
        # The tensor itself: whoever edits it in place after this hook edits it here as well.
        self._pass = _Pass(values)
        # Of a pass that failed, with the same values put in place of the model's.
        _ledgers.pop(_storage(values), None)

    def _at_gate(self, gate: Tensor, hook: Any) -> None:  # noqa: ARG002  TransformerLens passes it by name
        if self._pass is not None:
            self._pass.gate = _ACTIVATIONS[self._site.gate or "sigmoid"](gate)

    def _at_z(self, z: Tensor, hook: Any) -> Tensor | None:
        now = self._pass
        if now is None or now.name not in (None, hook.name):
            # In compatibility mode a hook fires once for each name of its hook point: add once.
            return None
        now.name = hook.name
        alike = z.ndim == now.values.ndim == 4 and z.shape[0] == now.values.shape[0]
        if not alike or (z.shape[1] != now.values.shape[1] and not self._site.cross):
            raise UnsupportedModel(
                f"found values of shape {tuple(now.values.shape)} and z of shape {tuple(z.shape)} "
                f"at {self._site.label}; [batch, pos, head, d_head] is needed to "
                f"{'add maps' if self._what == 'patch' else 'cut edges'} through z."
            )
        now.ledger = ledger = _ledgers.setdefault(_storage(now.values), _Ledger(now.values))
        shape = (z.shape[0], z.shape[2], z.shape[1], now.values.shape[1])
        pattern = partial(self._pattern, now, ledger, z)
        try:
            difference = self._difference(shape, z.device, pattern)
        except BadInput as misfit:
            # With a key/value cache there are more keys than are seen here: the pattern will tell
            # which of the two it is.
            now.misfit = misfit
            return None
        if difference is None:
            return None
        if now.z is None:
            now.z = _before(z, ledger)
        product = attention_output(difference, now.values, now.gate).to(z.dtype)
        ledger.z = product.detach() + (0 if ledger.z is None else ledger.z)
        ledger.pattern = difference if ledger.pattern is None else ledger.pattern + difference
        return z + product

    def _pattern(self, now: _Pass, ledger: _Ledger, z: Tensor) -> Tensor:
        """The pattern that the layer is using, as the changes before this one left it."""
        now.z = _before(z, ledger)
        found = patterns_in_use(z.shape[0], z.shape[2], z.shape[1])
        found = [one for one in found if bool((one >= 0).all())]  # which queries are not
        n_keys = now.values.shape[1]
        fitting = [one for one in found if one.shape[-1] == n_keys]
        if not fitting:
            longer = next((one for one in found if one.shape[-1] > n_keys), None)
            if longer is not None:
                raise self._cached(*longer.shape[-2:])
            raise UnsupportedModel(
                f"hook_pattern of {self._site.label} is observe-only in this model, and no pattern "
                f"of shape {(z.shape[0], z.shape[2], z.shape[1], n_keys)} was found in the "
                "attention that is running, so it cannot be changed. Load it with "
                "attn_implementation='eager' and without torch.compile, or as a "
                "HookedTransformer (TransformerLens 2 or 3)."
            )
        now.pattern = min(
            fitting, key=lambda one: float(self._misfit(one, now).max().nan_to_num(1))
        )
        self._check(now.pattern, now)
        return now.pattern if ledger.pattern is None else now.pattern + ledger.pattern

    def _at_pattern(self, pattern: Tensor, hook: Any) -> None:  # noqa: ARG002  TransformerLens passes it by name
        now, label = self._pass, self._site.label
        if now is None or now.name is None:
            raise UnsupportedModel(
                f"hook_pattern of {label} is observe-only in this model, and its hook_v and "
                f"hook_z did not fire before it, so {self._meant[0]} through z either. Load the "
                "model as a HookedTransformer (TransformerLens 2 or 3)."
            )
        if now.checked:
            return  # the same hooks were attached twice
        now.checked = True
        now.ledger = None  # changes are over; its other holders let go of it here too
        n_queries, n_keys = pattern.shape[-2:]
        if n_keys != now.values.shape[1]:
            if now.z is None and self._changes_nothing(pattern):
                return
            raise self._cached(n_queries, n_keys)
        if now.misfit is not None:
            raise now.misfit
        if now.pattern is not None and _same(now.pattern, pattern):
            return  # checked when it was found
        if now.z is not None:
            self._check(pattern, now)
        if now.pattern is not None:
            raise UnsupportedModel(
                f"hook_pattern of {self._site.label} is observe-only in this model and shows "
                "another pattern than the one that was cut. Either another hook edits "
                f"hook_pattern, which changes nothing in this model: leave it out, or put the "
                f"{self._what} before it. Or the model shows something else than it uses."
            )

    def _changes_nothing(self, pattern: Tensor) -> bool:
        return self._difference(pattern.shape, pattern.device, lambda: pattern) is None

    def _cached(self, n_queries: int, n_keys: int) -> UnsupportedModel:
        return UnsupportedModel(
            f"found {n_queries} queries and {n_keys} keys at {self._site.label}: a key/value cache "
            "holds earlier tokens, whose values are not seen. This model only shows its "
            f"pattern (observe-only), so {self._meant[1]} through z, which needs them. Generate "
            "with use_past_kv_cache=False."
        )

    def _at_block_output(self, residual: Tensor, hook: Any) -> None:  # noqa: ARG002  TransformerLens passes it by name
        now, self._pass = self._pass, None
        if now is not None and not now.checked:
            raise UnsupportedModel(
                f"hook_pattern of {self._site.label} did not fire, so {self._meant[2]} through z "
                "cannot be checked. The model probably runs fused attention: load it with "
                "attn_implementation='eager'."
            )

    @property
    def _meant(self) -> tuple[str, str, str]:
        if self._what == "patch":
            return "maps cannot be added", "maps are added", "an addition"
        return "edges cannot be cut", "edges are cut", "a cut"

    def _misfit(self, pattern: Tensor, now: _Pass) -> Tensor:
        """Error of A V for each example and head, relative to z."""
        assert now.z is not None
        gate = None if now.gate is None else now.gate.detach()
        product = attention_output(pattern.detach(), now.values.detach(), gate)
        z = now.z.to(product.dtype)
        difference = (product - z).norm(dim=(1, 3))
        size = torch.maximum(product.norm(dim=(1, 3)), z.norm(dim=(1, 3)))
        return torch.where(difference == 0, 0.0, difference / size)

    def _check(self, pattern: Tensor, now: _Pass) -> None:
        misfit = self._misfit(pattern, now)
        tolerance = _TOLERANCE.get(pattern.dtype, _TOLERANCE_OTHERWISE)
        if bool((misfit <= tolerance).all()):
            return
        meaning = "adding maps through z would not be adding them to the pattern"
        if self._what == "cut":
            meaning = "cutting edges through z would not be cutting them in the pattern"
        raise UnsupportedModel(
            f"hook_pattern of {self._site.label} is observe-only in this model, and pattern "
            f"times values differs from z by {float(misfit.max()):.1%} of its size, so {meaning}. "
            "Either the model gates or normalises z, or another hook edits hook_v or hook_z: put "
            f"the {self._what} before hooks that edit z, and after hooks that edit v."
        )


def _before(z: Tensor, ledger: _Ledger) -> Tensor:
    """z as the model made it."""
    return z.detach() if ledger.z is None else z.detach() - ledger.z


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.detach(), b.detach())
