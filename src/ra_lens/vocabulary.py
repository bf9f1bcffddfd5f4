"""Which tokens of the vocabulary a head's vectors are nearest to, forwards and backwards.

The vectors of `ra_lens.vectors` live in a head's own space, where no token has a place. The weights
of the head lead from there to the residual stream, and the unembedding from there to tokens (Katz,
Belinkov, Geva and Wolf 2024, *Backward Lens: Projecting Language Model Gradients into the
Vocabulary Space*). Of one head, with δ the gradient of the loss at what its index names, all before
rotation:

| kind | formula | what it tells |
|---|---|---|
| `query` | N₁ᵀ(q W_Kᵀ) | what the query looks for: tokens whose keys raise q·k |
| `key` | N₁ᵀ(k W_Qᵀ) | who finds the key: tokens whose queries raise q·k |
| `value` | v W_O | what a token writes to those who look at it with all their attention |
| `z` | z W_O | what the head writes |
| `query_step` | N₁ᵀ(−δ_q W_Kᵀ) | what the query looks for more, after a step of descent |
| `key_step` | N₁ᵀ(−δ_k W_Qᵀ) | who finds the key more |
| `value_step` | −δ_v W_O | what the token writes more |
| `z_step` | −e W_O | what the head writes more: the part of −δ_o that it can write |
| `query_in_step` | N₁ᵀ(−δ_q W_Qᵀ) | what its query asks of the residual stream that it reads |
| `key_in_step` | N₁ᵀ(−δ_k W_Kᵀ) | what its key asks of the stream |
| `value_in_step` | N₁ᵀ(−δ_v W_Vᵀ) | what its value asks of the stream |
| `out_step` | −δ_o | what the loss asks of the layer, the same for all its heads |

A step is one of descent, per unit of learning rate: minus the gradient. Four kinds read a vector as
the rest of the head does, four its change; three are this head's part of minus the gradient at the
layer's input. Keys and values of a group of query heads, and their gradients, are shared: `key` of
two heads of a group differs, as W_Q does, while `key_in_step` does not.

What is applied to a vector of the residual stream, forwards or gradient alike, is linear: centring
where the final norm subtracts a mean, its gain, W_U (`ra_lens.model.unembedding`). The size that
the norm divides by is left out, as it belongs to the whole stream at a token, which a gradient does
not have; no order of tokens depends on it. Biases are left out too. N₁ᵀ is likewise what the norm
in front of the layer does to a direction, transposed. So the two ends of a vector change places
with its sign, and folding norms into weights, or centring them, changes nothing. Folded value
biases are no part of `value` and `z`.

Limits. Where a model rotates queries and keys, `query`, `key` and their steps are read as if key
and query stood at the same place: with distance, what q looks for turns. The scores are inner
products, so that tokens with a long row of W_U come first often. And an early layer's stream need
not use the final layer's directions: what is read there is what would be said if nothing else read
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, UnsupportedModel, one_of
from ra_lens.head_maps import kept_tokens, read_example, read_head
from ra_lens.head_names import Head
from ra_lens.model import Site, as_lens
from ra_lens.model.sites import WEIGHTS, VectorKind, Weight
from ra_lens.model.unembedding import Unembedding, unembedding
from ra_lens.model.weights import Weights, head_weights
from ra_lens.numbers import Whole, as_whole, places, whole
from ra_lens.text import label

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal[
    "query", "key", "value", "z", "query_step", "key_step", "value_step", "z_step",
    "query_in_step", "key_in_step", "value_in_step", "out_step",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What is read, as in the table above."""


class _Recipe(NamedTuple):
    """A kind: the vector it is made from, what leads to the residual stream, and how."""

    vector: VectorKind
    weight: Weight | None
    first: Weight | None = None  # applied to the vector before, as the bias is
    sign: float = 1.0


