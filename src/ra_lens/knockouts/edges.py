"""Which edges of attention are meant: one `Edge`, or an `EdgeSet` of heads, queries and keys.

An edge goes from a query to the key that it looks at, in one head. Positions count the tokens of an
example from 0 on, whatever is put in front and without padding. People choose them by number, by a
slice, or by text; a choice without an end (all, or a slice without one) goes on with the tokens
that a model generates after the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ra_lens.errors import BadInput
from ra_lens.model import Layers, Sites
from ra_lens.model.sites import Side, spell_layers
from ra_lens.numbers import as_whole, places
from ra_lens.run_info import RunInfo
from ra_lens.text import BYTES_SHOWN, label

if TYPE_CHECKING:
    import pandas as pd

    from ra_lens.head_names import Heads

Tokens = SupportsIndex | slice | str | Iterable[SupportsIndex | str] | None


@dataclass(frozen=True)
class Edge:
    """What one head looks at from one query, and what the loss would say to its being cut.

    Attributes:
        layer: Index of the layer.
        head: Index of the head.
        query: Position of the token that looks.
        key: Position of the token looked at.
        effect: Change of the loss that is foretold, or whatever the edges were ordered by. NaN
            where nobody asked.
        pattern: A, the attention there. NaN where nobody asked.
        query_token: The token that looks; empty where the cache was not told.
        key_token: The token looked at.
        example: Which prompt of several.
    """

    layer: int
    head: int
    query: int
    key: int
    effect: float = float("nan")
    pattern: float = float("nan")
    query_token: str = ""
    key_token: str = ""
    example: int = 0

    @property
    def label(self) -> str:
        """`L5H3`, as TransformerLens labels heads."""
        return f"L{self.layer}H{self.head}"

    def __str__(self) -> str:
        """Spell the edge: head, query, key, effect."""
        query = f"{label(self.query_token)} ({self.query})" if self.query_token else self.query
        key = f"{label(self.key_token)} ({self.key})" if self.key_token else self.key
        effect = "" if self.effect != self.effect else f" {self.effect:+.4f}"
        return f"{self.label} {query} → {key}{effect}"


class Edges(Sequence[Edge]):
    """Edges in an order, as `RACache.top_edges` gives them.

    Attributes:
        by: The kind of map that they were ordered by.
        left_out: For each example the tokens where heads rest, edges to which were left out.
    """

    def __init__(
        self, edges: Iterable[Edge], by: str, left_out: Sequence[tuple[str, ...]] = ()
    ) -> None:
        """Hold edges that were ordered `by` a kind of map."""
        self._edges = tuple(edges)
        self.by = by
        self.left_out = tuple(left_out)

    @overload
    def __getitem__(self, index: int) -> Edge: ...
    @overload
    def __getitem__(self, index: slice) -> Edges: ...
    def __getitem__(self, index: int | slice) -> Edge | Edges:
        """Give one edge, or some of them."""
        found = self._edges[index]
        return Edges(found, self.by, self.left_out) if isinstance(found, tuple) else found

    def __len__(self) -> int:
        """Give the number of edges."""
        return len(self._edges)

    def __iter__(self) -> Iterator[Edge]:
        """Iterate over the edges in their order."""
        return iter(self._edges)

    def by_example(self) -> list[Edges]:
        """Give the edges of each example; of several prompts, `knockout_hooks` takes them so."""
        n = max((edge.example + 1 for edge in self), default=0)
        return [
            Edges((e for e in self if e.example == i), self.by, self.left_out[i : i + 1])
            for i in range(max(n, len(self.left_out)))
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate one row per edge."""
        import pandas as pd  # late, as it takes long to import

        columns = list(Edge.__dataclass_fields__)
        return pd.DataFrame([asdict(edge) for edge in self], columns=columns)

    def __repr__(self) -> str:
        """List the edges, one a line, and name the tokens that were left out."""
        names = dict.fromkeys(name for names in self.left_out for name in names)
        but = f", but for those to {', '.join(f'“{name}”' for name in names)}" if names else ""
        return "\n".join([f"{len(self)} edges by {self.by}{but}:", *map(str, self)])


