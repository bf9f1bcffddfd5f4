"""The knockout test: what is foretold of cutting attention, beside what cutting it does.

One backward pass foretells, to first order, what every edge of attention is worth
(`ra_lens.knockouts.predict`). Here a sample of edges, and of sets of edges, is really cut
(`ra_lens.experiments.cuts`), and the change of the loss is noted beside what was foretold and what
its rivals say. `knockout_agreement` sums up such a table.

Drawn, of every question:

* edges of each layer: half at random among those with A > .02, half those with the largest |R|. An
  edge whose row the loss does not reach, or that is all its row has, is not drawn at random;
* sets: a span of one to four tokens that the last token may not look at any more, in all heads of
  some layers; the same with the first token of the prompt, where heads rest, and that token alone.

Foretold, in nats, positive where the loss rises:

    predicted     −Σ R~ / (1 − Σ A) of each row, or −Σ A·G of a plain cut
    a_grad        −Σ A·G
    minus_ra      −Σ R~
    input_grad    −Σ x·∂L/∂x over the tokens looked at, x being what goes into the first block
    end           dL/dt at t = 1, where all is cut: one more backward pass
    trapezoid     mean of `predicted` and `end`: two backward passes
    gauss_n       Σ w_i dL/dt at n points t_i of a cut made by and by (Gauss-Legendre)

and, not signed, so to be compared with the size of the change: `pattern`, Σ A; `grad`, Σ |G|;
`value`, Σ A·‖v W_O‖ (Kobayashi et al. 2020).

Cost for n questions: 3 n passes to foretell; for each edge and set a forward pass of one row that
begins at its first layer; for each of its slopes that and a backward pass.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ra_lens.cache import RACache
from ra_lens.errors import BadInput, UnsupportedModel, one_of
from ra_lens.experiments.cuts import (
    Cut,
    CutQuestions,
    gauss_points,
    refuse_slopes,
    refuse_two_texts,
)
from ra_lens.experiments.engines import Engine
from ra_lens.experiments.runner import (
    Cell,
    Protocol,
    Row,
    Tasks,
    experiment,
    prompts_hash,
    read_some,
    read_tasks,
)
from ra_lens.knockouts.edges import Box, EdgeSet, Positions
from ra_lens.memory import offering
from ra_lens.model import Lens, PrependBos, Sites, as_lens
from ra_lens.model.values import writing_names, written_norms
from ra_lens.numbers import BatchSize, Whole, Wholes, whole, wholes
from ra_lens.prompts import Prompts
from ra_lens.run import run_with_ra
from ra_lens.tasks import Demonstrations, SplitRule

CutName = Literal["renormalised", "plain"]

WINDOWS = (1, 3, 5)
"""Numbers of layers that are cut together."""

_SEEN = 0.02  # smaller attention is not drawn at random
_LONGEST = 4  # tokens of a span
_NOWHERE = -1  # in the columns head and key: all, or several


def knockout_test(
    model: nn.Module,
    task: Tasks,
    *,
    n_edges: Whole = 2,
    n_sets: Whole = 2,
    windows: Wholes | None = None,
    cuts: CutName | Sequence[CutName] = ("renormalised",),
    steps: Wholes = (),
    ends: bool = False,
    steps_of: Literal["sets", "all"] = "sets",
    shots: Wholes = 1,
    n_test: Whole = 12,
    split: SplitRule = "code",
    seed: Whole = 0,
    demonstrations: Demonstrations = "own",
    prepend_bos: PrependBos = None,
    batch_size: BatchSize = 64,
    out: str | Path | None = None,
    progress: bool = True,
    engine: Engine = "local",
    part: str | None = None,
) -> pd.DataFrame:
    """Foretell what cutting attention does to the loss, and cut it.

    The loss is −log p of the first token of the answer, at the end of the question.

    Args:
        model: A HookedTransformer or TransformerBridge that reads left to right.
        task: A task, the name of a built-in one, `"all"`, or several.
        n_edges: Edges drawn in each layer of each question, half of them (rounded down) those with
            the largest |R|, the others at random among those with A > .02.
        n_sets: Spans drawn for each question and window; each is cut without the first token, with
            it, and the first token alone.
        windows: Numbers of layers in which a span is cut together. Default: 1, 3 and 5, as far as
            the model has so many.
        cuts: `"renormalised"`: the rest of a row gets what was cut, as if the keys were not there;
            `"plain"`: it does not.
        steps: Numbers of Gauss points at which the slope is taken to integrate the change, such as
            `(1, 3)`.
        ends: Whether the slope is also taken at the end, where all is cut.
        steps_of: Whether steps and ends are for `"sets"` only or for `"all"` cuts.
        shots: Numbers of demonstrations.
        n_test: Test questions at most.
        split: `"code"`: 70/9/21 % for train/valid/test; `"text"`: a third for test.
        seed: Demonstrations, edges and spans.
        demonstrations: `"own"`: drawn anew for every question; `"shared"`: the same before every
            question of a task.
        prepend_bos: What stands in front of each prompt, as in `run_with_ra`.
        batch_size: Rows per forward pass; `"auto"`: as many as fit what the model's device has
            free (`ra_lens.fitting`).
        out: `.parquet` or `.csv` to write; a run that was killed goes on where it stopped. Or a
            folder, or an address that fsspec reads: each cell of the grid is a file there.
        progress: False hides the progress bar.
        engine: Who computes: `"local"`, this process; `"ray"`, workers of a Ray cluster, each of
            which loads the model as it was loaded here (`RayEngine` says where and how).
        part: Which part of the grid to compute, `"3/8"`, where several processes share the folder
            `out`; the table is then that of this part.

    Returns:
        A table with one row per cut. Its columns are `task`, `n_shots`, `question`; `what` (`edge`
        or `set`), `cut`, `drawn` (`random`, `strongest`; `span`, `span and first`, `first`); the
        first `layer` and how many, `window`; `head` and `key`, −1 for all heads and several keys;
        `query`; `keys` as text; `query_token`, `key_tokens`; `first`, whether the first token is
        among the keys; `loss` before the cut and `measured`, what the cut adds to it, both from
        the model's own logits; and what is foretold, in the columns of
        `ra_lens.experiments.knockout` (NaN where the model does not show what it takes). Then what
        is needed to repeat it.

    Raises:
        BadInput: an option that cannot be used, or `out` holds something else.
        UnsupportedModel: a model whose attention cannot be read or edited.
        UnfinishedGrid: cells failed in a folder or on Ray; the others are finished.
    """
    tasks = read_tasks(task)
    protocol = Protocol.read(
        shots, split, seed, prepend_bos, batch_size, out, progress, demonstrations, engine, part
    )
    one_of("steps_of", steps_of, ("sets", "all"))
    lens = as_lens(model)
    refuse_two_texts(lens)
    points = [] if isinstance(steps, tuple | list) and not steps else wholes("steps", steps)
    settings: dict[str, Any] = {
        "n_edges": whole("n_edges", n_edges, least=0),
        "n_sets": whole("n_sets", n_sets, least=0),
        "windows": _read_windows(windows, len(lens.sites)),
        "cuts": read_some("cuts", cuts, ("renormalised", "plain")),
        "steps": [whole("steps", n, least=1) for n in points],
        "ends": bool(ends),
        "steps_of": steps_of,
        "n_test": whole("n_test", n_test, least=1),
    }
    if settings["steps"] or settings["ends"]:
        refuse_slopes(lens)
    if not settings["n_edges"] and not settings["n_sets"]:
        raise BadInput("found n_edges=0 and n_sets=0, which cut nothing. Give one of them.")
    with experiment("knockout", lens, tasks, protocol, accuracy="first token", **settings) as run:
        if run.finished is not None:
            return run.finished
        cells = run.cells(None)
        return run.frame("Knockouts", cells, _rows, steps=1 + len(lens.sites))


def _read_windows(windows: Wholes | None, n_layers: int) -> list[int]:
    if windows is None:
        return [n for n in WINDOWS if n <= n_layers]
    given = [whole("windows", n, least=1) for n in wholes("windows", windows)]
    if len(set(given)) < len(given) or max(given) > n_layers:
        raise BadInput(
            f"found windows={given}; give different numbers of layers, of 1 to {n_layers}."
        )
    return given


# ---- rows ---------------------------------------------------------------------------------------


def _rows(cell: Cell) -> Iterator[list[Row]]:
    """Give all rows of a cell with its last layer; the steps before it give none."""
    rows: list[Row] = []
    for question in range(len(cell.asked)):
        rows += cell.unit(f"foretold|{question}", partial(_foretell, cell, question))
    yield []
    measuring = _Measuring(cell)
    layers = list(cell.run.lens.sites)
    for layer in layers:
        of_layer = [row for row in rows if row["layer"] == layer]
        found = cell.unit(f"measured|{layer}", partial(measuring.measure, of_layer))
        for row, measured in zip(of_layer, found, strict=True):
            row |= measured
        if layer != layers[-1]:
            yield []
    yield cell.rows(rows, n_test=len(cell.asked), prompts_hash=prompts_hash(cell.asked))


class _Measuring:
    """Cuts what the rows of a cell say; the questions run when the first of them is needed."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell

    @cached_property
    def _questions(self) -> CutQuestions:
        run = self._cell.run
        return CutQuestions(run.lens, self._cell.questions, batch_size=run.protocol.batch_size)

    def measure(self, rows: Sequence[Row]) -> list[Row]:
        """Give what is measured of some rows."""
        if not rows:
            return []
        sites, settings = self._cell.run.lens.sites, self._cell.run.settings
        cuts = [_cut(sites, row) for row in rows]
        losses = self._questions.losses(cuts).tolist()
        found: list[Row] = [
            {"loss": float(self._questions.loss[cut.question]), "measured": loss}
            for cut, loss in zip(cuts, losses, strict=True)
        ]
        sloped = [
            i for i, row in enumerate(rows) if settings["steps_of"] == "all" or row["what"] == "set"
        ]
        for name, points in _slopes(settings["steps"], ends=settings["ends"]).items():
            values = torch.full((len(rows),), math.nan, dtype=torch.float64)
            if sloped:
                chosen = [cuts[i] for i in sloped]
                slopes = [w * self._questions.slopes(chosen, t) for t, w in points]
                values[sloped] = torch.stack(slopes).sum(dim=0)
            for one, value in zip(found, values.tolist(), strict=True):
                one[name] = value
        if settings["ends"]:
            for one, row in zip(found, rows, strict=True):
                one["trapezoid"] = (row["predicted"] + one["end"]) / 2
        return found


