"""The least that a run multiplies, counted by hand, over what a forward pass multiplies.

A product of [n, k] and [k, m] is n · k · m multiplications. Elementwise steps (norms, softmax,
activations, rotary angles) are not counted, nor are the additions. Per prompt of n tokens, with d
the width of the residual stream, H heads of d_h and K heads of keys and values:

    queries        n · d · H d_h             keys, values    n · d · K d_h each
    scores         n · n · H d_h             z = A v         n · n · H d_h
    output         n · H d_h · d             MLP             2 n · d · d_mlp, gated: 3
    unembedding    n · d · d_vocab

All n · n scores of a causal layer are counted, as eager attention computes them.

A forward pass is the sum over all layers, and the unembedding of all tokens. A run (`of_run`) is

* forwards the same, but the last MLP and the unembedding at the tokens read only;
* backwards to activations. Each product with a weight hands its gradient on through one product of
  the same size; scores and z have two factors that depend on the layers below, so two each. In the
  first layer the gradient ends at the pattern: nothing is asked of its queries, keys and values, so
  neither their projections nor the scores run backwards, and of z only one product, that gives
  ∂L/∂A. The last MLP and the unembedding run backwards at the tokens read only.

Both passes as a library makes them that collects nothing (`of_both_passes`) multiply more: they go
down to the embeddings, and through the last MLP at every token.

This is what has to be multiplied where layers run as they are; a run takes longer by what is not
multiplied. With few tokens a product takes as long as reading its weights, so what counts are
the bytes of the weights (`weights`): once forwards, and once backwards, but for the three
projections of the first layer. There reading at one token saves nothing of the unembedding.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What decides how much a language model multiplies."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    d_vocab: int
    gated: bool

    @property
    def projections(self) -> int:
        """Entries of W_Q, W_K and W_V of a layer."""
        return self.d_model * self.d_head * (self.n_heads + 2 * self.n_key_value_heads)

    @property
    def output(self) -> int:
        """Entries of W_O of a layer."""
        return self.n_heads * self.d_head * self.d_model

    @property
    def mlp(self) -> int:
        """Entries of the weights of an MLP."""
        return (3 if self.gated else 2) * self.d_model * self.d_mlp

    @property
    def unembedding(self) -> int:
        """Entries of W_U."""
        return self.d_model * self.d_vocab

    def pairs(self, n_tokens: int) -> int:
        """Multiplications of the scores of a layer, as many as those of z."""
        return n_tokens * n_tokens * self.n_heads * self.d_head


def of_forward(shape: Shape, *, batch: int, n_tokens: int) -> int:
    """Multiplications of a forward pass with all logits."""
    layer = n_tokens * (shape.projections + shape.output + shape.mlp) + 2 * shape.pairs(n_tokens)
    return batch * (shape.n_layers * layer + n_tokens * shape.unembedding)


def of_run(shape: Shape, *, batch: int, n_tokens: int, n_read: int = 1) -> int:
    """Multiplications of a run over all layers, whose loss reads `n_read` tokens of each prompt."""
    n, last = n_tokens, shape.n_layers - 1
    total = 0
    for layer in range(shape.n_layers):
        through_mlp = n_read if layer == last else n
        forwards = n * (shape.projections + shape.output) + 2 * shape.pairs(n)
        backwards = n * shape.output + shape.pairs(n)  # to z, and from z to the pattern
        if layer > 0:  # to the values, and from the scores to queries, keys and what they are of
            backwards += 3 * shape.pairs(n) + n * shape.projections
        total += forwards + backwards + 2 * through_mlp * shape.mlp
    return batch * (total + 2 * n_read * shape.unembedding)


def of_both_passes(shape: Shape, *, batch: int, n_tokens: int, n_read: int = 1) -> int:
    """Multiplications down to the embeddings, and of the unembedding at the tokens read."""
    weights = n_tokens * (shape.projections + shape.output + shape.mlp)
    layer = 2 * weights + 6 * shape.pairs(n_tokens)
    return batch * (shape.n_layers * layer + 2 * n_read * shape.unembedding)


def floor(shape: Shape, *, batch: int, n_tokens: int, n_read: int = 1) -> float:
    """Multiplications of a run over those of a forward pass with all logits."""
    run = of_run(shape, batch=batch, n_tokens=n_tokens, n_read=n_read)
    return run / of_forward(shape, batch=batch, n_tokens=n_tokens)


def weights_read(shape: Shape) -> float:
    """Weights that a run reads over those that a forward pass reads, each product reading its own.

    Whatever their bytes, as all have the same. The embedding is looked up, not read.
    """
    layers = shape.n_layers * (shape.projections + shape.output + shape.mlp)
    forward = layers + shape.unembedding
    return (2 * forward - shape.projections) / forward
