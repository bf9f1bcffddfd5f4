"""Forward passes with the steps that nobody reads left out.

Logits, and the last block's MLP, only at chosen positions (`reading_at`). After the last attention
nothing passes from one position to another, so what the last MLP and the unembedding give elsewhere
is never used. Everything else still sees every position.

Functions in fewer steps than the model does them (`fused`). They are the same, so results differ by
rounding. In half precision the model's own steps, each of which rounds, are kept; so are those with
a hook in between.

* `gelu_new` is written as eight operations in Hugging Face and TransformerLens, layer norm as eight
  in TransformerLens, and a backward pass keeps most of what comes between. torch has each in one.
* HookedTransformer copies its unembedding in every forward pass, for the rounding of bfloat16, and
  since TransformerLens 3 the three weights of a gated MLP.

The Hugging Face model inside a TransformerBridge (`without_bridge`). A bridge puts its own
components in the place of the Hugging Face modules, and keeps each module in the component. With
the modules put back for a moment, the model is Hugging Face's own: its logits are what the bridge's
should be. Weight processing (folding, centring) writes to some of the modules, so after it there is
nothing to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ra_lens.tensors import sent

# Hook points that what the last MLP gives has not reached, by how their names begin.
_BEFORE = ("blocks.", "embed.", "pos_embed.", "hook_embed", "hook_pos_embed")


@contextmanager
def reading_at(
    model: Any,
    hook_points: Mapping[str, nn.Module],
    positions: Int[Tensor, "batch read"],
    *,
    in_pieces: bool = False,
) -> Generator[None, None, None]:
    """Compute logits only at `positions` while the context is open: `[batch, read, d_vocab]`.

    The last MLP is left alone where somebody's hook could see what it gives, and where blocks get
    some tokens at a time (`in_pieces`).
    """
    with ExitStack() as stack:
        mlp = None if in_pieces else _last_mlp(model, hook_points)
        if mlp is not None:
            narrow = partial(_at_positions, mlp.forward, positions)
            stack.enter_context(with_forward({mlp: narrow}))
        point: Any = hook_points.get("unembed.hook_in")
        if point is not None:  # TransformerBridge
            handle = point.register_forward_hook(lambda _module, _args, x: at_columns(x, positions))
        else:
            handle = model.unembed.register_forward_pre_hook(
                lambda _module, args: (at_columns(args[0], positions), *args[1:])
            )
        stack.callback(handle.remove)
        yield


def _last_mlp(model: Any, hook_points: Mapping[str, nn.Module]) -> nn.Module | None:
    """The last block's MLP; None if there is none, or if hooks could see what it gives."""
    last = int(model.cfg.n_layers) - 1
    blocks: Any = getattr(model, "blocks", None) or [None] * (last + 1)
    mlp = getattr(blocks[last], "mlp", None)
    if not isinstance(mlp, nn.Module):
        return None

    inside = f"blocks.{last}."
    points = (
        point
        for name, point in hook_points.items()
        if (".attn." not in name if name.startswith(inside) else not name.startswith(_BEFORE))
    )
    return None if any(map(_is_hooked, (blocks[last], *points, *nn.Module.modules(mlp)))) else mlp