def _slopes(steps: Sequence[int], *, ends: bool) -> dict[str, list[tuple[float, float]]]:
    """Points and weights of each column that is made from slopes."""
    found: dict[str, list[tuple[float, float]]] = {"end": [(1.0, 1.0)]} if ends else {}
    return found | {f"gauss_{n}": gauss_points(n) for n in steps}


def _cut(sites: Sites, row: Row) -> Cut:
    """The cut that a row is of."""
    return Cut(
        row["question"],
        row["layer"],
        _set_of(sites, row["layer"], row["window"], row["head"], row["query"], _keys(row)),
        renormalise=row["cut"] == "renormalised",
    )


def _keys(row: Row) -> list[int]:
    return list(map(int, row["keys"].split()))


def _set_of(
    sites: Sites, layer: int, window: int, head: int, query: int, keys: Sequence[int]
) -> EdgeSet:
    """Edges from a query to some keys, in one head or in all heads of some layers on."""
    layers = list(sites)
    some = layers[layers.index(layer) :][:window]
    heads = {one: tuple(range(sites[one].n_heads)) if head == _NOWHERE else (head,) for one in some}
    return EdgeSet(((Box(heads, Positions((query,)), Positions(tuple(keys))),),))


# ---- what is foretold ---------------------------------------------------------------------------


