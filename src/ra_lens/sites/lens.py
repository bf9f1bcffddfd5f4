"""`Lens`: a thin, uniform view of a HookedTransformer or a TransformerBridge.

It tokenises as the model does, runs the forward pass, and names the places where a run attaches
its own module-level hooks. Those are torch hooks on the HookPoint modules, not TransformerLens
hooks: they run before (patterns) or after (residual stream, unembedding) everything the user has
attached, and removing them cannot touch the user's.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.sites.facts import processing_problems, remarks
from ra_lens.sites.find import find_sites
from ra_lens.sites.folding import value_biases_folded
from ra_lens.sites.guards import (
    fully_masked_rows_apart,
    refuse_dropout,
    refuse_inference_mode,
)
from ra_lens.sites.lean import lean, no_attention_returned
from ra_lens.sites.plain import huggingface_logits, weights_processed
from ra_lens.sites.reader import Reader
from ra_lens.sites.reading import reading_at
from ra_lens.sites.site import Site, spell_layers

# Whether hook_pattern is only observed at a layer, as shown by an earlier run of the same model.
_observed: weakref.WeakKeyDictionary[nn.Module, dict[int, bool]] = weakref.WeakKeyDictionary()


Layers = SupportsIndex | Iterable[SupportsIndex] | None
# A language model; a masked one, as BERT; an encoder-decoder, as T5.
Reads = Literal["left to right", "both ways", "input, then answer"]


def as_lens(model: nn.Module) -> Lens:
    """Wrap a TransformerLens model.

    Raises:
        UnsupportedModel: not a HookedTransformer or TransformerBridge, or no hook_pattern.
    """
    mro = {cls.__name__ for cls in type(model).__mro__}
    if "TransformerBridge" in mro:
        return Lens(model, "TransformerBridge")
    if "HookedTransformer" in mro:
        return Lens(model, "HookedTransformer")
    raise UnsupportedModel(
        f"found a {type(model).__module__}.{type(model).__name__}; ra_lens reads a TransformerLens "
        "HookedTransformer or TransformerBridge. Load one with ra_lens.load_model(name), or wrap "
        "a Hugging Face model with TransformerBridge.boot_transformers(name, hf_model=model)."
    )


class Lens(Reader):
    """A TransformerLens model seen through the few operations ra_lens needs."""

    def __init__(
        self, model: nn.Module, kind: Literal["HookedTransformer", "TransformerBridge"]
    ) -> None:
        """Wrap `model`; use `as_lens`."""
        super().__init__(model)
        self.kind = kind

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
        given = list(layers) if isinstance(layers, Iterable) else [layers]
        wanted = [operator.index(i) for i in given]
        chosen = [layer + self.n_layers if layer < 0 else layer for layer in wanted]
        unknown = [w for w, layer in zip(wanted, chosen, strict=True) if layer not in self.sites]
        if unknown or not chosen:
            raise BadInput(
                f"found layers={unknown or wanted}; {self.name} has attention at layers "
                f"{spell_layers(list(self.sites))}. Give one or several of these; negative counts "
                "from the end."
            )
        return {layer: self.sites[layer] for layer in sorted(set(chosen))}

    def activation_cache(self, maps: dict[str, Tensor], *, has_batch_dim: bool) -> Any:
        """Put maps into a TransformerLens ActivationCache of this model."""
        from transformer_lens import ActivationCache

        return ActivationCache(maps, self._model, has_batch_dim=has_batch_dim)

    def learn_route(self, layer: int, *, observe_only: bool) -> None:
        """Remember, for later runs of this model, whether hook_pattern of a layer is observed."""
        _observed.setdefault(self.module, {})[layer] = observe_only
        self.sites[layer] = replace(self.sites[layer], observe_only=observe_only)

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
    def value_biases_folded(self) -> bool:
        """Whether value biases were moved into output biases, so that zeroing z leaves them behind.

        Read from the weights (see `ra_lens.sites.folding`), as they are now.
        """
        return value_biases_folded(self._model, [site.prefix for site in self.sites.values()])

    @property
    def dtype(self) -> torch.dtype:
        """Data type that the model computes in."""
        floating = (p.dtype for p in nn.Module.parameters(self.module) if p.is_floating_point())
        return next(floating, torch.float32)

    @property
    def state(self) -> tuple[object, ...]:
        """What a model can be turned into while it stays the same object."""
        compatible = getattr(self._model, "compatibility_mode", False)
        return bool(compatible), weights_processed(self._model), self.dtype, str(self.device)

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts, judged by the names of its modules' classes."""
        names = {type(module).__name__ for module in self.module.modules()}
        return any(word in name for name in names for word in ("Expert", "MoE", "Moe", "Router"))

    def has(self, hook_name: str) -> bool:
        """Whether there is such a hook point."""
        return hook_name in self.hook_points

    def remarks(self, site: Site) -> list[str]:
        """What is unusual about an attention layer, as its module says."""
        return remarks(self._model.get_submodule(site.prefix), self._model.cfg)

    @property
    def processing_problems(self) -> list[str]:
        """What weight processing has broken in this model, as far as is known."""
        processed = self.kind == "TransformerBridge" and weights_processed(self._model)
        attention = (self._model.get_submodule(site.prefix) for site in self.sites.values())
        return processing_problems(attention) if processed else []

    def huggingface_logits(self, tokens: Tensor, decoder_tokens: Tensor | None) -> Tensor | None:
        """Logits of the Hugging Face model inside a bridge; None where there are none."""
        inputs = {"input_ids": tokens, "decoder_input_ids": decoder_tokens}
        given = {name: t.to(self.device) for name, t in inputs.items() if t is not None}
        return huggingface_logits(self._model, **given)

    # ---- running --------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Bool[Tensor, "batch pos"],
        encoded: tuple[Int[Tensor, "batch source"], Bool[Tensor, "batch source"]] | None = None,
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Run the model and return its logits (at the positions kept by `reading`, if any).

        Args:
            tokens: What is read; what the decoder reads in an encoder-decoder.
            attention_mask: True at real tokens.
            encoded: Tokens and mask of an encoder-decoder's encoder.

        Raises:
            UnsupportedModel: an encoder-decoder, and nothing for its encoder.
        """
        options: dict[str, Any] = {}
        if self.reads == "input, then answer":
            if encoded is None:
                raise UnsupportedModel(
                    f"{self.name} is an encoder-decoder, and this reads prompts with a language "
                    "model. Of encoder-decoders run_with_ra gives maps, and patch_hooks adds them."
                )
            options = {"decoder_input": tokens}
            if not bool(attention_mask.all()):
                options["decoder_attention_mask"] = attention_mask.long()
            tokens, attention_mask = encoded
        guesses_mask = getattr(self.tokenizer, "padding_side", "right") == "left"
        if guesses_mask or not bool(attention_mask.all()):
            # HookedTransformer guesses a mask from the token ids when its tokenizer pads left,
            # which mistakes a real end-of-text token for padding: say what is padding instead.
            options["attention_mask"] = attention_mask.long()
        return self._model(tokens, return_type="logits", **options)

    @contextmanager
    def hooks(self, fwd_hooks: list[tuple[Any, Any]]) -> Generator[None, None, None]:
        """Attach TransformerLens forward hooks while the context is open."""
        if not fwd_hooks:
            yield
            return
        # HookedTransformer's own context resets this flag, which belongs to the user's hooks.
        was_caching = getattr(self._model, "is_caching", None)
        try:
            with self._model.hooks(fwd_hooks=fwd_hooks):
                yield
        finally:
            if was_caching is not None:
                self._model.is_caching = was_caching

    @property
    def logits_are_hooked(self) -> bool:
        """Whether a hook of the user's waits where the logits come out, at every position."""
        point: Any = self.hook_points.get("unembed.hook_out")
        return point is not None and bool(point.fwd_hooks)

    @contextmanager
    def reading(self, positions: Int[Tensor, "batch read"] | None) -> Generator[None, None, None]:
        """Compute logits only at `positions` while the context is open (None: everywhere).

        They come back as [batch, read, d_vocab]. See `ra_lens.sites.reading`.
        """
        if positions is None:
            yield
            return

        with reading_at(self._model, self.hook_points, positions):
            yield

    def lean(self) -> AbstractContextManager[None]:
        """Compute some functions in fewer steps; see `ra_lens.sites.lean`."""
        return lean(self._modules)

    @contextmanager
    def no_attention_returned(self) -> Generator[None, None, None]:
        """Let no pattern outlive its layer, where hooks show it without being returned as well."""
        if any(site.observe_only is not False for site in self.sites.values()):
            yield
            return
        attentions = [self._model.get_submodule(site.prefix) for site in self.sites.values()]
        with no_attention_returned(self._modules, attentions):
            yield

    @cached_property
    def _modules(self) -> list[nn.Module]:
        inside = getattr(self._model, "original_model", None)  # which a bridge does not register
        roots = [self.module, *([inside] if isinstance(inside, nn.Module) else [])]
        # A bridge and what it wraps share modules.
        return list({id(m): m for root in roots for m in nn.Module.modules(root)}.values())

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

    def block_input_name(self, site: Site) -> str:
        """Name of the hook point that carries the residual stream into the block of a site."""
        for name in (f"{site.block}.hook_in", f"{site.block}.hook_resid_pre"):
            if name in self.hook_points:
                return name
        raise UnsupportedModel(f"{self.name}: {site.block} has no hook point on its input.")

    @contextmanager
    def parameters_frozen(self) -> Generator[None, None, None]:
        """Switch `requires_grad` off on every parameter while the context is open.

        The graph then begins at the first attention layer asked for and holds nothing that only a
        parameter's gradient would need; `.grad` cannot be touched.
        """
        # By name: a module that is offloaded gets a new parameter each time that it is used.
        live = [
            (module, name)
            for module in self._modules
            for name, parameter in module._parameters.items()  # pyright: ignore[reportPrivateUsage]
            if parameter is not None and parameter.requires_grad and parameter.is_leaf
        ]
        try:
            _switch(live, on=False)
            yield
        finally:
            _switch(live, on=True)

    def fully_masked_rows_apart(self) -> AbstractContextManager[None]:
        """See `ra_lens.sites.guards`; every layer's, as they hand on to those below."""
        names = (f"{site.prefix}.hook_attn_scores" for site in self.sites.values())
        return fully_masked_rows_apart([self.hook_points[name] for name in names if self.has(name)])

    # ---- guards ---------------------------------------------------------------------------------

    def refuse_dropout(self) -> None:
        """Raise if a forward pass would draw dropout masks."""
        refuse_dropout(self.module)

    def refuse_inference_mode(self) -> None:
        """Raise if tensors made now could never take part in a backward pass."""
        refuse_inference_mode(self.module)


def _switch(parameters: list[tuple[nn.Module, str]], *, on: bool) -> None:
    for module, name in parameters:
        parameter = module._parameters[name]  # pyright: ignore[reportPrivateUsage]
        if parameter is not None:
            parameter.requires_grad_(on)