@dataclass(frozen=True)
class Positions:
    """Positions of tokens: some, and perhaps all from one on."""

    some: tuple[int, ...] = ()
    onward: int | None = None

    def marks(self, index: Int[Tensor, "pos"]) -> Bool[Tensor, "pos"]:
        """Mark which of these positions are meant; −1 is none."""
        meant = torch.isin(index, torch.tensor(self.some, dtype=index.dtype))
        return meant if self.onward is None else meant | (index >= self.onward)

    def __str__(self) -> str:
        """Spell the positions: `3, 4`, or `3, 7…`."""
        onward = [] if self.onward is None else [f"{self.onward}…"]
        return ", ".join([*map(str, self.some), *onward]) if self != Positions(onward=0) else "all"


@dataclass(frozen=True)
class Box:
    """All edges from some queries to some keys in some heads."""

    heads: Mapping[int, tuple[int, ...]]  # by layer
    queries: Positions
    keys: Positions


@dataclass(frozen=True)
class EdgeSet:
    """Edges that are cut together, of each example.

    Attributes:
        rows: Boxes of each example; one row alone is meant for every example.
    """

    rows: tuple[tuple[Box, ...], ...]

    @property
    def layers(self) -> list[int]:
        """The layers in which something is cut."""
        return sorted({layer for boxes in self.rows for box in boxes for layer in box.heads})

    def marks(
        self,
        layer: int,
        n_heads: int,
        queries: Int[Tensor, "some query"],
        keys: Int[Tensor, "some key"],
    ) -> Bool[Tensor, "row head query key"]:
        """Mark the edges of a layer.

        Args:
            layer: The layer.
            n_heads: Its heads.
            queries: Position of the token in each row of a pattern, −1 for none; those of each
                example, or one row for all.
            keys: The same for its columns.
        """
        n = max(len(self.rows), len(queries), len(keys))
        found = torch.zeros(n, n_heads, queries.shape[-1], keys.shape[-1], dtype=torch.bool)
        for i, of_example in enumerate(found):
            q, k = queries[i % len(queries)], keys[i % len(keys)]
            for box in self.rows[i % len(self.rows)]:
                if layer in box.heads:
                    cells = box.queries.marks(q)[:, None] & box.keys.marks(k)
                    of_example[list(box.heads[layer])] |= cells
        return found

    def ends_before(self, layer: int, first: int) -> bool:
        """Whether no query of a layer stands at position `first` or later."""
        return all(
            box.queries.onward is None and max(box.queries.some, default=-1) < first
            for boxes in self.rows
            for box in boxes
            if layer in box.heads
        )

    def __or__(self, other: EdgeSet) -> EdgeSet:
        """Join two sets, of as many examples, or one of them for all."""
        n = max(len(self.rows), len(other.rows))
        if {len(self.rows), len(other.rows)} - {1, n}:
            raise BadInput(
                f"found sets of {len(self.rows)} and {len(other.rows)} examples. Join sets of as "
                "many, or one for all."
            )
        pairs = (self.rows[i % len(self.rows)] + other.rows[i % len(other.rows)] for i in range(n))
        return EdgeSet(tuple(pairs))

    def __repr__(self) -> str:
        """Say what is meant."""
        boxes = [
            f"{sum(map(len, box.heads.values()))} heads of layers "
            f"{spell_layers(sorted(box.heads))}, queries {box.queries}, keys {box.keys}"
            for box in self.rows[0][:3]
        ]
        more = ", …" * (len(self.rows[0]) > 3)
        n = f"{len(self.rows)} examples; the first: " if len(self.rows) > 1 else ""
        return f"EdgeSet({n}{'; '.join(boxes)}{more})"


# ---- reading what people choose -----------------------------------------------------------------


