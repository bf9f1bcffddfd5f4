"""The same addition where the model only shows its pattern: through z.

What a head gives to W_O is z = A V, so adding D to the pattern is adding D V to z, exactly. V is
seen at hook_v, before z; the pattern is shown after z. So the addition is made first and checked
as soon as the pattern is there, within the same layer and before anything is returned:

    A V = z    up to rounding, with z as it was before the addition

Where z is multiplied with a gate before hook_z (`Site.gate`), so is D V, and A V in the check. It
fails, and is refused, where z is changed in another way before W_O, where V is something else than
is shown, and where another hook changed V or z in between. Earlier tokens in a key/value cache
are refused too, because their V is not seen, unless nothing was to be added.

Cost: two products of a pattern with the values, and V and z kept until the pattern is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.model import Gate, Site
from ra_lens.model.values import attention_output
from ra_lens.patching.place import Addition, Placed

# Largest error of A V per head, relative to z: a few roundings of A, V and z in that dtype.
# What the check is to find (a gate, another V) is of order 1.
_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TOLERANCE_OTHERWISE = 1e-3

# In float32, as the models do it.
_ACTIVATIONS: dict[Gate, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda gate: gate.float().sigmoid(),
    "softplus": lambda gate: torch.nn.functional.softplus(gate.float()),
}

# Under this name a hook point's own context holds what has been added to z in this pass.
_LEDGER = "ra_lens: added to z"


@dataclass
class _Ledger:
    """What all patches together have added to the z that came with these values."""

    values: Tensor
    total: Tensor | None = None

    def is_of(self, values: Tensor) -> bool:
        # One tensor is handed to every hook, each in a view of its own.
        return self.values.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


@dataclass
class _Pass:
    """One forward pass through the layer."""

    values: Tensor
    gate: Tensor | None = None
    name: str | None = None  # under which hook_z fired first
    z: Tensor | None = None  # as the model made it; None: nothing was added to it
    checked: bool = False
    context: dict[str, _Ledger] | None = None
    misfit: BadInput | None = None


class ThroughZ:
    """Adds one layer's maps through z."""

    def __init__(self, site: Site, addition: Addition) -> None:
        """Add `addition` at `site`."""
        self._site = site
        self._addition = addition
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
                f"at {self._site.label}; [batch, pos, head, d_head] is needed to add maps "
                "through z."
            )
        placed = self._placed(now, z)
        if placed is None:
            return None
        ledger = hook.ctx.get(_LEDGER)
        if ledger is None or not ledger.is_of(now.values):
            ledger = hook.ctx[_LEDGER] = _Ledger(now.values)
        now.context = hook.ctx
        if now.z is None:
            now.z = z.detach() if ledger.total is None else z.detach() - ledger.total
        product = attention_output(placed.addition, now.values, now.gate).to(z.dtype)
        ledger.total = product.detach() + (0 if ledger.total is None else ledger.total)
        return z + product

    def _placed(self, now: _Pass, z: Tensor) -> Placed | None:
        n_examples, n_tokens, n_heads, _ = z.shape
        n_keys = now.values.shape[1]
        try:
            return self._addition.on(n_examples, n_heads, n_tokens, n_keys, z.device)
        except BadInput as misfit:
            # With a key/value cache there are more keys than are seen here: the pattern will tell
            # which of the two it is.
            now.misfit = misfit
            return None

    def _at_pattern(self, pattern: Tensor, hook: Any) -> None:  # noqa: ARG002  TransformerLens passes it by name
        now, label = self._pass, self._site.label
        if now is None or now.name is None:
            raise UnsupportedModel(
                f"hook_pattern of {label} is observe-only in this model, and its hook_v and "
                "hook_z did not fire before it, so maps cannot be added through z either. Load the "
                "model as a HookedTransformer (TransformerLens 2 or 3)."
            )
        if now.checked:
            return  # the same hooks were attached twice
        now.checked = True
        if now.context is not None:
            now.context.pop(_LEDGER, None)
        n_examples, n_heads, n_queries, n_keys = pattern.shape
        if n_keys != now.values.shape[1]:
            shape = (n_examples, n_heads, n_queries, n_keys)
            if now.z is None and self._addition.on(*shape, pattern.device) is None:
                return  # nothing was to be added, and nothing was
            raise UnsupportedModel(
                f"found {n_queries} queries and {n_keys} keys at {label}: a key/value cache "
                "holds earlier tokens, whose values are not seen. This model only shows its "
                "pattern (observe-only), so maps are added through z, which needs them. Generate "
                "with use_past_kv_cache=False."
            )
        if now.misfit is not None:
            raise now.misfit
        if now.z is not None:
            gate = None if now.gate is None else now.gate.detach()
            self._check(
                attention_output(pattern.detach(), now.values.detach(), gate), pattern, now.z
            )

    def _at_block_output(self, residual: Tensor, hook: Any) -> None:  # noqa: ARG002  TransformerLens passes it by name
        now, self._pass = self._pass, None
        if now is not None and not now.checked:
            raise UnsupportedModel(
                f"hook_pattern of {self._site.label} did not fire, so an addition through z "
                "cannot be checked. The model probably runs fused attention: load it with "
                "attn_implementation='eager'."
            )

    def _check(self, product: Tensor, pattern: Tensor, z: Tensor) -> None:
        z = z.to(product.dtype)
        difference = (product - z).norm(dim=(1, 3))
        size = torch.maximum(product.norm(dim=(1, 3)), z.norm(dim=(1, 3)))
        tolerance = _TOLERANCE.get(pattern.dtype, _TOLERANCE_OTHERWISE)
        if bool((difference <= tolerance * size).all()):
            return
        worst = float((difference / size.clamp(min=torch.finfo(size.dtype).tiny)).max())
        raise UnsupportedModel(
            f"hook_pattern of {self._site.label} is observe-only in this model, and pattern "
            f"times values differs from z by {worst:.1%} of its size, so adding maps through z "
            "would not be adding them to the pattern. Either the model gates or normalises z, or "
            "another hook edits hook_v or hook_z: put the patch before hooks that edit z, and "
            "after hooks that edit v."
        )
