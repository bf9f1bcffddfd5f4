"""`Lens`: one view of a HookedTransformer or a TransformerBridge.

A Lens knows the model before it runs, tokenises as the model does, runs the forward pass, and names
the places where a run attaches its own module-level hooks. Those are torch hooks on the HookPoint
modules, not TransformerLens hooks: they run before (patterns) or after (residual stream,
unembedding) everything the user has attached, and removing them cannot touch the user's.
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

from ra_lens.errors import BadInput, UnsupportedModel
from ra_lens.model.attention import find_sites, processing_problems, remarks, value_biases_folded
from ra_lens.model.forward import (
    huggingface_logits,
    lean,
    no_attention_returned,
    reading_at,
    weights_processed,
)
from ra_lens.model.guards import (
    alone,
    forget_pattern,
    fully_masked_rows_apart,
    is_hooked_by_a_user,
    refuse_checkpointing,
    refuse_dropout,
    refuse_inference_mode,
    refuse_meta,
    tensors_put_back,
    without_hooks,
)
from ra_lens.model.sites import Site, Sites
from ra_lens.text import bytes_of, isolated, pieces_as_read, whole_text


class Reader:
    """The tokenizer of a TransformerLens model."""

    def __init__(self, model: nn.Module) -> None:
        """Read as `model` does."""
        self.module = model
        # Both classes build attributes dynamically; all untyped access goes through this name.
        self._model: Any = model

    @property
    def name(self) -> str:
        """The model's name, as TransformerLens has it."""
        return str(getattr(self._model.cfg, "model_name", "") or type(self.module).__name__)

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
    def unknown_token_id(self) -> int | None:
        """Id of words that the tokenizer does not know; None where it knows them all.

        Tokenizers whose unknown token is also BOS or EOS know every text.
        """
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        ends = {getattr(self.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
        return None if unknown in ends else unknown

    def unknown_words(self, text: str) -> list[str]:
        """Words of a text that the tokenizer reads as its unknown token, each once."""
        unknown = self.unknown_token_id
        if unknown is None:
            return []
        if not getattr(self.tokenizer, "is_fast", False):
            words = [word for word in text.split() if unknown in self.encode_fragment(word)]
            return list(dict.fromkeys(words))
        read = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        places = zip(read["input_ids"], read["offset_mapping"], strict=True)
        words = [text[start:end] for token, (start, end) in places if token == unknown]
        return list(dict.fromkeys(word.strip() or repr(word) for word in words))

    def describe_unknown(self, text: str) -> str:
        """Name the unknown words of a text and what they are read as; empty where all are known."""
        words = self.unknown_words(text)
        if not words:
            return ""
        named = ", ".join(isolated(repr(word)) for word in words[:8])
        named += f" and {len(words) - 8} more" * (len(words) > 8)
        it = "them" if len(words) > 1 else "it"
        return f"{named}; its tokenizer reads {it} as {self.tokenizer.unk_token}"

    def encode(self, text: str, *, prepend_bos: bool | None) -> list[int]:
        """Token ids of a prompt, exactly as the model's own `to_tokens` gives them."""
        self._need_tokenizer()
        options: dict[str, Any] = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
        return self._model.to_tokens(whole_text("text", text), truncate=False, **options)[
            0
        ].tolist()

    def encode_fragment(self, text: str) -> list[int]:
        """Token ids of a piece of text in the middle of a prompt: no special tokens."""
        self._need_tokenizer()

        def ids_of(piece: str) -> list[int]:
            return self.tokenizer(piece, add_special_tokens=False)["input_ids"]

        # SentencePiece tokenizers put a space of their own in front of a text, so that " Paris"
        # alone is two tokens. Tokenised after something it is one; what that drops must be blank.
        text = whole_text("text", text)
        before, joint, alone = ids_of(":"), ids_of(":" + text), ids_of(text)
        rest = joint[len(before) :]
        if not rest or joint != before + rest or alone[-len(rest) :] != rest:
            return alone
        dropped = "".join(map(self.decode, alone[: -len(rest)]))
        return alone if dropped.replace("▁", "").strip() else rest

    def decode(self, token: int) -> str:
        """Text of one token by itself, as `decode_each` writes it."""
        return self.decode_each([token])[0]

    def decode_each(self, tokens: Sequence[int]) -> tuple[str, ...]:
        """Text of each token of a sequence; `#id` for a model without a tokenizer.

        Where a character is cut over several tokens, it stands with the one that completes it, and
        the others show their bytes: `⟨E2 9C⟩`.
        """
        if self.tokenizer is None:
            return tuple(f"#{token}" for token in tokens)
        tokenizer = self.tokenizer
        names = tokenizer.convert_ids_to_tokens(list(tokens))
        added = tokenizer.get_added_vocab()
        pieces: list[bytes] = []
        for token, name in zip(tokens, names, strict=True):
            text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
            pieces.append(bytes_of(name, text, added=name in added))
        return pieces_as_read(pieces)

    def decode_text(self, tokens: Sequence[int]) -> str:
        """Text of several tokens together; bytes where one alone is less than a character."""
        if self.tokenizer is None or len(tokens) == 1:
            return "".join(self.decode_each(tokens))
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def _need_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise BadInput(
                f"{self.name} has no tokenizer, so text cannot be read. Pass token ids "
                "(Int[Tensor, 'batch pos']) as input and ids as target, or set model.tokenizer."
            )


# Whether hook_pattern is only observed at a layer, as shown by an earlier run of the same model.
_observed: weakref.WeakKeyDictionary[nn.Module, dict[int, bool]] = weakref.WeakKeyDictionary()
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
    def reading(self, positions: Int[Tensor, "batch read"] | None) -> Generator[None, None, None]:
        """Compute logits only at `positions` while the context is open (None: everywhere).

        They come back as [batch, read, d_vocab]. See `ra_lens.model.forward`.
        """
        if positions is None:
            yield
            return

        with reading_at(self._model, self.hook_points, positions):
            yield

    def lean(self) -> AbstractContextManager[None]:
        """Compute some functions in fewer steps; see `ra_lens.model.forward`."""
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

    def fully_masked_rows_apart(self) -> AbstractContextManager[None]:
        """See `ra_lens.model.guards`; every layer's, as they hand on to those below."""
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