def _is_hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def _at_positions(forward: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An MLP's output at `positions`; elsewhere it is 0."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[0] != positions.shape[0]:
        return forward(*args, **kwargs)
    index = _index(positions, x)

    def narrow(value: Any) -> Any:  # Bloom and MPT hand their MLP the residual stream as well
        whole = isinstance(value, Tensor) and value.shape[:2] == x.shape[:2]
        return value[index] if whole else value

    found = forward(*map(narrow, args), **{name: narrow(value) for name, value in kwargs.items()})
    if not isinstance(found, Tensor) or found.shape[:-1] != positions.shape:
        return forward(*args, **kwargs)
    whole = found.new_zeros((*x.shape[:-1], found.shape[-1]))
    # A position that is read twice gets its share from each, and gives its gradient once.
    times = (positions.unsqueeze(-1) == positions.unsqueeze(-2)).sum(dim=-1)
    share = found / times.to(found).unsqueeze(-1)
    return whole.index_put(index, share, accumulate=True)


def at_columns(
    x: Float[Tensor, "batch pos *rest"], columns: Int[Tensor, "batch read"]
) -> Float[Tensor, "batch read *rest"]:
    """What a tensor holds at some columns of each row."""
    return x[_index(columns, x)]


def _index(positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Index of `positions`, one row of them per row of `x`, on the device of `x`."""
    rows = torch.arange(positions.shape[0], device=x.device)
    return rows.unsqueeze(1), sent(positions, x.device)


Function = Callable[[Tensor], Tensor]


@contextmanager
def fused(modules: list[nn.Module]) -> Generator[None, None, None]:
    """Run the modules that have a faster equal as that, while the context is open."""
    with ExitStack() as stack:
        for module in modules:
            for name, faster in _faster_equals(module):
                either = partial(_in_full_precision, faster, getattr(module, name))
                stack.enter_context(with_forward({module: either}, name))
        yield


def _faster_equals(module: Any) -> list[tuple[str, Function]]:
    """Attributes of a module that have a faster equal, and these equals."""
    if "forward" in vars(module):  # somebody's own, as accelerate puts it there
        return []
    some = [_faster_equal(module), _gated_mlp(module)]
    return [found for found in some if found is not None]


def _gated_mlp(module: Any) -> tuple[str, Function] | None:
    """A gated MLP of HookedTransformer, without copies of its weights in another layout."""
    kind = type(module)
    ours = kind.__module__.startswith("transformer_lens.components")
    if not ours or kind.__name__ != "GatedMLP" or module.cfg.is_layer_norm_activation():
        return None

    def forward(x: Tensor) -> Tensor:
        x = x.to(module.W_gate.device)
        gate = module.act_fn(module.hook_pre(functional.linear(x, module.W_gate.T)))
        linear = module.hook_pre_linear(functional.linear(x, module.W_in.T))
        inside = module.hook_post(gate * linear + module.b_in)
        return functional.linear(inside, module.W_out.T, module.b_out)

    return "forward", forward


def _faster_equal(module: Any) -> tuple[str, Function] | None:
    """Attribute of a module that has a faster equal, and that equal."""
    kind = type(module)
    if kind.__name__ == "NewGELUActivation":  # transformers
        return "forward", partial(functional.gelu, approximate="tanh")
    if kind.__name__ == "NormalizationBridge":
        inside = module.original_component
        if type(inside) is not nn.LayerNorm or _is_norm_hooked(module):
            return None
        eps = getattr(module.config, "eps", 1e-5)
        return "_python_norm_forward", lambda x: functional.layer_norm(
            x, x.shape[-1:], module.weight, inside.bias, eps
        )
    if not kind.__module__.startswith("transformer_lens.components"):
        return None
    if getattr(vars(module).get("act_fn"), "__name__", "") == "gelu_new":
        return "act_fn", partial(functional.gelu, approximate="tanh")
    if kind.__name__ in ("LayerNorm", "LayerNormPre"):
        if _is_norm_hooked(module):
            return None
        weight, bias = getattr(module, "w", None), getattr(module, "b", None)
        return "forward", lambda x: functional.layer_norm(x, x.shape[-1:], weight, bias, module.eps)
    if kind.__name__ == "Unembed" and hasattr(module, "hook_in"):  # not in TransformerLens 2
        return "forward", lambda x: module.hook_out(
            functional.linear(module.hook_in(x), module.W_U.T, module.b_U)
        )
    return None


def _in_full_precision(faster: Function, slow: Function, x: Tensor) -> Tensor:
    return (faster if x.dtype in (torch.float32, torch.float64) else slow)(x)


def _is_norm_hooked(norm: Any) -> bool:
    points = (norm.hook_scale, norm.hook_normalized)
    return any(point._forward_hooks or point._backward_hooks for point in points)


def weights_processed(model: Any) -> bool:
    """Whether a bridge has folded or centred its weights."""
    return bool(getattr(model, "_weights_processed", False))


@contextmanager
def without_bridge(inside: nn.Module) -> Generator[None, None, None]:
    """Let the Hugging Face model inside a bridge have its own modules in the context."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def put_back(parent: nn.Module) -> None:
        for name, child in list(parent.named_children()):
            original = getattr(child, "original_component", None)
            if isinstance(original, nn.Module):
                replaced.append((parent, name, child))
                parent._modules[name] = original  # pyright: ignore[reportPrivateUsage]
                child = original
            put_back(child)

    try:
        put_back(inside)
        yield
    finally:
        for parent, name, child in reversed(replaced):
            parent._modules[name] = child  # pyright: ignore[reportPrivateUsage]


@contextmanager
def with_forward(
    functions: Mapping[nn.Module, Callable[..., Any]], name: str = "forward"
) -> Generator[None, None, None]:
    """Let modules have these functions under `name` while the context is open."""
    # On the instance, where others (accelerate, for one) may have put theirs; and not by setattr,
    # which a bridge hands on to the module that it wraps.
    before = {module: vars(module).get(name) for module in functions}
    try:
        for module, function in functions.items():
            vars(module)[name] = function
        yield
    finally:
        for module, own in before.items():
            if own is None:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = own
