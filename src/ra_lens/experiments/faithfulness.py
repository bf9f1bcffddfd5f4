"""What does taking one head away do? Scores of heads beside exact effects, prompt by prompt.

Every method scores all heads on some prompts of a task, and on the same prompts every head is
really taken away, one at a time (`ra_lens.heads.ablation`). `head_effect_table` keeps both for each
prompt and head; `faithfulness` and `faithfulness_differences` (`ra_lens.heads.agreement`) sum such
a table up, again and again if need be. `faithfulness_test` does the one and the other.

It is one question of two. Which heads suffice is another (`perturbation_test`), and has other
winners: a head may do nothing that another does not do as well.

Cost for n prompts of each task and number of demonstrations and H heads: n·(1 + H) forward passes
for each ablation, half as long on average, and what the methods cost (`RankingMethod.passes`). Each
method runs by itself, so that its seconds are those it takes alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from ra_lens.errors import BadInput
from ra_lens.experiments.engines import Engine
from ra_lens.experiments.runner import (
    Cell,
    Protocol,
    Row,
    Tasks,
    experiment,
    prompts_hash,
    read_methods,
    read_some,
    read_tasks,
)
from ra_lens.heads import head_effects
from ra_lens.heads.ablation import ABLATIONS, Ablation
from ra_lens.heads.agreement import EFFECT, LOGIT_DIFF, SCORE, SECONDS, Summary, faithfulness
from ra_lens.heads.ranking import ranking_context, scores_by
from ra_lens.heads.registry import find_method
from ra_lens.model import PrependBos, as_lens
from ra_lens.numbers import BatchSize, Real, Whole, Wholes, whole
from ra_lens.patching.masking import need_heads
from ra_lens.tasks import Demonstrations, SplitRule

COMPARED = (
    *("zero", "resample", "atp", "michel", "grad_sam", "ag", "grad_norm", "knockout", "ra"),
    *("nap", "nap_ig", "w_norm", "fa", "index", "random"),
)
"""The methods compared by default: the exact effects themselves, and all that cost a few passes.