_RECIPES: dict[Kind, _Recipe] = {
    "query": _Recipe("query_in", "W_K", first="W_Q"),
    "key": _Recipe("key_in", "W_Q", first="W_K"),
    "value": _Recipe("value", "W_O"),
    "z": _Recipe("z", "W_O"),
    "query_step": _Recipe("q_grad", "W_K", sign=-1),
    "key_step": _Recipe("k_grad", "W_Q", sign=-1),
    "value_step": _Recipe("value_grad", "W_O", sign=-1),
    "z_step": _Recipe("z_grad", "W_O", sign=-1),
    "query_in_step": _Recipe("q_grad", "W_Q", sign=-1),
    "key_in_step": _Recipe("k_grad", "W_K", sign=-1),
    "value_in_step": _Recipe("v_grad", "W_V", sign=-1),
    "out_step": _Recipe("attn_out_grad", None, sign=-1),
}
# Of one per key/value head.
_SHARED = ("W_K", "W_V", "k_grad", "v_grad", "value", "value_grad")
_CELLS = 2**24
"""Scores that are worked on at once."""


@dataclass(frozen=True)
class TokenScore:
    """A token of the vocabulary, and its score for a vector: its logit less the mean logit.

    Attributes:
        token: Its text.
        score: The score, not divided by the size of the residual stream.
        id: Its id.
    """

    token: str
    score: float
    id: int


@dataclass(frozen=True)
class VectorReading:
    """One vector at one token, in tokens of the vocabulary.

    Attributes:
        position: Of the token, counted without padding.
        token: The token.
        kind: What is read.
        norm: Length of the vector in the residual stream.
        top: The tokens with the largest scores, largest first; none of a vector that is 0.
        bottom: Those with the smallest, smallest first.
        rank: Place of the target among all tokens, 1 the largest; others with its score count
            before it. None without a target, and of a vector that is 0.
        score: Score of the target; None where `rank` is.
    """

    position: int
    token: str
    kind: Kind
    norm: float
    top: tuple[TokenScore, ...]
    bottom: tuple[TokenScore, ...]
    rank: int | None = None
    score: float | None = None

    def __str__(self) -> str:
        """Say the tokens at both ends in a line."""
        ends = [" ".join(label(t.token) for t in end) or "–" for end in (self.top, self.bottom)]
        rank = "" if self.rank is None else f"   target: {self.rank:,}"
        token = label(self.token) if self.token else ""
        return f"{self.position:4} {token:12} {self.kind:14} + {ends[0]}   − {ends[1]}{rank}"


