"""Computing only what is read: logits, and the last block's MLP, at chosen positions.

After the last attention nothing passes from one position to another, so what the last MLP and the
unembedding give elsewhere is never used. Everything else still sees every position.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
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
    with ExitStack() as stack:
        mlp = _last_mlp(model, hook_points)
        if mlp is not None:
            narrow = partial(_at_positions, mlp.forward, positions)
            stack.enter_context(replaced({mlp: narrow}))
        point = hook_points.get("unembed.hook_in")
        if point is not None:  # TransformerBridge
            handle = point.register_forward_hook(lambda _module, _args, x: x[_index(positions, x)])
        else:
            handle = model.unembed.register_forward_pre_hook(
                lambda _module, args: (args[0][_index(positions, args[0])], *args[1:])
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


def _index(positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Index of `positions`, one row of them per row of `x`, on the device of `x`."""
    rows = torch.arange(positions.shape[0], device=x.device)
    return rows.unsqueeze(1), positions.to(x.device)
