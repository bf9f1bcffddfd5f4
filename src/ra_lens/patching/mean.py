"""Mean maps: what attention patching adds, averaged over examples entry by entry.

A running mean holds one sum per head however many examples go in, so a mean over a thousand
prompts needs the memory of one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from ra_lens.errors import BadInput, NotStored
from ra_lens.model import Sites
from ra_lens.model.sites import MAP_KINDS, read_kind
from ra_lens.numbers import Real
from ra_lens.patching.hooks import HookPairs, PatchOptions, patch_hooks


@dataclass(frozen=True, eq=False)
class MeanMaps:
    """Maps averaged over examples of equal length.

    Attributes:
        sites: The attention layers, by layer.
        count: Number of examples averaged.
    """

    sites: Sites
    count: int
    _maps: dict[str, Tensor] = field(repr=False)

    def __repr__(self) -> str:
        """Say what was averaged."""
        kinds = [
            k for k in MAP_KINDS if any(s.map_name(k) in self._maps for s in self.sites.values())
        ]
        sizes = sorted({" × ".join(map(str, t.shape[-2:])) for t in self._maps.values()})
        heads = sorted({site.n_heads for site in self.sites.values()})
        n_bytes = sum(t.nbytes for t in self._maps.values())
        return (
            f"MeanMaps of {self.count} prompt{'s' * (self.count != 1)}: layers "
            f"{self.sites.spell()}, {' or '.join(map(str, heads))} heads, "
            f"{' or '.join(sizes)} tokens ({', '.join(kinds)}, {n_bytes / 1e6:.2f} MB)"
        )

    def __getitem__(self, key: str | tuple[str, SupportsIndex]) -> Float[Tensor, "head query key"]:
        """Give a mean map by name, as in `RACache`.

        Raises:
            NotStored: that map was not averaged.
        """
        name = self.sites.name(key)
        if name not in self._maps:
            raise NotStored(f"{key!r} is not among the mean maps: {', '.join(self._maps)}.")
        return self._maps[name]

    def patch_hooks(
        self, *, scale: Real, kind: str = "ra", **options: Unpack[PatchOptions]
    ) -> HookPairs:
        """Forward hooks that add `scale` times the mean maps to the pattern: A' = A + scale · map.

        They work in `model.hooks`, `run_with_hooks`, `run_with_ra` and `model.generate`.

        Args:
            scale: Factor; the paper uses −30 for RA (a descent step) and +1 for `pattern`.
            kind: `"ra"` or `"pattern"`.
            options: Those of `ra_lens.patch_hooks`, which tells what they do: `heads`, `layers`,
                `rows`, `align`, `renormalise`, `at`, `attention_mask`.

        Returns:
            `(hook name, hook)` pairs.

        Raises:
            NotStored: that kind was not averaged.
            BadInput: options that cannot be used, or heads, layers or rows there are no maps for.
            UnsupportedModel: a layer where this cannot be added exactly.
        """
        return patch_hooks(self.by_layer(kind), self.sites, scale=scale, **options)

    def by_layer(self, kind: str = "ra") -> dict[int, Float[Tensor, "head query key"]]:
        """Give the mean maps of one kind by layer.

        Raises:
            NotStored: that kind was not averaged.
        """
        names = {layer: s.map_name(read_kind(kind)) for layer, s in self.sites.items()}
        maps = {layer: self._maps[name] for layer, name in names.items() if name in self._maps}
        if not maps:
            raise NotStored(f"found no mean maps of kind {kind!r}: {', '.join(self._maps)}.")
        return maps


@dataclass(eq=False)
class RunningMean:
    """Sums of maps, fed batch by batch; in float32 at least, whatever the mean is given in."""

    sites: Sites
    count: int = 0
    dtype: torch.dtype | None = None
    _sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)

    def add(
        self,
        name: str,
        value: Float[Tensor, "batch head query key"],
        device: str | torch.device | None = None,
    ) -> None:
        """Add the maps of one batch under their full name; the caller raises `count`.

        They are summed where they are, and only their sum moves to `device`.
        """
        total = value.sum(dim=0, dtype=torch.promote_types(value.dtype, torch.float32))
        total = total.to(device=device)
        if name in self._sums:
            if self._sums[name].shape != total.shape:
                raise BadInput(
                    f"found maps of {total.shape[-1]} tokens after maps of "
                    f"{self._sums[name].shape[-1]}; a mean needs prompts of equal length."
                )
            total = self._sums[name] + total
        self._sums[name] = total

    def items(self) -> Iterable[tuple[str, Tensor]]:
        """Full names and sums."""
        return self._sums.items()

    def include(self, other: RunningMean) -> None:
        """Add what another one has added; the caller raises `count`."""
        for name, total in other.items():
            self.add(name, total.unsqueeze(0))

    def to(self, where: torch.device | torch.dtype) -> RunningMean:
        """Move the sums, or have the mean given in another dtype."""
        if isinstance(where, torch.dtype):
            return replace(self, dtype=where)
        return replace(self, _sums={name: t.to(where) for name, t in self._sums.items()})

    def result(self) -> MeanMaps:
        """Give the mean of everything added so far."""
        sums = {name: self._sums[name] for name in self.sites.in_order(self._sums)}
        means = {name: (t / self.count).to(dtype=self.dtype) for name, t in sums.items()}
        return MeanMaps(self.sites, self.count, means)
