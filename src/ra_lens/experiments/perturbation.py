"""The perturbation test: zero every head, then unmask them in order of importance (section 5.2).

A good order restores the accuracy with few heads. At each share p of the heads, ⌊p·H⌋ heads of the
order are kept and the others zeroed (`ra_lens.patching.masking`); the model answers the test
questions, and accuracy top-1, top-2, top-3 and the logit difference are noted. Both the order and
its reverse are tested: most important first, and least important first.

In place of 0 the others may get what they give on another question, or a mean
(`ra_lens.experiments.others`). Which heads suffice depends on it, so a result says which it was.

Cost per task, number of demonstrations and order: (1/step − 1) forward passes over the test
questions. Shares and questions of like length are batched together; the two ends, no head and all
heads, are the same for every order and are evaluated once. Rankings: see `ra_lens.heads`.

The area under a curve is one number for how good an order is:

    AUC = Σ (m_i + m_{i+1}) / 2 · (p_{i+1} − p_i)        p: share of the heads unmasked, 0 to 1

the trapezoid, for accuracy or any other column m. No rule is published with the paper's numbers;
the trapezoid fits them: rows whose full model is nearly perfect have a floor of .05, which is what
the last trapezoid of 11 points alone gives. The mean of the points would give .09.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import nn

from ra_lens.errors import BadInput, RALensWarning
from ra_lens.experiments.engines import Engine
from ra_lens.experiments.others import InsteadOfZero, Others, read_others
from ra_lens.experiments.runner import (
    METHODS,
    SHOTS,
    Cell,
    Protocol,
    Row,
    Run,
    Tasks,
    experiment,
    prompts_hash,
    read_accuracy,
    read_methods,
    read_some,
    read_tasks,
)
from ra_lens.heads.registry import find_method
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
from ra_lens.patching.masking import mask_hooks, need_heads
from ra_lens.questions import Accuracy, Metric
from ra_lens.tables import mean_over_questions, problem_of
from ra_lens.tasks import Demonstrations, SplitRule

Rule = Literal["trapezoid", "mean"]
Direction = Literal["forward", "reversed", "absolute"]

MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of a model's components at which MIB measures circuits (Mueller et al. 2025)."""

_DRAWS = 5  # random orders of one piece of a cell: each piece runs no and all heads once more

CURVE = ["model", "task", "kind", "n_shots", "method", "direction"]
"""Columns that tell one order of heads from another."""


