"""`Described`: what is known of a HookedTransformer or a TransformerBridge before it runs."""

from __future__ import annotations

import reprlib
import weakref
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.numbers import Wholes, wholes
from ra_lens.sites.facts import processing_problems, remarks
from ra_lens.sites.find import find_sites
from ra_lens.sites.folding import value_biases_folded
from ra_lens.sites.guards import is_hooked_by_a_user
from ra_lens.sites.plain import weights_processed
from ra_lens.sites.reader import Reader
from ra_lens.sites.site import Site, spell_layers

# Whether hook_pattern is only observed at a layer, as shown by an earlier run of the same model.
_observed: weakref.WeakKeyDictionary[nn.Module, dict[int, bool]] = weakref.WeakKeyDictionary()

Layers = Wholes | None
# A language model; a masked one, as BERT; an encoder-decoder, as T5.
Reads = Literal["left to right", "both ways", "input, then answer"]


class Described(Reader):
    """The parts and properties of a TransformerLens model."""

    def __init__(
        self, model: nn.Module, kind: Literal["HookedTransformer", "TransformerBridge"]
    ) -> None:
        """Describe `model`; use `as_lens`."""
        super().__init__(model)
        self.kind = kind

    # ---- parts ----------------------------------------------------------------------------------

    @cached_property
    def hook_points(self) -> dict[str, nn.Module]:
        """Hook points by name, aliases included."""
        return dict(self._model.hook_dict)

    @cached_property
    def sites(self) -> dict[int, Site]:
        """Attention layers by index, in layer order."""
        sites = find_sites(self._model, self.hook_points)
        if self.kind == "HookedTransformer":  # its own attention always consumes the hooked tensor
            return {layer: replace(site, observe_only=False) for layer, site in sites.items()}
        known = _observed.get(self.module, {})
        return {
            layer: replace(site, observe_only=known.get(layer)) for layer, site in sites.items()
        }

    def choose_layers(self, layers: Layers) -> dict[int, Site]:
        """Sites of the layers asked for, in layer order; negative counts from the model's end.

        Raises:
            BadInput: a layer without attention, or none.
        """
        if layers is None:
            return dict(self.sites)
        wanted = wholes("layers", layers)
        chosen = [layer + self.n_layers if layer < 0 else layer for layer in wanted]
        unknown = [w for w, layer in zip(wanted, chosen, strict=True) if layer not in self.sites]
        if unknown:
            found = reprlib.repr(unknown)  # a hundred thousand are not spelled out
            raise BadInput(
                f"found layers={found}; {self.name} has attention at layers "
                f"{spell_layers(list(self.sites))}. Give one or several of these; negative counts "
                "from the end."
            )
        return {layer: self.sites[layer] for layer in sorted(set(chosen))}

    def learn_route(self, layer: int, *, observe_only: bool) -> None:
        """Remember, for later runs of this model, whether hook_pattern of a layer is observed."""
        _observed.setdefault(self.module, {})[layer] = observe_only
        self.sites[layer] = replace(self.sites[layer], observe_only=observe_only)

    def block_input_name(self, site: Site) -> str:
        """Name of the hook point that carries the residual stream into the block of a site."""
        for name in (f"{site.block}.hook_in", f"{site.block}.hook_resid_pre"):
            if name in self.hook_points:
                return name
        raise UnsupportedModel(f"{self.name}: {site.block} has no hook point on its input.")

    def blocks_from(self, layer: int) -> list[nn.Module]:
        """Modules of the blocks from that of attention layer `layer` on, in running order.

        Raises:
            UnsupportedModel: blocks that run more than once.
        """
        sites = [site for i, site in self.sites.items() if i >= layer]
        if any(site.repeated for site in sites):
            raise UnsupportedModel(
                f"{self.name} runs its blocks several times in one forward pass, and the maps are "
                "those of the last time, which recomputing would mix up. Leave recompute=True out."
            )
        names = dict.fromkeys(site.block for site in sites)
        return [self._model.get_submodule(name) for name in names]

    @property
    def _innermost(self) -> nn.Module:
        inside = getattr(self._model, "original_model", None)  # which a bridge does not register
        return inside if isinstance(inside, nn.Module) else self.module

    @cached_property
    def _modules(self) -> list[nn.Module]:
        roots = dict.fromkeys([self.module, self._innermost])
        # A bridge and what it wraps share modules.
        return list({id(m): m for root in roots for m in nn.Module.modules(root)}.values())

    @cached_property
    def _attentions(self) -> list[nn.Module]:
        return [self._model.get_submodule(site.prefix) for site in self.sites.values()]

    # ---- facts ----------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        """Layers of the model; those of a hybrid need not all have attention.

        In a model of several stacks they are its attention layers, counted through.
        """
        one_stack = any(site.prefix.startswith("blocks.") for site in self.sites.values())
        return int(self._model.cfg.n_layers) if one_stack else len(self.sites)

    @cached_property
    def reads(self) -> Reads:
        """How the model comes to its logits."""
        inside = getattr(self._model, "original_model", None)  # a bridge's Hugging Face model
        if getattr(getattr(inside, "config", None), "is_encoder_decoder", False):
            return "input, then answer"
        return "left to right" if any(s.causal for s in self.sites.values()) else "both ways"

    @property
    def decoder_start(self) -> int | None:
        """The token that an encoder-decoder's decoder begins with."""
        config = self._model.original_model.config
        return getattr(config, "decoder_start_token_id", None)

    @property
    def n_ctx(self) -> int:
        """Longest prompt the model takes."""
        return int(self._model.cfg.n_ctx)

    @property
    def d_vocab(self) -> int:
        """Size of the vocabulary."""
        return int(self._model.cfg.d_vocab)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self._model.cfg.d_model)

    @property
    def d_mlp(self) -> int:
        """Width of an MLP; 0 where the model does not say."""
        return int(getattr(self._model.cfg, "d_mlp", None) or 0)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return torch.device(self._model.cfg.device or "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Data type that the model computes in."""
        floating = (p.dtype for p in nn.Module.parameters(self.module) if p.is_floating_point())
        return next(floating, torch.float32)

    @property
    def in_float16(self) -> bool:
        """Whether it computes in float16, in part at least."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            return True
        return any(
            parameter is not None and parameter.dtype == torch.float16
            for module in self._modules
            for parameter in module._parameters.values()  # pyright: ignore[reportPrivateUsage]
        )

    @property
    def is_hooked(self) -> bool:
        """Whether hooks of the user's are on it, on a hook point or on any module."""
        return any(map(is_hooked_by_a_user, self._modules))

    @property
    def has_hooks(self) -> bool:
        """Whether there are TransformerLens hooks on the model, other than permanent ones."""
        points: list[Any] = list(self.hook_points.values())
        return any(not handle.is_permanent for point in points for handle in point.fwd_hooks)

    @property
    def state(self) -> tuple[object, ...]:
        """What a model can be turned into while it stays the same object."""
        compatible = getattr(self._model, "compatibility_mode", False)
        return bool(compatible), weights_processed(self._model), self.dtype, str(self.device)

    @property
    def value_biases_folded(self) -> bool:
        """Whether value biases were moved into output biases, so that zeroing z leaves them behind.

        Read from the weights (see `ra_lens.sites.folding`), as they are now.
        """
        return value_biases_folded(self._model, [site.prefix for site in self.sites.values()])

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts, judged by the names of its modules' classes."""
        names = {type(module).__name__ for module in self.module.modules()}
        return any(word in name for name in names for word in ("Expert", "MoE", "Moe", "Router"))

    def has(self, hook_name: str) -> bool:
        """Whether there is such a hook point."""
        return hook_name in self.hook_points

    @property
    def logits_are_hooked(self) -> bool:
        """Whether a hook of the user's waits where the logits come out, at every position."""
        point: Any = self.hook_points.get("unembed.hook_out")
        return point is not None and bool(point.fwd_hooks)

    def remarks(self, site: Site) -> list[str]:
        """What is unusual about an attention layer, as its module says."""
        return remarks(self._model.get_submodule(site.prefix), self._model.cfg)

    @property
    def processing_problems(self) -> list[str]:
        """What weight processing has broken in this model, as far as is known."""
        processed = self.kind == "TransformerBridge" and weights_processed(self._model)
        attention = (self._model.get_submodule(site.prefix) for site in self.sites.values())
        return processing_problems(attention) if processed else []