def edge_set(
    sites: Sites,
    info: RunInfo,
    sizes: Mapping[int, tuple[int, int]],
    n_examples: int,
    *,
    heads: Heads,
    layers: Layers,
    queries: Tokens,
    keys: Tokens,
) -> EdgeSet:
    """Read a choice of heads and tokens in a cache.

    Args:
        sites: The layers collected.
        info: What the cache was made from; gives the tokens.
        sizes: Rows and columns of each layer's maps.
        n_examples: Examples in the cache.
        heads: Heads; None: all.
        layers: Layers; None: all.
        queries: Tokens that look; None: all.
        keys: Tokens looked at; None: all.

    Raises:
        BadInput: heads, layers or tokens that are not there.
    """
    chosen = {
        layer: tuple(marks.nonzero()[:, 0].tolist())
        for layer, marks in sites.choose_heads(heads, layers).items()
    }
    # Queries and keys may be tokens of two texts, in a decoder that attends to an encoder.
    groups: dict[tuple[Side, Side], list[int]] = {}
    for layer in chosen:
        site = sites[layer]
        groups.setdefault((site.query_side, site.key_side), []).append(layer)
    rows: list[tuple[Box, ...]] = []
    for example in range(n_examples):
        of = f"tokens of example {example}" if n_examples > 1 else "tokens"
        boxes: list[Box] = []
        for sides, of_group in groups.items():
            lengths = sizes[of_group[0]]
            q, k = (
                _read(name, choice, _tokens(info, side, example), n, of)
                for name, choice, side, n in zip(
                    ("queries", "keys"), (queries, keys), sides, lengths, strict=True
                )
            )
            boxes.append(Box({layer: chosen[layer] for layer in of_group}, q, k))
        rows.append(tuple(boxes))
    return EdgeSet(tuple(rows))


def _tokens(info: RunInfo, side: Side, example: int) -> tuple[str, ...] | None:
    rows = info.tokens_of(side)
    return None if rows is None else rows[example]


def _read(
    name: str, choice: Any, tokens: Sequence[str] | None, n_columns: int, of: str
) -> Positions:
    """Read a choice of tokens of one example; messages say `of` which they are."""
    n = n_columns if tokens is None else len(tokens)
    if choice is None:
        return Positions(onward=0)
    if isinstance(choice, slice):
        some = places(name, choice, n, of)
        open_ended = choice.stop is None and choice.step in (None, 1)
        return Positions(tuple(some), n) if open_ended else Positions(tuple(some))
    if isinstance(choice, str):
        return Positions(tuple(find_text(name, choice, tokens, of)))
    if as_whole(choice) is not None or not isinstance(choice, Iterable):
        return Positions(tuple(places(name, choice, n, of)))
    given: list[Any] = choice.tolist() if hasattr(choice, "tolist") else list(choice)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportUnknownMemberType]
    texts = [one for one in given if isinstance(one, str)]
    found = [i for text in texts for i in find_text(name, text, tokens, of)]
    numbers = [one for one in given if not isinstance(one, str)]
    if numbers or not texts:
        found += places(name, numbers, n, of)
    return Positions(tuple(sorted(set(found))))


def find_text(name: str, text: str, tokens: Sequence[str] | None, of: str = "tokens") -> list[int]:
    """Find the tokens that a text covers, each time that it occurs.

    It must begin and end where tokens do, but for spaces: “Italy” is the token “ Italy”, “Ita” is
    no token of it.

    Raises:
        BadInput: the tokens are not known, or the text is not there.
    """
    if tokens is None:
        raise BadInput(
            f"found {name}={text!r}, but this cache does not know which tokens were read. Give "
            "positions, or make it with run_with_ra."
        )
    wanted = text.strip() or text
    if not wanted:
        raise BadInput(f"found {name}='', which no token has. Give a text, or positions.")
    # Bytes of a character that is cut over several tokens belong to the last, which shows it.
    pieces = ["" if _only_bytes(token) else token for token in tokens]
    ends = list(accumulate(map(len, pieces)))
    starts = [end - len(piece) for end, piece in zip(ends, pieces, strict=True)]
    found: set[int] = set()
    for match in re.finditer(f"(?={re.escape(wanted)})", "".join(pieces)):
        at, after = match.start(), match.start() + len(wanted)
        first = next(i for i, end in enumerate(ends) if end > at)
        last = max(i for i, start in enumerate(starts) if start < after and pieces[i])
        if (
            pieces[first][: at - starts[first]].strip()
            or pieces[last][after - starts[last] :].strip()
        ):
            continue
        while first > 0 and not pieces[first - 1] and tokens[first - 1]:
            first -= 1
        found.update(range(first, last + 1))
    if not found:
        shown = " ".join(label(token) for token in tokens[:40]) + " …" * (len(tokens) > 40)
        raise BadInput(
            f"found {name}={text!r}, which is not among the {of}: {shown}. "
            "Give a text that begins and ends where tokens do, or positions."
        )
    return sorted(found)


def _only_bytes(token: str) -> bool:
    return BYTES_SHOWN.fullmatch(token) is not None