def perturbation_test(
    model: nn.Module,
    task: Tasks,
    *,
    methods: str | Sequence[str] = METHODS,
    shots: Wholes = SHOTS,
    step: Real = 0.1,
    heads_kept: Wholes | None = None,
    shares: Reals | None = None,
    others: Others = "zero",
    directions: Direction | Sequence[Direction] = ("forward", "reversed"),
    random_orders: Whole = 20,
    each_question: bool = False,
    costs: bool = False,
    n_rank: Whole = 25,
    n_test: Whole | None = None,
    rank_shots: Whole | None = None,
    split: SplitRule = "code",
    answer_in_input: bool = True,
    accuracy: Accuracy = "first token",
    seed: Whole = 0,
    demonstrations: Demonstrations = "own",
    prepend_bos: PrependBos = None,
    batch_size: BatchSize = 64,
    out: str | Path | None = None,
    progress: bool = True,
    engine: Engine = "local",
    part: str | None = None,
) -> pd.DataFrame:
    """Zero all heads and unmask them in the order of each ranking method (paper section 5.2).

    Args:
        model: A HookedTransformer or TransformerBridge.
        task: A task, the name of a built-in one, `"all"`, or several.
        methods: Names of `ra_lens.heads.ranking_methods()`.
        shots: Numbers of demonstrations.
        step: Share of the heads unmasked at a time; 1/step is a whole number.
        heads_kept: In the place of `step`, numbers of heads unmasked, such as `(1, 2, 3, 5, 8)`;
            none and all are there in any case.
        shares: In the place of both, shares of the heads unmasked, such as `MIB_SHARES`.
        others: What masked heads get: `"zero"` (the paper's); `"resample"`, what they give at the
            same place in the question's corrupted twin; `"mean"`, what they give on average
            (`ra_lens.experiments.others`). Questions of which no twin can be drawn
            (`ra_lens.tasks.with_corrupted`) are left out of `"resample"`, with a warning.
        directions: `"forward"`: most important first; `"reversed"`: least important first;
            `"absolute"`: the largest score first, whatever its sign.
        random_orders: How many orders to draw for random methods; they have no direction.
        each_question: Give a row for each test question, numbered in the column `question`, in
            place of their mean: for `bootstrap_intervals`. Everything that reads such a table takes
            the means itself (`mean_over_questions`).
        costs: Say in the columns `forwards`, `backwards` and `seconds` what the ranking took:
            passes of one prompt, as the method says of itself, and time. Methods that share a run
            each have the time of all of them.
        n_rank: Prompts per ranking; where a method needs corrupted twins, they have some.
        n_test: Test questions at most. Default: the whole test part.
        rank_shots: Demonstrations in the prompts that heads are ranked with. Default: as many as
            in the questions.
        split: `"code"`: 70/9/21 % for train/valid/test, as in the paper's code; `"text"`: a third
            for test, as in its text.
        answer_in_input: Whether methods that read gradients or patterns read prompt and answer (the
            paper's experiments) or the prompt alone.
        accuracy: What counts as right: `"first token"` of the answer (the paper's), or the whole
            `"answer"`, as a greedy decode gives it. The first says nothing where all answers of a
            task begin with one token, as digits after a space do in many tokenizers.
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
        One row per task, number of demonstrations, method, direction, draw and share of the heads
        unmasked: `heads_kept`, accuracy `top1`, `top2`, `top3` (first answer token, at the last
        position of the prompt), and `logit_diff` (the answer's logit minus the best other one,
        mean); `accuracy` and `n_first_tokens`, the number of different first tokens among the
        answers asked for; then what is needed to repeat it. With `accuracy="answer"` top-k is the
        share of questions with every token of the answer among the first k, and `logit_diff` the
        smallest of its tokens. With `others="resample"` there is `answer_diff` too: the logit of
        the answer minus that of the twin's answer, first tokens, mean.

    Raises:
        BadInput: an option that cannot be used, or `out` holds something else.
        UnsupportedModel: a model whose attention cannot be read, or whose heads cannot be masked.
        UnfinishedGrid: cells failed in a folder or on Ray; the others are finished.
    """
    tasks, names = read_tasks(task), read_methods(methods)
    protocol = Protocol.read(
        shots, split, seed, prepend_bos, batch_size, out, progress, demonstrations, engine, part
    )
    settings: dict[str, Any] = {
        "directions": read_some("directions", directions, get_args(Direction)),
        **_read_points(step, heads_kept, shares),
        "random_orders": whole("random_orders", random_orders, least=1),
        "n_rank": whole("n_rank", n_rank, least=1),
        "n_test": whole_or_none("n_test", n_test, least=1),
        "rank_shots": whole_or_none("rank_shots", rank_shots, least=0),
        # They came later: without them the results of before are found.
        **({"each_question": True} if each_question else {}),
        **({"others": others} if read_others(others) != "zero" else {}),
        **({"costs": True} if costs else {}),
    }
    lens = as_lens(model)
    need_heads(lens)
    _check_heads_kept(lens, settings)
    with experiment(
        "perturbation",
        lens,
        tasks,
        protocol,
        methods=names,
        answer_in_input=answer_in_input,
        accuracy=read_accuracy(accuracy),
        **settings,
    ) as run:
        if others == "zero":
            _warn_if_folded(lens)
        if run.finished is not None:
            return run.finished
        steps = [piece for piece, _ in _orders(run)]
        return run.frame(
            "Perturbation test",
            run.cells("n_rank"),
            _curves,
            steps=len(steps),
            pieces=list(dict.fromkeys(steps)),
            whole=lambda cell: _ends(cell)[1],
            so="An area under nothing ranks nothing.",
        )


def _orders(run: Run) -> Iterator[tuple[str, tuple[str, int, str]]]:
    """Give the methods with their draws and directions, each after its piece of a cell."""
    for method in run.methods:
        if find_method(method).random:
            n = run.settings["random_orders"]
            for draw in range(n):
                first = draw - draw % _DRAWS
                last = min(first + _DRAWS, n) - 1
                yield f"{method} {first} to {last}", (method, draw, "none")
        else:
            for direction in run.settings["directions"]:
                yield method, (method, 0, direction)