class HeadReading(Sequence[VectorReading]):
    """The vectors of one head, in tokens of the vocabulary: one entry per position and kind.

    Attributes:
        layer: Index of the layer.
        head: Index of the head.
        example: Which prompt of several.
        target: The token ranked, as text; None if none was.
    """

    def __init__(
        self,
        rows: Iterable[VectorReading],
        *,
        layer: int,
        head: int,
        example: int,
        target: str | None,
    ) -> None:
        """Hold what was read of a head."""
        self._rows = tuple(rows)
        self.layer, self.head, self.example, self.target = layer, head, example, target

    @property
    def label(self) -> str:
        """`L5H3`, as TransformerLens labels heads."""
        return f"L{self.layer}H{self.head}"

    @overload
    def __getitem__(self, index: int) -> VectorReading: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[VectorReading, ...]: ...
    def __getitem__(self, index: int | slice) -> VectorReading | tuple[VectorReading, ...]:
        """Give one entry, or some of them."""
        return self._rows[index]

    def __len__(self) -> int:
        """Give the number of entries."""
        return len(self._rows)

    def __iter__(self) -> Iterator[VectorReading]:
        """Iterate over the entries, position by position."""
        return iter(self._rows)

    def at(self, position: Whole, kind: Kind) -> VectorReading:
        """Give the entry of one position (negative: from the end) and kind.

        Raises:
            BadInput: it was not read.
        """
        place = whole("position", position)
        there = sorted({row.position for row in self})
        place = place + there[-1] + 1 if place < 0 and there else place
        for row in self:
            if (row.position, row.kind) == (place, kind):
                return row
        kinds = ", ".join(dict.fromkeys(row.kind for row in self))
        raise BadInput(
            f"found position {position}, kind {kind!r}; read were positions {there} and kinds "
            f"{kinds}. Read it with positions= and kinds=."
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate one row per entry, tokens at each end as one text and as tuples of scores."""
        import pandas as pd  # late, as it takes long to import

        rows = [
            {
                "layer": self.layer,
                "head": self.head,
                "position": row.position,
                "token": row.token,
                "kind": row.kind,
                "norm": row.norm,
                "top": " ".join(label(t.token) for t in row.top),
                "bottom": " ".join(label(t.token) for t in row.bottom),
                "top_scores": tuple(t.score for t in row.top),
                "bottom_scores": tuple(t.score for t in row.bottom),
                "rank": float("nan") if row.rank is None else row.rank,
                "score": float("nan") if row.score is None else row.score,
            }
            for row in self
        ]
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        """List the entries, one a line."""
        target = f", target {label(self.target)}" if self.target is not None else ""
        return "\n".join([f"{self.label}{target}:", *map(str, self)])


class Vocabulary:
    """A model's vocabulary, for reading vectors of many heads: each layer is looked at once.

    Weights are those that the model had when a layer was first read.
    """

    def __init__(self, model: nn.Module) -> None:
        """Read the unembedding of a TransformerLens model; one short forward pass checks it.

        Raises:
            UnsupportedModel: its logits are not the last block's output, a final norm and W_U.
        """
        self._lens = as_lens(model)
        self.unembedding: Unembedding = unembedding(self._lens)
        self._weights: dict[tuple[int, tuple[Weight, ...], bool], Weights | None] = {}

    # ---- vectors --------------------------------------------------------------------------------

    def vectors(
        self, ra: RACache, head: Head, kind: Kind, *, example: Whole = 0
    ) -> Float[Tensor, "pos d_model"]:
        """Give a kind of vector of one head as directions of the residual stream.

        Args:
            ra: From `run_with_ra` of this model with `vectors=True`.
            head: `"L2H3"`, `(layer, head)` or a `HeadScore`.
            kind: As in the table of the module.
            example: Which prompt.

        Returns:
            One direction per token of the prompt, padding left out.

        Raises:
            BadInput: no such head, kind or example, or a cache of another model.
            NotStored: the run kept no such vectors.
            UnsupportedModel: what leads from the head to the residual stream is no plain matrix.
        """
        one_of("kind", kind, KINDS)
        site, index = self._head(ra, head)
        example = read_example(ra, example)
        recipe = _RECIPES[kind]
        found = self._stored(ra, site, recipe.vector, example) * recipe.sign
        if recipe.weight is None:
            return found.to(self.unembedding.weights)
        names = (recipe.weight,) if recipe.first is None else (recipe.first, recipe.weight)
        of_values = recipe.vector in ("value", "value_grad")
        weights = self._of_layer(site, names, applied_to_values=of_values)

        def own(name: str) -> int:
            return site.kv_group(index) if name in _SHARED else index

        weight = weights[recipe.weight][own(recipe.weight)]
        if recipe.first is None:
            found = found[:, own(recipe.vector)].to(weight)
        else:
            at = own(recipe.first)
            found = found.to(weight) @ weights[recipe.first][at] + weights.biases[recipe.first][at]
            self._refuse_norm(ra, site, kind, example, at, found)
        if recipe.weight == "W_O":
            return found @ weight
        return weights.norms[recipe.weight].back(found @ weight.T)

    def _head(self, ra: RACache, head: Head) -> tuple[Site, int]:
        layer, index = read_head(ra, head)
        own, site = self._lens.sites.get(layer), ra.sites[layer]
        heads = (site.n_heads, site.n_key_value_heads, site.prefix)
        if own is None or heads != (own.n_heads, own.n_key_value_heads, own.prefix):
            raise BadInput(
                f"found a cache of {ra.info.model_name}, whose {site.label} has {site.n_heads} "
                f"heads, and the model {self._lens.name}, which has no such layer. Give the cache "
                "of a run of this model."
            )
        return site, index

    def _stored(
        self, ra: RACache, site: Site, kind: VectorKind, example: int
    ) -> Float[Tensor, "pos *rest"]:
        """The vectors of one example, without padding."""
        stored = ra[kind, site.layer]
        stored = stored[example] if ra.has_batch_dim else stored
        _, _, columns = kept_tokens(ra, site.side_of(kind), example, len(stored), None)
        return stored[columns]

    def _of_layer(
        self, site: Site, names: tuple[Weight, ...], *, applied_to_values: bool
    ) -> Weights:
        everything = (site.layer, WEIGHTS, True)
        if everything not in self._weights:
            try:
                found = head_weights(self._lens, site, applied_to_values=True)
            except UnsupportedModel:  # which what is asked for may not be
                found = None
            self._weights[everything] = found
        whole_layer, key = self._weights[everything], (site.layer, names, applied_to_values)
        if whole_layer is not None:
            return whole_layer
        own = self._weights.get(key)
        if own is None:
            own = head_weights(self._lens, site, names, applied_to_values=applied_to_values)
            self._weights[key] = own
        return own

    def _refuse_norm(
        self,
        ra: RACache,
        site: Site,
        kind: Kind,
        example: int,
        index: int,
        given: Float[Tensor, "pos d_head"],
    ) -> None:
        """Refuse where more than a rotation comes between a projection and q·k."""
        of_kind: VectorKind = "query" if kind == "query" else "key"
        used = self._stored(ra, site, of_kind, example)[:, index].to(given).norm(dim=-1)
        ratio = used / given.norm(dim=-1).clamp(min=1e-12)  # 1 where it is turned, or a scale
        if float(ratio.max() - ratio.min()) > 0.03 * float(ratio.max()):
            raise UnsupportedModel(
                f"{site.label} of {self._lens.name} does more to its {of_kind} than to turn it (a "
                f"norm of each {of_kind}, perhaps), so which tokens it is nearest to is not known. "
                f"{of_kind}_step and {of_kind}_in_step can be read: their gradient is taken "
                "before that."
            )

    # ---- tokens ---------------------------------------------------------------------------------

    def scores(self, directions: Float[Tensor, "*some d_model"]) -> Float[Tensor, "*some d_vocab"]:
        """Score every token for directions of the residual stream; see `ra_lens.model.unembedding`.

        A row of as many numbers as there are tokens for each direction.
        """
        return self.unembedding.scores(directions)

    def ranks(
        self, directions: Float[Tensor, "*some d_model"], tokens: Sequence[str | Whole]
    ) -> Int[Tensor, "*some token"]:
        """Give the place of some tokens among all, for each direction; 1: the largest score.

        Other tokens with the same score count before it. A direction that is 0 ranks nothing: −1.
        """
        ids = torch.tensor([self.token(token) for token in tokens])
        flat = directions.reshape(-1, directions.shape[-1])
        found = torch.full((len(flat), len(ids)), -1)
        size = max(1, _CELLS // self._lens.d_vocab)
        for start in range(0, len(flat), size):
            part = flat[start : start + size]
            scores = self.scores(part)
            for column, token in enumerate(ids.tolist()):
                place = (scores >= scores[:, token, None]).sum(dim=-1)
                some = part.any(dim=-1).to(place.device)
                found[start : start + size, column] = place.where(some, -1).cpu()
        return found.reshape(*directions.shape[:-1], len(ids))

    def token(self, given: str | Whole) -> int:
        """Give the id of a token given as text or id; of a text of several, its first.

        Raises:
            BadInput: an empty text, or an id that is none.
        """
        number = as_whole(given)
        if number is not None:
            if not 0 <= number < self._lens.d_vocab:
                raise BadInput(
                    f"found token {number}; {self._lens.name} has tokens 0 to "
                    f"{self._lens.d_vocab - 1}."
                )
            return number
        ids = self._lens.encode_fragment(given) if isinstance(given, str) else []
        if not ids:
            raise BadInput(f"found target={given!r}; give text, such as ' Paris', or a token id.")
        return ids[0]

    def read(
        self,
        ra: RACache,
        head: Head,
        *,
        kinds: Kind | Sequence[Kind] = KINDS,
        positions: Whole | Sequence[Whole] | None = None,
        example: Whole = 0,
        target: str | Whole | None = None,
        k: Whole = 5,
    ) -> HeadReading:
        """Read vectors of one head in tokens; see `read_vectors`."""
        given: list[str] = [kinds] if isinstance(kinds, str) else list(kinds)
        for name in given:
            one_of("kinds", name, KINDS)
        wanted: list[Kind] = [kind for kind in KINDS if kind in given]
        k = whole("k", k, least=1)
        token = None if target is None else self.token(target)
        site, index = self._head(ra, head)
        example = read_example(ra, example)
        rows: list[VectorReading] = []
        for kind in wanted:
            directions = self.vectors(ra, (site.layer, index), kind, example=example)
            n = len(directions)
            side = site.side_of(_RECIPES[kind].vector)
            tokens, _, _ = kept_tokens(ra, side, example, n, None)
            chosen = range(n) if positions is None else places("positions", positions, n, "tokens")
            rows += self._entries(kind, directions, tokens, sorted(set(chosen)), token, k)
        rows.sort(key=lambda row: row.position)  # which keeps the order of kinds
        text = None if token is None else self._lens.decode(token)
        return HeadReading(rows, layer=site.layer, head=index, example=example, target=text)

    def _entries(
        self,
        kind: Kind,
        directions: Float[Tensor, "pos d_model"],
        tokens: Sequence[str],
        chosen: Sequence[int],
        target: int | None,
        k: int,
    ) -> Iterator[VectorReading]:
        for place in chosen:
            direction = directions[place]
            entry = (place, tokens[place], kind, float(direction.norm()))
            if not bool(direction.any()):
                yield VectorReading(*entry, (), ())
                continue
            scores = self.scores(direction)
            n = min(k, len(scores))
            top, bottom = (self._named(*scores.topk(n, largest=up)) for up in (True, False))
            rank = score = None
            if target is not None:
                rank, score = int((scores >= scores[target]).sum()), float(scores[target])
            yield VectorReading(*entry, top, bottom, rank, score)

    def _named(
        self, scores: Float[Tensor, "some"], ids: Int[Tensor, "some"]
    ) -> tuple[TokenScore, ...]:
        return tuple(
            TokenScore(self._lens.decode(token), score, token)
            for score, token in zip(scores.tolist(), ids.tolist(), strict=True)
        )


def read_vectors(
    ra: RACache,
    model: nn.Module,
    head: Head,
    *,
    kinds: Kind | Sequence[Kind] = KINDS,
    positions: Whole | Sequence[Whole] | None = None,
    example: Whole = 0,
    target: str | Whole | None = None,
    k: Whole = 5,
) -> HeadReading:
    """Read a head's vectors and their gradients in tokens of the vocabulary.

        _, ra = run_with_ra(model, prompt, target=" Paris", vectors=True)
        read_vectors(ra, model, "L10H7", kinds=("z", "z_step"), positions=-1, target=" Paris")

    Args:
        ra: From `run_with_ra` of this model with `vectors=True`.
        model: The model.
        head: `"L2H3"`, `(layer, head)` or a `HeadScore`.
        kinds: What is read, as in the table of `ra_lens.vocabulary`. Default: all.
        positions: Of which tokens, without padding; negative from the end. Default: all.
        example: Which prompt.
        target: A token whose place among all is told for each vector; of a text of several tokens,
            the first.
        k: How many tokens at each end.

    Returns:
        One entry per position and kind; `to_dataframe()` makes a table of them.

    Cost: a forward pass of five tokens for the unembedding and one for the layer; then one product
    with W_U per vector. `Vocabulary` keeps what it has read.

    Raises:
        BadInput: no such head, kind, position, example or token, or a cache of another model.
        NotStored: the run kept no such vectors.
        UnsupportedModel: the model's logits, or what leads from the head to the residual stream,
            are made in another way than by plain matrices and norms.
    """
    return Vocabulary(model).read(
        ra, head, kinds=kinds, positions=positions, example=example, target=target, k=k
    )
