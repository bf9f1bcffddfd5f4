"""`Lens`: one view of a HookedTransformer or a TransformerBridge.

A Lens knows the model before it runs, tokenises as the model does, runs the forward pass, and names
the places where a run attaches its own module-level hooks. Those are torch hooks on the HookPoint
modules, not TransformerLens hooks: they run before (patterns) or after (residual stream,
unembedding) everything the user has attached, and removing them cannot touch the user's.

It refuses states of a model in which maps would be wrong, or could not be had.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ra_lens.errors import NothingToDifferentiate, UnsupportedModel
from ra_lens.model.attention import find_sites, processing_problems, remarks, value_biases_folded
from ra_lens.model.forward import (
    at_columns,
    fused,
    reading_at,
    weights_processed,
    without_bridge,
)
from ra_lens.model.guards import (
    alone,
    forget_pattern,
    is_hooked_by_a_user,
    tensors_put_back,
    without_hooks,
)
from ra_lens.model.placement import device_of, masks_beside, refuse_misplaced
from ra_lens.model.sites import Site, Sites
from ra_lens.model.tokens import Tokens
from ra_lens.tensors import sent

ModelKind = Literal["HookedTransformer", "TransformerBridge"]
# A language model; a masked one, as BERT; an encoder-decoder, as T5.
Reads = Literal["left to right", "both ways", "input, then answer"]
FwdHooks = Sequence[tuple[Any, Callable[..., Any]]]
"""TransformerLens hooks of one run, as `model.hooks(fwd_hooks=...)` takes them."""
TokensAndMask = tuple[Int[Tensor, "batch source"], Bool[Tensor, "batch source"]]

# Whether hook_pattern is only observed at a layer, as shown by an earlier run of the same model.
_observed: weakref.WeakKeyDictionary[nn.Module, dict[int, bool]] = weakref.WeakKeyDictionary()


class Lens(Tokens):
    """A TransformerLens model seen through the few operations ra_lens needs."""

    def __init__(self, model: nn.Module, kind: ModelKind) -> None:
        """See `model`, which is of this kind; use `as_lens`."""
        super().__init__(model)
        self.kind: ModelKind = kind

    # ---- parts ----------------------------------------------------------------------------------

    @cached_property
    def hook_points(self) -> dict[str, nn.Module]:
        """Hook points by name, aliases included."""
        return dict(self._model.hook_dict)

    @cached_property
    def sites(self) -> Sites:
        """Attention layers by index, in layer order."""
        known: Mapping[int, bool] = _observed.get(self.module, {})
        found = find_sites(self._model, self.hook_points)
        if self.kind == "HookedTransformer":  # its own attention always consumes the hooked tensor
            known = dict.fromkeys(found, False)
        sites = {i: replace(site, observe_only=known.get(i)) for i, site in found.items()}
        # Layers of a hybrid need not all have attention; those of several stacks are counted
        # through, those with attention only.
        one_stack = any(site.prefix.startswith("blocks.") for site in sites.values())
        n_layers = int(self._model.cfg.n_layers) if one_stack else len(sites)
        return Sites(sites, n_layers, noun=f"{self.name} has attention at")

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
        """Modules of the blocks from that of attention layer `layer` on, in running order."""
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

    @cached_property
    def layer_devices(self) -> dict[int, torch.device]:
        """Where each attention layer computes: its maps are made there, its graph is held there."""
        found = {i: self._model.get_submodule(site.prefix) for i, site in self.sites.items()}
        return {i: device_of(attention) or self.device for i, attention in found.items()}

    @property
    def logits_devices(self) -> set[torch.device]:
        """Where logits are: where they are computed, and where a bridge brings them."""
        unembed = getattr(self._model, "unembed", None)
        made = device_of(unembed) if isinstance(unembed, nn.Module) else None
        given = self.layer_devices[min(self.sites)]  # with its index, as `device` need not be
        return {made or given, given if self.kind == "TransformerBridge" else made or given}

    @property
    def _handed_on(self) -> list[nn.Module]:
        """Blocks to which TransformerLens itself brings the residual stream, each on its device."""
        several = int(getattr(self._model.cfg, "n_devices", 1)) > 1
        return list(self._model.blocks) if several and self.kind == "HookedTransformer" else []

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

        Read from the weights (see `ra_lens.model.attention`), as they are now.
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

    # ---- running --------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Bool[Tensor, "batch pos"],
        encoded: TokensAndMask | None = None,
        past: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Run the model and return its logits (at the columns of `running`, if any).

        The mask is True at real tokens. In an encoder-decoder, these are what the decoder reads,
        and `encoded` is what the encoder does. `past` are the model's options for tokens that come
        after others (`ra_lens.model.prefix`), in the place of the mask.
        """
        self.refuse_meta()
        if self._handed_on:
            refuse_misplaced(self._model, self.name)
        options: dict[str, Any] = {}
        if self.reads == "input, then answer":
            if encoded is None:
                raise UnsupportedModel(
                    f"{self.name} is an encoder-decoder, and this reads prompts with a language "
                    "model. Of encoder-decoders run_with_ra gives maps, and patch_hooks adds them."
                )
            options = {"decoder_input": tokens}
            if not bool(attention_mask.all()):
                options["decoder_attention_mask"] = sent(attention_mask.long(), tokens.device)
            tokens, attention_mask = encoded
        if past is not None:
            options.update(past)
        elif self._guesses_mask or not bool(attention_mask.all()):
            options["attention_mask"] = sent(attention_mask.long(), tokens.device)
        # A backward pass puts back what was kept when it is over.
        kept = nullcontext() if torch.is_grad_enabled() else self.tensors_put_back()
        with kept, masks_beside(self._handed_on):
            logits: Tensor = self._model(tokens, return_type="logits", **options)
        self.refuse_meta(logits.device)  # which the configuration may not say
        return logits

    @property
    def _guesses_mask(self) -> bool:
        # HookedTransformer guesses a mask from the token ids when its tokenizer pads left, which
        # mistakes a real end-of-text token for padding: say what is padding instead. A bridge does
        # not, and there is a model that a mask does more to than hide padding.
        left = getattr(self.tokenizer, "padding_side", "right") == "left"
        return left and self.kind == "HookedTransformer"

    def logits_at(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Bool[Tensor, "batch pos"],
        columns: Int[Tensor, "batch read"] | None = None,
        fwd_hooks: FwdHooks = (),
        encoded: TokensAndMask | None = None,
        past: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Run the model once and give its logits at some columns of `tokens`; None: everywhere."""
        with self.running(columns, fwd_hooks) as everywhere:
            logits = self.forward(tokens, attention_mask, encoded, past)
        return at_columns(logits, columns) if everywhere and columns is not None else logits

    def look(
        self,
        keep: Mapping[str, Callable[[Tensor], Tensor]],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Bool[Tensor, "batch pos"],
        columns: Int[Tensor, "batch read"] | None = None,
        encoded: TokensAndMask | None = None,
    ) -> tuple[dict[str, Tensor], Float[Tensor, "batch read d_vocab"]]:
        """Run the model once without gradients; give what hook points showed, and the logits.

        `keep` says, by name of a hook point, what is kept of what it shows after all other hooks.
        Of a layer that runs several times, that of the last time stays.
        """
        shown: dict[str, Tensor] = {}

        def showing(name: str) -> Callable[..., None]:
            def show(value: Tensor, hook: Any) -> None:  # noqa: ARG001  passed by name
                shown[name] = keep[name](value.detach())

            return show

        hooks = [(name, showing(name)) for name in keep]
        with torch.no_grad():
            return shown, self.logits_at(tokens, attention_mask, columns, hooks, encoded)

    @contextmanager
    def running(
        self,
        columns: Int[Tensor, "batch read"] | None,
        fwd_hooks: FwdHooks = (),
        *,
        in_pieces: bool = False,
    ) -> Generator[bool, None, None]:
        """Attach hooks, compute in fewer steps, and logits only at `columns`, in the context.

        Where blocks get some tokens at a time (`ra_lens.model.rows`) they are `in_pieces`. Gives
        whether logits come at every column all the same: where `columns` is None, or where a hook
        waits for them.
        """
        with self.hooks(fwd_hooks), fused(self._modules):
            if columns is None or self.logits_are_hooked:
                yield True
            else:
                points = self.hook_points
                with reading_at(self._model, points, columns, in_pieces=in_pieces):
                    yield False

    def refuse_nan(self, logits: Float[Tensor, "batch read d_vocab"]) -> None:
        """Raise if logits contain NaN."""
        if bool(logits.detach().isnan().any()):
            raise NothingToDifferentiate(
                f"the logits of {self.name} contain NaN at the positions read. Check the weights "
                "and hooks; for float16 models try bfloat16 or float32."
            )

    @contextmanager
    def hooks(self, fwd_hooks: FwdHooks) -> Generator[None, None, None]:
        """Attach TransformerLens forward hooks while the context is open, in one thread at a time.

        Attention layers then keep the tensors that they kept before.
        """
        # HookedTransformer's own context resets this flag, which belongs to the user's hooks.
        was_caching = getattr(self._model, "is_caching", None)
        attentions = set(self._attentions)
        with alone(self._innermost, self.name), tensors_put_back(attentions, attentions):
            if not fwd_hooks:
                yield
                return
            try:
                with self._model.hooks(fwd_hooks=list(fwd_hooks)):
                    yield
            finally:
                if was_caching is not None:
                    self._model.is_caching = was_caching

    def only_run(self) -> AbstractContextManager[None]:
        """Let this be the only run of the model; see `ra_lens.model.guards`."""
        return alone(self._innermost, self.name, run=True)

    def without_hooks(self) -> AbstractContextManager[None]:
        """Leave out the TransformerLens hooks on the model while the context is open."""
        return without_hooks(self.hook_points.values())

    @contextmanager
    def looking(self, looks: Mapping[str, Callable[[Tensor], None]]) -> Generator[None, None, None]:
        """Show functions what reaches the hook points of these names, before any hook sees it."""

        def pre_hook(look: Callable[[Tensor], None]) -> Callable[..., None]:
            return lambda _module, args: look(args[0].detach())

        with ExitStack() as stack:
            for name, look in looks.items():
                point = self.hook_points[name]
                handle = point.register_forward_pre_hook(pre_hook(look), prepend=True)
                stack.callback(handle.remove)
            yield

    @contextmanager
    def no_attention_returned(self) -> Generator[None, None, None]:
        """Let no pattern outlive its layer, where hooks show it without being returned as well.

        A bridge asks the Hugging Face model to return them all at the end, and its attention may
        keep each one in an attribute; see `ra_lens.model.guards`.
        """
        if any(site.observe_only is not False for site in self.sites.values()):
            yield
            return
        configs = {id(c): c for m in self._modules if (c := vars(m).get("config")) is not None}
        asked = [c for c in configs.values() if getattr(c, "output_attentions", False) is True]
        with ExitStack() as stack:
            for attention in self._attentions:
                handle = attention.register_forward_hook(
                    lambda module, _args, _output: forget_pattern(module)
                )
                stack.callback(handle.remove)
            for config in asked:
                config.output_attentions = False
                stack.callback(setattr, config, "output_attentions", True)
            yield

    def tensors_put_back(self) -> AbstractContextManager[None]:
        """Let all modules keep the tensors that they kept before; see `ra_lens.model.guards`."""
        points = {id(point) for point in self.hook_points.values()}  # most modules; they keep none
        modules = (module for module in self._modules if id(module) not in points)
        return tensors_put_back(modules, set(self._attentions))

    def forget_patterns(self) -> None:
        """Let no attention layer keep its last pattern."""
        for attention in self._attentions:
            forget_pattern(attention)

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

    @contextmanager
    def fully_masked_rows_apart(self) -> Generator[None, None, None]:
        """Give no gradient to rows of scores that are −∞ throughout, while the context is open.

        At padding on the left a query sees no key. TransformerBridge 3.9 in compatibility mode sets
        the NaN that the softmax makes of such a row to 0, which says that its gradient is 0; the
        softmax still multiplies by the NaN, and hands it on to every key. Every layer's rows, as
        they hand on to those below.
        """

        def at_scores(_module: nn.Module, args: tuple[Any, ...]) -> None:
            scores: Tensor = args[0]
            if scores.requires_grad:
                # Whether there are any is not asked: a GPU would have to be waited for.
                dead = scores.detach().isneginf().all(dim=-1, keepdim=True)
                scores.register_hook(lambda grad: grad.masked_fill(dead, 0.0))

        with ExitStack() as stack:
            for site in self.sites.values():
                if self.has(site.scores_name):
                    point = self.hook_points[site.scores_name]
                    stack.callback(point.register_forward_pre_hook(at_scores).remove)
            yield

    @torch.no_grad()
    def huggingface_logits(self, tokens: Tensor, decoder_tokens: Tensor | None) -> Tensor | None:
        """Logits of the Hugging Face model inside a bridge; None where there are none to compare.

        The bridge's hooks do not fire.
        """
        if self._innermost is self.module or weights_processed(self._model):
            return None
        inputs = {"input_ids": tokens, "decoder_input_ids": decoder_tokens}
        given = {name: t.to(self.device) for name, t in inputs.items() if t is not None}
        with without_bridge(self._innermost):
            return self._innermost(**given).logits

    def activation_cache(self, maps: dict[str, Tensor], *, has_batch_dim: bool) -> Any:
        """Put maps into a TransformerLens ActivationCache of this model."""
        from transformer_lens import ActivationCache

        return ActivationCache(maps, self._model, has_batch_dim=has_batch_dim)

    # ---- guards ---------------------------------------------------------------------------------

    def refuse_dropout(self) -> None:
        """Raise if a forward pass would draw dropout masks."""
        for name, module in self.module.named_modules():
            if not module.training:
                continue
            rate = module.p if isinstance(module, nn.Dropout) else 0.0
            for attribute in ("attention_dropout", "attn_dropout", "dropout", "hidden_dropout"):
                value = getattr(module, attribute, 0.0)
                rate = max(rate, value if isinstance(value, float) else 0.0)
            if rate > 0:
                raise UnsupportedModel(
                    f"the model is in train mode and {name or type(module).__name__} drops out "
                    f"with probability {rate:g}: dropout acts before hook_pattern, so the map "
                    "would not be the gradient of this loss. Call model.eval() first."
                )

    def refuse_checkpointing(self) -> None:
        """Raise if blocks would run without a graph, and again in the backward pass."""
        for module in self._modules:
            if module.training and getattr(module, "gradient_checkpointing", False):
                raise UnsupportedModel(
                    "the model is in train mode with gradient checkpointing, which runs its blocks "
                    "without gradients, and again in the backward pass. Call model.eval() first, "
                    "or gradient_checkpointing_disable() of the Hugging Face model "
                    "(model.original_model). run_with_ra(recompute=True) saves as much memory."
                )

    def refuse_meta(self, device: torch.device | None = None) -> None:
        """Raise where a forward pass computes nothing: on the meta device."""
        if (device or self.device).type == "meta":
            raise UnsupportedModel(
                f"{self.name} is on the meta device, where tensors have a shape and no values. "
                "Load it with its weights, on a CPU or GPU: ra_lens.load_model(name, device='cpu')."
            )

    def refuse_inference_mode(self) -> None:
        """Raise if tensors made now could never take part in a backward pass."""
        if torch.is_inference_mode_enabled():
            raise UnsupportedModel(
                "found torch.inference_mode(), under which nothing can be differentiated. Use "
                "torch.no_grad() instead (it is allowed around run_with_ra), or leave the context."
            )
        if any(p.is_inference() for p in self.module.parameters()):
            raise UnsupportedModel(
                "the model's parameters were created under torch.inference_mode(), so nothing can "
                "be differentiated through them. Load the model outside of that context."
            )


def _switch(parameters: list[tuple[nn.Module, str]], *, on: bool) -> None:
    for module, name in parameters:
        parameter = module._parameters[name]  # pyright: ignore[reportPrivateUsage]
        if parameter is not None:
            parameter.requires_grad_(on)


def as_lens(model: nn.Module) -> Lens:
    """Wrap a TransformerLens model.

    Raises:
        UnsupportedModel: not a HookedTransformer or TransformerBridge, or no hook_pattern.
    """
    kind = _kind_of(model)
    if kind is not None:
        return Lens(model, kind)
    found = f"found a {type(model).__module__}.{type(model).__name__}"
    parts = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    for name, part in parts.items():
        if (kind := _kind_of(part)) is not None:
            raise UnsupportedModel(
                f"{found} around a {kind}. ra_lens attaches hooks to the model itself and runs it, "
                f"without what is around it: give model.{name}."
            )
    inside = next((name for name, part in parts.items() if _is_of(part, "PreTrainedModel")), "")
    raise UnsupportedModel(
        f"{found}; ra_lens reads a TransformerLens HookedTransformer or TransformerBridge. Load "
        "one with ra_lens.load_model(name), or wrap a Hugging Face model with "
        f"TransformerBridge.boot_transformers(name, hf_model=model{inside and '.'}{inside})."
    )


def _kind_of(model: object) -> ModelKind | None:
    if _is_of(model, "TransformerBridge"):
        return "TransformerBridge"
    return "HookedTransformer" if _is_of(model, "HookedTransformer") else None


def _is_of(model: object, class_name: str) -> bool:
    return any(cls.__name__ == class_name for cls in type(model).__mro__)
