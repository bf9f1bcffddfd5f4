"""The paper's vector-Jacobian products of an attention layer, and the gradients of its weights.

With x, q, k, v, A, z and out as in `ra_lens.vectors`, δ the gradient of the loss at what its index
names, and R of one head `[query, key]` (paper, sections 3 and 4; its numbers):

    (12)  e   = δ_o W_Oᵀ          what the loss wants of what the head gives, at each query
    (13)  δ_v = Aᵀ e              a value gets the e of those who look at it
    (14)  G   = e Vᵀ              what looking at a key would do: ∂L/∂A
    (17)  R   = c · A ⊙ (G − rowsum(A ⊙ G))
    (18)  δ_q = R K               a query is drawn to keys with R < 0, and away from R > 0
    (19)  δ_k = Rᵀ Q              and a key to the queries
     (7)  ∂L/∂W = Σ_t x_t ⊗ δ_t   a matrix: what it read, times the gradient of what it gave

Descent moves each against its δ. `ra["query_grad", 5]` and the others hold what autograd gives; the
functions here are the equations, so that they can be read, used on edited maps, and compared.
Where the scores are capped (Gemma 2), R is the gradient after the cap, and (18) and (19) need it
times the cap's derivative; where a gate stands between A·v and W_O, (13) needs e times the gate.

The gradient of a weight is never formed for all heads at once, and no parameter's `.grad` is
touched: it is a sum of as many outer products as there are tokens, so its norm, the share of each
token in it and its singular values come from two small matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor

from ra_lens.cache import RACache
from ra_lens.errors import UnsupportedModel, one_of
from ra_lens.head_maps import kept_tokens, read_example, read_head
from ra_lens.head_names import Head
from ra_lens.model.sites import WEIGHTS, VectorKind, Weight, table
from ra_lens.model.values import by_query_head
from ra_lens.numbers import Whole

# What a weight read and the gradient at what it gave; ∂L/∂W = Σ_t read_t ⊗ gradient_t.
FACTORS: dict[Weight, tuple[VectorKind, VectorKind]] = {
    "W_Q": ("query_in", "q_grad"),
    "W_K": ("key_in", "k_grad"),
    "W_V": ("value_in", "v_grad"),
    "W_O": ("z", "attn_out_grad"),
}


# ---- the paper's equations -----------------------------------------------------------------------


def z_grad(
    attn_out_grad: Float[Tensor, "batch query d_model"],
    w_o: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "batch query head d_head"]:
    """e = δ_o W_Oᵀ (12): the gradient at what each head gives to W_O."""
    terms = "batch query d_model, head d_head d_model -> batch query head d_head"
    return einsum(attn_out_grad, w_o, terms)


def value_grad(
    pattern: Float[Tensor, "batch head query key"],
    z_grad: Float[Tensor, "batch query head d_head"],
    n_key_value_heads: int | None = None,
) -> Float[Tensor, "batch key kv_head d_head"]:
    """δ_v = Aᵀ e (13), summed over the query heads of a group."""
    terms = "batch head query key, batch query head d_head -> batch key head d_head"
    return _summed(einsum(pattern, z_grad, terms), n_key_value_heads)


def pattern_grad(
    z_grad: Float[Tensor, "batch query head d_head"],
    value: Float[Tensor, "batch key kv_head d_head"],
) -> Float[Tensor, "batch head query key"]:
    """G = e Vᵀ (14): the gradient at the pattern."""
    terms = "batch query head d_head, batch key head d_head -> batch head query key"
    return einsum(z_grad, by_query_head(value, z_grad.shape[2]), terms)


def query_grad(
    ra: Float[Tensor, "batch head query key"], key: Float[Tensor, "batch key kv_head d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    """δ_q = R K (18): the gradient at the queries, as they enter their product with the keys."""
    terms = "batch head query key, batch key head d_head -> batch query head d_head"
    return einsum(ra, by_query_head(key, ra.shape[1]), terms)


def key_grad(
    ra: Float[Tensor, "batch head query key"],
    query: Float[Tensor, "batch query head d_head"],
    n_key_value_heads: int | None = None,
) -> Float[Tensor, "batch key kv_head d_head"]:
    """δ_k = Rᵀ Q (19), summed over the query heads of a group."""
    terms = "batch head query key, batch query head d_head -> batch key head d_head"
    return _summed(einsum(ra, query, terms), n_key_value_heads)


def _summed(
    vectors: Float[Tensor, "batch key head d_head"], n_key_value_heads: int | None
) -> Float[Tensor, "batch key kv_head d_head"]:
    if n_key_value_heads in (None, vectors.shape[2]):
        return vectors
    return reduce(
        vectors,
        "batch key (kv_head share) d_head -> batch key kv_head d_head",
        "sum",
        kv_head=n_key_value_heads,
    )


# ---- gradients of weights ------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightGradient:
    """∂L/∂W of one head's W_Q, W_K, W_V or W_O on one example, as the sum of its tokens.

    A matrix is written as in TransformerLens: x @ W, so `[d_model, d_head]`, and W_O
    `[d_head, d_model]`. A key/value head that several heads share has one W_K and one W_V.

    Attributes:
        weight: Which matrix.
        read: What it read at each token.
        grad: The gradient of the loss at what it gave there.
        tokens: The tokens; `#0`, `#1` where the run was not told.
    """

    weight: Weight
    read: Float[Tensor, "pos into"]
    grad: Float[Tensor, "pos out"]
    tokens: tuple[str, ...]

    @property
    def matrix(self) -> Float[Tensor, "into out"]:
        """The gradient itself: Σ over tokens of read ⊗ grad (paper eq. 7)."""
        return einsum(self.read, self.grad, "pos into, pos out -> into out")

    @property
    def norm(self) -> float:
        """Its Frobenius norm."""
        return float(self._small.norm())

    @property
    def shares(self) -> Float[Tensor, "pos"]:
        """Share of each token in it: ⟨read_t ⊗ grad_t, G⟩ / ‖G‖², which sum to 1.

        A token whose part points against the sum has a negative share. NaN where the gradient is 0.
        """
        read, grad = self.read.double(), self.grad.double()
        along = einsum(read @ read.mT, grad @ grad.mT, "pos other, pos other -> pos")
        return (along / along.sum()).to(self.read.dtype)

    @property
    def singular_values(self) -> Float[Tensor, "rank"]:
        """Its singular values, the largest first; no more than there are tokens."""
        return torch.linalg.svdvals(self._small)

    @property
    def rank(self) -> int:
        """Its numerical rank: singular values that rounding does not explain."""
        values = self.singular_values
        least = max(self.read.shape[1], self.grad.shape[1]) * torch.finfo(values.dtype).eps
        return int((values > least * values.max()).sum()) if len(values) else 0

    @property
    def _small(self) -> Float[Tensor, "some out"]:
        # readᵀ = Q T with orthonormal Q, so that G = Q (T grad) has the singular values of T grad.
        wide, narrow = self.read, self.grad
        if wide.shape[1] < narrow.shape[1]:
            wide, narrow = narrow, wide
        return torch.linalg.qr(wide.mT, mode="r").R @ narrow


def weight_gradient(
    ra: RACache, weight: Weight, head: Head, *, example: Whole = 0
) -> WeightGradient:
    """Give ∂L/∂W of one head on one example, from a run with `vectors=True`.

    Args:
        ra: The cache.
        weight: `"W_Q"`, `"W_K"`, `"W_V"` or `"W_O"`; of W_K and W_V that of the key/value head that
            the head reads.
        head: Such as `"L2H3"` or `(2, 3)`.
        example: Which prompt.

    Raises:
        BadInput: no such weight, head or example.
        NotStored: the run did not keep the vectors, or this attention has no such matrix.
        UnsupportedModel: a layer that runs several times.
    """
    one_of("weight", weight, WEIGHTS)
    layer, index = read_head(ra, head)
    number = read_example(ra, example)
    site, (read, grad) = ra.sites[layer], _factors(ra, weight, layer)
    at = site.kv_group(index) if weight in ("W_K", "W_V") else index
    kind = FACTORS[weight][0]
    tokens, _, columns = kept_tokens(ra, site.side_of(kind), number, read.shape[1], None)
    read, grad = ((part[:, :, at] if part.ndim == 4 else part)[number] for part in (read, grad))
    return WeightGradient(weight, read[columns], grad[columns], tokens)


def weight_norms(ra: RACache, weight: Weight) -> Float[Tensor, "*batch layer head"]:
    """‖∂L/∂W‖ of every head and example, from a run with `vectors=True`.

    Of W_K and W_V there is one for each key/value head. NaN where a layer has fewer heads.

    Raises:
        BadInput: no such weight.
        NotStored, UnsupportedModel: as `weight_gradient`.
    """
    one_of("weight", weight, WEIGHTS)
    rows = [_norms_at(ra, weight, layer) for layer in ra.layers]
    norms = table([row.to(rows[0].device) for row in rows])
    return norms if ra.has_batch_dim else norms[0]


def norms_of_all_weights(ra: RACache) -> Float[Tensor, "batch layer head"]:
    """(Σ ‖∂L/∂W‖²)^½ over the four matrices of every head; a shared W_K, W_V counts for each head.

    NaN where a layer has fewer heads.
    """
    rows = list[Tensor]()
    for layer, site in ra.sites.items():
        share = site.n_heads // site.n_key_value_heads
        squares = list[Tensor]()
        for weight in WEIGHTS:
            norms = _norms_at(ra, weight, layer)
            shared = weight in ("W_K", "W_V")
            squares.append((norms.repeat_interleave(share, dim=-1) if shared else norms) ** 2)
        rows.append(torch.stack(squares).sum(dim=0).sqrt())
    return table([row.to(rows[0].device) for row in rows])


def _norms_at(ra: RACache, weight: Weight, layer: int) -> Float[Tensor, "batch head"]:
    read, grad = _factors(ra, weight, layer)
    wide, by_head = (read, grad) if read.ndim == 3 else (grad, read)
    small = torch.linalg.qr(wide.mT, mode="r").R  # once for all heads: `WeightGradient._small`
    terms = "batch some pos, batch pos head d_head -> batch head some d_head"
    return einsum(small, by_head, terms).flatten(start_dim=2).norm(dim=-1)


def _factors(ra: RACache, weight: Weight, layer: int) -> tuple[Tensor, Tensor]:
    """What a weight read and the gradient at what it gave, `[batch, pos, (head,) …]`."""
    if ra.sites[layer].repeated:
        raise UnsupportedModel(
            f"{ra.sites[layer].label} of {ra.info.model_name} runs several times in one forward "
            "pass, and the vectors kept are those of the last time, so the gradients of its "
            "weights cannot be had from them."
        )
    parts = [ra[kind, layer] for kind in FACTORS[weight]]
    read, grad = parts if ra.has_batch_dim else [part.unsqueeze(0) for part in parts]
    return read, grad
