"""The matrices of one attention layer, W_Q, W_K, W_V and W_O, where they are used.

What a step of gradient descent changes is what a matrix gives: x W becomes x W − η·x ∂L/∂W. So it
is enough to know where a matrix gives its product, and what it reads meanwhile; no weight is
touched. A bridge has a module for each matrix, also where the model holds three in one. A
HookedTransformer shows what W_Q, W_K and W_V give; behind W_O it has no hook point of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.errors import UnsupportedModel
from ra_lens.model.in_use import argument_in_use
from ra_lens.model.lens import Lens
from ra_lens.model.sites import Site

Matrix = Literal["q", "k", "v", "o"]

_ARGUMENTS: dict[Matrix, str] = {"q": "query_input", "k": "key_input", "v": "value_input"}


def rounding(dtype: torch.dtype) -> float:
    """Largest error of a sum of products in this type, relative to its size: a few roundings."""
    return {torch.bfloat16: 5e-2, torch.float16: 1e-2}.get(dtype, 1e-3)


@dataclass(frozen=True, eq=False, repr=False)
class WeightInUse:
    """Where one matrix of an attention layer gives its product.

    Attributes:
        name: Full hook name of what it gives.
        label: The matrix and its layer, for errors.
        owner: The module whose method is running then.
        argument: Under which name that method was given what the matrix reads; None where it is
            over by then, as behind W_O of a HookedTransformer.
    """

    name: str
    label: str
    owner: nn.Module
    argument: str | None

    def read(self) -> Float[Tensor, "batch pos *head _width"]:
        """What the matrix has read, while a hook of that name is running.

        Raises:
            UnsupportedModel: the model computes the product in another way.
        """
        found = None if self.argument is None else argument_in_use(self.owner, self.argument)
        if found is None:
            raise UnsupportedModel(
                f"what {self.label} reads was not found while {self.name} showed what it gives, so "
                "the step cannot be taken: the model computes this product in another way than by "
                "a module of its own. Switch off use_split_qkv_input and use_attn_in, and "
                "torch.compile."
            )
        return found


def weight_in_use(lens: Lens, site: Site, matrix: Matrix) -> WeightInUse:
    """Find where a matrix of an attention layer is used.

    Raises:
        UnsupportedModel: the layer has no such matrix, shows nothing behind it, or puts something
            else around it.
    """
    label = f"W_{matrix.upper()} of {site.label}"
    attention = lens.module.get_submodule(site.prefix)
    if lens.kind == "HookedTransformer":
        name = f"{site.prefix}.hook_{matrix}"
        if matrix == "o":
            name = f"{site.block}.hook_attn_out"
            if hasattr(lens.module.get_submodule(site.block), "ln1_post"):
                raise UnsupportedModel(
                    f"{lens.name} normalises what attention gives before any hook point shows it, "
                    f"so a step of {label} cannot be taken by hooks. Leave W_O out of weights=, or "
                    "load the model as a TransformerBridge."
                )
        _need_point(lens, name, label)
        found = WeightInUse(name, label, attention, _ARGUMENTS.get(matrix))
    else:
        name = f"{site.prefix}.{matrix}.hook_out"
        _need_point(lens, name, label)
        found = WeightInUse(name, label, attention.get_submodule(matrix), "input")
        _need_linear(found)
    return found


def _need_point(lens: Lens, name: str, label: str) -> None:
    if name not in lens.hook_points:
        raise UnsupportedModel(
            f"{lens.name} has no {name}, where {label} would give its product: in latent attention "
            "(MLA), and where a layer uses the keys and values of another, there is no such matrix."
        )


@torch.no_grad()
def _need_linear(found: WeightInUse) -> None:
    """Refuse a module that does more than multiply with a matrix and add a bias."""
    module = getattr(found.owner, "original_component", None)
    weight, width = getattr(module, "weight", None), _width_read(module)
    if isinstance(module, nn.Module) and isinstance(weight, Tensor) and width:
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        grid = torch.arange(2 * width, device=weight.device).reshape(2, width)
        a, b = torch.sin(grid.float() ** 1.5).to(dtype)
        some = torch.stack([a, b, a + b, torch.zeros_like(a)]).unsqueeze(0)
        given = module.forward(some)  # without the hooks of anyone
        if isinstance(given, Tensor) and given.ndim == 3:
            of_a, of_b, of_both = given[0, :3].float() - given[0, 3].float()
            error = float((of_a + of_b - of_both).norm())
            if error <= rounding(dtype) * float(given[0].float().norm()):
                return
    raise UnsupportedModel(
        f"{found.label} is held by a {type(module).__name__}, which does more than multiply with a "
        "matrix and add a bias (it may round what it reads), so a step of the matrix is not what "
        "hooks could add. Load the model in floating point."
    )


def _width_read(module: object) -> int:
    """How wide what a module reads is: `in_features` of a Linear, `nx` of a Conv1D."""
    for name in ("in_features", "nx"):
        if isinstance(width := getattr(module, name, None), int):
            return width
    return 0
