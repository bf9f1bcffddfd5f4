"""`Lens`: a thin, uniform view of a HookedTransformer or a TransformerBridge.

It tokenises as the model does, runs the forward pass, and names the places where a run attaches
its own module-level hooks. Those are torch hooks on the HookPoint modules, not TransformerLens
hooks: they run before (patterns) or after (residual stream, unembedding) everything the user has
attached, and removing them cannot touch the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ra_lens.errors import UnsupportedModel
from ra_lens.sites.alone import alone
from ra_lens.sites.described import Described
from ra_lens.sites.guards import (
    fully_masked_rows_apart,
    refuse_checkpointing,
    refuse_dropout,
    refuse_inference_mode,
    refuse_meta,
    without_hooks,
)
from ra_lens.sites.kept import forget_pattern, tensors_put_back
from ra_lens.sites.lean import lean, no_attention_returned
from ra_lens.sites.plain import huggingface_logits
from ra_lens.sites.reading import reading_at


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


def _kind_of(model: object) -> Literal["HookedTransformer", "TransformerBridge"] | None:
    if _is_of(model, "TransformerBridge"):
        return "TransformerBridge"
    return "HookedTransformer" if _is_of(model, "HookedTransformer") else None


def _is_of(model: object, class_name: str) -> bool:
    return any(cls.__name__ == class_name for cls in type(model).__mro__)


class Lens(Described):
    """A TransformerLens model seen through the few operations ra_lens needs."""

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
            UnsupportedModel: an encoder-decoder, and nothing for its encoder; or no weights.
        """
        self.refuse_meta()
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
        if self._guesses_mask or not bool(attention_mask.all()):
            options["attention_mask"] = attention_mask.long()
        # A backward pass puts back what was kept when it is over.
        kept = nullcontext() if torch.is_grad_enabled() else self.tensors_put_back()
        with kept:
            logits: Tensor = self._model(tokens, return_type="logits", **options)
        refuse_meta(logits.device, self.name)  # which the configuration may not say
        return logits

    @property
    def _guesses_mask(self) -> bool:
        # HookedTransformer guesses a mask from the token ids when its tokenizer pads left, which
        # mistakes a real end-of-text token for padding: say what is padding instead. A bridge does
        # not, and there is a model that a mask does more to than hide padding.
        left = getattr(self.tokenizer, "padding_side", "right") == "left"
        return left and self.kind == "HookedTransformer"

    @contextmanager
    def hooks(self, fwd_hooks: list[tuple[Any, Any]]) -> Generator[None, None, None]:
        """Attach TransformerLens forward hooks while the context is open.

        Attention layers then keep the tensors that they kept before.

        Raises:
            UnsupportedModel: another thread is running this model with hooks of its own.
        """
        # HookedTransformer's own context resets this flag, which belongs to the user's hooks.
        was_caching = getattr(self._model, "is_caching", None)
        attentions = set(self._attentions)
        with alone(self._innermost, self.name), tensors_put_back(attentions, attentions):
            if not fwd_hooks:
                yield
                return
            try:
                with self._model.hooks(fwd_hooks=fwd_hooks):
                    yield
            finally:
                if was_caching is not None:
                    self._model.is_caching = was_caching

    def only_run(self) -> AbstractContextManager[None]:
        """Let this be the only run of the model; see `ra_lens.sites.alone`."""
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
        with no_attention_returned(self._modules, self._attentions):
            yield

    def tensors_put_back(self) -> AbstractContextManager[None]:
        """Let all modules keep the tensors that they kept before; see `ra_lens.sites.kept`."""
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

    def fully_masked_rows_apart(self) -> AbstractContextManager[None]:
        """See `ra_lens.sites.guards`; every layer's, as they hand on to those below."""
        names = (f"{site.prefix}.hook_attn_scores" for site in self.sites.values())
        return fully_masked_rows_apart([self.hook_points[name] for name in names if self.has(name)])

    def huggingface_logits(self, tokens: Tensor, decoder_tokens: Tensor | None) -> Tensor | None:
        """Logits of the Hugging Face model inside a bridge; None where there are none."""
        inputs = {"input_ids": tokens, "decoder_input_ids": decoder_tokens}
        given = {name: t.to(self.device) for name, t in inputs.items() if t is not None}
        return huggingface_logits(self._model, **given)

    def activation_cache(self, maps: dict[str, Tensor], *, has_batch_dim: bool) -> Any:
        """Put maps into a TransformerLens ActivationCache of this model."""
        from transformer_lens import ActivationCache

        return ActivationCache(maps, self._model, has_batch_dim=has_batch_dim)

    # ---- guards ---------------------------------------------------------------------------------

    def refuse_checkpointing(self) -> None:
        """Raise if blocks would run again in the backward pass."""
        refuse_checkpointing(self._modules)

    def refuse_dropout(self) -> None:
        """Raise if a forward pass would draw dropout masks."""
        refuse_dropout(self.module)

    def refuse_meta(self) -> None:
        """Raise if the model has no weights."""
        refuse_meta(self.device, self.name)

    def refuse_inference_mode(self) -> None:
        """Raise if tensors made now could never take part in a backward pass."""
        refuse_inference_mode(self.module)


def _switch(parameters: list[tuple[nn.Module, str]], *, on: bool) -> None:
    for module, name in parameters:
        parameter = module._parameters[name]  # pyright: ignore[reportPrivateUsage]
        if parameter is not None:
            parameter.requires_grad_(on)
