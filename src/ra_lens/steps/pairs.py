"""`pulls`: queries and keys that the loss draws together or apart, before and after a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from ra_lens.cache import RACache
from ra_lens.errors import BadInput
from ra_lens.head_maps import kept_tokens, read_example, read_head
from ra_lens.head_names import Head
from ra_lens.model import Site
from ra_lens.numbers import Real, Whole, real, whole
from ra_lens.prompts import PromptInput
from ra_lens.steps.again import RunOptions, run_again
from ra_lens.steps.gradient import gradient_step
from ra_lens.text import label

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Pull:
    """What the loss wants of one query and one key of a head, and what a step did to them.

    Attributes:
        layer: Index of the layer.
        head: Index of the head.
        query: Position of the token that looks, within its prompt.
        key: Position of the token looked at.
        ra: R, ∂L/∂(q·k). Negative: descent draws the two together.
        pattern: A, the attention there; NaN where it was not kept.
        product: q·k, as they enter the scores.
        cosine: Of the angle between them.
        predicted: Change of q·k after the step, to first order: Δq·k + q·Δk. NaN without a step,
            and so are the next two.
        product_after: q·k after it.
        cosine_after: Of the angle then.
        query_token: The token that looks; `#3` where the cache was not told.
        key_token: The token looked at.
        example: Which prompt of several.
    """

    layer: int
    head: int
    query: int
    key: int
    ra: float
    pattern: float
    product: float
    cosine: float
    predicted: float = float("nan")
    product_after: float = float("nan")
    cosine_after: float = float("nan")
    query_token: str = ""
    key_token: str = ""
    example: int = 0

    @property
    def together(self) -> bool:
        """Whether descent is asked to draw query and key together (R < 0)."""
        return self.ra < 0

    @property
    def change(self) -> float:
        """Change of q·k by the step, as measured."""
        return self.product_after - self.product

    def __str__(self) -> str:
        """Spell the pair, what is asked for, and what happened."""
        query, key = (
            f"{label(token)} ({at})" if token else str(at)
            for token, at in ((self.query_token, self.query), (self.key_token, self.key))
        )
        wish = "together" if self.together else "apart"
        text = f"{query} → {key}: R {self.ra:+.3g} ({wish}), q·k {self.product:.4g}"
        if self.product_after == self.product_after:
            text += f" → {self.product_after:.4g}"
        text += f", cosine {self.cosine:.3f}"
        return text + (f" → {self.cosine_after:.3f}" * (self.cosine_after == self.cosine_after))


class Pulls(Sequence[Pull]):
    """Pairs of one head in the order of |R|, as `pulls` gives them.

    Attributes:
        label: The head, `L5H3`.
        eta: Size of the step; None where none was taken.
    """

    def __init__(self, pairs: Iterable[Pull], label: str, eta: float | None) -> None:
        """Hold the pairs of the head called `label`, after a step of size `eta`."""
        self._pairs, self.label, self.eta = tuple(pairs), label, eta

    @overload
    def __getitem__(self, index: int) -> Pull: ...
    @overload
    def __getitem__(self, index: slice) -> Pulls: ...
    def __getitem__(self, index: int | slice) -> Pull | Pulls:
        """Give one pair, or some of them."""
        found = self._pairs[index]
        return Pulls(found, self.label, self.eta) if isinstance(found, tuple) else found

    def __len__(self) -> int:
        """Give the number of pairs."""
        return len(self._pairs)

    def __iter__(self) -> Iterator[Pull]:
        """Iterate over the pairs in their order."""
        return iter(self._pairs)

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate one row per pair."""
        import pandas as pd  # late, as it takes long to import

        return pd.DataFrame([asdict(pair) for pair in self])

    def __repr__(self) -> str:
        """List the pairs, a line each."""
        step = "" if self.eta is None else f", before and after a step of {self.eta:.4g}"
        return "\n".join([f"Pulls of {self.label}: {len(self)} pairs{step}", *map(str, self)])


