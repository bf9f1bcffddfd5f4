"""What of attention patching carries its effect: parts of the mean map, and others in its place.

The mean map of Reversed Attention, times a scale, raises the accuracy on questions without examples
(`patching_sweep`). Here it is added in parts: of some layers, heads, query rows, or of one sign; at
another place; made of fewer prompts, of another task, of prompts with examples; and other maps as
large are added instead. Beside the accuracy stands what the same patch does to unrelated text
(`ra_lens.experiments.side_effects`).

Protocol: that of the sweep, whose row for the whole map at −30 comes out the same. At `"paper"`
scales each is added times −30, forward attention times 1. That is no fair comparison of maps whose
best scale is another one: `"best"` finds the scale of each on the training questions.

Cost for each task and variant: a forward pass of the test questions and of eight short sentences,
and for the best scale one of the training questions at each scale that is tried. The mean maps cost
a forward and a backward pass of the training questions; again where prompts or examples are others.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from torch import nn

from ra_lens.errors import BadInput, RALensWarning
from ra_lens.experiments.engines import Engine
from ra_lens.experiments.intervals import bootstrap_intervals
from ra_lens.experiments.mean_maps import asked, need_one_length, one_length
from ra_lens.experiments.runner import (
    Cell,
    Protocol,
    Row,
    Run,
    Tasks,
    experiment,
    read_accuracy,
    read_methods,
    read_some,
    read_tasks,
)
from ra_lens.experiments.side_effects import PlainText
from ra_lens.experiments.variants import (
    Ablation,
    Change,
    Material,
    materials_of,
    thirds,
)
from ra_lens.model import Lens, PrependBos, as_lens
from ra_lens.numbers import (
    BatchSize,
    Real,
    Reals,
    Whole,
    Wholes,
    real,
    reals,
    whole,
    whole_or_none,
    wholes,
)
from ra_lens.patching.hooks import PatchOptions, patch_hooks
from ra_lens.questions import METRICS, Accuracy, FwdHooks, Metric
from ra_lens.scales import PAPER_SCALE, SCALES
from ra_lens.tables import problem_of
from ra_lens.tasks import Demonstrations, SplitRule

ScaleFrom = Literal["paper", "best"]
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)

_N_PROMPTS, _FROM_SHOTS = (1, 5), (1, 5)


def patching_ablations(
    model: nn.Module,
    task: Tasks,
    *,
    ablations: Ablation | Sequence[Ablation] = ABLATIONS,
    scales: ScaleFrom | Sequence[ScaleFrom] = ("paper",),
    tried: Reals = SCALES,
    layer_ranges: Sequence[tuple[Whole, Whole]] | None = None,
    methods: str | Sequence[str] = ("ra",),
    head_shares: Reals = (0.1, 0.25),
    n_prompts: Wholes | None = None,
    from_shots: Wholes = _FROM_SHOTS,
    shots: Wholes = 0,
    n_mean: Whole = 25,
    n_test: Whole | None = None,
    length: Whole | None = None,
    at_least: Whole | None = None,
    answer_tokens: Whole = 1,
    each_question: bool = False,
    accuracy: Accuracy = "first token",
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
    """Patch with parts of the mean map, and with other maps, and note accuracy and side effects.

    Args:
        model: A HookedTransformer or TransformerBridge.
        task: A task, the name of a built-in one, `"all"`, or several.
        ablations: What is compared with the whole map; where one that is named has nothing to
            compare, a warning says so:
            `"layers"`: of the map, the layers of each range;
            `"heads"`: the first heads of each ranking, and all others;
            `"rows"`: the last query row, all but it, either half;
            `"sign"`: entries below 0, where descent wants more attention, or above;
            `"place"`: at the scores; at the pattern with rows kept distributions;
            `"prompts"`: a mean over fewer questions;
            `"transfer"`: the maps of each other task, their end on the end of the questions. Longer
            ones are left out, with a warning: cut off at their beginning, their rows move no
            attention any more, but make or take it;
            `"shots"`: maps of prompts with demonstrations on questions without, likewise with the
            ends on each other, so that what pointed at demonstrations is lost; only where questions
            have none, and left out where such prompts have several lengths;
            `"controls"`: forward attention, and maps as large as RA
            (`ra_lens.patching.controls`).
        scales: `"paper"`: −30, for forward attention 1; `"best"`: for each task and variant the one
            at which the loss of the training questions is smallest; or both.
        tried: For `"best"`, scales to choose from; 0 is always among them.
        layer_ranges: First and last layer of each range. Default: thirds of the layers.
        methods: Names of `ra_lens.heads.ranking_methods()` that rank heads, on the training
            questions (`cm2` on those of the valid part).
        head_shares: How many of the heads are the first: shares of them.
        n_prompts: Numbers of training questions, fewer than `n_mean`. Default: 1 and 5.
        from_shots: Numbers of demonstrations in the prompts of `"shots"`.
        shots: Numbers of demonstrations in the questions.
        n_mean: Training questions whose maps are averaged.
        n_test: Test questions at most. Default: the whole test part.
        length: Tokens of prompt and answer, as in `patching_sweep`, and so are the next two.
        at_least: Smallest number of pairs of one length.
        answer_tokens: Tokens of the answers.
        each_question: Give a row for each test question, numbered in the column `question`, in
            place of their mean: `ablation_effects` then gives intervals.
        accuracy: What counts as right, as in `perturbation_test`.
        split: Parts of a task, as in `patching_sweep`.
        seed: Demonstrations, and the shuffle of rows.
        demonstrations: As in `patching_sweep`.
        prepend_bos: What stands in front of each prompt, as in `run_with_ra`.
        batch_size: Questions per forward pass; `"auto"`: as many as fit what the model's device has
            free (`ra_lens.fitting`).
        out: `.parquet` or `.csv` to write; a run that was killed goes on where it stopped.
        progress: False hides the progress bar.
        engine: Who computes: `"local"`, this process; `"ray"`, workers of a Ray cluster, each of
            which loads the model as it was loaded here (`RayEngine` says where and how).
        part: Which part of the grid to compute, `"3/8"`, where several processes share the folder
            `out`; the table is then that of this part.

    Returns:
        One row per task, number of demonstrations, variant and way to find its scale, with
        `ablation`, `variant`, `map` (the kind), `scale`, `scale_from`; accuracy `top1`, `top2`,
        `top3` and `logit_diff` as in `perturbation_test`; `kl` (nats per token) and `top1_same`,
        what the patch does to unrelated text; `train_loss` and `train_loss_unpatched` where the
        scale was found; then what is needed to repeat it. The first row of a cell is the unpatched
        model (`ablation` and `map` `"none"`), the second the whole map (`"whole"`).
        `ablation_effects` sums them up over the tasks.

    Raises:
        BadInput: an option that cannot be used, too few questions of one length, or `out` holds
            something else.
        UnsupportedModel: a model whose attention cannot be edited; of one that only shows its
            pattern `"place"` has to be left out of `ablations`.
    """
    protocol = Protocol.read(
        shots, split, seed, prepend_bos, batch_size, out, progress, demonstrations, engine, part
    )
    lens = as_lens(model)
    chosen = read_some("ablations", ablations, ABLATIONS)
    scales_from = read_some("scales", scales, get_args(ScaleFrom))
    n_mean = whole("n_mean", n_mean, least=1)
    settings: dict[str, Any] = {
        "ablations": chosen,
        "scales_from": scales_from,
        "tried": reals("tried", tried) if "best" in scales_from else [],
        "layer_ranges": _read_ranges(lens, layer_ranges),
        "head_shares": _read_shares(head_shares),
        "n_prompts": _read_counts(n_prompts, n_mean),
        "from_shots": wholes("from_shots", from_shots, least=1),
        "n_mean": n_mean,
        "n_test": whole_or_none("n_test", n_test, least=1),
        "answer_tokens": whole("answer_tokens", answer_tokens, least=1),
        "each_question": bool(each_question),
    }
    ranked = read_methods(methods) if "heads" in chosen else []
    length, at_least = whole_or_none("length", length), whole_or_none("at_least", at_least, least=1)
    sets = [
        one_length(
            lens,
            one,
            length=length,
            at_least=at_least,
            answer_tokens=settings["answer_tokens"],
            prepend_bos=prepend_bos,
        )
        for one in read_tasks(task)
    ]
    with experiment(
        "ablations",
        lens,
        sets,
        protocol,
        methods=ranked,
        accuracy=read_accuracy(accuracy),
        **settings,
    ) as run:
        if run.finished is not None:
            return run.finished
        cells = run.cells("n_mean", also=["train"])
        for cell in cells:
            need_one_length(cell)
        material = materials_of(cells)
        counts = [len(list(of.variants())) for of in material.values()]
        _tell_left_out(run, material.values())
        return run.frame(
            "Ablations",
            cells,
            lambda cell: _rows(material[cell.task.name, cell.shots].of(cell)),
            steps=1 + max(counts) * len(settings["scales_from"]),
        )


def _rows(of: Material) -> Iterator[list[Row]]:
    """Give the rows of the unpatched model, and of each variant at each of its scales."""
    cell = of.cell
    front = cell.run.protocol.prepend_bos
    text = PlainText.read(cell.run.lens, of.n_tokens, prepend_bos=front)
    found = cell.unit("none", partial(_measured, cell, text, ()))
    names = dict.fromkeys(("ablation", "map", "scale_from"), "none")
    yield _told(cell, found, variant="unpatched", **names)
    for variant in of.variants():
        # The same maps serve for each way to find their scale, and then are let go.
        change = None if variant is None else cache(variant.change)
        for scale_from in cell.run.settings["scales_from"]:
            if variant is None or change is None:
                yield []
                continue
            key = f"{variant.ablation}|{variant.name}|{scale_from}"
            found = cell.unit(key, partial(_patched, of, text, variant.map, change, scale_from))
            names = {"ablation": variant.ablation, "map": variant.map, "scale_from": scale_from}
            yield _told(cell, found, variant=variant.name, **names)


def _patched(
    of: Material, text: PlainText, kind: str, change: Callable[[], Change], scale_from: ScaleFrom
) -> list[Row]:
    """Find the scale of a change, and measure what it does."""
    maps, how = change()
    options: PatchOptions = {**how, "align": "left"}
    scale = PAPER_SCALE.get(kind, PAPER_SCALE["ra"])
    about: Row = {}
    if scale_from == "best":
        tried = of.cell.run.settings["tried"]
        best = of.learned.best_scale(maps, scales=tried, **options)
        scale = best.scale
        about = {"train_loss": best.loss, "train_loss_unpatched": best.unpatched_loss}
    hooks: FwdHooks = ()
    if scale != 0:
        sites = of.learned.mean.sites
        hooks = patch_hooks(maps, sites, scale=scale, **options)
    return _measured(of.cell, text, hooks, scale=scale, **about)


def _measured(cell: Cell, text: PlainText, hooks: FwdHooks, **about: Any) -> list[Row]:
    """Ask the questions under hooks, and read unrelated text: a row, or one for each question."""
    effect = text.under(hooks)
    found = asked(cell, hooks, kl=effect.kl, top1_same=effect.top1_same, **about)
    return found if isinstance(found, list) else [found]


def _told(cell: Cell, found: list[Row], **names: str) -> list[Row]:
    """Make rows of the table, that all have the same columns."""
    unknown = math.nan
    missing = {"train_loss": unknown, "train_loss_unpatched": unknown}
    of_best = missing if "best" in cell.run.settings["scales_from"] else {}
    last = ("n_tokens", "n_test", *of_best, "prompts_hash")
    rows: list[Row] = []
    for row in found:
        row = {"scale": unknown, **of_best, **row}
        first = {**names, "scale": row["scale"]}
        middle = {name: value for name, value in row.items() if name not in last}
        rows.append({**first, **middle, **{name: row[name] for name in last}})
    return cell.rows(rows)


def _tell_left_out(run: Run, material: Iterable[Material]) -> None:
    left_out = [*_without_any(run), *(text for of in material for text in of.left_out)]
    if left_out:
        more = f"; and {len(left_out) - 5} more" * (len(left_out) > 5)
        warnings.warn(
            f"left out: {'; '.join(left_out[:5])}{more}.",
            RALensWarning,
            stacklevel=3,
        )


def _without_any(run: Run) -> Iterator[str]:
    """Say what was asked for by name and has no variant in any cell, and why."""
    asked = run.settings["ablations"]
    if set(asked) == set(ABLATIONS):  # whatever there is
        return
    if "transfer" in asked and len(run.tasks) == 1:
        yield "'transfer', maps of other tasks, as there is one task"
    if "shots" in asked and 0 not in run.protocol.shots:
        yield "'shots', which is for questions without demonstrations (shots=0)"
    if "prompts" in asked and not run.settings["n_prompts"]:
        yield f"'prompts', fewer than n_mean={run.settings['n_mean']}"


def _read_ranges(lens: Lens, layer_ranges: Sequence[tuple[Whole, Whole]] | None) -> list[list[int]]:
    layers = list(lens.sites)
    if layer_ranges is None:
        return thirds(layers)
    ranges = [wholes("layer_ranges", one) for one in layer_ranges]
    for one in ranges:
        if len(one) != 2 or not any(one[0] <= layer <= one[1] for layer in layers):
            raise BadInput(
                f"found {one} in layer_ranges; give pairs of a first and a last layer, with "
                f"attention between them: {lens.name} has layers {lens.sites.spell()}."
            )
    if not ranges or len(set(map(tuple, ranges))) < len(ranges):
        raise BadInput(f"found layer_ranges={layer_ranges!r}; give at least one, each once.")
    return ranges


def _read_shares(head_shares: Reals) -> list[float]:
    shares = reals("head_shares", head_shares)
    if min(shares) <= 0 or max(shares) >= 1 or len(set(shares)) < len(shares):
        raise BadInput(
            f"found head_shares={shares}; give different shares of the heads between 0 and 1, such "
            "as (0.1, 0.25)."
        )
    return shares


def _read_counts(n_prompts: Wholes | None, n_mean: int) -> list[int]:
    if n_prompts is None:
        return [n for n in _N_PROMPTS if n < n_mean]
    counts = wholes("n_prompts", n_prompts, least=1)
    if max(counts) >= n_mean or len(set(counts)) < len(counts):
        raise BadInput(
            f"found n_prompts={counts}; give different numbers below n_mean={n_mean}, which the "
            "whole map is a mean of."
        )
    return counts


# ---- summed up ----------------------------------------------------------------------------------

_KEYS = ["n_shots", "ablation", "variant", "map", "scale_from"]


def ablation_effects(
    frame: pd.DataFrame, *, metric: Metric = "top1", level: Real = 0.9, seed: Whole = 0
) -> pd.DataFrame:
    """Sum up ablations over their tasks: each variant beside the unpatched model and the whole map.

    Differences are paired: of the same questions, and at scales found in the same way. Where a
    variant is not there for all tasks, it is compared with what it is compared with on its own.

    Args:
        frame: From `patching_ablations`, of one model; intervals need `each_question=True`.
        metric: Which column is summed up: accuracy `top1`, `top2`, `top3`, or `logit_diff`.
        level: Share of the resampled means that an interval holds (`bootstrap_intervals`).
        seed: Of the draws.

    Returns:
        One row per number of demonstrations, variant and way to find its scale, with `value`, the
        mean over tasks, and its `low` and `high`; `unpatched` and `whole`, what these give on the
        same tasks; `minus_unpatched` and `minus_whole`, each with `_low` and `_high`; `kl` and
        `top1_same`, means over tasks; `scale_low` and `scale_high`, smallest and largest of its
        scales; `n_tasks`, `n_questions`, `metric`, `level`. NaN where there is nothing to compare,
        and for intervals of a table without single questions.

    Raises:
        BadInput: not such a frame, several models in it, or an unknown `metric`.
    """
    if metric not in METRICS:
        raise BadInput(f"found metric={metric!r}; give one of {', '.join(map(repr, METRICS))}.")
    needed = ["task", *_KEYS, "scale", metric, "kl", "top1_same"]
    problem = problem_of(frame, needed, rows=True)
    if problem is not None:
        raise BadInput(f"found a table {problem}; give the result of patching_ablations().")
    level = real("level", level)
    models = list(dict.fromkeys(frame["model"].astype(str)))
    if len(models) > 1:
        raise BadInput(
            f"found results of {len(models)} models ({', '.join(models)}). Give "
            f"frame[frame.model == {models[0]!r}]."
        )
    each = "question" in frame
    frame = frame if each else frame.assign(question=0)
    place = ["task", "n_shots", "question"]
    twice: Any = frame[frame.duplicated([*place, *_KEYS])]
    if not twice.empty:
        row = twice.iloc[0]
        raise BadInput(
            f"found {row['variant']} of {row['task']} twice, with {row['scale_from']} scales. Give "
            "each once: table.drop_duplicates() of joined tables, without the columns that differ."
        )
    every: Any = frame.set_index(place)
    unpatched = every[every["ablation"] == "none"][metric]
    whole_map = every[every["ablation"] == "whole"]
    rows: list[Row] = []
    for key, part in every.groupby(_KEYS, sort=False):
        of = dict(zip(_KEYS, key, strict=True))
        beside = whole_map[whole_map["scale_from"] == of["scale_from"]][metric]
        wide = pd.DataFrame({"value": part[metric]})
        for name, other in (("unpatched", unpatched), ("whole", beside)):
            wide[name] = other.reindex(wide.index)
            wide[f"minus_{name}"] = wide["value"] - wide[name]
        known = wide.dropna(axis="columns", how="any")
        found = bootstrap_intervals(known, level=level, seed=seed)
        row: Row = {**of}
        for name in ("value", "unpatched", "minus_unpatched", "whole", "minus_whole"):
            there = name in found.index
            row[name] = float(found.loc[name, "mean"]) if there else math.nan
            if name in ("unpatched", "whole"):
                continue
            for end in ("low", "high"):
                column = end if name == "value" else f"{name}_{end}"
                row[column] = float(found.loc[name, end]) if there and each else math.nan
        of_tasks: Any = part.groupby(level="task")[["kl", "top1_same"]].mean().mean()
        rows.append(
            {
                **row,
                "kl": float(of_tasks["kl"]),
                "top1_same": float(of_tasks["top1_same"]),
                "scale_low": float(part["scale"].min()),
                "scale_high": float(part["scale"].max()),
                "n_tasks": int(part.index.get_level_values("task").nunique()),
                "n_questions": len(part) if each else int(part["n_test"].sum()),
                "metric": metric,
                "level": level,
                "model": models[0],
            }
        )
    order = {name: i for i, name in enumerate(("none", "whole", *ABLATIONS))}
    rows.sort(key=lambda row: (row["n_shots"], order.get(row["ablation"], len(order))))
    return pd.DataFrame(rows)