def _ends(cell: Cell) -> tuple[list[Row], list[Row]]:
    """Give the rows of no head and those of all heads, the whole model: the same for every order.

    Of each number of heads there is one row, or one for each question.
    """
    n_heads = sum(cell.run.lens.sites.n_heads)
    ends: list[Row] = cell.unit("ends", partial(_evaluate, cell, [], [0, n_heads]))
    return ends[: len(ends) // 2], ends[len(ends) // 2 :]


def _curves(cell: Cell) -> Iterator[list[Row]]:
    """Give the rows of each order, one for each share of the heads."""
    kept, shares = _points(cell)

    def by_score(method: str, draw: int) -> list[tuple[int, int]]:
        return cell.unit(f"scores|{method}|{draw}", lambda: cell.ranked(method, draw).order())

    def by_size(method: str, draw: int) -> list[tuple[int, int]]:
        key = f"sizes|{method}|{draw}"
        return cell.unit(key, lambda: cell.ranked(method, draw).absolute().order())

    def curve(method: str, draw: int, direction: str) -> list[Row]:
        order = (by_size if direction == "absolute" else by_score)(method, draw)
        return _evaluate(cell, order[::-1] if direction == "reversed" else order, kept[1:-1])

    none, every = _ends(cell)
    each = len(none)  # rows of one number of heads: one, or one for each question
    prompts = prompts_hash(cell.asked, *cell.learned.values())
    for piece, (method, draw, direction) in _orders(cell.run):
        if cell.piece not in (None, piece):
            continue
        same = direction == "absolute" and by_size(method, draw) == by_score(method, draw)
        key = f"curve|{method}|{'forward' if same else direction}|{draw}"
        inner = cell.unit(key, partial(curve, method, draw, direction)) if kept[1:-1] else []
        about = {"method": method, "direction": direction, "draw": draw}
        if cell.run.settings.get("costs"):
            about |= cell.unit(f"costs|{method}|{draw}", partial(cell.costs, method, draw))
        points = [*none, *inner, *every]
        rows = [
            {**about, "share": shares[i // each], **point, "n_test": len(cell.asked)}
            for i, point in enumerate(points)
        ]
        yield cell.rows(rows, prompts_hash=prompts)


def _evaluate(cell: Cell, order: Sequence[tuple[int, int]], kept: Sequence[int]) -> list[Row]:
    """Ask all questions with the first `kept` heads of the order; a row or more for each number."""
    sites, n = cell.run.lens.sites, len(cell.asked)
    # Place of each head in the order, [layer, head]; any order does for none and all.
    place = torch.zeros(sites.shape, dtype=torch.long)
    for i, (layer, head) in enumerate(order):
        place[list(sites).index(layer), head] = i
    others = cell.run.settings.get("others", "zero")
    instead = None if others == "zero" else cell.kept("instead", partial(InsteadOfZero, cell))
    # One row per number of heads and question, so that a batch holds several numbers.
    heads = torch.tensor(kept).repeat_interleave(n)
    marks = cell.marked(
        cell.questions.repeated(len(kept)),
        lambda part: mask_hooks(
            sites,
            place < heads[part, None, None],
            instead=instead.of([i % n for i in part]) if instead is not None else None,
        ),
        # What heads give on twins is another at each question, so that no tokens are shared.
        variants=None if others == "resample" else heads.tolist(),
    )
    return [
        {"heads_kept": k, **row}
        for i, k in enumerate(kept)
        for row in cell.scored(marks.part(slice(i * n, (i + 1) * n)))
    ]


def _read_points(step: Real, heads_kept: Wholes | None, shares: Reals | None) -> dict[str, Any]:
    """Read at which numbers or shares of the heads a curve has a point; one of three says it."""
    if heads_kept is not None and shares is not None:
        raise BadInput("found heads_kept and shares; give one of them, or step.")
    if heads_kept is not None:
        counts = sorted({0, *wholes("heads_kept", heads_kept, least=0)})
        return {"heads_kept": counts}
    if shares is not None:
        given = sorted({0.0, *reals("shares", shares), 1.0})
        if given[0] < 0 or given[-1] > 1:
            raise BadInput(f"found shares={shares}; give shares of the heads, from 0 to 1.")
        return {"shares": given}
    return {"steps": _read_step(real("step", step))}


def _check_heads_kept(lens: Lens, settings: dict[str, Any]) -> None:
    n_heads, counts = sum(lens.sites.n_heads), settings.get("heads_kept", [0])
    if max(counts) > n_heads:
        raise BadInput(
            f"found heads_kept={counts}; {lens.name} has {n_heads} heads. Give that many at most."
        )


def _points(cell: Cell) -> tuple[list[int], list[float]]:
    """Give the numbers of heads unmasked, from none to all, and the shares that they are."""
    settings, n_heads = cell.run.settings, sum(cell.run.lens.sites.n_heads)
    if "heads_kept" in settings:
        counts = sorted({*settings["heads_kept"], n_heads})
        return counts, [count / n_heads for count in counts]
    if "shares" in settings:
        # Ten billionths more, since .29 · 100 is less than 29 in floating point.
        return [int(share * n_heads + 1e-8) for share in settings["shares"]], settings["shares"]
    steps = settings["steps"]
    return [i * n_heads // steps for i in range(steps + 1)], [i / steps for i in range(steps + 1)]


def _read_step(step: float) -> int:
    steps = round(1 / step) if step > 0 else 0
    if steps < 2 or abs(steps * step - 1) > 1e-9:
        raise BadInput(
            f"found step={step}; give a share of the heads that divides 1 into at least two parts, "
            "such as 0.1."
        )
    return steps


def _warn_if_folded(lens: Lens) -> None:
    if lens.value_biases_folded:
        warnings.warn(
            f"the value biases of {lens.name} are folded into its output biases, so a head whose "
            "z is zeroed still writes its value bias: the test is not the paper's (zeroed rows of "
            "W_O). Load the model with ra_lens.load_model, which does not fold. Recorded in the "
            "column value_biases_folded.",
            RALensWarning,
            stacklevel=3,
        )


def area_under_curve(
    frame: pd.DataFrame, *, metric: Metric = "top1", rule: Rule = "trapezoid"
) -> pd.DataFrame:
    """Take the area under each curve of a perturbation test.

    Args:
        frame: From `perturbation_test`; several may be concatenated.
        metric: Which column to integrate: accuracy `top1`, `top2`, `top3`, or `logit_diff`.
        rule: `"trapezoid"`, or the plain `"mean"` of the points.

    Returns:
        One row per model, task, number of shots, method and direction, with `auc` (the mean over
        draws for random orders), `auc_low` and `auc_high` (smallest and largest draw), `draws`.

    Raises:
        BadInput: not a frame of perturbation curves, an unknown rule, or a curve that does not
            reach from 0 to 1.
    """
    areas = areas_of_curves(mean_over_questions(frame), [*CURVE, "draw"], metric=metric, rule=rule)
    grouped = areas.groupby(CURVE, sort=False)
    return grouped.agg(
        auc=("auc", "mean"), auc_low=("auc", "min"), auc_high=("auc", "max"), draws=("auc", "size")
    ).reset_index()


def areas_of_curves(
    frame: pd.DataFrame, keys: list[str], *, metric: Metric, rule: Rule
) -> pd.DataFrame:
    """Take the area `auc` under each curve, which are told apart by the columns `keys`."""
    problem = problem_of(frame, [*keys, "share", metric])
    if problem is not None:
        raise BadInput(f"found a table {problem}; give the result of perturbation_test().")
    if rule not in ("trapezoid", "mean"):
        raise BadInput(f"found rule={rule!r}; give 'trapezoid' or 'mean'.")
    areas: list[dict[str, Any]] = []
    for key, curve in frame.groupby(keys, sort=False):
        names = curve.iloc[0][keys].to_dict()
        areas.append({**names, "auc": _area(curve, metric, rule, key)})
    return pd.DataFrame(areas, columns=[*keys, "auc"])


def _area(curve: pd.DataFrame, metric: str, rule: Rule, key: object) -> float:
    ordered = curve.sort_values("share")
    shares = ordered["share"].to_numpy(dtype=float)
    values = ordered[metric].to_numpy(dtype=float)
    if len(shares) < 2 or shares[0] != 0 or shares[-1] != 1 or bool((np.diff(shares) <= 0).any()):
        raise BadInput(
            f"the curve of {key} has shares {shares.tolist()}; each has to be there once, from 0 "
            "to 1. Give the results of one run; take the areas of several seeds one by one."
        )
    if rule == "mean":
        return float(values.mean())
    return float(((values[1:] + values[:-1]) / 2 * np.diff(shares)).sum())
