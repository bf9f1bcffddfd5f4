"""Which patches are compared, to see what of attention patching carries its effect.

Each is the mean RA map of the training questions with something of it left out, or another map in
its place. What one adds to questions of n tokens lies on their first n rows and columns, as in the
published protocol; maps of prompts of another length are laid with their end on the questions' end,
as `patch_hooks(align="right")` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

from torch import Tensor
from typing_extensions import Unpack

from ra_lens.experiments.mean_maps import LearnedMaps, MapName
from ra_lens.experiments.runner import Cell
from ra_lens.heads.registry import find_method
from ra_lens.patching.controls import Control
from ra_lens.patching.hooks import PatchOptions
from ra_lens.patching.place import map_indices, place
from ra_lens.tasks import Prompt

Ablation = Literal[
    "layers", "heads", "rows", "sign", "place", "prompts", "transfer", "shots", "controls"
]
Change = tuple[Mapping[int, Tensor], PatchOptions]
"""What is added, by layer, and how."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One patch.

    Attributes:
        ablation: What it is a case of; `"whole"` for the whole map.
        name: Which one.
        change: Makes it.
        map: What kind of map is added.
    """

    ablation: str
    name: str
    change: Callable[[], Change]
    map: MapName = "ra"


@dataclass(frozen=True, eq=False)
class Material:
    """What the variants of one cell are made of; maps are averaged when they are first needed.

    Attributes:
        cell: The cell.
        tasks: Names of all tasks of the experiment.
        others: By task, the material of the cells with as many demonstrations; its own among them.
        left_out: Why variants that were asked for are not there.
    """

    cell: Cell
    tasks: Sequence[str]
    others: Mapping[str, Material]
    left_out: list[str] = field(default_factory=list[str])
    _kept: dict[object, LearnedMaps] = field(default_factory=dict[object, LearnedMaps])

    def of(self, cell: Cell) -> Material:
        """Give the material of the same cell in another's hands, as a grid gives it."""
        return replace(self, cell=cell, left_out=[])

    @property
    def learned(self) -> LearnedMaps:
        """The maps of all training questions."""
        return self._learned("all", self.cell.learned["train"])

    @property
    def n_tokens(self) -> int:
        """Tokens of a question, without its answer."""
        return self.cell.questions.prompts.lengths[0]

    def variants(self) -> Iterator[Variant | None]:
        """Give what is compared, the whole map first; None in the place of what is left out.

        All cells of an experiment give as many.
        """
        kinds: dict[Ablation, Callable[[], Iterator[Variant | None]]] = {
            "layers": self._layers,
            "heads": self._heads,
            "rows": self._rows,
            "sign": self._sign,
            "place": self._place,
            "prompts": self._prompts,
            "transfer": self._transfer,
            "shots": self._shots,
            "controls": self._controls,
        }
        yield Variant("whole", "whole map", self._whole)
        for ablation in self.cell.run.settings["ablations"]:
            yield from kinds[ablation]()

    def _layers(self) -> Iterator[Variant]:
        layers = list(self.cell.run.lens.sites)
        for first, last in self.cell.run.settings["layer_ranges"]:
            chosen = [layer for layer in layers if first <= layer <= last]
            name = f"layer {first}" if first == last else f"layers {first} to {last}"
            yield Variant("layers", name, partial(self._whole, layers=chosen))

    def _heads(self) -> Iterator[Variant]:
        for method in self.cell.run.methods:
            label = find_method(method).label or method
            for part in self.cell.run.settings["head_shares"]:
                for first in (True, False):
                    named = (
                        f"first {_percent(part)}" if first else f"all but first {_percent(part)}"
                    )
                    make = partial(self._of_heads, method, part, first=first)
                    yield Variant("heads", f"{label}: {named}", make)

    def _rows(self) -> Iterator[Variant]:
        n = self.n_tokens
        for name, rows in {
            "last row": range(n - 1, n),
            "all but the last row": range(n - 1),
            "first half": range(n // 2),
            "second half": range(n // 2, n),
        }.items():
            yield Variant("rows", name, partial(self._whole, rows=list(rows)))

    def _sign(self) -> Iterator[Variant]:
        yield Variant("sign", "R < 0 only", partial(self._clamped, max=0))
        yield Variant("sign", "R > 0 only", partial(self._clamped, min=0))

    def _place(self) -> Iterator[Variant]:
        yield Variant("place", "at the scores", partial(self._whole, at="scores"))
        yield Variant("place", "rows kept distributions", partial(self._whole, renormalise=True))

    def _prompts(self) -> Iterator[Variant]:
        for n in self.cell.run.settings["n_prompts"]:
            name = f"{n} training question{'s' * (n != 1)}"
            yield Variant("prompts", name, partial(self._of_fewer, n))

    def _transfer(self) -> Iterator[Variant | None]:
        for task in self.tasks:
            other = self.others[task]
            if task == self.cell.task.name:
                yield None
            elif other.n_tokens > self.n_tokens:
                self.left_out.append(
                    f"maps of {task} ({other.n_tokens} tokens) on {self.cell.task.name} "
                    f"({self.n_tokens}), whose questions are shorter"
                )
                yield None
            else:
                yield Variant("transfer", f"maps of {task}", partial(self._of_other, other))

    def _shots(self) -> Iterator[Variant | None]:
        for n in self.cell.run.settings["from_shots"]:
            if self.cell.shots != 0:
                yield None
                continue
            prompts = self._with_shots(n)
            lengths = {self._n_tokens_of(prompt) for prompt in prompts}
            if len(lengths) > 1:
                self.left_out.append(
                    f"maps of {self.cell.task.name} with {n} examples, which have {min(lengths)} "
                    f"to {max(lengths)} tokens"
                )
                yield None
                continue
            name = f"maps with {n} example{'s' * (n != 1)}"
            yield Variant("shots", name, partial(self._of_longer, n, prompts, lengths.pop()))

    def _controls(self) -> Iterator[Variant]:
        names: dict[MapName, str] = {
            "shuffled": "RA, rows shuffled",
            "grad": "G",
            "centred_grad": "G, rows centred",
            "a_grad": "A ⊙ G",
            "pattern": "FA",
        }
        for kind in (*get_args(Control), "pattern"):
            make = partial(self._whole_of, kind)
            yield Variant("controls", names[kind], make, map=kind)

    # ---- maps -----------------------------------------------------------------------------------

    def _whole(self, **options: Unpack[PatchOptions]) -> Change:
        return self.learned.maps("ra"), options

    def _whole_of(self, kind: MapName) -> Change:
        return self.learned.maps(kind), {}

    def _of_heads(self, method: str, part: float, *, first: bool) -> Change:
        key = f"order|{method}"
        order = self.cell.unit(key, lambda: self.cell.ranked(method).order())
        heads = [(int(layer), int(head)) for layer, head in order]
        k = n_of_share(part, len(heads))
        return self._whole(heads=heads[:k] if first else heads[k:])

    def _clamped(self, **limits: Any) -> Change:
        maps = self.learned.maps("ra")
        return {layer: value.clamp(**limits) for layer, value in maps.items()}, {}

    def _of_fewer(self, n: int) -> Change:
        prompts = self.cell.learned["train"][:n]
        return self._learned(("fewer", n), prompts).maps("ra"), {}

    def _of_other(self, other: Material) -> Change:
        return self._at_the_end(other.learned.maps("ra"), other.n_tokens), {}

    def _of_longer(self, shots: int, prompts: Sequence[Prompt], n_tokens: int) -> Change:
        maps = self._learned(("shots", shots), prompts).maps("ra")
        return self._at_the_end(maps, n_tokens), {}

    def _at_the_end(self, maps: Mapping[int, Tensor], n_tokens: int) -> dict[int, Tensor]:
        """Lay maps of prompts of `n_tokens`, and their answers, on the end of the questions."""
        n = self.n_tokens
        index = map_indices(n_tokens, n, n, align="right")
        return {
            layer: place(
                value[None, :, :n_tokens, :n_tokens],
                index.to(value.device),
                n,
                causal=self.cell.run.lens.sites[layer].causal,
            )[0]
            for layer, value in maps.items()
        }

    def _learned(self, key: object, prompts: Sequence[Prompt]) -> LearnedMaps:
        run = self.cell.run
        return self._kept.setdefault(key, LearnedMaps(run.lens, run.protocol, prompts))

    def _with_shots(self, n: int) -> list[Prompt]:
        run = self.cell.run
        return run.learned(self.cell.task.split(run.protocol.split), "train", n, "n_mean")

    def _n_tokens_of(self, prompt: Prompt) -> int:
        run = self.cell.run
        return len(run.lens.encode(prompt.text, prepend_bos=run.protocol.prepend_bos))


def materials_of(cells: Sequence[Cell]) -> dict[tuple[str, int], Material]:
    """Give what the variants of each cell are made of, by task and number of demonstrations."""
    tasks = list(dict.fromkeys(cell.task.name for cell in cells))
    by_shots: dict[int, dict[str, Material]] = {}
    found: dict[tuple[str, int], Material] = {}
    for cell in cells:
        others = by_shots.setdefault(cell.shots, {})
        material = Material(cell, tasks, others)
        found[cell.task.name, cell.shots] = others[cell.task.name] = material
    return found


def thirds(layers: Sequence[int]) -> list[list[int]]:
    """Give the first and last layer of each third; of fewer layers than three, of each layer."""
    parts = min(3, len(layers))
    ends = [len(layers) * i // parts for i in range(parts + 1)]
    return [[layers[start], layers[end - 1]] for start, end in pairwise(ends)]


def n_of_share(part: float, n_heads: int) -> int:
    """Give how many heads a share of them is: at least one, and one less than all."""
    return min(max(round(part * n_heads), 1), n_heads - 1)


def _percent(part: float) -> str:
    return f"{100 * part:g} %"
