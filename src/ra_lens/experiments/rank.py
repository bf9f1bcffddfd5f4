"""Rankings of the heads over tasks, numbers of demonstrations and methods, in one table.

Protocol (paper section 5.2 and its code): 25 prompts per ranking. RA, forward attention and causal
mediation by zeroing take the first 25 training pairs, causal mediation by mean activations 25 pairs
of the validation part; demonstrations come from the training part.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from ra_lens.errors import BadInput
from ra_lens.experiments.journal import open_journal, settings_hash
from ra_lens.experiments.protocol import (
    SHOTS,
    Tasks,
    learned,
    read_shots,
    read_tasks,
    refuse_hooks,
    task_facts,
    task_settings,
    warn_of_first_tokens,
)
from ra_lens.experiments.results import (
    as_frame,
    finished_results,
    model_facts,
    prompts_hash,
    write_results,
)
from ra_lens.heads import HeadScores, RankingMethod, rank_heads
from ra_lens.heads.ranking import find_method
from ra_lens.model import as_lens
from ra_lens.numbers import Whole, Wholes, whole
from ra_lens.questions import read_questions
from ra_lens.tasks import Prompt, SplitRule, Task

METHODS = ("ra", "fa", "cm1", "cm2", "index", "random")
"""The paper's methods."""


def ranking_prompts(
    task: Task, method: str, *, shots: int, n: int, split: SplitRule, seed: int
) -> list[Prompt]:
    """Prompts that a method ranks heads with."""
    part = find_method(method).split
    return learned(task.split(split), part, shots=shots, n=n, seed=seed, count="n_rank")


def method_facts(names: Sequence[str]) -> list[dict[str, Any]]:
    """Which methods these are: a user's own by its code, as its name may be given to another."""
    return [_facts(find_method(name)) for name in names]


def _facts(method: RankingMethod) -> dict[str, Any]:
    function: Any = method.function
    facts = {"name": method.name, "split": method.split, "random": method.random}
    if not str(function.__module__).startswith("ra_lens."):
        code = getattr(function, "__code__", None)
        parts = [getattr(code, name, None) for name in ("co_code", "co_consts", "co_names")]
        facts["code"] = settings_hash({"code": [repr(part) for part in parts]})
    return facts


def read_methods(methods: str | Sequence[str]) -> list[str]:
    """Read names of ranking methods.

    Raises:
        BadInput: none, one twice, or an unknown one.
    """
    given = [methods] if isinstance(methods, str) else list(methods)
    if not given or len(set(given)) < len(given):
        raise BadInput(f"found methods={methods!r}; give at least one, each once.")
    return [find_method(name).name for name in given]


def by_first_token(methods: Sequence[str], *, answer_in_input: bool) -> list[str]:
    """Give the methods that go by the probability of the answer's first token alone."""
    always = ("cm1", "cm1_last", "cm2")
    return [name for name in methods if name in always or (name, answer_in_input) == ("ra", False)]


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
    prepend_bos: bool | None = None,
    batch_size: Whole = 64,
    out: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Rank the heads of a model for each task, number of demonstrations and method.

    Args:
        model: A HookedTransformer or TransformerBridge.
        task: A task, the name of a built-in one, `"all"`, or several.
        methods: Names of `ra_lens.heads.ranking_methods()`.
        shots: Numbers of demonstrations.
        n_rank: Prompts per ranking.
        split: `"code"`: 70/9/21 % for train/valid/test; `"text"`: a third for test.
        answer_in_input: Whether RA and FA are taken on prompt and answer (the paper's experiments)
            or on the prompt alone.
        seed: Demonstrations, and random orders.
        prepend_bos: Overrides the model's default.
        batch_size: Rows per forward pass.
        out: `.parquet` or `.csv` to write; a run that was killed goes on where it stopped.
        progress: False hides the progress bar.

    Returns:
        One row per task, number of demonstrations, method, layer and head, with `score` (larger =
        more important), `rank` (1 = most important) and what is needed to repeat it.

    Raises:
        BadInput: an option that cannot be used, or `out` holds something else.
        UnsupportedModel: a model whose attention cannot be read.
    """
    tasks, counts, names = read_tasks(task), read_shots(shots), read_methods(methods)
    n_rank, seed = whole("n_rank", n_rank, least=1), whole("seed", seed)
    batch_size = whole("batch_size", batch_size, least=1)
    lens = as_lens(model)
    lens.refuse_dropout()
    refuse_hooks(lens, out)
    settings: dict[str, Any] = {
        "experiment": "ranking",
        **model_facts(lens),
        "tasks": [task_settings(lens, one, prepend_bos) for one in tasks],
        "methods": method_facts(names),
        "shots": counts,
        "n_rank": n_rank,
        "split": split,
        "answer_in_input": answer_in_input,
        "seed": seed,
        "prepend_bos": prepend_bos,
        "batch_size": batch_size,
    }
    if (finished := finished_results(out, settings)) is not None:
        return finished
    cells = [
        (one, n, name, ranking_prompts(one, name, shots=n, n=n_rank, split=split, seed=seed))
        for one in tasks
        for n in counts
        for name in names
    ]
    by_first = by_first_token(names, answer_in_input=answer_in_input)
    read = (
        (one, read_questions(lens, prompts, prepend_bos=prepend_bos))
        for one, _, name, prompts in cells
        if name in by_first
    )
    warn_of_first_tokens(lens, read, accuracy=None, by_first=by_first)
    rows: list[dict[str, Any]] = []
    with open_journal(out, settings) as journal:
        bar = tqdm(cells, desc="Ranking heads", unit="ranking", disable=not progress)
        for one, n, name, prompts in bar:

            def scores(prompts: list[Prompt] = prompts, name: str = name) -> list[list[float]]:
                return rank_heads(
                    model,
                    prompts,
                    method=name,
                    seed=seed,
                    answer_in_input=answer_in_input,
                    prepend_bos=prepend_bos,
                    batch_size=batch_size,
                    progress=progress,
                ).scores.tolist()

            ranked = HeadScores(
                method=name,
                title=find_method(name).title,
                scores=torch.tensor(
                    journal.unit(f"{one.name}|{n}|{name}", scores), dtype=torch.float64
                ),
                layers=tuple(lens.sites),
                heads=lens.sites.n_heads,
                n_examples=len(prompts),
                model_name=lens.name,
            )
            about = {"task": one.name, "kind": one.kind, "n_shots": n}
            made = {**task_facts(one), "prompts_hash": prompts_hash(prompts)}
            columns = ["method", "draw", "layer", "head", "label", "score", "rank"]
            table = ranked.to_dataframe()[columns]
            for values in table.itertuples(index=False, name=None):
                rows.append({**about, **dict(zip(columns, values, strict=True)), **made})
        frame = as_frame("ranking", rows, settings)
        if out is not None:
            write_results(frame, out)
    return frame