def _foretell(cell: Cell, question: int) -> list[Row]:
    """Draw the cuts of a question, and give what is foretold of them."""
    run, lens = cell.run, cell.run.lens
    prompts = cell.questions.prompts.chosen([question]).unpadded()
    answer = cell.questions.answers[question][0]
    with offering():  # one question, of which all maps are needed
        _, ra = run_with_ra(lens.module, prompts, target=[answer], progress=False)
    tokens = lens.decode_each(prompts.ids[0])
    maps = _Maps(ra, _written(lens, prompts, ra), _input_gradient(lens, prompts, answer))
    protocol, settings = run.protocol, run.settings
    # Only `random()` is the same on every version of Python.
    drawing = random.Random(
        f"ra_lens knockouts {protocol.seed} {cell.task.name} {cell.shots} {question}"
    )
    drawn = _draw_edges(ra, settings["n_edges"], drawing)
    drawn += _draw_sets(
        list(lens.sites), len(tokens), settings["windows"], settings["n_sets"], drawing
    )
    rows: list[Row] = []
    for one in drawn:
        query, keys = one["query"], one["keys"]
        edges = _set_of(ra.sites, one["layer"], one["window"], one["head"], query, keys)
        about = {
            "question": question,
            **one,
            "key": keys[0] if one["what"] == "edge" else _NOWHERE,
            "keys": " ".join(map(str, keys)),
            "query_token": tokens[query],
            "key_tokens": "".join(tokens[key] for key in keys),
            "first": 0 in keys,
        }
        rivals = maps.of(edges.rows[0][0].heads, query, keys)
        for cut in settings["cuts"]:
            predicted = ra.knockout(edges=edges, renormalise=cut == "renormalised")
            rows.append({"cut": cut, **about, "predicted": float(predicted[0]), **rivals})
    return rows


