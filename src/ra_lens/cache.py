"""`RACache`: the maps of one run, read like a TransformerLens `ActivationCache`.

Three kinds of map per attention layer are stored, each `[batch, head, query, key]`:

* `ra`, full name `blocks.{layer}.attn.hook_ra` (in an encoder-decoder
  `decoder_blocks.1.cross_attn.hook_ra` and so on): Reversed Attention R. Positive: descent lowers
  this attention; negative: descent raises it.
* `pattern`, `….hook_pattern`: A, as the softmax made it, before any edit by a hook.
* `pattern_grad`, `….hook_pattern_grad`: G = ∂L/∂A.

Two more are made from these when they are asked for, in float32 at least. Both foretell, to first
order and in the unit of the loss, what cutting an edge does to it; positive where it rises, so
that the answer needs the edge (formulas, proof and limits: `ra_lens.knockouts.predict`):

* `knockout`, `….hook_knockout`: −R~ / (1 − A), the row renormalised, with R~ = R / scale. 0 where
  an edge is all that its row has, which cannot be cut so.
* `cut`, `….hook_cut`: −A ⊙ G, the row not renormalised.

A run with `vectors=True` also keeps queries, keys, values, what heads give, and the gradients
there, token by token: `ra["query", 5]`, `ra["query_grad", 5]` and so on (`ra_lens.vectors`).

In a cache that `run_with_ra` made, rows and columns of padding are 0. Norms are kept whatever is
stored. `save` writes one safetensors file, which cannot run code, with a JSON description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.cache_file import read_cache, write_cache
from ra_lens.collect import Store, reversed_attention
from ra_lens.errors import BadInput, NotStored
from ra_lens.head_names import Head, Heads, HeadScore, layer_and_index, spell_head
from ra_lens.knockouts.edges import Edges, EdgeSet, Tokens
from ra_lens.knockouts.predict import FORETOLD_FROM, foretold
from ra_lens.knockouts.read import effect_of, flow_of, set_of, strongest
from ra_lens.model import Layers, Site, Sites, as_lens
from ra_lens.model.sites import (
    MAP_KINDS,
    STORED_KINDS,
    VECTOR_KINDS,
    MapKind,
    StoredKind,
    VectorKind,
    read_kind,
    spell_counts,
    table,
)
from ra_lens.numbers import Whole, as_whole, is_several, places, whole, whole_or_none
from ra_lens.patching.mean import MeanMaps, RunningMean
from ra_lens.run_info import RunInfo
from ra_lens.tensors import read_place

if TYPE_CHECKING:
    import pandas as pd


@dataclass(eq=False)
class RACache:
    """Reversed Attention of one run; see the module's text for the maps and their sign.

    Made by `run_with_ra`, `get_ra_caching_hooks` and `RACache.from_activation_cache`.

    Attributes:
        sites: The attention layers, by layer.
        loss: Loss of each example (a scalar if the metric gave one). NaN where nobody said what it
            is: with your own backward pass, and in what is read from an ActivationCache.
        info: What it was made from.
        store: What was kept: `maps`, only `norms`, or the `mean` over examples.
        has_batch_dim: False after `remove_batch_dim`.
    """

    sites: Sites
    loss: Float[Tensor, "batch"] | Float[Tensor, ""] = field(default_factory=lambda: torch.zeros(0))
    info: RunInfo = field(default_factory=RunInfo)
    store: Store = "maps"
    has_batch_dim: bool = True
    _maps: dict[str, Tensor] = field(default_factory=dict[str, Tensor], repr=False)
    _norms: dict[tuple[StoredKind, int], Tensor] = field(
        default_factory=dict[tuple[StoredKind, int], Tensor], repr=False
    )
    _running: RunningMean | None = field(default=None, repr=False)

    # ---- reading --------------------------------------------------------------------------------

    def __getitem__(
        self, key: str | tuple[str, SupportsIndex]
    ) -> Float[Tensor, "*batch head query key"] | Float[Tensor, "*batch pos ..."]:
        """Give a map by name: `ra["ra", 5]`, `ra["knockout", -1]`, `ra["blocks.5.attn.hook_ra"]`.

        Or vectors, `ra["query", 5]`, where the run kept them.

        Raises:
            NotStored: that map is not here; the message says what is.
        """
        name = self.sites.name(key)
        if name in self._maps:
            return self._maps[name]
        made = self._made_from(name)
        if made is None:
            raise NotStored(self._why_not(key))
        kind, site, parts = made
        missing = [part for part in parts if site.map_name(part) not in self._maps]
        if missing:
            raise NotStored(
                f"{kind!r} is made from {parts[0]!r} and {parts[1]!r}; {self._why_not(missing[0])}"
            )
        pattern, other = (self._maps[site.map_name(part)] for part in parts)
        return foretold(kind, pattern, other, site.need_scale() if kind == "knockout" else 1.0)

    def __contains__(self, key: object) -> bool:
        """Tell whether a map can be had, by either form of name."""
        try:
            name = self.sites.name(key)
        except NotStored:
            return False
        made = self._made_from(name)
        if name in self._maps or made is None:
            return name in self._maps
        return all(made[1].map_name(part) in self._maps for part in made[2])

    def _made_from(
        self, name: str
    ) -> tuple[Literal["knockout", "cut"], Site, tuple[StoredKind, StoredKind]] | None:
        """What a map that is not stored itself is made from; None where it is no such map."""
        kinds: tuple[Literal["knockout", "cut"], ...] = ("knockout", "cut")
        for site in self.sites.values():
            for kind in kinds:
                if name == site.map_name(kind):
                    return kind, site, FORETOLD_FROM[kind]
        return None

    def __len__(self) -> int:
        """Give the number of maps stored."""
        return len(self._maps)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the full names of the maps, layer by layer."""
        return iter(self.keys())

    def keys(self) -> list[str]:
        """Full names of the maps, layer by layer."""
        return self.sites.in_order(self._maps)

    def values(self) -> list[Tensor]:
        """The maps, layer by layer."""
        return [self._maps[name] for name in self.keys()]

    def items(self) -> list[tuple[str, Tensor]]:
        """Full names and maps, layer by layer."""
        return [(name, self._maps[name]) for name in self.keys()]

    @property
    def layers(self) -> list[int]:
        """Layers collected."""
        return list(self.sites)

    @property
    def n_heads(self) -> int:
        """Query heads per layer; of the layer with the most, where they differ."""
        return self.sites.shape[1]

    @property
    def scale(self) -> dict[int, float]:
        """Softmax scale by layer: R = scale · ∂L/∂scores."""
        return {layer: site.need_scale() for layer, site in self.sites.items()}

    @property
    def batch_size(self) -> int:
        """Number of examples."""
        first = next(iter(self._norms.values()), torch.zeros(0))  # empty before the backward
        return first.shape[0] if self.has_batch_dim else 1

    @property
    def str_tokens(self) -> list[list[str]] | list[str] | None:
        """Tokens the model read, per example, without padding; None if it was not told.

        They are for reading: of a character cut over several tokens the last has the character, the
        others their bytes, `⟨E2 9C⟩`. The text itself is what the tokenizer decodes.
        """
        if self.info.str_tokens is None:
            return None
        rows = [list(row) for row in self.info.str_tokens]
        return rows if self.has_batch_dim else rows[0]

    @property
    def n_bytes(self) -> int:
        """Memory of the maps stored."""
        return sum(t.nbytes for t in self._maps.values())

    def kv_group(self, head: Head | Whole) -> int:
        """Index of the key/value head that a query head reads (grouped queries).

        Args:
            head: `"L2H3"`, `(layer, head)`, a `HeadScore`; or its index alone, where all layers
                have the same heads.

        Raises:
            BadInput: no such head, or an index alone where layers differ.
        """
        index = as_whole(head)
        if index is None:
            layer, index = layer_and_index(head)
            layer = layer + self.sites.n_layers if layer < 0 else layer
        else:
            layer = self.layers[0]
            if len({(site.n_heads, site.n_key_value_heads) for site in self.sites.values()}) > 1:
                raise BadInput(
                    f"found head {index}, but the layers of this model differ in their heads. "
                    f"Give its layer too: 'L{layer}H{index}'."
                )
        if layer not in self.sites:
            raise BadInput(f"found head {spell_head(head)}; this cache has layers {self.layers}.")
        site = self.sites[layer]
        if not -site.n_heads <= index < site.n_heads:
            raise BadInput(
                f"found head {spell_head(head)}; {site.label} has heads 0 to {site.n_heads - 1}."
            )
        return site.kv_group(index % site.n_heads)

    def __repr__(self) -> str:
        """Say what is in the cache."""
        kinds = [k for k in STORED_KINDS if any((k, layer) in self for layer in self.layers)]
        some = any((k, layer) in self for k in VECTOR_KINDS for layer in self.layers)
        held = [*(kinds or [f"{self.store} only"]), *["vectors"] * some]
        held += [f"{self.n_bytes / 1e6:.2f} MB"] if self._maps else []
        n = self.batch_size
        return (
            f"RACache of {self.info.model_name}: {n} prompt{'s' * (n != 1)}, "
            f"layers {self.sites.spell()}, {spell_counts(self.sites.n_heads)} heads "
            f"({', '.join(held)})"
            + "".join(f"\n  {name.lower()}: {value}" for name, value in self.facts())
        )

    def facts(self, example: Whole | None = None) -> list[tuple[str, str]]:
        """Tell in names and values what was read, what was asked for, and the loss.

        Args:
            example: Of which example. Default: of all of them, in short.
        """
        return self.info.facts(self.loss.detach(), whole_or_none("example", example))

    @property
    def loss_unit(self) -> str:
        """Unit of the loss: `nats` for −log p, `logits`, or of others `units of the loss`."""
        return self.info.loss_unit

    def loss_of(self, example: Whole) -> float:
        """Loss of an example; of the whole batch where a metric gave one number for it."""
        loss = self.loss.detach()
        return float(loss[whole("example", example)] if loss.ndim else loss)

    def model_facts(self) -> list[tuple[str, str]]:
        """Tell in names and values which model this is of, and which of its layers."""
        first, last = self.layers[0], self.layers[-1]
        together = len(self.layers) > 1 and self.layers == list(range(first, last + 1))
        layers = f"{first} to {last}" if together else ", ".join(map(str, self.layers))
        return [
            ("Model", self.info.model_name),
            ("Layers", f"{layers}; {spell_counts(self.sites.n_heads)} heads each"),
        ]

    # ---- summaries ------------------------------------------------------------------------------

    def stack(self, kind: MapKind = "ra") -> Float[Tensor, "layer *batch head query key"]:
        """Give all layers of one kind of map in one tensor, in the order of `layers`."""
        maps = [self[kind, layer] for layer in self.layers]
        if len({t.shape for t in maps}) > 1:
            raise BadInput(
                "the layers have maps of different shapes or numbers of heads, so they do not go "
                "into one tensor. Take them layer by layer: ra['ra', 0], or some with layers=."
            )
        device = next(iter(self._norms.values())).device
        return torch.stack([t.to(device) for t in maps])

    def norms(self, kind: MapKind = "ra") -> Float[Tensor, "*batch layer head"]:
        """Frobenius norm of each head's map, per example (paper section 5.2).

        Where layers have different numbers of heads, NaN at those that do not exist.
        """
        if not self._norms:
            raise NotStored("this cache is empty: run the backward pass first.")
        kind = read_kind(kind)
        device = next(iter(self._norms.values())).device
        if kind == "pattern_grad" and (kind, self.layers[0]) not in self._norms:
            raise NotStored(
                "found no norms of hook_pattern_grad: attention ran in blocks of rows, whose "
                "queries meet no later keys, and G is a number there too. Leave query_rows away, "
                "with which shorter prompts run in one block; R and the pattern are whole here."
            )
        rows = [
            self[kind, layer].flatten(start_dim=-2).norm(dim=-1)
            if kind in ("knockout", "cut")
            else self._norms[kind, layer]
            for layer in self.layers
        ]
        return table([row.to(device) for row in rows])

    def top_heads(self, k: Whole = 10, kind: MapKind = "ra") -> list[HeadScore]:
        """Give the `k` heads with the largest norm, averaged over the examples."""
        k = whole("k", k, least=1)
        scores = self.norms(kind).mean(dim=0) if self.has_batch_dim else self.norms(kind)
        every = self.sites.heads
        values, order = scores[self.sites.places].sort(descending=True, stable=True)
        return [
            HeadScore(*every[int(i)], float(v)) for v, i in zip(values[:k], order[:k], strict=True)
        ]

    def mean(self, *kinds: MapKind) -> MeanMaps:
        """Average maps over the examples, entry by entry (paper section 5.3).

        Args:
            *kinds: Kinds of map. Default: those stored.

        Raises:
            BadInput: examples of different lengths, whose positions do not correspond.
            NotStored: the maps were not stored.
        """
        chosen = [read_kind(kind) for kind in kinds]
        if self._running is not None:
            mean = self._running.result()
            for kind in chosen:
                mean.by_layer(kind)
            return mean
        if not any((kind, layer) in self for kind in STORED_KINDS for layer in self.layers):
            raise NotStored(self._why_not("ra"))
        running = RunningMean(self.sites, self.batch_size)
        for site in self.sites.values():
            queries = self.info.common_span(site.query_side)
            keys = self.info.common_span(site.key_side)
            stored = filter(self._maps.__contains__, map(site.map_name, STORED_KINDS))
            for name in map(site.map_name, chosen) if chosen else stored:
                value = self[name]
                batched = value if self.has_batch_dim else value.unsqueeze(0)
                running.add(name, batched[..., queries, keys])
        return running.result()

    def to_dataframe(self) -> pd.DataFrame:
        """Tabulate one row per prompt, layer and head: the norms, the loss, the target."""
        n = self.batch_size
        every = [(prompt, *head) for prompt in range(n) for head in self.sites.heads]
        import pandas as pd  # late, as it takes long to import

        index = pd.MultiIndex.from_tuples(every, names=["prompt", "layer", "head"])
        first = self.layers[0]
        norms = {
            f"{kind}_norm": self.norms(kind)[..., self.sites.places].flatten().tolist()
            for kind in MAP_KINDS
            if (kind, first) in self._norms or (kind, first) in self
        }
        frame = pd.DataFrame(norms, index=index).reset_index()
        losses = [self.loss_of(i) for i in range(n)]
        frame["loss"] = [losses[i] for i in frame["prompt"]]
        targets = self.info.targets or (None,) * n
        frame["target"] = [targets[i] for i in frame["prompt"]]
        return frame

    # ---- knockouts ------------------------------------------------------------------------------

    def edges(
        self,
        *,
        heads: Heads = None,
        layers: Layers = None,
        queries: Tokens = None,
        keys: Tokens = None,
    ) -> EdgeSet:
        """Choose edges: from some queries to some keys, in some heads, of every example.

            ra.edges(queries=-1, keys="Beats Music", layers=range(10, 16))

        Args:
            heads: Labels like `"L3H5"`, `(layer, head)` pairs or `HeadScore`s; one or several.
                Default: all.
            layers: Layers; with `heads` those of them that lie in these. Default: all.
            queries: Tokens that look: positions within each example (negative: from its end), a
                slice, or a text, which stands for all tokens that it covers, each time that it
                occurs; one or several. Default: all.
            keys: Tokens looked at, in the same way.

        Returns:
            A set for `knockout_hooks`. What has no end, all tokens or a slice without one, goes on
            with those that the model generates.

        Raises:
            BadInput: heads, layers, positions or texts that are not there.
        """
        choice = {"heads": heads, "layers": layers, "queries": queries, "keys": keys}
        return set_of(self, **choice)

    def knockout(
        self,
        *,
        heads: Heads = None,
        layers: Layers = None,
        queries: Tokens = None,
        keys: Tokens = None,
        edges: EdgeSet | None = None,
        renormalise: bool = True,
    ) -> Float[Tensor, "*batch"]:
        """Foretell what cutting a set of edges does to the loss, to first order.

        Args:
            heads: The edges to cut, as in `edges`.
            layers: The same.
            queries: The same.
            keys: The same.
            edges: Instead of these, a set that is there already.
            renormalise: Whether each row gives what is cut to its other keys, as if those that are
                cut were not there. A row that would have nothing left stays as it is.

        Returns:
            Change of the loss of each example, in its unit, positive where it rises. It is
            −Σ R~ / (1 − Σ A) per row, or −Σ A·G, summed over rows, heads and layers.

        Raises:
            BadInput: heads, layers, positions or texts that are not there; or maps of another
                backward pass than the loss's own.
            NotStored: the maps were not kept.
        """
        choice = {"heads": heads, "layers": layers, "queries": queries, "keys": keys}
        if edges is None:
            edges = set_of(self, **choice)
        elif any(value is not None for value in choice.values()):
            raise BadInput("found edges= beside heads, layers, queries or keys. Give one of them.")
        return effect_of(self, edges, renormalise=renormalise)

    def top_edges(self, k: Whole = 10, *, by: MapKind = "knockout", bos: bool = False) -> Edges:
        """Give the `k` edges of each example that matter most, the largest first.

        Args:
            k: How many of each example.
            by: What they are ordered by, without regard to its sign: a kind of map. `"knockout"`:
                the foretold change of the loss when the edge is cut.
            bos: Whether edges to the token that was put in front of a text count, and those to
                attention sinks (`ra_lens.knockouts.sinks`, from the patterns kept). Heads rest
                there, and cutting that is seldom what is asked about.

        Returns:
            Records with tokens and values; `to_dataframe()` makes a table of them.

        Raises:
            NotStored: the maps were not kept.
        """
        return strongest(self, whole("k", k, least=1), by=read_kind(by), bos=bos)

    def flow(
        self, *, queries: Tokens = -1, by: MapKind = "knockout", heads: Heads = None
    ) -> Float[Tensor, "*batch layer key"]:
        """Sum a map over heads, and over the rows of some queries: what enters them, from where.

        Args:
            queries: Tokens that look, as in `edges`. Default: the last one of each example.
            by: A kind of map. `"knockout"`: the foretold change of the loss if a layer's heads,
                one by one, could not look at the key.
            heads: Only these. Default: all.

        Returns:
            Layers in the order of `layers`, keys as the columns of the maps.

        Raises:
            BadInput: heads or tokens that are not there, or an encoder-decoder, whose layers have
                keys of different texts.
            NotStored: the maps were not kept.
        """
        return flow_of(self, queries=queries, by=read_kind(by), heads=heads)

    # ---- making others --------------------------------------------------------------------------

    def to(self, device: str | torch.device | torch.dtype) -> RACache:
        """Move or convert every tensor; gives a new cache.

        Raises:
            BadInput: no device, and no floating-point dtype.
        """
        where = read_place(device)
        new = self._map_tensors(lambda t: t.to(where))
        return replace(new, _running=None if self._running is None else self._running.to(where))

    def remove_batch_dim(self) -> RACache:
        """Drop the batch dimension of a cache of one example; gives a new cache."""
        if not self.has_batch_dim:
            return self
        if self.batch_size != 1:
            raise BadInput(
                f"found a cache of {self.batch_size} examples; only one can lose its batch "
                "dimension. Take one first: ra.apply_slice_to_batch_dim(0)."
            )
        new = self._map_tensors(lambda t: t[0] if t.ndim else t)
        return replace(new, has_batch_dim=False)

    def apply_slice_to_batch_dim(
        self, batch_slice: SupportsIndex | slice | Iterable[Any]
    ) -> RACache:
        """Keep some of the examples; one whole number keeps one and drops the batch dimension.

        The loss of a metric that gave one scalar for the batch belongs to no example and becomes
        NaN.

        Args:
            batch_slice: A place or several (negative: from the end), a slice, or a bool for every
                example, as in `ra.apply_slice_to_batch_dim(ra.loss > 1)`; of Python, NumPy, torch
                or pandas.

        Raises:
            BadInput: none of these, an example that is not there, or none at all.
            NotStored: with `store="mean"`, which keeps no examples.
        """
        if not self.has_batch_dim:
            raise BadInput("this cache has no batch dimension to slice.")
        if self.store == "mean":
            raise NotStored(self._why_not("ra"))
        examples = places("batch_slice", batch_slice, self.batch_size, "examples")
        index = torch.tensor(examples)
        new = self._map_tensors(lambda t: t[index.to(t.device)] if t.ndim else t)
        loss = new.loss if self.loss.ndim else torch.full_like(self.loss, float("nan"))
        new = replace(new, info=self.info.part(examples), loss=loss)
        return new if is_several(batch_slice) else new.remove_batch_dim()

    def to_activation_cache(self, model: nn.Module) -> Any:
        """Give the maps as a TransformerLens `ActivationCache` of `model`.

        There `("ra", 5)` stands for `blocks.5.hook_ra`, as TransformerLens does not know that these
        maps belong to the attention: ask for `cache["ra", 5, "attn"]`, or for the full name.

        Raises:
            NotStored: the maps were not kept.
        """
        if not self._maps:
            raise NotStored(self._why_not("ra"))
        return as_lens(model).activation_cache(dict(self.items()), has_batch_dim=self.has_batch_dim)

    @staticmethod
    def from_activation_cache(cache: Any, model: nn.Module) -> RACache:
        """Read `model.run_with_cache(..., incl_bwd=True)` that someone already has.

        Args:
            cache: ActivationCache with hook_pattern and hook_pattern_grad.
            model: The model that it came from; gives the softmax scale.

        Raises:
            NotStored: there are no pattern gradients in it.
        """
        lens = as_lens(model)
        entries: dict[str, Tensor] = dict(cache.items())
        found = {
            layer: replace(site, observe_only=False)  # else there were no gradients
            for layer, site in lens.sites.items()
            if site.pattern_name in entries and f"{site.pattern_name}_grad" in entries
        }
        if not found:
            seen = any(site.pattern_name in entries for site in lens.sites.values())
            raise NotStored(
                f"found {'patterns but no pattern gradients' if seen else 'no patterns'} in the "
                "activation cache. Run model.run_with_cache(..., incl_bwd=True) with a loss; on "
                "models whose hook_pattern is observe-only that gives no gradients: use "
                "run_with_ra instead."
            )
        has_batch = bool(getattr(cache, "has_batch_dim", True))
        sites = Sites(found, lens.sites.n_layers)
        new = RACache(sites=sites, info=RunInfo(model_name=lens.name, n_layers=sites.n_layers))
        for layer, site in sites.items():
            pattern, grad = entries[site.pattern_name], entries[f"{site.pattern_name}_grad"]
            dtype = torch.float64 if pattern.dtype == torch.float64 else torch.float32
            pattern, grad = pattern.detach().to(dtype), grad.detach().to(dtype)
            if not has_batch:
                pattern, grad = pattern.unsqueeze(0), grad.unsqueeze(0)
            new._put(layer, "ra", reversed_attention(pattern, grad, site.need_scale()))
            new._put(layer, "pattern", pattern)
            new._put(layer, "pattern_grad", grad)
        return new if has_batch else new.remove_batch_dim()

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file, in place of another cache only.

        Raises:
            BadInput: the path cannot be written, or holds something that is no cache.
        """
        write_cache(path, **vars(self))

    @staticmethod
    def load(path: str | Path) -> RACache:
        """Read a cache written by `save`; BadFile if missing, truncated, or of something else."""
        return RACache(**read_cache(path))

    def to_html(self, path: str | Path, **options: Any) -> Path:
        """Write a report, one HTML file; options are those of `ra_lens.report.write_report`."""
        from ra_lens.report import write_report

        return write_report(self, path, **options)

    def show(self, **options: Any) -> None:
        """Show the maps of every head in a notebook's cell, as a cache in the last line does.

        Outside of notebooks, and before the backward pass, what `print` says of the cache.

        Args:
            **options: Those of `ra_lens.report.inline_report`: `examples`, `sign`, `top`,
                `max_tokens`, `max_megabytes`, `height`.

        Raises:
            BadInput: an option that cannot be.
        """
        from ra_lens.report.inline import display

        display(self, **options)

    def _repr_html_(self) -> str | None:
        """Draw the cache for a notebook, which asks for it; where only text is shown nobody does.

        `_repr_mimebundle_` would be asked for in terminals too, and draw in vain.
        """
        from ra_lens.report.inline import cell_of

        return cell_of(self)

    # ---- filling, by a run ----------------------------------------------------------------------

    def _put(self, layer: int, kind: StoredKind, value: Tensor) -> None:
        """Add a map (`[batch, head, query, key]`) and its norms."""
        self._put_norms(layer, kind, value)
        self._keep(layer, kind, value)

    def _put_norms(
        self,
        layer: int,
        kind: StoredKind,
        value: Tensor,
        device: str | torch.device | None = None,
        *,
        add: bool = False,
    ) -> Float[Tensor, "batch head"]:
        """Add the norms of a map; gives them where it is, and only they move to `device`.

        With `add` it is a block of the map's rows, and the norms become those of all so far. A
        block of G lacks keys that come later, where R and the pattern are 0 and G is not: its norms
        are not kept.
        """
        norms = value.flatten(start_dim=-2).norm(dim=-1)
        if add and kind == "pattern_grad":
            return norms
        if add and (kind, layer) in self._norms:
            norms = torch.hypot(norms, self._norms[kind, layer].to(norms.device))
        self._norms[kind, layer] = norms.to(device=device)
        if self.loss.ndim and len(self.loss) != len(norms):  # of examples met for the first time
            self.loss = torch.full(norms.shape[:1], float("nan"))
        return norms

    def _keep(self, layer: int, kind: StoredKind | VectorKind, value: Tensor) -> None:
        """Add a map without its norms, or vectors."""
        self._maps[self.sites[layer].map_name(kind)] = value

    @staticmethod
    def _joined(
        parts: Sequence[RACache],
        *,
        running: RunningMean | None = None,
        order: Sequence[int] | None = None,
    ) -> RACache:
        """Join caches of several batches of one run; their examples come in `order`, if given."""
        first = parts[0]
        if len(parts) == 1:
            return replace(first, _running=running)

        def join(tensors: Iterable[Tensor]) -> Tensor:
            whole = torch.cat(list(tensors))
            return whole if order is None else whole[list(order)]

        names, keys = list(first._maps), first._norms
        return replace(
            first,
            # Popped, as parts beside the whole would take twice the memory.
            _maps={name: join(p._maps.pop(name) for p in parts) for name in names},
            _norms={key: join(p._norms[key] for p in parts) for key in keys},
            _running=running,
        )

    # ---- inside ---------------------------------------------------------------------------------

    def _why_not(self, key: object) -> str:
        if (kind := self._vector_kind(key)) is not None:
            layers = {site.map_name(kind): site for site in self.sites.values()}
            site = layers.get(self.sites.name(key))
            if site is None or not any((other, site.layer) in self for other in VECTOR_KINDS):
                return f"{key!r} was not kept. Run again with run_with_ra(..., vectors=True)."
            return (
                f"{key!r} is not in this cache. Either it is not among the vectors= asked for, or "
                f"the attention of {site.label} has none: latent attention (MLA) has no W_Q, W_K "
                "and W_V, some modules show no projections, and a hook may have replaced them."
            )
        if self.store != "maps":
            other = "ra.norms()" if self.store == "norms" else "ra.mean() and ra.norms()"
            return (
                f"{key!r} was not kept: this run had store={self.store!r}, which gives {other}. "
                "Run again with store='maps'."
            )
        names = self.keys()
        some = f"{names[0]} to {names[-1]}" if names else "nothing yet (run the backward pass)"
        return f"{key!r} is not in this cache, which holds {some} (layers {self.layers})."

    def _vector_kind(self, key: object) -> VectorKind | None:
        name = self.sites.name(key)  # pyright: ignore[reportArgumentType]
        return next((kind for kind in VECTOR_KINDS if name.endswith(f".hook_{kind}")), None)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> RACache:
        return replace(
            self,
            loss=function(self.loss),
            _maps={name: function(value) for name, value in self._maps.items()},
            _norms={key: function(value) for key, value in self._norms.items()},
        )
