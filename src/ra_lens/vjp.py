"""The paper's vector-Jacobian products of an attention layer, and the gradients of its weights.

With x, q, k, v, A, z and out as in `ra_lens.vectors`, δ the gradient of the loss at what its index
names, and R of one head `[query, key]` (paper, sections 3 and 4; its numbers):

    (12)  e   = δ_o W_Oᵀ          what the loss wants of what the head gives, at each query
    (13)  δ_v = Aᵀ e              a value gets the e of those who look at it
    (14)  G   = e Vᵀ              what looking at a key would do: ∂L/∂A
    (17)  R   = c · A ⊙ (G − rowsum(A ⊙ G))
    (18)  δ_q = R K               a query is drawn to the keys with R < 0, away from those with R > 0
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

from typing import Literal, get_args

import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from ra_lens.cache import RACache
from ra_lens.collect import reversed_attention
from ra_lens.errors import BadInput, NotStored, one_of
from ra_lens.head_names import Head, layer_and_index
from ra_lens.model.sites import VectorKind, table

Weight = Literal["W_Q", "W_K", "W_V", "W_O"]
WEIGHTS: tuple[Weight, ...] = get_args(Weight)
# What a weight read and the gradient at what it gave; ∂L/∂W = Σ_t read_t ⊗ gradient_t.
_FACTORS: dict[Weight, tuple[VectorKind, VectorKind]] = {
    "W_Q": ("query_in", "q_grad"),
    "W_K": ("key_in", "k_grad"),
    "W_V": ("value_in", "v_grad"),
    "W_O": ("z", "attn_out_grad"),
}

