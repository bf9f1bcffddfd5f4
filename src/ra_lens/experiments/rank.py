"""Rankings of the heads over tasks, numbers of demonstrations and methods, in one table.

Protocol (paper section 5.2 and its code): 25 prompts per ranking. RA, forward attention and causal
mediation by zeroing take the first 25 training pairs, causal mediation by mean activations 25 pairs
of the validation part; demonstrations come from the training part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ra_lens.experiments.engines import Engine
from ra_lens.experiments.runner import (
    METHODS,
    SHOTS,
    Cell,
    Protocol,
    Row,
    Tasks,
    experiment,
    prompts_hash,
    read_methods,
    read_tasks,
)
from ra_lens.heads import HeadScores
from ra_lens.heads.registry import find_method
from ra_lens.model import PrependBos, as_lens
from ra_lens.numbers import BatchSize, Whole, Wholes, whole
from ra_lens.tasks import Demonstrations, SplitRule

_COLUMNS = ["method", "draw", "layer", "head", "label", "score", "rank"]


def rank_tasks(
    model: nn.Module,
    task: Tasks,
    *,
    methods: str | Sequence[str] = METHODS,
    shots: Wholes = SHOTS,
    n_rank: Whole = 25,
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
    """Rank the heads of a model for each task, number of demonstrations and method.

    Args:
        model: A HookedTransformer or TransformerBridge.
        task: A task, the name of a built-in one, `"all"`, or several.
        methods: Names of `ra_lens.heads.ranking_methods()`.
        shots: Numbers of demonstrations.
        n_rank: Prompts per ranking; where a method needs corrupted twins, they have some.
        split: `"code"`: 70/9/21 % for train/valid/test; `"text"`: a third for test.
        answer_in_input: Whether methods that read gradients or patterns read prompt and answer (the
            paper's experiments) or the prompt alone.
        seed: Demonstrations, and random orders.
        demonstrations: `"own"`: drawn anew for every question (the paper's way); `"shared"`: the
            same before every question of a task, drawn once from its train part by the seed. Their
            keys and values are then computed once and reused (`ra_lens.shared_prefix`), which is
            several times as fast where demonstrations are most of a prompt.
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
        One row per task, number of demonstrations, method, layer and head, with `score` (larger =
        more important), `rank` (1 = most important) and what is needed to repeat it.

    Raises:
        BadInput: an option that cannot be used, or `out` holds something else.
        UnsupportedModel: a model whose attention cannot be read.
        UnfinishedGrid: cells failed in a folder or on Ray; the others are finished.
    """
    tasks, names = read_tasks(task), read_methods(methods)
    protocol = Protocol.read(
        shots, split, seed, prepend_bos, batch_size, out, progress, demonstrations, engine, part
    )
    n_rank = whole("n_rank", n_rank, least=1)
    with experiment(
        "ranking",
        as_lens(model),
        tasks,
        protocol,
        methods=names,
        answer_in_input=answer_in_input,
        n_rank=n_rank,
    ) as run:
        if run.finished is not None:
            return run.finished
        cells = run.cells("n_rank")
        return run.frame("Ranking heads", cells, _rows, steps=len(names), pieces=names)


def _rows(cell: Cell) -> Iterator[list[Row]]:
    """Give the rows of each method, one for each head, the most important first."""
    lens = cell.run.lens
    for name in cell.run.methods:
        if cell.piece not in (None, name):
            continue
        scores = cell.unit(name, lambda name=name: cell.ranked(name).scores.tolist())
        ranked = HeadScores(
            method=name,
            title=find_method(name).title,
            scores=torch.tensor(scores, dtype=torch.float64),
            layers=tuple(lens.sites),
            heads=lens.sites.n_heads,
            n_examples=len(cell.given(name)),
            model_name=lens.name,
        )
        table: Any = ranked.to_dataframe()[_COLUMNS]
        yield cell.rows(table.to_dict("records"), prompts_hash=prompts_hash(cell.given(name)))
