"""Computing only what is read: logits, and the last block's MLP, at chosen positions.

After the last attention nothing passes from one position to another, so what the last MLP and the
unembedding give elsewhere is never used. Everything else still sees every position.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ra_lens.replaced import replaced

# Hook points that what the last MLP gives has not reached, by how their names begin.
_BEFORE = ("blocks.", "embed.", "pos_embed.", "hook_embed", "hook_pos_embed")


@contextmanager
def reading_at(
    model: Any, hook_points: Mapping[str, nn.Module], positions: Int[Tensor, "batch read"]
) -> Generator[None, None, None]:
    """Compute logits only at `positions` while the context is open: `[batch, read, d_vocab]`.

    The last MLP is left alone where somebody's hook could see what it gives.
    """
    rows = torch.arange(positions.shape[0]).unsqueeze(1)

    def gather(x: Tensor) -> Tensor:
        return x[rows.to(x.device), positions.to(x.device)]

    def before_unembed(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (gather(args[0]), *args[1:])

    def after_point(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return gather(output)

    with ExitStack() as stack:
        mlp = _last_mlp(model, hook_points)
        if mlp is not None:
            stack.enter_context(_mlp_at(mlp, rows, positions))
        point = hook_points.get("unembed.hook_in")
        if point is not None:  # TransformerBridge
            handle = point.register_forward_hook(after_point)
        else:
            handle = model.unembed.register_forward_pre_hook(before_unembed)
        stack.callback(handle.remove)
        yield


def _last_mlp(model: Any, hook_points: Mapping[str, nn.Module]) -> nn.Module | None:
    """The last block's MLP; None if there is none, or if hooks could see what it gives."""
    last = int(model.cfg.n_layers) - 1
    blocks: Any = getattr(model, "blocks", None) or [None] * (last + 1)
    mlp = getattr(blocks[last], "mlp", None)
    if not isinstance(mlp, nn.Module):
        return None

    def reached(name: str) -> bool:
        in_last = name.startswith(f"blocks.{last}.")
        return ".attn." not in name if in_last else not name.startswith(_BEFORE)

    points = (point for name, point in hook_points.items() if reached(name))
    return None if any(map(_is_hooked, (blocks[last], *points, *nn.Module.modules(mlp)))) else mlp


def _is_hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


@contextmanager
def _mlp_at(mlp: nn.Module, rows: Tensor, positions: Tensor) -> Generator[None, None, None]:
    """Run an MLP at `positions`; elsewhere its output is 0."""
    forward: Any = mlp.forward
    times = (positions.unsqueeze(-1) == positions.unsqueeze(-2)).sum(dim=-1)

    def narrow(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[0] != positions.shape[0]:
            return forward(*args, **kwargs)
        index = rows.to(x.device), positions.to(x.device)
        found = forward(x[index], *args[1:], **kwargs)
        if not isinstance(found, Tensor) or found.shape[:-1] != positions.shape:
            return forward(*args, **kwargs)
        whole = found.new_zeros((*x.shape[:-1], found.shape[-1]))
        # A position that is read twice gets its share from each, and gives its gradient once.
        share = found / times.to(found).unsqueeze(-1)
        return whole.index_put(index, share, accumulate=True)

    with replaced({mlp: narrow}):
        yield
