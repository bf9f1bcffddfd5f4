"""`Lens`: a thin, uniform view of a HookedTransformer or a TransformerBridge.

It tokenises as the model does, runs the forward pass, and names the places where a run attaches
its own module-level hooks. Those are torch hooks on the HookPoint modules, not TransformerLens
hooks: they run before (patterns) or after (residual stream, unembedding) everything the user has
attached, and removing them cannot touch the user's.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.sites.folding import value_biases_folded
from ra_lens.sites.site import Site, find_sites, spell_layers

# Whether hook_pattern is only observed at a layer, as shown by an earlier run of the same model.
_observed: weakref.WeakKeyDictionary[nn.Module, dict[int, bool]] = weakref.WeakKeyDictionary()


Layers = SupportsIndex | Iterable[SupportsIndex] | None


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


class Lens:
    """A TransformerLens model seen through the few operations ra_lens needs."""

    def __init__(
        self, model: nn.Module, kind: Literal["HookedTransformer", "TransformerBridge"]
    ) -> None:
        """Wrap `model`; use `as_lens`."""
        self.module = model
        self.kind = kind
        # Both classes build attributes dynamically; all untyped access goes through this name.
        self._model: Any = model

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
    def name(self) -> str:
        """The model's name, as TransformerLens has it."""
        return str(getattr(self._model.cfg, "model_name", "") or type(self.module).__name__)

    @property
    def n_layers(self) -> int:
        """Layers of the model; those of a hybrid need not all have attention."""
        return int(self._model.cfg.n_layers)

    @property
    def n_ctx(self) -> int:
        """Longest prompt the model takes."""
        return int(self._model.cfg.n_ctx)

    @property
    def d_vocab(self) -> int:
        """Size of the vocabulary."""
        return int(self._model.cfg.d_vocab)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return torch.device(self._model.cfg.device or "cpu")

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, or None."""
        return getattr(self._model, "tokenizer", None)

    @property
    def pad_token_id(self) -> int:
        """Id written at padded positions; what it is never matters, they are masked."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if pad is None else int(pad)

    @property
    def value_biases_folded(self) -> bool:
        """Whether value biases were moved into output biases, so that zeroing z leaves them behind.

        Read from the weights (see `ra_lens.sites.folding`), as they are now.
        """
        return value_biases_folded(self._model, self.sites)

    # ---- text -----------------------------------------------------------------------------------

    def encode(self, text: str, *, prepend_bos: bool | None) -> list[int]:
        """Token ids of a prompt, exactly as the model's own `to_tokens` gives them."""
        self._need_tokenizer()
        options: dict[str, Any] = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        return self._model.to_tokens(text, truncate=False, **options)[0].tolist()

    def encode_fragment(self, text: str) -> list[int]:
        """Token ids of a piece of text in the middle of a prompt: no special tokens."""
        self._need_tokenizer()

        def ids_of(piece: str) -> list[int]:
            return self.tokenizer(piece, add_special_tokens=False)["input_ids"]

        # SentencePiece tokenizers put a space of their own in front of a text, so that " Paris"
        # alone is two tokens. Tokenised after something it is one; what that drops must be blank.
        before, joint, alone = ids_of(":"), ids_of(":" + text), ids_of(text)
        rest = joint[len(before) :]
        if not rest or joint != before + rest or alone[-len(rest) :] != rest:
            return alone
        dropped = "".join(map(self.decode, alone[: -len(rest)]))
        return alone if dropped.replace("▁", "").strip() else rest

    def decode(self, token: int) -> str:
        """Text of one token; `#id` for a model without a tokenizer."""
        if self.tokenizer is None:
            return f"#{token}"
        text = self.tokenizer.batch_decode([[token]], clean_up_tokenization_spaces=False)[0]
        return str(text)

    def decode_text(self, tokens: Sequence[int]) -> str:
        """Text of several tokens together."""
        if self.tokenizer is None:
            return "".join(map(self.decode, tokens))
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def _need_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise BadInput(
                f"{self.name} has no tokenizer, so text cannot be read. Pass token ids "
                "(Int[Tensor, 'batch pos']) as input and ids as target, or set model.tokenizer."
            )

    # ---- running --------------------------------------------------------------------------------

    def forward(
        self, tokens: Int[Tensor, "batch pos"], attention_mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Run the model and return its logits (at the positions kept by `reading`, if any)."""
        options: dict[str, Any] = {}
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
        """Unembed only at `positions` while the context is open (None: everywhere).

        The final normalisation and everything before it still see every position; the logits that
        come back are [batch, read, d_vocab].
        """
        if positions is None:
            yield
            return

        def gather(x: Tensor) -> Tensor:
            index = positions.to(x.device)
            rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
            return x[rows, index]

        def before_module(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (gather(args[0]), *args[1:])

        def after_point(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return gather(output)

        handle: RemovableHandle
        point = self.hook_points.get("unembed.hook_in")
        if point is not None:  # TransformerBridge
            handle = point.register_forward_hook(after_point)
        else:
            handle = self._model.unembed.register_forward_pre_hook(before_module)
        try:
            yield
        finally:
            handle.remove()

    def block_input(self, layer: int) -> nn.Module:
        """The hook point that carries the residual stream into a block."""
        for name in (f"blocks.{layer}.hook_in", f"blocks.{layer}.hook_resid_pre"):
            if name in self.hook_points:
                return self.hook_points[name]
        raise UnsupportedModel(f"{self.name}: block {layer} has no hook point on its input.")

    def block_input_name(self, layer: int) -> str:
        """Name under which TransformerLens's own hooks reach the input of a block."""
        names = (f"blocks.{layer}.hook_in", f"blocks.{layer}.hook_resid_pre")
        return next(name for name in names if name in self.hook_points)

    @contextmanager
    def parameters_frozen(self) -> Generator[None, None, None]:
        """Switch `requires_grad` off on every parameter while the context is open.

        The graph then begins at the first attention layer asked for and holds nothing that only a
        parameter's gradient would need; `.grad` cannot be touched.
        """
        every = [*self.module.parameters(), *nn.Module.parameters(self.module)]
        live = list({id(p): p for p in every if p.requires_grad and p.is_leaf}.values())
        try:
            for parameter in live:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in live:
                parameter.requires_grad_(True)

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