@dataclass(frozen=True)
class _Maps:
    """What foretells a cut of one question."""

    ra: RACache
    written: dict[int, Float[Tensor, "head key"]] | None
    at_input: Float[Tensor, "pos"] | None

    def of(self, heads: Mapping[int, Sequence[int]], query: int, keys: Sequence[int]) -> Row:
        """What rivals say of a cut, and A."""
        found: Row = {"a_grad": 0.0, "minus_ra": 0.0, "pattern": 0.0, "grad": 0.0}
        value = 0.0
        for layer, some in heads.items():
            at = torch.tensor(some)[:, None], query, torch.tensor(keys)[None]
            pattern, ra, grad = (
                self.ra[kind, layer][0][at].double().cpu()
                for kind in ("pattern", "ra", "pattern_grad")
            )
            found["a_grad"] -= float((pattern * grad).sum())
            found["minus_ra"] -= float(ra.sum()) / self.ra.sites[layer].need_scale()
            found["pattern"] += float(pattern.sum())
            found["grad"] += float(grad.abs().sum())
            if self.written is not None:
                value += float((pattern * self.written[layer][at[0], at[2]].double()).sum())
        found["value"] = math.nan if self.written is None else value
        at_input = self.at_input
        found["input_grad"] = math.nan if at_input is None else float(at_input[keys].sum())
        return found


