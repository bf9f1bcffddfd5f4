"""Attention patching over a range of scales (paper section 5.3, Figure 12, Tables 3 and 13).

The maps of 25 training questions of one length are averaged entry by entry, multiplied by a scale
and added to the attention of every head on the test questions. Maps are taken on prompt and answer,
with the mean cross-entropy over the answer as the loss, separately for each number of
demonstrations. The published scales are −30 for RA, a descent step, and +1 for forward attention;
or a scale is found on the training questions (`ra_lens.best_scale`).

Questions of one length: the largest group of pairs with as many tokens of prompt and answer, unless
a length is given (`ra_lens.experiments.mean_maps`).

The test questions are read without their answer, and the map's row for the answer falls away:
attention is causal, so the prediction at the end of the prompt is that of the published protocol,
which reads them with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import pandas as pd
from torch import nn

from ra_lens.errors import BadInput
from ra_lens.experiments.engines import Engine
from ra_lens.experiments.mean_maps import (
    LearnedMaps,
    MapName,
    asked,
    need_one_length,
    one_length,
)
from ra_lens.experiments.runner import (
    SHOTS,
    Cell,
    Protocol,
    Row,
    Run,
    Tasks,
    experiment,
    read_accuracy,
    read_some,
    read_tasks,
)
from ra_lens.model import PrependBos, as_lens
from ra_lens.numbers import BatchSize, Reals, Whole, Wholes, reals, whole, whole_or_none
from ra_lens.patching.hooks import PatchOptions, Where, check_variant, patch_hooks
from ra_lens.questions import Accuracy, FwdHooks
from ra_lens.scales import PAPER_SCALES
from ra_lens.tasks import Demonstrations, SplitRule


def patching_sweep(
    model: nn.Module,
    task: Tasks,
    *,
    scales: Reals | Literal["best"] = PAPER_SCALES,
    kinds: MapName | Sequence[MapName] = ("ra", "pattern"),
    shots: Wholes = SHOTS,
    n_mean: Whole = 25,
    n_test: Whole | None = None,
    length: Whole | None = None,
    at_least: Whole | None = None,
    answer_tokens: Whole = 1,
    each_question: bool = False,
    accuracy: Accuracy = "first token",
    renormalise: bool = False,
    at: Where = "pattern",
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
    """Add scaled mean maps to the attention of other questions and note the accuracy.

    Args:
        model: A HookedTransformer or TransformerBridge.
        task: A task, the name of a built-in one, `"all"`, or several.
        scales: What the mean maps are multiplied by. `"best"`: for each task, number of
            demonstrations and kind of map the one scale at which the loss of the questions
            averaged is smallest, of those that `best_scale` tries; no test question is read for
            it. Costs 32 forward passes of each question averaged.
        kinds: `"ra"` (Reversed Attention), `"pattern"` (forward attention); and controls as large
            as RA: `"shuffled"`, `"grad"`, `"centred_grad"`, `"a_grad"` (see
            `ra_lens.patching.controls`).
        shots: Numbers of demonstrations.
        n_mean: Training questions whose maps are averaged.
        n_test: Test questions at most. Default: the whole test part.
        length: Tokens of prompt and answer, without demonstrations. Default: the length that most
            pairs have.
        at_least: Smallest number of pairs of one length. Default: 100, as published; 40 for the
            built-in tasks, whose lists are shorter.
        answer_tokens: Tokens of the answers, with their leading space; 1, as published. Digits are
            2 where a tokenizer makes the space a token of its own.
        each_question: Give a row for each test question, numbered in the column `question`, in
            place of their mean, as in `perturbation_test`.
        accuracy: What counts as right: the `"first token"` of the answer (the paper's), or the
            whole `"answer"`, as in `perturbation_test`.
        renormalise: Set negative attention to 0 and let rows keep their sum; not the paper's.
        at: `"pattern"` (the paper's), or `"scores"`: what the maps are added to.
        split: `"code"`: 70/9/21 % for train/valid/test, as in the paper's code; `"text"`: a third
            for test, as in its text.
        seed: Demonstrations.
        demonstrations: `"own"`: drawn anew for every question (the paper's way); `"shared"`: the
            same before every question of a task, drawn once from its train part by the seed. Their
            keys and values are then computed once and reused (`ra_lens.shared_prefix`), which is
            several times as fast where demonstrations are most of a prompt.
        prepend_bos: What stands in front of each prompt, as in `run_with_ra`.
        batch_size: Questions per forward pass; `"auto"`: as many as fit what the model's device has
            free (`ra_lens.fitting`).
        out: `.parquet` or `.csv` to write; a run that was killed goes on where it stopped. Or a
            folder, or an address that fsspec reads: each cell of the grid is a file there.
        progress: False hides the progress bar.
        engine: Who computes: `"local"`, this process; `"ray"`, workers of a Ray cluster, each of
            which loads the model as it was loaded here (`RayEngine` says where and how).
        part: Which part of the grid to compute, `"3/8"`, where several processes share the folder
            `out`; the table is then that of this part.

    Returns:
        One row per task, number of demonstrations, map and scale, with accuracy `top1`, `top2`,
        `top3`, `logit_diff`, `accuracy` and `n_first_tokens` as in `perturbation_test`; map
        `"none"` is the unpatched model, whose rows with demonstrations are the n-shot accuracy;
        `n_tokens` of the questions as read, without their answer (the name of a set counts it);
        then what is needed to repeat it. Where scales are found: `train_loss` at the scale and
        `train_loss_unpatched`, mean −log p of the answers of the questions averaged.

    Raises:
        BadInput: an option that cannot be used, too few questions of one length, or `out` holds
            something else.
        UnsupportedModel: a model whose attention cannot be edited.
        UnfinishedGrid: cells failed in a folder or on Ray; the others are finished.
    """
    protocol = Protocol.read(
        shots, split, seed, prepend_bos, batch_size, out, progress, demonstrations, engine, part
    )
    settings: dict[str, Any] = {
        "kinds": read_some("kinds", kinds, get_args(MapName)),
        "scales": _read_scales(scales),
        "n_mean": whole("n_mean", n_mean, least=1),
        "n_test": whole_or_none("n_test", n_test, least=1),
        "renormalise": renormalise,
        "at": at,
    }
    length, at_least = whole_or_none("length", length), whole_or_none("at_least", at_least, least=1)
    answer_tokens = whole("answer_tokens", answer_tokens, least=1)
    if answer_tokens > 1:  # it came later: without it the results of before are found
        settings["answer_tokens"] = answer_tokens
    if each_question:
        settings["each_question"] = True
    check_variant(at, renormalise=renormalise)
    lens = as_lens(model)
    sets = [
        one_length(
            lens,
            one,
            length=length,
            at_least=at_least,
            answer_tokens=answer_tokens,
            prepend_bos=prepend_bos,
        )
        for one in read_tasks(task)
    ]
    with experiment(
        "patching", lens, sets, protocol, accuracy=read_accuracy(accuracy), **settings
    ) as run:
        if run.finished is not None:
            return run.finished
        cells = run.cells("n_mean")
        for cell in cells:
            need_one_length(cell)
        return run.frame(
            "Patching",
            cells,
            _rows,
            steps=len(list(_steps(run))),
            pieces=["none", *run.settings["kinds"]],
            whole=_unpatched,
            so="Maps of answers that it does not know may hold nothing to patch with.",
        )


_Scale = float | Literal["best"] | None


def _steps(run: Run) -> Iterator[tuple[str, _Scale]]:
    """Give the maps with their scales, after the unpatched model."""
    yield "none", None
    scales: list[float] | Literal["best"] = run.settings["scales"]
    tried: list[_Scale] = ["best"] if scales == "best" else [*scales]
    for kind in run.settings["kinds"]:
        for scale in tried:
            yield kind, scale


def _unpatched(cell: Cell) -> list[Row]:
    """Give the rows of the model as it is."""
    found: Row | list[Row] = cell.unit("none|None", partial(asked, cell, ()))
    return found if isinstance(found, list) else [found]


def _rows(cell: Cell) -> Iterator[list[Row]]:
    """Give the row of each map and scale."""
    settings, run = cell.run.settings, cell.run
    learned = LearnedMaps(run.lens, run.protocol, cell.learned["train"])
    of_all = not settings.get("each_question")
    edit: PatchOptions = {
        "renormalise": settings["renormalise"],
        "at": settings["at"],
        "align": "left",
    }
    maps = cache(learned.maps)

    def evaluate(kind: MapName, scale: _Scale) -> Row | list[Row]:
        hooks: FwdHooks = ()
        of_scale: Row = {}
        if scale == "best":
            best = learned.best_scale(maps(kind), **edit)
            scale = best.scale
            of_scale = {
                "scale": scale,
                "train_loss": best.loss,
                "train_loss_unpatched": best.unpatched_loss,
            }
        if scale is not None:
            hooks = patch_hooks(maps(kind), learned.mean.sites, scale=scale, **edit)
        return asked(cell, hooks, **of_scale)

    for kind, scale in _steps(cell.run):
        if cell.piece not in (None, kind):
            continue
        given = cell.unit(f"{kind}|{scale}", partial(evaluate, cast("MapName", kind), scale))
        at = float("nan") if scale is None else scale
        rows: list[Row] = [given] if of_all else given
        yield cell.rows([{"map": kind, "scale": at, **row} for row in rows])


def _read_scales(scales: Reals | Literal["best"]) -> list[float] | Literal["best"]:
    if isinstance(scales, str) and scales == "best":
        return "best"
    given = reals("scales", scales)
    if len(set(given)) < len(given):
        raise BadInput(f"found scales={given}; give each once.")
    return given