Without `relp` and `gim`, which not every model has rules for."""


def faithfulness_test(
    model: nn.Module,
    task: Tasks,
    *,
    methods: str | Sequence[str] = COMPARED,
    ablations: Ablation | Sequence[Ablation] = ("zero", "resample"),
    shots: Wholes = (1, 5),
    n_rank: Whole = 12,
    ks: Wholes = (10, 20),
    splits: Whole = 100,
    level: Real = 0.9,
    resamples: Whole = 1000,
    split: SplitRule = "code",
    answer_in_input: bool = True,
    seed: Whole = 0,
    demonstrations: Demonstrations = "own",
    prepend_bos: PrependBos = None,
    batch_size: BatchSize = 64,
    out: str | Path | None = None,
    progress: bool = True,
    engine: Engine = "local",
    part: str | None = None,
) -> pd.DataFrame:
    """Say how well scores of heads foretell what taking one head away does to the loss.

    Args:
        model: A HookedTransformer or TransformerBridge that reads left to right.
        task: A task, the name of a built-in one, `"all"`, or several.
        methods: Names of `ra_lens.heads.ranking_methods()`.
        ablations: What heads give when they are taken away: `"zero"`, `"mean"`, `"resample"`.
        shots: Numbers of demonstrations.
        n_rank: Prompts of each task and number of demonstrations, at least 2.
        ks: Numbers of heads at which precision and stability are taken.
        splits: Into how many pairs of random halves the prompts are divided.
        level: Share of intervals that are to hold the mean over sets of as many prompts.
        resamples: How often prompts are drawn.
        split: `"code"`: 70/9/21 % for train/valid/test; `"text"`: a third for test.
        answer_in_input: Whether the loss is the mean over the answer's tokens, for effects and for
            methods that read gradients or patterns, or that of its first token alone.
        seed: Demonstrations, corrupted twins, random orders, draws and splits.
        demonstrations: `"own"`: drawn anew for every prompt; `"shared"`: the same before every
            prompt of a task, which then run once for each head and layer.
        prepend_bos: What stands in front of each prompt, as in `run_with_ra`.
        batch_size: Rows per forward pass; `"auto"`: as many as fit what the model's device has
            free (`ra_lens.fitting`).
        out: `.parquet` or `.csv` to write the scores and effects of every prompt and head to, from
            which this table is made again in no time (`read_results`, `faithfulness`); a run that
            was killed goes on where it stopped.
        progress: False hides the progress bar.
        engine: Who computes: `"local"`, this process; `"ray"`, workers of a Ray cluster, each of
            which loads the model as it was loaded here (`RayEngine` says where and how).
        part: Which part of the grid to compute, `"3/8"`, where several processes share the folder
            `out`; the table is then that of this part.

    Returns:
        One row per task, number of demonstrations, method and ablation, as `faithfulness` gives it.

    Raises:
        BadInput: an option that cannot be used, too few prompts with a corrupted twin, or `out`
            holds something else.
        UnsupportedModel: a model whose attention cannot be read, or whose heads cannot be changed.
    """
    summary = Summary.read(ks, splits, level, resamples, seed)
    summary.refuse_all_of(sum(as_lens(model).sites.n_heads))
    if not ablations:
        raise BadInput(
            f"found ablations={ablations!r}, without which there are no effects to foretell. Give "
            "'zero', 'mean', 'resample' or several; for scores alone call head_effect_table()."
        )
    frame = head_effect_table(
        model,
        task,
        methods=methods,
        ablations=ablations,
        shots=shots,
        n_rank=n_rank,
        split=split,
        answer_in_input=answer_in_input,
        seed=seed,
        demonstrations=demonstrations,
        prepend_bos=prepend_bos,
        batch_size=batch_size,
        out=out,
        progress=progress,
        engine=engine,
        part=part,
    )
    return faithfulness(frame, **vars(summary))


def head_effect_table(
    model: nn.Module,
    task: Tasks,
    *,
    methods: str | Sequence[str] = COMPARED,
    ablations: Ablation | Sequence[Ablation] = ("zero", "resample"),
    shots: Wholes = (1, 5),
    n_rank: Whole = 12,
    split: SplitRule = "code",
    answer_in_input: bool = True,
    seed: Whole = 0,
    demonstrations: Demonstrations = "own",
    prepend_bos: PrependBos = None,
    batch_size: BatchSize = 64,
    out: str | Path | None = None,
    progress: bool = True,
    engine: Engine = "local",
    part: str | None = None,
) -> pd.DataFrame:
    """Score every head of a model on some prompts, and take each away.

    All methods and ablations get the same prompts: the first of the train part; where something
    needs corrupted twins, the first that have one (`ra_lens.tasks.with_corrupted`).

    Args:
        model: As in `faithfulness_test`, and so are the other arguments.
        task: A task, the name of a built-in one, `"all"`, or several.
        methods: Names of ranking methods.
        ablations: `"zero"`, `"mean"`, `"resample"`, one or several; none, `()`, for scores to be
            joined to a table of the same prompts.
        shots: Numbers of demonstrations.
        n_rank: Prompts of each task and number of demonstrations.
        split: `"code"` or `"text"`.
        answer_in_input: Whether the whole answer is read, or its first token.
        seed: Demonstrations, corrupted twins, random orders.
        demonstrations: `"own"` or `"shared"`.
        prepend_bos: What stands in front of each prompt.
        batch_size: Rows per forward pass; `"auto"`: as many as fit what the model's device has
            free (`ra_lens.fitting`).
        out: `.parquet` or `.csv` to write; a run that was killed goes on where it stopped.
        progress: False hides the progress bar.
        engine: Who computes: `"local"`, this process; `"ray"`, workers of a Ray cluster, each of
            which loads the model as it was loaded here (`RayEngine` says where and how).
        part: Which part of the grid to compute, `"3/8"`, where several processes share the folder
            `out`; the table is then that of this part.

    Returns:
        One row per task, number of demonstrations, prompt (`question`), `layer` and `head`, with
        its `score_…` by each method; `effect_…` of each ablation, the rise of the loss in nats, and
        `logit_diff_effect_…`, the fall of the logit difference; `loss` and `logit_diff` of the
        whole model on that prompt; `seconds_…` that each took for all prompts together; and what is
        needed to repeat it. Methods that score no single prompt have the same score on each.

    Raises:
        BadInput: an option that cannot be used, too few prompts with a corrupted twin, or `out`
            holds something else.
        UnsupportedModel: a model whose attention cannot be read, or whose heads cannot be changed.
    """
    tasks, names = read_tasks(task), read_methods(methods)
    protocol = Protocol.read(
        shots, split, seed, prepend_bos, batch_size, out, progress, demonstrations, engine, part
    )
    settings: dict[str, Any] = {
        "ablations": read_some("ablations", ablations, ABLATIONS) if ablations else [],
        "n_rank": whole("n_rank", n_rank, least=2),
    }
    lens = as_lens(model)
    need_heads(lens)
    with experiment(
        "head effects",
        lens,
        tasks,
        protocol,
        methods=names,
        answer_in_input=answer_in_input,
        **settings,
    ) as run:
        if run.finished is not None:
            return run.finished
        twins = "resample" in settings["ablations"]
        cells = run.cells("n_rank", part="train", twins=twins)
        return run.frame("Heads", cells, _rows, steps=len(names) + len(settings["ablations"]))


def _rows(cell: Cell) -> Iterator[list[Row]]:
    """Give all rows of a cell with its last step; the steps before it give none."""
    run = cell.run
    measured: dict[str, Any] = {}
    for ablation in run.settings["ablations"]:
        key = f"effects|{ablation}"
        measured[ablation] = cell.unit(key, partial(_effects, cell, ablation))
        yield []
    scored: dict[str, Any] = {}
    for name in run.methods:
        # An ablation that is asked for as a method too has been measured.
        of = measured.get(name)
        scored[name] = of or cell.unit(f"scores|{name}", partial(_scores, cell, name))
        if name != run.methods[-1]:
            yield []
    prompts, heads = cell.learned["train"], run.lens.sites.heads
    whole_model = next(iter(measured.values()), {})
    seconds = {SECONDS + name: found["seconds"] for name, found in {**scored, **measured}.items()}
    rows = [
        {
            "question": i,
            "layer": layer,
            "head": head,
            "label": f"L{layer}H{head}",
            **{name: whole_model[name][i] for name in ("loss", "logit_diff") if whole_model},
            **{SCORE + name: found["each"][i][j] for name, found in scored.items()},
            **{EFFECT + name: found["each"][i][j] for name, found in measured.items()},
            **{LOGIT_DIFF + name: found["logit_diffs"][i][j] for name, found in measured.items()},
            **seconds,
        }
        for i in range(len(prompts))
        for j, (layer, head) in enumerate(heads)
    ]
    yield cell.rows(rows, prompts_hash=prompts_hash(prompts))


def _effects(cell: Cell, ablation: Ablation) -> dict[str, Any]:
    """What an ablation of each head does, as JSON has it."""
    run, began = cell.run, time.perf_counter()
    found = head_effects(
        run.lens.module,
        cell.learned["train"],
        ablation=ablation,
        answer_in_input=run.answer_in_input,
        seed=run.protocol.seed,
        prepend_bos=run.protocol.prepend_bos,
        batch_size=run.protocol.batch_size,
        progress=run.protocol.progress,
    )
    return {
        "each": _flat(cell, found.effects),
        "logit_diffs": _flat(cell, found.logit_diff_effects),
        "loss": found.loss.tolist(),
        "logit_diff": found.logit_diff.tolist(),
        "seconds": time.perf_counter() - began,
    }


def _scores(cell: Cell, name: str) -> dict[str, Any]:
    """What a method says of each head on each prompt, as JSON has it."""
    run, began = cell.run, time.perf_counter()
    prompts = cell.learned["train"]
    context = ranking_context(
        run.lens.module,
        prompts,
        seed=run.protocol.seed,
        answer_in_input=run.answer_in_input,
        prepend_bos=run.protocol.prepend_bos,
        batch_size=run.protocol.batch_size,
        progress=run.protocol.progress,
    )
    found = scores_by(context, [find_method(name)])[name]
    each = found if found.ndim == 3 else found.expand(len(prompts), -1, -1)
    return {"each": _flat(cell, each), "seconds": time.perf_counter() - began}


def _flat(cell: Cell, values: Tensor) -> list[list[float]]:
    """Values of the heads that there are, in the order of the model, for each prompt."""
    return values[:, cell.run.lens.sites.places].tolist()
