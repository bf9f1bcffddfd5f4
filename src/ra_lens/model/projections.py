"""Where an attention layer's projections are: what W_Q, W_K, W_V and W_O read and give.

A HookedTransformer's attention is called with its three inputs by name. A bridge has a module for
each projection, whose hook points show what it reads and gives, also where one matrix holds all
three. Latent attention (MLA) has no such matrices.
"""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

from torch import nn

from ra_lens.model.lens import Lens
from ra_lens.model.sites import Site, VectorKind


class Projections:
    """The modules at which the vectors of one attention layer pass; None where there is none."""

    INPUTS: ClassVar[tuple[VectorKind, ...]] = ("query_in", "key_in", "value_in")
    GRADIENTS: ClassVar[dict[str, VectorKind]] = {"q": "q_grad", "k": "k_grad", "v": "v_grad"}

    def __init__(self, lens: Lens, site: Site) -> None:
        """Find them for `site`."""
        self._lens, self._site = lens, site

    @cached_property
    def module(self) -> nn.Module:
        """The attention module."""
        return self._lens.module.get_submodule(self._site.prefix)

    @property
    def reads_by_name(self) -> bool:
        """Whether the module is called with `query_input`, `key_input` and `value_input`."""
        return self._lens.kind == "HookedTransformer"

    def reads(self, kind: VectorKind) -> nn.Module | None:
        """Hook point of what a projection reads."""
        return self._point(f"{kind[0]}.hook_in")

    def gives(self, name: str) -> nn.Module | None:
        """Hook point of what the projection `q`, `k` or `v` gives."""
        return self._point(f"hook_{name}" if self.reads_by_name else f"{name}.hook_out")

    @property
    def z(self) -> nn.Module | None:
        """Hook point of what the heads give to W_O."""
        return self._point("hook_z")

    @property
    def out(self) -> nn.Module | None:
        """What gives the layer's output, after W_O and b_O and before any norm."""
        return self.module if self.reads_by_name else self._point("o.hook_out")

    def _point(self, name: str) -> nn.Module | None:
        return self._lens.hook_points.get(f"{self._site.prefix}.{name}")