@torch.no_grad()
def _written(
    lens: Lens, prompts: Prompts, ra: RACache
) -> dict[int, Float[Tensor, "head key"]] | None:
    """‖v W_O‖ of every head and key of each layer; None where the model does not show it."""
    batch = prompts.lay_out(lens)
    try:
        names = {layer: writing_names(lens, site) for layer, site in lens.sites.items()}
        keep = {name: torch.Tensor.clone for of in names.values() for name in of.values()}
        shown, _ = lens.look(keep, *batch.model_input, batch.last)
        return {
            layer: written_norms(
                lens,
                lens.sites[layer],
                ra["pattern", layer],
                {part: shown[name] for part, name in of.items()},
            )[0].cpu()
            for layer, of in names.items()
        }
    except UnsupportedModel:
        return None


def _input_gradient(lens: Lens, prompts: Prompts, answer: int) -> Float[Tensor, "pos"] | None:
    """−x·∂L/∂x of each token, x going into the first block with attention."""
    try:
        name = lens.block_input_name(next(iter(lens.sites.values())))
    except UnsupportedModel:
        return None
    leaves: list[Tensor] = []

    def take(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001  TransformerLens passes it by name
        leaves[:] = [x.detach().requires_grad_()]
        return leaves[0]

    batch = prompts.lay_out(lens)
    with torch.enable_grad(), lens.parameters_frozen(), lens.tensors_put_back():
        logits = lens.logits_at(*batch.model_input, batch.last, [(name, take)])[0, 0]
        loss = -logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)[answer]
        (grad,) = torch.autograd.grad(loss, leaves, allow_unused=True)
    if grad is None:
        return None
    wide = torch.promote_types(grad.dtype, torch.float32)
    product = leaves[0].detach()[0].to(wide) * grad[0].to(wide)
    return -product.sum(dim=-1).cpu()


# ---- what is drawn ------------------------------------------------------------------------------


def _draw_edges(ra: RACache, n: int, drawing: random.Random) -> list[Row]:
    """Edges of each layer: half those with the largest |R|, the others at random."""
    found: list[Row] = []
    for layer in ra.layers:
        size, pattern = ra["ra", layer][0].abs(), ra["pattern", layer][0]
        values, places = size.flatten().topk(min(n // 2, size.numel()))
        strongest = [
            place for place, value in zip(places.tolist(), values.tolist(), strict=True) if value
        ]
        reached = size.sum(dim=-1, keepdim=True) > 0
        pool = ((pattern > _SEEN) & reached).flatten().nonzero()[:, 0].tolist()
        taken = set(strongest)
        pool = [place for place in pool if place not in taken]
        keyed = sorted((drawing.random(), place) for place in pool)
        others = [place for _, place in keyed[: n - n // 2]]
        for drawn, some in (("strongest", strongest), ("random", others)):
            for place in some:
                head, cell = divmod(place, size.shape[-2] * size.shape[-1])
                query, key = divmod(cell, size.shape[-1])
                edge = {"layer": layer, "window": 1, "head": head, "query": query, "keys": [key]}
                found.append({"what": "edge", "drawn": drawn, **edge})
    return found


def _draw_sets(
    layers: Sequence[int],
    n_tokens: int,
    windows: Sequence[int],
    n: int,
    drawing: random.Random,
) -> list[Row]:
    """Spans before the last token, each without the first token, with it, and that alone.

    The same spans are cut in windows of every width, about as deep in the model.
    """
    found: list[Row] = []
    for _ in range(n if n_tokens > 2 else 0):
        depth, size, where = (drawing.random() for _ in range(3))
        length = 1 + int(size * min(_LONGEST, n_tokens - 2))
        start = 1 + int(where * (n_tokens - 1 - length))
        span = list(range(start, start + length))
        choices = {"span": span, "span and first": [0, *span], "first": [0]}
        for window in windows:
            layer = layers[int(depth * (len(layers) - window + 1))]
            about = {"layer": layer, "window": window, "head": _NOWHERE, "query": n_tokens - 1}
            found += [
                {"what": "set", "drawn": drawn, **about, "keys": keys}
                for drawn, keys in choices.items()
            ]
    return found