def pulls(
    ra: RACache,
    head: Head,
    *,
    example: Whole = 0,
    k: Whole = 20,
    eta: Real | None = None,
    model: nn.Module | None = None,
    input: PromptInput | None = None,
    **options: Unpack[RunOptions],
) -> Pulls:
    """Queries and keys of a head that the loss draws together, and those it drives apart.

    R is the gradient at q·k: descent raises the product of a pair with R < 0. With `eta` the step
    is really taken, on W_Q and W_K of this head for this example's loss: the model runs with
    `gradient_step` on the same prompts, and q and k are read off again as they enter their product,
    rotated, normalised and scaled as the model does it. What a pair does then is not decided by
    its R alone, because one step moves all tokens' queries and keys at once.

    Args:
        ra: A run with `vectors=True`, or at least `query` and `key`; with `eta` also `query_in`,
            `q_grad`, `key_in` and `k_grad`.
        head: `"L2H3"`, `(layer, head)` or a `HeadScore`.
        example: Which prompt.
        k: How many pairs at most; those with R = 0 are none.
        eta: Size of a step to take. Default: none is taken. Costs a forward pass of all prompts and
            a backward pass down to this layer.
        model: The model, for the step.
        input: The prompts that `ra` was made from, for the step.
        **options: As they were given to `run_with_ra`: `attention_mask`, `prepend_bos`,
            `padding_side`, `decoder_input`; and `target`, where it was appended to the prompts.

    Returns:
        Pairs, the largest |R| first.

    Raises:
        BadInput: a head or example that is not there, a step without a model, or other prompts.
        NotStored: maps or vectors that were not kept.
        UnsupportedModel: a step that cannot be taken; see `gradient_step`.
    """
    layer, index = read_head(ra, head)
    site, one = ra.sites[layer], read_example(ra, example)
    k = whole("k", k, least=1)
    size = None if eta is None else real("eta", eta)
    r = _of_one(ra, ra["ra", layer], one)[index]
    no_pattern = torch.full_like(r, float("nan"))
    pattern = (
        _of_one(ra, ra["pattern", layer], one)[index] if ("pattern", layer) in ra else no_pattern
    )
    query, key = _query_and_key(ra, site, one, index)
    product, cosine = _product_and_cosine(query, key)
    predicted = product_after = cosine_after = no_pattern
    if size is not None:
        again = _stepped_run(ra, site, index, one, size, model, input, options)
        query_after, key_after = _query_and_key(again, site, one, index)
        product_after, cosine_after = _product_and_cosine(query_after, key_after)
        predicted = (query_after - query) @ key.T + query @ (key_after - key).T
    query_tokens, _, rows = kept_tokens(ra, site.query_side, one, r.shape[0], None)
    key_tokens, _, columns = kept_tokens(ra, site.key_side, one, r.shape[1], None)
    pairs: list[Pull] = []
    tables = {
        "ra": r,
        "pattern": pattern,
        "product": product,
        "cosine": cosine,
        "predicted": predicted,
        "product_after": product_after,
        "cosine_after": cosine_after,
    }
    own = {name: table[rows, columns] for name, table in tables.items()}
    order = own["ra"].abs().flatten().sort(descending=True, stable=True).indices.tolist()
    for row, column in (divmod(place, len(key_tokens)) for place in order[:k]):
        values = {name: float(table[row, column]) for name, table in own.items()}
        if values["ra"] == 0:
            break
        pairs.append(
            Pull(
                layer=layer,
                head=index,
                query=row,
                key=column,
                query_token=query_tokens[row],
                key_token=key_tokens[column],
                example=one,
                **values,
            )
        )
    return Pulls(pairs, f"L{layer}H{index}", size)


def _of_one(ra: RACache, value: Tensor, example: int) -> Tensor:
    return value[example] if ra.has_batch_dim else value


def _query_and_key(
    ra: RACache, site: Site, example: int, head: int
) -> tuple[Float[Tensor, "query d_head"], Float[Tensor, "key d_head"]]:
    query, key = (_of_one(ra, ra[kind, site.layer], example) for kind in ("query", "key"))
    dtype = torch.promote_types(query.dtype, key.dtype)
    return query[:, head].to(dtype), key[:, site.kv_group(head)].to(dtype)


def _product_and_cosine(
    q: Float[Tensor, "query d_head"], key: Float[Tensor, "key d_head"]
) -> tuple[Float[Tensor, "query key"], Float[Tensor, "query key"]]:
    product = q @ key.T
    size = q.norm(dim=-1, keepdim=True) * key.norm(dim=-1)
    return product, product / size.clamp(min=torch.finfo(size.dtype).tiny)


def _stepped_run(
    ra: RACache,
    site: Site,
    head: int,
    example: int,
    eta: float,
    model: nn.Module | None,
    input: PromptInput | None,
    options: RunOptions,
) -> RACache:
    """Queries and keys of a layer after a step on W_Q and W_K of a head."""
    if model is None or input is None:
        missing = "model" if model is None else "input"
        raise BadInput(
            f"found eta={eta:g} without {missing}=; the step is really taken, so give the model "
            "and the prompts that the cache was made from: pulls(ra, head, eta=..., model=model, "
            "input=prompts)."
        )
    of_example = ra.apply_slice_to_batch_dim([example]) if ra.has_batch_dim else ra
    hooks = gradient_step(model, of_example, [(site.layer, head)], eta, weights=("W_Q", "W_K"))
    return run_again(ra, model, input, options, hooks, site, vectors=("query", "key"))
